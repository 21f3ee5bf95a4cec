"""Attacks as JSON and back: every option is there, and what comes back is the same attack."""

import inspect
import json
from dataclasses import dataclass, fields
from functools import partial

import pytest
import torch
import torchattacks
from query_batches import bench_of, images_of, network

from pml_adversarial.attacks.ball import NORMS
from pml_adversarial.errors import InputError
from pml_adversarial.evaluation import GalleryAttack, QueryAttack, quick, standard
from pml_adversarial.evaluation.attacks.as_json import description, from_json, to_json
from pml_adversarial.evaluation.attacks.gradients import (
    classifier_attack,
    gradient_attack,
    margin_score,
    nearest_right,
    promotion,
    shift_score,
    targeted_score,
)

MINE = QueryAttack("mine", lambda batch, eps, restart: batch.images + eps)
SUITES = {"standard": standard(7, 2, 30, 3), "quick": quick(4, 2)}


@dataclass(frozen=True)
class Louder(QueryAttack):
    """A kind of attack of the user."""

    gain: float = 2.0


def through_json(attacks):
    return json.loads(json.dumps([to_json(attack) for attack in attacks], allow_nan=False))


class TestToJSON:
    def test_has_every_option(self):
        assert to_json(QueryAttack("m", gradient_attack(margin_score, 9), 3, only_robust=True)) == {
            "kind": "QueryAttack",
            "name": "m",
            "perturb": {"function": "raise_score", "options": {"score": {"function": "margin_score"}, "steps": 9}},
            "restarts": 3,
            "black_box": False,
            "only_robust": True,
            "num_classes": 2,
            "passes": None,
            "follows": False,
            "norms": list(NORMS),
            "needs_items": False,
        }
        assert to_json(GalleryAttack("p", nearest_right, promotion, 4)) == {
            "kind": "GalleryAttack",
            "name": "p",
            "choose": {"function": "nearest_right"},
            "score": {"function": "promotion"},
            "steps": 4,
            "restarts": 1,
            "norms": list(NORMS),
            "samples": None,
        }

    @pytest.mark.parametrize("kind", ["APGD", "APGDT", "FAB", "Square", "PGD", "PGDL2"])
    def test_of_a_class_of_torchattacks_the_defaults_too(self, kind):
        made = getattr(torchattacks, kind)
        parameters = inspect.signature(made).parameters
        own = [name for name in parameters if name not in ("model", "eps", "norm", "seed", "n_classes", "eot_iter")]
        found = to_json(QueryAttack("x", classifier_attack(partial(made, **{own[0]: 77}), 4)))["perturb"]
        make = found["options"].pop("make")
        assert found == {"function": "fool_classifier", "options": {"targets": 4}}
        assert make["function"] == f"torchattacks.{kind}"
        assert list(make["options"]) == own
        assert make["options"] == {name: parameters[name].default for name in own} | {own[0]: 77}

    @pytest.mark.parametrize("suite", SUITES.values(), ids=SUITES)
    def test_holds_all_attributes_of_the_suites(self, suite):
        for attack, found in zip(suite, through_json(suite), strict=True):
            assert set(found) == {"kind", *(field.name for field in fields(attack))}
            assert "own" not in json.dumps(found)

    @pytest.mark.parametrize(
        "value",
        [
            lambda batch: 0,
            partial(print, end=""),
            partial(gradient_attack, margin_score),
            torch.zeros(3),
            float("inf"),
            float("nan"),
            print,
            torch.nn.Linear,
            {"a": 1},
        ],
    )
    def test_anything_else_is_described(self, value):
        assert to_json(value) == {"own": description(value)}

    def test_a_class_of_the_user_is_described_with_its_name(self):
        found = to_json(Louder("loud", MINE.perturb, gain=3.0))
        assert found["name"] == "loud"
        assert "gain=3.0" in found["own"]


class TestFromJSON:
    @pytest.mark.parametrize("suite", SUITES.values(), ids=SUITES)
    def test_gives_the_same_attacks(self, suite):
        made = from_json(through_json(suite))
        assert through_json(made) == through_json(suite)
        task = bench_of(network(), images_of())
        batch = task.batch(torch.arange(6))
        for attack, again in zip(suite, made, strict=True):
            assert type(again) is type(attack)
            found = []
            for one in (attack, again):
                torch.manual_seed(3)
                found.append(one.run(batch, 0.05, 0, 4).images)
            assert torch.equal(*found)
            assert not torch.equal(found[0], batch.images if attack.target == "query" else 0 * found[0])

    @pytest.mark.parametrize("attack", [MINE, Louder("mine", MINE.perturb)])
    def test_own_code_is_asked_for_by_name(self, attack):
        specs = through_json([*quick(), attack])
        with pytest.raises(InputError, match=r"^mine \(.*lambda.*\) cannot be made from .*attacks=\[\.\.\.\]"):
            from_json(specs)
        made = from_json(specs, [attack])
        assert [one.name for one in made] == ["margin", "shift", "mine"]
        assert made[2] is attack

    def test_all_that_are_missing_are_named(self):
        other = QueryAttack("other", lambda batch, eps, restart: batch.images)
        with pytest.raises(InputError, match=r"^mine \(.*\), other \(.*\) cannot be made"):
            from_json(through_json([MINE, other]))

    def test_another_attack_of_that_name_is_refused(self):
        another = QueryAttack("mine", MINE.perturb, restarts=5)
        with pytest.raises(InputError, match=r"attack mine that was given is .*'restarts': 5.*; the report has .*: 1,"):
            from_json(through_json([MINE]), [another])

    def test_an_attack_that_the_report_does_not_have_is_refused(self):
        with pytest.raises(InputError, match=r"attacks holds mine; expected none but those of the report: margin, s"):
            from_json(through_json(quick()), [MINE])

    @pytest.mark.parametrize("name", ["no_such_score", "torchattacks.NoSuch", "torchattacks.attack", "torch", "Any"])
    def test_a_name_of_something_else_is_refused(self, name):
        spec = through_json(quick()[:1])
        spec[0]["perturb"]["options"]["score"]["function"] = name
        with pytest.raises(InputError, match=rf"The report names {name}, which the installed versions do not have"):
            from_json(spec)

    @pytest.mark.parametrize("change", [{"kind": "LaterAttack"}, {"an_option_of_a_later_version": 3}])
    def test_an_attack_of_another_version_is_refused(self, change):
        spec = {**through_json(quick())[0], **change}
        with pytest.raises(InputError, match=r"The attack margin cannot be made from .*Install the versions that"):
            from_json([spec])


class TestDescription:
    def test_tells_attacks_apart_by_all_that_is_bound(self):
        def closed(score, steps):
            return lambda batch, eps, restart: score(batch, steps)

        made = [
            QueryAttack("x", gradient_attack(shift_score, 3)),
            QueryAttack("x", gradient_attack(shift_score, 4)),
            QueryAttack("x", gradient_attack(targeted_score, 4)),
            QueryAttack("x", gradient_attack(shift_score, 4), 2),
            QueryAttack("x", partial(gradient_attack(shift_score, 4), restart=0)),
            QueryAttack("y", gradient_attack(shift_score, 4)),
            QueryAttack("x", gradient_attack(lambda batch, restart: None, 4)),
            QueryAttack("x", closed(shift_score, 3)),
            QueryAttack("x", closed(shift_score, 4)),
        ]
        for tell in (description, lambda attack: json.dumps(to_json(attack))):
            assert len({tell(attack) for attack in made}) == len(made)
            assert tell(made[0]) == tell(QueryAttack("x", gradient_attack(shift_score, 3)))
            assert tell(made[-1]) == tell(QueryAttack("x", closed(shift_score, 4)))

    def test_is_the_same_in_every_process(self):
        assert " at 0x" not in description(quick())
        assert " at 0x" not in description(QueryAttack("x", lambda batch, eps, restart: batch.images))

    def test_of_objects_and_classes(self):
        assert description([torch.nn.Linear, torch.zeros(3), None, 2.5]) == "(Linear, Tensor, None, 2.5)"
