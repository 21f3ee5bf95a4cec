"""Verification as a user calls it: all forms of models and pairs, and what is refused."""

import math

import numpy
import pytest
import torch
from pytorch_metric_learning import distances
from query_batches import Made, images_of, network
from some_pairs import LISTED, rates_by_loops, similarities_by_loops, verified
from torch import nn

from pml_adversarial.errors import InputError
from pml_adversarial.evaluation import PairAttack, VerificationReport, evaluate_verification
from pml_adversarial.evaluation.retrieval.distance import DISTANCES
from pml_adversarial.evaluation.verification.attacks import pair_attacks

IMAGES, LABELS = images_of()
NOISE = PairAttack("noise", lambda batch, eps, restart: batch.images + eps * torch.randn_like(batch.images).sign())


def without_times(report):
    found = report.to_dict()
    for attack in found["attacks"]:
        del attack["seconds"]
    found["provenance"] = {key: value for key, value in found["provenance"].items() if key != "time"}
    return found


def found_by(report):
    """What was found, without the settings."""
    return {key: value for key, value in without_times(report).items() if key in ("results", "attacks", "same")}


class TestClean:
    @pytest.mark.parametrize("distance", ["cosine", "euclidean", "inner_product"])
    def test_by_loops(self, distance):
        model = network()
        report = verified(model, distance=distance, far=(0.5, 0.3, 0.1))
        model.eval()
        with torch.no_grad():
            embeddings = model(IMAGES).double()
        similarities = similarities_by_loops(embeddings[LISTED[:, 0]], embeddings[LISTED[:, 1]], distance)
        same = [bool(LABELS[i] == LABELS[j]) for i, j in LISTED.tolist()]
        impostors = [s for s, genuine in zip(similarities, same, strict=True) if not genuine]
        for far in (0.5, 0.3, 0.1):
            at = report.at(far)
            higher = sorted(impostors, reverse=True)[round(far * 20)]  # the first that must not be accepted
            assert at.threshold == pytest.approx(higher, rel=1e-4, abs=1e-4)
            tar, accepted = rates_by_loops(report.result().similarities, same, at.threshold, report.tie)
            assert (at.tar.rate, at.far.rate) == pytest.approx((tar, accepted))
            assert at.far.rate == pytest.approx(far)
        assert report.result().similarities == pytest.approx(similarities, rel=1e-5, abs=1e-5)
        assert report.num_genuine == report.num_impostors == 20

    def test_clean_thresholds_hold_under_attack(self):
        report = verified()
        thresholds = [[at.threshold for at in result.thresholds] for result in report.results]
        assert thresholds[0] == thresholds[1] == thresholds[2]

    def test_a_collapsed_embedding_tells_nothing_apart(self):
        report = verified(Made(lambda x: torch.ones(len(x), 3) * (1 + 0 * x.flatten(1)[:, :1])))
        assert report.at(0.5).tar.rate == 0
        assert report.result().equal_error_rate.rate == 1
        assert report.result().auc == 0


class TestForms:
    @pytest.mark.parametrize(
        "pairs",
        [
            (IMAGES[LISTED[:, 0]], IMAGES[LISTED[:, 1]], LABELS[LISTED[:, 0]] == LABELS[LISTED[:, 1]]),
            (
                IMAGES[LISTED[:, 0]].numpy(),
                IMAGES[LISTED[:, 1]].numpy(),
                (LABELS[LISTED[:, 0]] == LABELS[LISTED[:, 1]]).numpy(),
            ),
            [(IMAGES[i], IMAGES[j], int(LABELS[i] == LABELS[j])) for i, j in LISTED.tolist()],
        ],
        ids=["tensors", "arrays", "items"],
    )
    def test_pairs(self, pairs):
        if isinstance(pairs, list):
            pairs = torch.utils.data.StackDataset(*map(list, zip(*pairs, strict=True)))
        report = verified(pairs=pairs, far=(0.5, 0.1, 0.001), batch_size=25)
        listed = verified()
        assert report.result().similarities == pytest.approx(listed.result().similarities, abs=1e-6)
        for eps in (0.02, 0.06):
            found, wanted = report.result(eps), listed.result(eps)
            assert found.similarities == pytest.approx(wanted.similarities, abs=1e-3)
        assert report.protocol == "given pairs"

    def test_drawn(self):
        report = verified(pairs=(IMAGES, LABELS), genuine=10, impostors=30, far=0.1)
        assert (report.num_genuine, report.num_impostors, report.protocol) == (10, 30, "drawn pairs")
        assert report.at(0.1).far.count == 3
        assert (report.settings["genuine"], report.settings["impostors"], report.settings["subset"]) == (10, 30, None)

    @pytest.mark.parametrize(("subset", "kept"), [(3, 3), ([39, 0, 5], [39, 0, 5]), (torch.tensor([1, 30]), [1, 30])])
    def test_some_are_attacked(self, subset, kept, tmp_path):
        report = verified(subset=subset)
        assert report.settings["subset"] == kept
        assert len(report.attacked_pairs) == (6 if kept == 3 else len(kept))
        assert len(report.result().similarities) == 40
        report.save_json(tmp_path / "report.json")

    def test_normalised_images_and_a_normalising_model(self):
        mean, std = [0.4], [0.3]
        plain, model = network(), network()
        normalising = Made(lambda x: model((x - 0.4) / 0.3))
        model.eval()
        given = (IMAGES - 0.4) / 0.3, LABELS
        options = {"indices": LISTED, "far": 0.5, "eps": 0.05}
        wanted = verified(normalising, (IMAGES, LABELS), **options)
        for images in ((IMAGES, LABELS), given):
            found = verified(plain, images, normalization=(mean, std), **options)
            assert found.result().similarities == pytest.approx(wanted.result().similarities, abs=1e-4)
            assert found.result(0.05).similarities == pytest.approx(wanted.result(0.05).similarities, abs=0.02)
        assert "the normalisation is undone" in found.notes[0]

    def test_features_with_bounds(self):
        features = torch.randn(24, 9, generator=torch.Generator().manual_seed(0)).clamp(-3, 3)
        report = verified(nn.Linear(9, 4), (features, LABELS), bounds=(-3, 3), indices=LISTED, far=0.5)
        assert report.result(0.06).auc < report.result().auc
        assert report.settings["bounds"] == [-3, 3]

    @pytest.mark.parametrize("norm", ["Linf", "L2"])
    def test_small_images(self, norm):
        report = verified(network(size=4), images_of(size=4), indices=LISTED, norm=norm, eps=0.05, far=0.5)
        assert report.attacks[3].attack == "square"
        assert report.attacks[3].forward_passes == 40 * 5

    @pytest.mark.parametrize("model", [network(), lambda x: x.flatten(1)[:, :7], [nn.Flatten(), nn.Linear(36, 4)]])
    def test_models(self, model):
        assert verified(model).result(0.06).auc < verified(model).result().auc

    def test_a_function_without_gradient(self):
        matrix = numpy.random.default_rng(0).normal(size=(36, 4)).astype("float32")
        report = verified(lambda x: x.flatten(1).numpy() @ matrix, checks=True)
        assert report.result(0.06).auc < report.result().auc  # by the black box
        assert {"gradients are there"} <= {check.name for check in report.flagged}

    def test_a_model_that_answers_at_random(self):
        model = network()
        options = {"attacks": [NOISE], "steps": 1, "restarts": 1, "square": 0}
        report = verified(lambda x: model(x + 0.1 * torch.randn_like(x)), **options)
        (note,) = (note for note in report.notes if "answers at random" in note)
        assert f"note: {note}" in str(report)
        assert note in report.to_dict()["notes"]
        assert not any("answers at random" in note for note in verified(model, **options).notes)

    @pytest.mark.parametrize("distance", [*DISTANCES, distances.LpDistance(p=1), distances.SNRDistance()])
    def test_distances(self, distance):
        report = verified(distance=distance)
        assert report.result(0.06).equal_error_rate.rate > report.result().equal_error_rate.rate
        clean, worst = (torch.tensor(report.result(eps).similarities) for eps in (0, 0.06))
        assert (torch.where(LABELS[LISTED[:, 0]] == LABELS[LISTED[:, 1]], clean - worst, worst - clean) >= 0).all()

    def test_half_precision(self):
        report = verified(network().bfloat16())
        assert report.settings["precision"].startswith("bfloat16 -> bfloat16")
        assert report.result(0.06).auc < report.result().auc

    def test_autocast(self):
        with torch.autocast("cpu", torch.bfloat16):
            report = verified()
        assert report.settings["precision"] == "float32 -> bfloat16, autocast cpu torch.bfloat16"
        assert report.result().similarities == pytest.approx(verified().result().similarities, abs=0.05)

    def test_inference_mode(self):
        model = network()
        wanted = verified(model)
        with torch.inference_mode():
            indices, images = LISTED + 0, IMAGES + 0
            found = verified(model, (images, LABELS + 0), indices=indices, far=(0.5, 0.1, 0.001), batch_size=25)
        assert found_by(found) == found_by(wanted)

    def test_double_precision(self):
        model = network().double()
        assert verified(model).result().similarities == pytest.approx(verified().result().similarities, abs=1e-6)


class TestProvenance:
    def test_tells_models_and_images_apart(self):
        found = [report.provenance for report in (verified(), verified(network(seed=1)), verified(seed=1))]
        assert found[0]["model"]["sha256"] == found[2]["model"]["sha256"] != found[1]["model"]["sha256"]
        assert found[0]["images"] == found[1]["images"] == found[2]["images"]
        assert found[0]["threads"] == torch.get_num_threads()

    def test_of_given_pairs(self):
        pairs = IMAGES, images_of(seed=1)[0], LABELS == 0
        found = verified(pairs=pairs).provenance
        assert found["first"]["sha256"] != found["second"]["sha256"]


class TestOptions:
    def test_the_suite_has_its_name_only_if_it_is_whole(self):
        options = {"eps": 0.05, "steps": 50, "restarts": 3, "square": 200, "subset": 1}
        assert verified(**options).suite == "pairs-v1"
        assert verified(**{**options, "steps": 2}).suite == "custom"
        assert verified(**options, attacks=(NOISE,)).suite == "custom"

    def test_further_attacks_run_beside_the_suite(self):
        report, plain = verified(attacks=(NOISE,)), verified()
        assert [a.attack for a in report.attacks[:5]] == ["momentum", "enrolled", "pgd", "square", "noise"]
        assert [a.thresholds for a in report.attacks[:4]] == [a.thresholds for a in plain.attacks[:4]]

    def test_the_seed_decides(self):
        assert without_times(verified()) == without_times(verified())
        assert found_by(verified(seed=1)) != found_by(verified())

    def test_one_eps_is_not_changed_by_another(self):
        assert found_by(verified(eps=0.02))["attacks"] == found_by(verified())["attacks"][:4]

    def test_far_may_be_one_number_or_none(self):
        assert verified(pairs=(IMAGES, LABELS), far=0.1).settings["far"] == [0.1]
        report = verified(pairs=(IMAGES, LABELS), far=())
        assert [at.at for at in report.result().thresholds] == ["EER"]

    def test_checks(self):
        assert verified().checks == ()
        assert [check.passed for check in verified(checks=True).checks].count(None) == 0

    def test_progress(self, capsys):
        verified(progress=True)
        shown = capsys.readouterr().err
        assert "22/22" in shown
        assert "16/16" in shown  # two batches, two radii, four runs

    def test_json(self, tmp_path):
        report = verified(distance=distances.LpDistance(p=1))
        report.save_json(tmp_path / "report.json")
        found = VerificationReport.load_json(tmp_path / "report.json")
        assert found.to_dict() == report.to_dict()
        assert found.settings["distance"].startswith("LpDistance(")


def trace(model):
    return {
        "modes": [module.training for module in model.modules()],
        "buffers": [(id(buffer), buffer.clone().tolist()) for buffer in model.buffers()],
        "parameters": [(id(p), p.requires_grad, id(p.grad), p.detach().clone().tolist()) for p in model.parameters()],
        "torch": torch.get_rng_state().tolist(),
        "numpy": [x.tolist() if hasattr(x, "tolist") else x for x in numpy.random.get_state()],  # noqa: NPY002
        "gradient": torch.is_grad_enabled(),
    }


class TestLeavesNoTrace:
    def prepared(self):
        model = network()
        model[1].eval()
        model[0].weight.requires_grad_(False)
        model[5].weight.grad = torch.ones_like(model[5].weight)
        return model

    def test_after_all_attacks_and_checks(self):
        model, images = self.prepared(), IMAGES.clone()
        before = trace(model)
        verified(model, checks=True, keep_attacked=True)
        assert trace(model) == before
        assert torch.equal(IMAGES, images)

    def test_after_an_exception(self):
        model = self.prepared()
        before = trace(model)

        def fails(batch, eps, restart):
            torch.rand(3)
            model(batch.images)
            raise RuntimeError("out of luck")

        with pytest.raises(RuntimeError, match="out of luck"):
            verified(model, attacks=(PairAttack("fails", fails),))
        assert trace(model) == before

    def test_without_gradient_outside(self):
        with torch.no_grad():
            found = verified()
            assert not torch.is_grad_enabled()
        assert without_times(found) == without_times(verified())


class TestRefusals:
    @pytest.mark.parametrize(
        ("option", "message"),
        [
            ({"eps": 8}, "eps=8 is wider than all pixels"),
            ({"norm": "L3"}, "norm='L3'; expected 'Linf', 'L2'"),
            ({"far": 1.5}, r"far=1\.5; expected a probability"),
            ({"far": (0.1, 0)}, r"far=0\.0; expected a probability"),
            ({"far": "low"}, "far='low'; expected one or more rates between 0 and 1"),
            ({"steps": 0}, "steps=0; expected a whole number from 1 on"),
            ({"restarts": 1.5}, r"restarts=1\.5; expected a whole number from 1 on"),
            ({"square": -1}, "square=-1; expected a whole number from 0 on"),
            ({"batch_size": 0}, "batch_size=0; expected a whole number"),
            ({"subset": 0}, "subset=0; expected whole numbers"),
            ({"distance": "l3"}, "distance='l3'; expected 'cosine'"),
            ({"attacks": (3,)}, "attacks holds 3; expected PairAttack objects"),
            ({"attacks": (NOISE, NOISE)}, "attacks holds 'noise'; expected PairAttack objects of different names"),
            (
                {"attacks": pair_attacks()[:1]},
                r"attacks holds 'momentum'; .* none of them enrolled, momentum",
            ),
            ({"normalization": (0.5, 0.5)}, "normalization="),
            ({"genuine": 3}, "genuine would change nothing"),
            ({"eps": 40, "norm": "L0"}, r"eps=40 in norm='L0' is wider than images of shape \(1, 6, 6\)"),
            ({"eps": 1.5, "norm": "patch"}, r"eps=1\.5; expected whole numbers"),
        ],
    )
    def test_options(self, option, message):
        with pytest.raises(InputError, match=message):
            verified(**option)

    @pytest.mark.parametrize(
        ("pairs", "message"),
        [
            ((IMAGES, torch.zeros(24).long()), "There are 276 genuine and 0 impostor pairs"),
            ((IMAGES, torch.arange(24)), "There are 0 genuine and 0 impostor pairs; expected one of each"),
            ((torch.randn(24, 1, 6, 6), LABELS), r"pairs, image .* pass normalization="),
            ((IMAGES, torch.randn(24, 1, 6, 6), LABELS == 0), "second images, image "),
            (IMAGES, "pairs is Tensor"),
        ],
    )
    def test_pairs(self, pairs, message):
        with pytest.raises(InputError, match=message):
            evaluate_verification(network(), pairs, eps=0.05, steps=2, square=0)

    @pytest.mark.parametrize(
        ("made", "message"),
        [
            (lambda x: x, r"The model returned \(1, 1, 6, 6\) for 1 images; expected embeddings"),
            (lambda x: x.flatten(1) * math.nan, "NaN or infinite embeddings for 40 of 40 images"),
            (lambda x: x.flatten(1)[:, :1] + 1, "The embeddings have one dimension"),
        ],
    )
    def test_models(self, made, message):
        with pytest.raises(InputError, match=message):
            verified(Made(made))
