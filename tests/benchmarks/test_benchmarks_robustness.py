import json
import logging
import sys
from importlib.util import find_spec
from pathlib import Path
from statistics import mean
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

sys.path.append(str(Path(__file__).parents[2]))  # the benchmarks are not installed

from benchmarks.robustness import __main__ as command
from benchmarks.robustness import collapse, miners, train
from benchmarks.robustness.backbones import WIDTH, build, check, start_as_thresholds
from benchmarks.robustness.batches import Batches
from benchmarks.robustness.data import InMemory, Rotated, hold_out, load
from benchmarks.robustness.methods import METHODS, Method, triplet
from benchmarks.robustness.protocol import Protocol, named
from benchmarks.robustness.table import table, worst_case
from benchmarks.robustness.train import Passed, Training, counted
from pml_adversarial import InputError

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "robustness" / "results"
PAGE = "".join((ROOT / "docs" / name).read_text(encoding="utf-8") for name in ("robustness.md", "experiments.md"))
PERFORMANCE = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
README = (ROOT / "README.md").read_text(encoding="utf-8")
CPU = torch.device("cpu")
TINY = {"data": "digits", "backbone": "mlp", "classes": 3, "per_class": 2, "attack_steps": 2}


@pytest.fixture
def part():
    """Four classes of three images."""
    return InMemory(torch.rand(12, 1, 6, 6), torch.tensor([5, 7, 8, 9]).repeat(3))


def trained(method, part, tmp_path, seed=0, **protocol):
    training = Training(METHODS[method], Protocol(**{**TINY, "steps": 3, **protocol}), part, seed, CPU)
    return training, training.run(tmp_path / "checkpoint.pt")


class TestProtocol:
    def test_the_peers_at_28x28(self):
        found = named("peers", "omniglot", {"steps": None})
        assert (found.backbone, found.steps, found.budget, found.batch) == ("c2f2", 300, 0, 112)
        assert (found.learning_rate, found.schedule, found.augment, found.rotations) == (1e-3, "constant", 0, False)
        options = found.pgd().keywords
        assert options == {"eps": 77 / 255, "alpha": 3 / 255, "steps": 32, "random_start": False}
        assert [METHODS[name].steps(found) for name in ("plain", "plain-softhard", "act")] == [600, 600, 300]
        assert METHODS["tride"].options(found)["attack"].keywords == {**options, "steps": 16}

    def test_help_is_augmentation_and_a_schedule(self):
        found = named("helped", "cub", {"budget": 7000})
        assert (found.steps, found.budget) == (0, 7000)
        assert (found.schedule, found.augment, found.rotations) == ("cosine", 1.0, False)
        assert (found.eps, found.alpha, found.learning_rate, found.backbone) == (8 / 255, 1 / 255, 1e-5, "resnet18")

    def test_help_differs_by_data(self):
        strokes, digits, peers = (
            named(name, data, {})
            for name, data in (("helped", "omniglot"), ("helped", "digits"), ("peers", "omniglot"))
        )
        assert (strokes.thresholds, strokes.learning_rate, strokes.preset_eps) == (True, 5e-4, 77 / 255)
        for other in (digits, peers):
            assert (other.thresholds, other.learning_rate, other.preset_eps) == (False, 1e-3, 40 / 255)

    def test_steps_take_the_place_of_a_budget(self):
        assert (named("helped", "digits", {"steps": 5}).steps, named("helped", "digits", {"steps": 5}).budget) == (5, 0)

    @pytest.mark.parametrize(
        ("wrong", "message"),
        [
            ({"steps": 0}, "steps=0, budget=0"),
            ({"budget": 9, "steps": 9}, "expected one of them"),
            ({"eps": -1.0}, r"eps=-1\.0; expected numbers above 0"),
            ({"per_class": 1}, "holds no triplets"),
            ({"precision": "float16"}, "expected one of"),
            ({"augment": -1.0}, r"augment=-1\.0; expected"),
        ],
    )
    def test_refuses(self, wrong, message):
        with pytest.raises(InputError, match=message):
            Protocol(**{**TINY, "steps": 3, **wrong})


class TestMiners:
    def test_pairs_of_neighbours(self):
        labels = torch.tensor([4, 4, 2, 2, 2, 9, 9, 9, 9])
        anchors, positives, negatives = miners.random_negatives(torch.rand(9, 3), labels)
        assert anchors.tolist() == [0, 2, 5, 7]
        assert positives.tolist() == [1, 3, 6, 8]
        assert (labels[negatives] != labels[anchors]).all()

    def test_every_image_of_another_class_may_be_the_negative(self):
        labels = torch.arange(3).repeat_interleave(2)
        drawn = {int(miners.random_negatives(torch.rand(6, 2), labels)[2][0]) for _ in range(100)}
        assert drawn == {2, 3, 4, 5}

    @pytest.mark.parametrize("itself", [False, True])
    def test_soft_hard_by_a_loop(self, itself):
        draw = miners.soft_hard_as_coded if itself else miners.soft_hard
        embeddings = torch.randn(12, 2)
        labels = torch.arange(4).repeat_interleave(3)
        unit = embeddings / embeddings.norm(dim=1, keepdim=True)
        seen = {0: set(), 3: set(), 6: set(), 9: set()}
        for _ in range(200):
            for a, p, n in zip(*(m.tolist() for m in draw(embeddings, labels)), strict=True):
                seen[a].add((p, n))
        for a in seen:
            away = (unit - unit[a]).norm(dim=1).tolist()
            same = [i for i in range(12) if labels[i] == labels[a] and i != a]
            others = [i for i in range(12) if labels[i] != labels[a]]
            hard = [i for i in same if away[i] > min(away[j] for j in others)] or same + [a] * itself
            near = [i for i in others if away[i] < max(away[j] for j in same)] or others
            assert {p for p, _ in seen[a]} == set(hard)
            assert {n for _, n in seen[a]} == set(near)

    def test_where_none_is_hard_any_is_drawn_but_the_anchor(self):
        apart = torch.eye(2).repeat_interleave(3, 0)
        for _ in range(20):
            anchors, positives, negatives = miners.soft_hard(apart, torch.tensor([0, 0, 0, 1, 1, 1]))
            assert anchors.tolist() == [0, 3]
            assert (positives != anchors).all()
            assert ((positives >= 3) == (anchors >= 3)).all()
            assert ((negatives >= 3) != (anchors >= 3)).all()

    def test_as_coded_an_anchor_may_be_its_own(self):
        apart, labels = torch.eye(2).repeat_interleave(2, 0), torch.tensor([0, 0, 1, 1])
        drawn = {int(miners.soft_hard_as_coded(apart, labels)[1][0]) for _ in range(50)}
        assert drawn == {0, 1}


class TestBatches:
    def test_classes_side_by_side_with_different_images(self, part):
        images, labels = Batches(part, Protocol(**TINY, steps=1), 0)[4]
        assert labels.tolist()[::2] == labels.tolist()[1::2]
        assert len(labels.unique()) == 3
        assert len(images.flatten(1).unique(dim=0)) == 6
        _, numbers = part.labels.unique(return_inverse=True)
        found = [int(numbers[(part.images == image).all((1, 2, 3))]) for image in images]
        assert found == labels.tolist()

    def test_a_function_of_seed_and_step(self, part):
        protocol = Protocol(**TINY, steps=1, augment=1.0)
        first = Batches(part, protocol, 0)
        torch.rand(5)
        again = [images for (images, _), _ in zip(Batches(part, protocol, 0).after(2), range(3), strict=False)]
        assert all(torch.equal(images, first[step][0]) for step, images in enumerate(again, start=2))
        assert not torch.equal(first[2][0], first[3][0])
        assert not torch.equal(first[2][0], Batches(part, protocol, 1)[2][0])

    def test_images_are_augmented_if_asked(self, part):
        plain, moved = (Batches(part, Protocol(**TINY, steps=1, augment=asked), 0)[0] for asked in (0.0, 0.5))
        assert torch.equal(plain[1], moved[1])
        assert not (plain[0] == moved[0]).all((1, 2, 3)).any()

    def test_images_are_mixed_if_asked(self, part):
        plain, mixed = (Batches(part, Protocol(**TINY, steps=1, mixed=asked), 0)[0] for asked in (False, True))
        assert torch.equal(plain[1], mixed[1])
        assert not torch.equal(plain[0], mixed[0])
        assert torch.equal(mixed[0], Batches(part, Protocol(**TINY, steps=1, mixed=True), 0)[0][0])

    def test_workers_read_the_same(self, part):
        batches = Batches(part, Protocol(**TINY, steps=1, augment=1.0), 0)
        ahead = batches.after(1, workers=2)
        assert all(torch.equal(next(ahead)[0], batches[step][0]) for step in (1, 2, 3))

    def test_turned_classes_are_further_classes(self, part):
        turned = Rotated(part)
        assert turned.labels.tolist() == [c + 4 * turn for turn in range(4) for c in [0, 1, 2, 3] * 3]
        image = turned.pixels(torch.tensor([2 * 12 + 5]))[0]
        torch.testing.assert_close(image, part.images[5].flip(1, 2), rtol=0, atol=0)
        batch = Batches(part, Protocol(**{**TINY, "classes": 16}, steps=1, rotations=True), 0)[0]
        assert sorted(batch[1].unique().tolist()) == list(range(16))

    def test_too_few_classes(self, part):
        with pytest.raises(InputError, match="A batch of 3 classes with 4 images each; found 0"):
            Batches(part, Protocol(**{**TINY, "per_class": 4}, steps=1), 0)

    def test_held_out_classes_are_the_last(self, part):
        rest, held = hold_out(part, 2)
        assert set(rest.labels.tolist()) == {5, 7}
        assert set(held.labels.tolist()) == {8, 9}
        assert torch.equal(held.images, part.images[part.labels >= 8])
        with pytest.raises(InputError, match="expected from 2 to 2"):
            hold_out(part, 3)


class TestTraining:
    @pytest.mark.parametrize(
        ("method", "passes"),
        [
            ("plain", 6 * 6),  # twice three steps of six images
            ("preset-ms", 6 + 2 * 6 * (1 + 3 + 1)),  # the first step of the warm-up has no attack
            ("noisy-step", 6 + 2 * 6 * (1 + 1 + 1)),
            ("hard-rows", 6 + 2 * (6 + 3 * (3 + 1))),
            ("reuse", 6 + 2 * 6 * (1 + 1 + 1)),
            ("replay", 6 + 2 * 6 * (1 + 1)),
        ],
    )
    def test_counts_passes(self, method, passes, part, tmp_path):
        training, _ = trained(method, part, tmp_path)
        assert training.passed.steps == (6 if method == "plain" else 3)
        assert training.passed.forward == passes
        assert training.passed.backward <= training.passed.forward

    def test_counts_what_gets_a_gradient(self):
        model, passed = nn.Linear(3, 2), Passed()
        with counted(model, passed):
            model(torch.rand(5, 3)).sum().backward()
            model(torch.rand(7, 3))
            with torch.no_grad():
                model(torch.rand(11, 3))
        model(torch.rand(13, 3)).sum().backward()
        assert (passed.forward, passed.backward) == (12, 5)

    def test_plain_is_what_a_plain_loop_makes_of_it(self, part, tmp_path):
        training, found = trained("plain-ms", part, tmp_path, schedule="cosine", weight_decay=0.1)
        torch.manual_seed(0)
        model = build("mlp", (1, 6, 6))
        optimizer = torch.optim.Adam(model.parameters(), 1e-3, weight_decay=0.1)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 6)
        for step in range(6):
            images, labels = training.batches[step]
            optimizer.zero_grad()
            METHODS["plain-ms"].loss()(model(images), labels).backward()
            optimizer.step()
            schedule.step()
        torch.testing.assert_close(found.state_dict(), model.state_dict())

    @pytest.mark.parametrize("method", ["plain-softhard", "seed-paper", "preset-ms", "reuse", "replay"])
    def test_goes_on_after_an_exception(self, method, part, tmp_path, monkeypatch):
        monkeypatch.setattr(train, "KEPT_EVERY", 2)
        (tmp_path / "whole").mkdir()
        protocol = {"steps": 5, "augment": 1.0, "schedule": "cosine"}
        whole, expected = trained(method, part, tmp_path / "whole", **protocol)
        step = Training._step

        def fails(self, *batch):
            if self.passed.steps == 3:
                raise RuntimeError("cut off")
            return step(self, *batch)

        monkeypatch.setattr(Training, "_step", fails)
        with pytest.raises(RuntimeError, match="cut off"):
            trained(method, part, tmp_path, **protocol)
        monkeypatch.setattr(Training, "_step", step)
        torch.rand(3)
        again, found = trained(method, part, tmp_path, **protocol)
        torch.testing.assert_close(found.state_dict(), expected.state_dict(), rtol=0, atol=0)
        assert (again.passed.forward, again.passed.losses) == (whole.passed.forward, whole.passed.losses)

    def test_replays_each_batch(self, part, tmp_path, monkeypatch):
        seen, step = [], Training._step
        monkeypatch.setattr(
            Training, "_step", lambda self, images, labels: seen.append(images) or step(self, images, labels)
        )
        trained("replay", part, tmp_path, steps=6, augment=1.0)
        assert all(torch.equal(seen[0], images) for images in seen[1:4])
        assert not torch.equal(seen[3], seen[4])
        assert torch.equal(seen[4], seen[5])

    def test_rows_are_those_of_the_batch(self, part):
        batches = Batches(part, Protocol(**TINY, steps=1), 0)
        for number in (0, 7):
            images, _ = batches[number]
            assert torch.equal(part.images[batches.rows(number)], images)

    def test_a_budget_ends_it(self, part, tmp_path):
        training, _ = trained("preset-ms", part, tmp_path, steps=0, budget=200)
        assert training.loss.adversary.schedule.warmup == 200 // 30 // 2
        assert 200 <= training.passed.forward < 200 + 30

    def test_methods_start_from_the_same_weights(self, part):
        protocol = Protocol(**TINY, steps=1)
        one, two, other = (
            Training(METHODS[name], protocol, part, seed, CPU).model.state_dict()
            for name, seed in (("plain", 0), ("preset-ms", 0), ("plain", 1))
        )
        torch.testing.assert_close(one, two, rtol=0, atol=0)
        assert not torch.equal(one["1.weight"], other["1.weight"])

    def test_half_precision_stays_near(self, part, tmp_path):
        (tmp_path / "half").mkdir()
        _, full = trained("preset-ms", part, tmp_path)
        training, half = trained("preset-ms", part, tmp_path / "half", precision="bfloat16")
        assert all(weight.dtype == torch.float32 for weight in half.parameters())
        assert not torch.equal(full[1].weight, half[1].weight)
        torch.testing.assert_close(full[1].weight, half[1].weight, rtol=0, atol=2 * 3 * 1e-3)  # Adam's reach
        assert np.isfinite(training.passed.losses).all()

    def test_frozen_batchnorm_keeps_its_statistics(self, tmp_path):
        part = InMemory(torch.rand(8, 1, 28, 28), torch.arange(4).repeat(2))
        for frozen in (True, False):
            options = {"backbone": "c2f2-batchnorm", "steps": 1, "frozen_batchnorm": frozen}
            (tmp_path / str(frozen)).mkdir()
            _, model = trained("plain", part, tmp_path / str(frozen), **options)
            assert (model[1].running_mean == 0).all() == frozen

    def test_a_loss_that_is_lost_is_an_error(self, part, tmp_path):
        lost = InMemory(part.images * torch.nan, part.labels)
        with pytest.raises(ArithmeticError, match="The loss is nan after 6 steps"):
            Training(METHODS["plain"], Protocol(**TINY, steps=3), lost, 0, CPU).run(tmp_path / "checkpoint.pt")


class TestMethods:
    def test_the_recipe_tells_options(self):
        protocol = Protocol(**TINY, steps=3)
        recipe = METHODS["preset-ms"].recipe(protocol)
        assert recipe != METHODS["preset-ms"].recipe(Protocol(**TINY, steps=3, preset_eps=0.1))
        assert recipe["loss"].startswith("MultiSimilarityLoss(alpha=2, base=0.5, beta=40")
        assert json.loads(json.dumps(recipe)) == recipe

    def test_the_recipe_tells_what_a_loss_is_made_of(self):
        loss = METHODS["plain-both"].recipe(Protocol(**TINY, steps=3))["loss"]
        for part in ("losses=[SupConLoss(", "temperature=0.1", "MultiSimilarityLoss(alpha=2"):
            assert part in loss
        assert loss.endswith("weights=[0.5, 0.5])")

    def test_a_plugin_is_made_for_each_loss(self, model):
        method = Method("", triplet, plugins=lambda protocol: [SimpleNamespace()], options=lambda protocol: {})
        with pytest.raises(Exception, match="answers no hook"):
            method.wrapped(Protocol(**TINY, steps=3), model, 0, 0)

    def test_the_published_triplet_loss_counts_satisfied_triplets(self):
        embeddings = torch.tensor([[1.0, 0], [1, 0], [0, 1], [1, 0]])
        triplets = torch.tensor([0, 0]), torch.tensor([1, 1]), torch.tensor([2, 3])
        loss = triplet()(embeddings, torch.tensor([0, 0, 1, 2]), triplets)
        torch.testing.assert_close(loss, torch.tensor(0.2 / 2))


def photograph(path, shade):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB" if shade else "L", (30, 20), (shade, 0, 0) if shade else 0).save(path)


def fake(name, root):
    """Two training and two test classes of two images, in the layout that PML's class reads."""
    if name == "cub":
        base, rows = root / "CUB_200_2011", [(c, f"{c:03}.bird/{i}.jpg") for c in (1, 2, 101, 102) for i in (0, 1)]
        for shade, (_, file) in enumerate(rows):
            photograph(base / "images" / file, 10 * shade)
        (base / "images.txt").write_text("".join(f"{i} {file}\n" for i, (_, file) in enumerate(rows, 1)))
        (base / "image_class_labels.txt").write_text("".join(f"{i} {c}\n" for i, (c, _) in enumerate(rows, 1)))
    elif name == "cars":
        (root / "names.csv").write_text("".join(f"Car {c}\n" for c in range(1, 197)))
        for split in ("train", "test"):
            rows = [(c, f"{c}.jpg") for c in (1, 2, 150, 160)]
            for c, file in rows:
                photograph(root / "car_data" / "car_data" / split / f"Car {c}" / file, c)
            (root / f"anno_{split}.csv").write_text("".join(f"{file},0,0,9,9,{c}\n" for c, file in rows))
    else:
        base = root / "Stanford_Online_Products"
        for split, classes in (("train", (1, 2)), ("test", (3, 4))):
            rows = [(c, f"chair_final/{c}_{i}.JPG") for c in classes for i in (0, 1)]
            for c, file in rows:
                photograph(base / file, c)
            lines = "".join(f"{i} {c} 1 {file}\n" for i, (c, file) in enumerate(rows))
            (base / f"Ebay_{split}.txt").write_text("image_id class_id super_class_id path\n" + lines)


@pytest.mark.skipif(not find_spec("pytorch_metric_learning.datasets"), reason="PML reads them from 2.9 on")
@pytest.mark.parametrize("name", ["cub", "cars", "sop"])
class TestPhotographs:
    def test_are_read_and_trained_on(self, name, tmp_path):
        (tmp_path / name).mkdir()
        fake(name, tmp_path / name)
        data, searched = load(name, tmp_path, size=14)
        assert len(data.labels) == len(searched.labels) == 4
        assert not set(data.labels.tolist()) & set(searched.labels.tolist())
        assert data.pixels(torch.tensor([0, 3])).shape == (2, 3, 14, 14)
        image, label = searched.to_evaluate()[1]
        assert image.shape == (3, 14, 14)
        assert label == searched.labels[1]
        kept = data.keep(torch.tensor([3, 1]))
        assert kept.labels.tolist() == data.labels[[3, 1]].tolist()
        assert torch.equal(kept.pixels(torch.tensor([0])), data.pixels(torch.tensor([3])))
        assert not torch.equal(kept.pixels(torch.tensor([0])), data.pixels(torch.tensor([0])))
        protocol = Protocol(name, "mlp", steps=1, classes=2, augment=1.0, attack_steps=1)
        Training(METHODS["preset-ms"], protocol, data, 0, CPU).run(tmp_path / "checkpoint.pt")

    def test_that_are_not_there(self, name, tmp_path):
        with pytest.raises(InputError, match=f"{name} cannot be read from .*--download"):
            load(name, tmp_path)


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_resnets_take_as_many_channels_as_there_are(name):
    model = build(name, (1, 32, 32)).eval()
    assert model(torch.rand(2, 1, 32, 32)).shape == (2, 512)


@pytest.mark.parametrize("name", ["cnn", "c2f2", "c2f2-batchnorm", "resnet18"])
def test_thresholds_are_ramps_of_single_pixels(name):
    side = 8 if name == "cnn" else 28
    images = torch.rand(64, 1, side, side)
    model = build(name, (1, side, side))
    start_as_thresholds(model, images)
    first, second, *_ = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)][:1]
    seen = nn.Sequential(first, *norms, nn.ReLU())(images)
    wide, step = torch.nn.functional.pad(images, (0, 1, 0, 1)), first.stride[0]
    torch.testing.assert_close(second.weight[:, 0::2], -second.weight[:, 1::2], rtol=0, atol=0)
    count = first.out_channels // 16
    for pair in range(first.out_channels // 2):
        middle = 0.3 + 0.4 * (pair // 8 + 0.5) / count
        down, right, falls = pair % 8 // 4, pair % 4 // 2, pair % 2
        pixel = wide[:, 0, down : side + down : step, right : side + right : step]
        ramp = ((pixel - middle) / WIDTH + 0.5).clamp(0, 1)
        found = seen[:, 2 * pair] - seen[:, 2 * pair + 1]
        torch.testing.assert_close(found, 1 - ramp if falls else ramp, rtol=0, atol=1e-3)  # BatchNorm adds 1e-5


@pytest.mark.parametrize("name", ["c2f2", "c2f2-batchnorm"])
def test_what_moves_no_pixel_into_a_ramp_moves_no_embedding(name):
    strokes = torch.rand(64, 1, 28, 28).round()
    noisy = (strokes + 0.24 * (2 * torch.rand(strokes.shape) - 1)).clamp(0, 1)
    model = build(name, (1, 28, 28))
    for start, moves in ((lambda: None, True), (lambda: start_as_thresholds(model, strokes), False)):
        start()
        for module in model.modules():
            module.momentum = None  # the statistics of all that passes from here on
            isinstance(module, nn.BatchNorm2d) and module.reset_running_stats()
        model.train()(strokes)
        found, expected = (model.eval()(images).detach() for images in (noisy, strokes))
        assert ((found - expected).norm() > 0.01 * expected.norm()) == moves


@pytest.mark.parametrize(("name", "shape"), [("mlp", (1, 8, 8)), ("resnet18", (3, 8, 8))])
def test_thresholds_need_a_convolution_over_one_channel(name, shape):
    with pytest.raises(InputError, match=rf"first weights of a convolution.*found {name}, {shape[0]} channels"):
        check(name, shape, thresholds=True)


@pytest.mark.parametrize(
    ("name", "shape", "pretrained", "message"),
    [
        ("c2f2", (3, 28, 28), False, "is for images"),
        ("mlp", (1, 8, 8), "imagenet", "no ImageNet weights"),
        ("resnet18", (1, 8, 8), "imagenet", "expect 3 channels"),
        ("vit", (3, 8, 8), "", "expected one of mlp"),
    ],
)
def test_networks_that_cannot_be(name, shape, pretrained, message):
    with pytest.raises(InputError, match=message):
        build(name, shape, pretrained)


def run_of(method, clean, worst):
    report = {
        "clean": {"recall_at_1": clean, "map_at_r": clean / 2},
        "worst": [
            {"eps": 13 / 255, "target": target, "measures": {"recall_at_1": value}}
            for target, value in (("gallery", 0.99), ("query", worst))
        ],
    }
    return {"method": method, "report": report, "training": {"steps": 3, "forward": 1200}}


def test_the_table_has_mean_and_deviation_over_seeds():
    runs = [run_of("b", 0.5, 0.1), run_of("a", 0.25, 0.0), run_of("b", 0.7, 0.4)]
    lines = table(runs, ["a", "b", "c"]).splitlines()
    assert lines[0] == "| method | R@1 | mAP@R | R@1 at 13/255 | steps | image passes | seeds |"
    assert lines[2:] == [
        "| a | 25.0 | 12.5 | 0.0 | 3 | 1,200 | 1 |",
        "| b | 60.0 ± 14.1 | 30.0 ± 7.1 | 25.0 ± 21.2 | 3 | 1,200 | 2 |",
    ]


@pytest.mark.parametrize("experiment", sorted(path.name for path in RESULTS.iterdir() if path.is_dir()))
def test_the_tables_of_the_page_are_those_of_the_committed_runs(experiment):
    runs = [
        json.loads(path.read_text(encoding="utf-8")) for path in sorted((RESULTS / experiment).glob("*/*/run.json"))
    ]
    settings = [{name: run[name] for name in ("protocol", "images", "evaluation")} for run in runs]
    assert all(found == settings[0] for found in settings)
    assert table(runs, METHODS) in PAGE


IN_README = {  # method of the table of strokes, and of that of photographs
    "plain training": ("plain-supcon", "plain-supcon"),
    "HM & ICS (CVPR 2022), authors' version": ("hm-lga-ics-as-coded", "hm-lga-ics-as-coded"),
    "`AdversarialLoss`": ("preset-ms", "preset-ms-two-steps"),
}


def rows_of_page(experiment):
    """Method -> R@1 without attack and at the two smaller radii, as the page shows them, and the number of seeds."""
    found = {}
    for line in PAGE.split(f"({experiment}) -->")[1].split("\n\n")[0].splitlines():
        if cells := [cell.strip() for cell in line.split("|")][1:-1]:
            method, recall, _, first, second, *_, seeds = cells
            found[method] = f"{recall}|{first}|{second}", seeds
    return found


def test_the_table_of_the_readme_is_of_the_page():
    experiments = rows_of_page("omniglot-1700k"), rows_of_page("tiny-imagenet-1700k")
    assert "one seed, with ± three" in README
    for name, methods in IN_README.items():
        rows = [rows[method] for rows, method in zip(experiments, methods, strict=True)]
        assert "|".join(["", name, *(cells for cells, _ in rows), ""]) in README
        for cells, seeds in rows:
            assert seeds == ("3" if "±" in cells else "1")


NOT_TRAINED = {"collapse-omniglot.jsonl": {"InstanceLoss", "SoftTripleLoss"}}
"""Losses with which plain training leaves less than an untrained network finds, as the page says."""


@pytest.mark.parametrize("file", sorted(path.name for path in RESULTS.glob("collapse-*.jsonl")))
def test_no_committed_run_of_the_preset_collapsed_and_the_page_has_their_table(file):
    runs = [json.loads(line) for line in (RESULTS / file).read_text(encoding="utf-8").splitlines()]
    collapsed = {run["loss"] for run in collapse.collapsed(runs) if not run["bare"]}
    assert collapsed <= NOT_TRAINED.get(file, set())
    assert {0, 77} <= {run["eps"] for run in runs}
    assert {run["loss"] for run in runs} >= set(collapse.all_losses(classes=3, dimensions=4))
    assert {run["loss"] for run in runs if "error" in run} <= {"DynamicSoftMarginLoss"}  # PML's own failure
    assert collapse.table(runs) in PAGE


class TestCommand:
    @pytest.fixture
    def asked(self, tmp_path):
        short = (
            "--data digits --backbone mlp --steps 2 --batch 5 2 --attack-steps 2 --suite margin --queries 6 --eps 13"
        )
        return [*short.split(), "--quiet", "--device", "cpu", "--out", str(tmp_path / "out")]

    def test_trains_attacks_and_puts_it_into_a_table(self, asked, tmp_path):
        assert command.main([*asked, "--methods", "plain", "preset-ms", "--seeds", "3"]) == 0
        results = json.loads((tmp_path / "out" / "results.json").read_text())
        assert [(run["method"], run["seed"]) for run in results["runs"]] == [("plain", 3), ("preset-ms", 3)]
        assert results["runs"][0]["training"]["steps"] == 4
        assert results["runs"][0]["report"]["num_queries"] == 6
        assert {"torch", "pml-adversarial"} <= set(results["runs"][0]["report"]["versions"])
        assert "| plain | " in (tmp_path / "out" / "table.md").read_text()

    def test_what_is_there_is_not_made_again(self, asked, tmp_path, monkeypatch):
        assert command.main([*asked, "--methods", "plain"]) == 0
        run = tmp_path / "out" / "plain" / "seed_0" / "run.json"
        before = run.stat().st_mtime_ns
        monkeypatch.setattr(Training, "run", None)
        assert command.main([*asked, "--methods", "plain"]) == 0
        assert run.stat().st_mtime_ns == before
        assert command.main([*asked, "--methods", "plain", "--eps", "26"]) == 0  # measured anew, of the same model
        assert "26/255" in (tmp_path / "out" / "table.md").read_text()

    def test_another_training_in_the_folder_is_refused(self, asked, caplog):
        assert command.main([*asked, "--methods", "plain"]) == 0
        assert command.main([*asked, "--methods", "plain", "--learning-rate", "0.5"]) == 1
        assert "holds another training, by learning_rate (0.001, asked: 0.5)" in caplog.text

    def test_another_recipe_of_the_method_is_refused(self, asked, caplog, monkeypatch):
        assert command.main([*asked, "--methods", "plain"]) == 0
        monkeypatch.setitem(METHODS, "plain", METHODS["plain-softhard"])
        assert command.main([*asked, "--methods", "plain"]) == 1
        assert "holds another training, by recipe" in caplog.text

    def test_a_failure_does_not_lose_the_others(self, asked, tmp_path, monkeypatch, caplog):
        def broken(*_):
            raise RuntimeError("out of paper")

        monkeypatch.setitem(METHODS, "act", Method("", triplet, options=broken))
        assert command.main([*asked, "--methods", "act", "plain"]) == 1
        assert caplog.messages[-1] == "failed: act, seed 0: RuntimeError: out of paper"
        assert (tmp_path / "out" / "plain" / "seed_0" / "run.json").exists()

    def test_held_out_training_classes_are_searched(self, asked, tmp_path):
        options = ["--validation-classes", "2", "--batch", "3", "2", "--methods", "plain"]
        assert command.main([*asked, *options]) == 0
        run = json.loads((tmp_path / "out" / "plain" / "seed_0" / "run.json").read_text())
        assert run["report"]["num_classes"] == 2
        assert run["images"]["searched"] + run["images"]["trained_on"] == 901

    @pytest.mark.parametrize(
        ("wrong", "message"),
        [
            ("--batch 6 2", "A batch of 6 classes"),
            ("--backbone c2f2", "c2f2 is for images (1, 28, 28); found (1, 8, 8)"),
            ("--eps 0", "expected radii above 0"),
            ("--suite tickle", "attacks holds 'tickle'"),
            ("--validation-classes 4", "expected from 2 to 3"),
            ("--file x.npz", "is for omniglot"),
            ("--size 64", "is for photographs"),
            ("--methods start", "give its weights with --pretrained FILE"),
            ("--pretrained none.pt", "--pretrained none.pt is for slim-resnet, lite0, mobilenetv2; found mlp"),
            ("--data tiny-imagenet", "is read from --file"),
            ("--data tiny-imagenet --file none.zip", "--file none.zip cannot be read"),
            ("--average mean", "invalid choice: 'mean'"),
            ("--methods magic", "invalid choice: 'magic'"),
            ("--steps 2 --budget 5", "expected one of them"),
            ("--pretrained", "There are no ImageNet weights of mlp"),
            ("--seeds 1 1", "expected different whole numbers"),
            ("--device warp", "--device warp"),
            ("--threads 0", "--threads from 1 on"),
            ("--data omniglot --file missing.npz", "Omniglot cannot be read from missing.npz"),
        ],
    )
    def test_says_in_one_line_what_cannot_be(self, wrong, message, asked, capsys):
        with pytest.raises(SystemExit) as stopped:
            command.main([*asked, *wrong.split()])
        assert stopped.value.code == 2
        assert message in capsys.readouterr().err.splitlines()[-1]


class TestCollapse:
    @pytest.mark.filterwarnings("ignore")  # of PML, in constructors
    def test_all_losses_that_take_labels(self):
        found = collapse.all_losses(classes=3, dimensions=4)
        assert {"TripletMarginLoss", "CosFaceLoss", "P2SGradLoss", "RankedListLoss", "SupConLoss"} <= set(found)
        assert {"VICRegLoss", "ManifoldLoss", "SelfSupervisedLoss", "CrossBatchMemory"}.isdisjoint(found)
        for make in found.values():
            assert isinstance(make(), nn.Module)
        assert found["TripletMarginLoss"]().margin == 0.05  # its own default

    def test_less_than_half_of_plain_training_is_collapse(self):
        found = [
            (0, 0, False, 0.8, {}),
            (0, 26, False, 0.41, {"out_of_reach": False}),
            (0, 77, False, 0.39, {"out_of_reach": True}),
            (1, 0, False, 0.4, {}),
            (1, 26, False, 0.3, {"out_of_reach": False}),
            (1, 77, False, 0.1, {"out_of_reach": True}),
            (1, 77, True, 0.12, {"out_of_reach": True}),
        ]
        runs = [
            {
                "loss": "A",
                "seed": seed,
                "eps": eps,
                "bare": bare,
                "recall_at_1": recall,
                "attacked": recall / 2,
                **said,
            }
            for seed, eps, bare, recall, said in found
        ]
        assert [(run["seed"], run["eps"], run["bare"]) for run in collapse.collapsed(runs)] == [
            (0, 77, False),
            (1, 77, False),
            (1, 77, True),
        ]
        failed = {"loss": "B", "seed": 0, "eps": 77, "bare": False, "error": "ArithmeticError: nan"}
        lines = collapse.table([*runs, failed]).splitlines()
        assert lines[0] == (
            "| loss | plain | 26/255 | 77/255 | 77/255, bare | collapsed | out of reach, and said so | failed | runs |"
        )
        ours = "60.0 (40.0) | 35.5 (30.0) / 17.8 | 24.5 (10.0) / 12.2"
        assert lines[2] == f"| A | {ours} | 12.0 (12.0) / 6.0 | 2 | 2 | 0 | 6 |"
        assert lines[3] == "| B | - | - | - | - | 0 | 0 | 1 | 1 |"

    @pytest.mark.slow
    def test_runs_that_are_there_are_not_made_again(self, tmp_path, monkeypatch):
        asked = ["--losses", "SupConLoss", "DynamicSoftMarginLoss", "--seeds", "0", "--eps", "77", "--steps", "4"]
        asked += ["--bare", "26"]
        out = tmp_path / "runs.jsonl"
        collapse.main([*asked, "--out", str(out)])
        runs = [json.loads(line) for line in out.read_text().splitlines()]
        assert [(run["loss"], run["eps"], run["bare"]) for run in runs] == [
            (loss, *way) for loss in asked[1:3] for way in ((0, False), (77, False), (26, True))
        ]
        assert 0 < runs[1]["recall_at_1"] <= 1
        assert runs[1]["batch_recall"] >= 0
        assert runs[1]["out_of_reach"] is False  # four steps do not tell
        assert "error" in runs[3]  # PML keeps a graph there
        assert logging.getLogger("pml_adversarial").level == logging.NOTSET  # quiet while it trains only
        monkeypatch.setattr(collapse, "measure", None)
        collapse.main([*asked, "--out", str(out)])
        assert len(out.read_text().splitlines()) == 6


SAVINGS = {
    "fewer, larger steps": "two-steps",
    "one noisy step": "noisy-step",
    "rows stop when broken": "early-stop",
    "hard rows": "hard-rows",
    "perturbations of the last epoch": "reuse",
    "free adversarial training": "replay",
    "lower precision": "bfloat16-attack",
}
"""In the words of the page on performance, and in those of the tables."""


def means_of(experiment):
    """Method -> mean R@1 in percent under the worst attacks of 13/255 and of 26/255."""
    runs = [json.loads(path.read_text(encoding="utf-8")) for path in (RESULTS / experiment).glob("*/*/run.json")]
    return {
        method: [mean(worst_case(run, k / 255) for run in runs if run["method"] == method) for k in (13, 26)]
        for method in {run["method"] for run in runs}
    }


@pytest.mark.parametrize("saving", SAVINGS)
def test_the_price_of_a_saving_is_that_of_the_committed_runs(saving):
    (line,) = [line for line in PERFORMANCE.splitlines() if line.startswith(f"| {saving} | `")]
    cells = []
    for experiment in ("omniglot-85k", "digits-100k"):
        found = means_of(experiment)
        prices = (
            left - of_preset for left, of_preset in zip(found[SAVINGS[saving]], found["preset-both"], strict=True)
        )
        cells.append(", ".join(f"{price:+.1f}" for price in prices))
    assert f" | {' | '.join(cells)} | " in line
