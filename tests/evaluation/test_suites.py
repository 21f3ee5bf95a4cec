"""Suites and attacks by their names, and classes of torchattacks as attacks."""

from functools import partial

import pytest
import torchattacks
from query_batches import RADIUS, both_norms, images_of, length, network

from pml_adversarial import evaluate_robustness
from pml_adversarial.errors import InputError
from pml_adversarial.evaluation.attacks.as_json import description
from pml_adversarial.evaluation.evaluator import most_passes
from pml_adversarial.evaluation.suites import SUITES, attacks_by_name, find_suite, quick


class TestSuites:
    def test_names_are_different_and_versions_are_named(self):
        for name, (title, make) in SUITES.items():
            names = [attack.name for attack in make()]
            assert len(set(names)) == len(names)
            assert title.startswith(name + "-v")

    def test_standard_holds_all_kinds(self):
        members = SUITES["standard"][1]()
        assert {attack.target for attack in members} == {"query", "gallery"}
        assert any(attack.black_box for attack in members)


class TestClassesOfTorchattacks:
    """Attacks on classifiers, as torchattacks makes them: they get those options that they take, and are held to "
    "eps."""

    @pytest.mark.parametrize(
        "make",
        [
            torchattacks.PGD,
            torchattacks.CW,
            torchattacks.DeepFool,
            torchattacks.Jitter,
            pytest.param(torchattacks.AutoAttack, marks=pytest.mark.slow),
            torchattacks.FGSM,
            torchattacks.PGDL2,
            partial(torchattacks.APGD, steps=3, norm="Linf"),
            partial(torchattacks.FAB, steps=3),
        ],
    )
    @both_norms
    def test_run_as_they_are(self, make, norm):
        kind = make.func if isinstance(make, partial) else make
        images, eps = images_of(12), RADIUS[norm]
        name, (attack,) = find_suite([make])
        assert (name, attack.name) == ("custom", kind.__name__)
        report = evaluate_robustness(
            network(), images, eps=eps, norm=norm, attacks=[make], checks=False, keep_attacked=True
        )
        assert (length(report.attacked[eps] - images[0], norm) <= eps * (1 + 1e-4)).all()
        assert report.attacks[0].attack == kind.__name__

    def test_what_is_bound_stays(self):
        seen = []

        class Watched(torchattacks.FGSM):
            def __init__(self, model, eps=8 / 255):
                seen.append(eps)
                super().__init__(model, eps)

        options = {"eps": 0.05, "checks": False}
        evaluate_robustness(network(), images_of(12), attacks=[Watched], **options)
        evaluate_robustness(network(), images_of(12), attacks=[partial(Watched, eps=0.01)], **options)
        assert set(seen) == {0.05, 0.01}

    def test_fast_costs_a_ninth_at_most(self):
        most = {name: most_passes(make(), 1, 1) for name, (_, make) in SUITES.items()}
        assert 9 * most["fast"] < most["standard"]
        assert [attack.name for attack in SUITES["fast"][1]() if attack.follows] == ["targeted"]

    def test_of_two_attacks_with_one_name_that_of_standard_is_meant(self):
        wanted = {attack.name: description(attack) for attack in SUITES["standard"][1]()}
        found = attacks_by_name()
        assert {name: description(found[name]) for name in wanted} == wanted


class TestNames:
    @pytest.mark.parametrize("name", SUITES)
    def test_with_and_without_the_version(self, name):
        version, make = SUITES[name]
        for text in (name, version):
            found, attacks = find_suite(text)
            assert (found, [attack.name for attack in attacks]) == (version, [attack.name for attack in make()])

    @pytest.mark.parametrize(
        ("attacks", "message"),
        [
            ("best", r"attacks='best'; expected one of standard, fast, quick, or a list of attacks\."),
            ("margin", r"attacks='margin'; expected \['margin'\]\."),
            (
                quick,
                r"attacks is <function quick .*>, which was not called; expected a list of attacks, such as quick\(\)",
            ),
            ([*quick(), *quick(3)], r"different names.* More than one is named margin, shift: give them names, name="),
            ([3], r"attacks holds 3; expected QueryAttack and GalleryAttack objects"),
            ([], r"attacks holds none"),
        ],
    )
    def test_what_names_none(self, attacks, message):
        with pytest.raises(InputError, match=message):
            find_suite(attacks)
