"""The benchmark on photographs: how they are read, first weights, heads, averaged weights, and a deployed network."""

import copy
import json
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torchvision.transforms.v2 import functional

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT))  # the benchmarks are not installed

from benchmarks.robustness import __main__ as command  # noqa: E402
from benchmarks.robustness import lora, train  # noqa: E402
from benchmarks.robustness.backbones import build, load_weights, slim_resnet, smooth  # noqa: E402
from benchmarks.robustness.data import (  # noqa: E402
    SmallPhotographs,
    coloured,
    load,
    mirrored,
    mixed,
    read_classes,
    shifted,
)
from benchmarks.robustness.methods import METHODS  # noqa: E402
from benchmarks.robustness.protocol import Protocol, named  # noqa: E402
from benchmarks.robustness.train import Training, build_for  # noqa: E402
from pml_adversarial import InputError  # noqa: E402

CPU = torch.device("cpu")
SLIM = {"data": "tiny-imagenet", "backbone": "slim-resnet", "classes": 3, "per_class": 2, "attack_steps": 1, "steps": 3}


@pytest.fixture
def part():
    """Four classes of three photographs."""
    return SmallPhotographs(torch.randint(0, 256, (12, 3, 16, 16), dtype=torch.uint8), torch.arange(4).repeat(3))


def trained(method, part, tmp_path, **protocol):
    training = Training(METHODS[method], Protocol(**{**SLIM, **protocol}), part, 0, CPU)
    return training, training.run(tmp_path / "checkpoint.pt")


def photographs(root, folders, count=3, size=(40, 30)):
    """Photographs of one shade, which tells folder and number."""
    shades = {}
    for f, folder in enumerate(folders):
        for i in range(count):
            path = root / folder / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            shades[folder, i] = (10 * f, 20 * i, 50)
            Image.new("RGB", size, shades[folder, i]).save(path)
    return shades


def zipped(root, path):
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(root.rglob("*")):
            archive.write(file, f"set/{file.relative_to(root).as_posix()}")
    return path


class TestReading:
    @pytest.mark.parametrize("as_zip", [True, False])
    def test_a_folder_for_each_class(self, as_zip, tmp_path):
        shades = photographs(tmp_path / "set", ["b", "a", "c"])
        (tmp_path / "set" / "a" / "notes.txt").write_text("no photograph")
        path = zipped(tmp_path / "set", tmp_path / "set.zip") if as_zip else tmp_path / "set"
        images, labels = read_classes(path, 8)
        assert images.shape == (9, 3, 8, 8)
        assert images.dtype == torch.uint8
        assert labels.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
        for row, (folder, i) in enumerate((folder, i) for folder in "abc" for i in range(3)):
            assert images[row, :, 4, 4].tolist() == list(shades[folder, i])

    def test_tiny_imagenet_as_it_is_distributed(self, tmp_path):
        photographs(tmp_path / "set", ["train/n1/images", "train/n2/images", "val/images", "test/images"])
        images, labels = read_classes(tmp_path / "set", 8)
        assert labels.tolist() == [0, 0, 0, 1, 1, 1]
        assert images.shape == (6, 3, 8, 8)

    def test_the_first_half_of_the_classes_is_trained_on(self, tmp_path):
        photographs(tmp_path / "set", ["001", "002", "003", "004"])
        train_part, searched = load("cars", tmp_path, file=tmp_path / "set")
        assert train_part.labels.tolist() == [0, 0, 0, 1, 1, 1]
        assert searched.labels.tolist() == [2, 2, 2, 3, 3, 3]
        pixels, _ = searched.to_evaluate()
        assert pixels.shape == (6, 3, 64, 64)
        assert 0 <= pixels.min() <= pixels.max() <= 1
        assert load("tiny-imagenet", tmp_path, file=tmp_path / "set", size=16)[0].images.shape[-1] == 16

    @pytest.mark.parametrize("what", ["nothing", "one class", "no zip"])
    def test_what_holds_no_classes(self, what, tmp_path):
        if what == "one class":
            photographs(tmp_path / "set", ["a"])
        path = tmp_path / ("set.zip" if what == "no zip" else "set")
        path.write_text("text") if what == "no zip" else path.mkdir(exist_ok=True)
        with pytest.raises(InputError, match=r"--file .*(cannot be read|expected one per class)"):
            read_classes(path, 8)

    def test_augmented_as_people_do(self, part):
        rows = torch.arange(12)
        assert torch.equal(part.pixels(rows), part.images.float() / 255)
        torch.manual_seed(0)
        changed = part.pixels(rows, 1.0)
        assert changed.shape == (12, 3, 16, 16)
        assert 0 <= changed.min() <= changed.max() <= 1
        assert not torch.equal(changed, part.pixels(rows, 1.0))
        kept = part.keep(torch.tensor([3, 1]))
        assert torch.equal(kept.images, part.images[[3, 1]])
        assert kept.labels.tolist() == [3, 1]


class TestAugmentation:
    """All images at once, beside torchvision's functions for one image at a time."""

    @pytest.fixture
    def pixels(self):
        return torch.rand(9, 3, 16, 16, generator=torch.Generator().manual_seed(3))

    def test_moved(self, pixels):
        torch.manual_seed(0)
        found = shifted(pixels, 1.0)
        torch.manual_seed(0)
        down, right = torch.randint(5, (2, 9)).tolist()
        for image, before, y, x in zip(found, pixels, down, right, strict=True):
            assert torch.equal(image, functional.crop(functional.pad(before, 2, padding_mode="reflect"), y, x, 16, 16))
        assert {*down, *right} == set(range(5))

    def test_half_of_them_mirrored(self, pixels):
        torch.manual_seed(0)
        found = mirrored(pixels)
        kinds = [torch.equal(a, b) + 2 * torch.equal(a, b.flip(-1)) for a, b in zip(found, pixels, strict=True)]
        assert set(kinds) == {1, 2}

    def test_coloured(self, pixels):
        torch.manual_seed(0)
        found = coloured(pixels, 2.0)
        torch.manual_seed(0)
        factors = (1 + 0.4 * (2 * torch.rand(3, 9, 1, 1, 1) - 1)).flatten(1).T.tolist()
        orders = torch.rand(9, 3).argsort(1).tolist()
        changes = functional.adjust_brightness, functional.adjust_contrast, functional.adjust_saturation
        for image, before, of_image, order in zip(found, pixels, factors, orders, strict=True):
            for number in order:
                before = changes[number](before, of_image[number])
            torch.testing.assert_close(image, before, rtol=0, atol=1e-5)
        assert len({*map(tuple, orders)}) > 3

    def test_mixed(self, pixels):
        torch.manual_seed(0)
        found = mixed(pixels)
        torch.manual_seed(0)
        others, shares = torch.randperm(9).tolist(), torch.rand(9).tolist()
        for image, before, other, share in zip(found, pixels, others, shares, strict=True):
            torch.testing.assert_close(image, share * before + (1 - share) * pixels[other])
        assert sorted(others) == list(range(9))


class TestFirstWeights:
    def test_by_name(self, tmp_path):
        torch.manual_seed(1)
        saved = slim_resnet()
        torch.save({**saved.state_dict(), "more": torch.rand(3)}, tmp_path / "w.pt")
        network = slim_resnet()
        load_weights(network, tmp_path / "w.pt")
        torch.testing.assert_close(network.state_dict(), saved.state_dict())

    def test_in_order_under_other_names(self, tmp_path):
        torch.manual_seed(1)
        saved = slim_resnet()
        renamed = {f"layer{i}": value for i, value in enumerate(saved.state_dict().values())}
        torch.save({**renamed, "classifier": torch.rand(5, 96)}, tmp_path / "w.pt")
        network = nn.Sequential(*slim_resnet())
        load_weights(network, tmp_path / "w.pt")
        torch.testing.assert_close(network.state_dict(), saved.state_dict())

    def test_mobilenet_with_its_mean_and_deviation(self, tmp_path):
        import torchvision

        torch.manual_seed(1)
        saved = torchvision.models.mobilenet_v2().features
        torch.save(dict(enumerate(saved.state_dict().values())), tmp_path / "w.pt")
        network = build("mobilenetv2", (3, 32, 32)).eval()
        load_weights(network, tmp_path / "w.pt")
        images = torch.rand(2, 3, 32, 32)
        mean, deviation = (torch.tensor(v).reshape(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
        expected = saved.eval()((images - mean) / deviation).mean((2, 3))
        torch.testing.assert_close(network(images), expected)

    def test_lite0_of_timm(self, tmp_path):
        timm = pytest.importorskip("timm")
        saved = timm.create_model("tf_efficientnet_lite0", num_classes=10)
        torch.save({f"w{i}": value for i, value in enumerate(saved.state_dict().values())}, tmp_path / "w.pt")
        network = build("lite0", (3, 32, 32)).eval()
        load_weights(network, tmp_path / "w.pt")
        images = torch.rand(2, 3, 32, 32)
        saved.eval().reset_classifier(0)
        torch.testing.assert_close(network(images), saved((images - 0.5) / 0.5))

    def test_of_another_network(self, tmp_path):
        torch.save(nn.Linear(3, 4).state_dict(), tmp_path / "w.pt")
        with pytest.raises(InputError, match=r"holds the weights of another network: \d+ of \d+ tensors"):
            load_weights(slim_resnet(), tmp_path / "w.pt")

    def test_of_no_file(self, tmp_path):
        (tmp_path / "w.pt").write_text("text")
        for name in ("w.pt", "none.pt"):
            with pytest.raises(InputError, match=f"--pretrained .*{name} cannot be read"):
                load_weights(slim_resnet(), tmp_path / name)

    def test_are_those_that_training_begins_with_and_a_head_stands_on_top(self, part, tmp_path):
        torch.manual_seed(1)
        saved = slim_resnet()
        torch.save(saved.state_dict(), tmp_path / "w.pt")
        protocol = Protocol(**{**SLIM, "pretrained": str(tmp_path / "w.pt"), "head": 7})
        model = Training(METHODS["plain-ms"], protocol, part, 0, CPU).model
        torch.testing.assert_close(model.trunk.state_dict(), saved.state_dict())
        assert model(torch.rand(2, 3, 16, 16)).shape == (2, 7)

    def test_are_told_by_name_and_hash_alone(self, tmp_path):
        torch.save(slim_resnet().state_dict(), tmp_path / "w.pt")
        told = Protocol(**{**SLIM, "pretrained": str(tmp_path / "w.pt")}).described()["pretrained"]
        assert told.startswith("w.pt ")
        assert len(told) == len("w.pt ") + 12
        assert Protocol(**SLIM).described()["pretrained"] == ""


class TestTraining:
    def test_head_and_own_weights_of_the_loss_learn_faster(self, part):
        training = Training(METHODS["preset-ms"], Protocol(**SLIM, head=7, head_rate=10.0), part, 0, CPU)
        trunk, head = training.optimizer.param_groups
        assert [id(p) for p in head["params"]] == [id(p) for p in training.model.head.parameters()]
        assert len(trunk["params"]) == len(list(training.model.trunk.parameters()))
        training._step(*training.batches[0])
        assert (trunk["lr"], head["lr"]) == pytest.approx((1e-3, 1e-2))

    @pytest.mark.parametrize("method", ["plain-softmax", "preset-softmax-one-step"])
    @pytest.mark.parametrize(("head", "dimensions"), [(0, 96), (7, 7)])
    def test_a_loss_with_proxies_has_one_for_each_class_and_trains_them(self, method, head, dimensions, part, tmp_path):
        training = Training(METHODS[method], Protocol(**SLIM, head=head, head_rate=10.0), part, 0, CPU)
        (proxies,) = training.loss.parameters()
        assert proxies.shape == (dimensions, 4)
        assert any(weight is proxies for weight in training.optimizer.param_groups[1]["params"])
        before, start = proxies.clone(), copy.deepcopy(training.model.state_dict())
        other = Training(METHODS["plain-ms"], Protocol(**SLIM, head=head), part, 0, CPU).model.state_dict()
        assert all(torch.equal(other[name], weight) for name, weight in start.items())
        training.run(tmp_path / "checkpoint.pt")
        assert not torch.equal(proxies, before)

    @pytest.mark.parametrize("average", ["ema", "swa"])
    def test_averaged_weights_by_a_loop(self, average, part, tmp_path, monkeypatch):
        seen, step = [], Training._step

        def noted(self, *batch):
            loss = step(self, *batch)
            seen.append(copy.deepcopy(self.model.state_dict()))
            return loss

        monkeypatch.setattr(Training, "_step", noted)
        _, model = trained("plain-ms", part, tmp_path, average=average)  # 6 steps
        name = "0.convolutions.0.weight"
        if average == "swa":
            last = [state[name] for state in seen[4:]]  # from three quarters of the steps on
            torch.testing.assert_close(model.state_dict()[name], torch.stack(last).mean(0))
            assert int(model[0].convolutions[1].num_batches_tracked) == train.STATISTICS_STEPS
        else:
            expected = seen[0][name]
            for count, state in enumerate(seen[1:], 1):
                expected = train.ema_decay(count) * expected + (1 - train.ema_decay(count)) * state[name]
            assert train.ema_decay(10**6) == train.EMA_DECAY
            torch.testing.assert_close(model.state_dict()[name], expected)
        assert not torch.equal(model.state_dict()[name], seen[-1][name])

    @pytest.mark.parametrize("average", ["ema", "swa"])
    def test_averages_go_on_after_an_exception(self, average, part, tmp_path, monkeypatch):
        monkeypatch.setattr(train, "KEPT_EVERY", 2)
        (tmp_path / "whole").mkdir()
        _, expected = trained("plain-ms", part, tmp_path / "whole", average=average, augment=1.0)
        step = Training._step

        def fails(self, *batch):
            if self.passed.steps == 5:
                raise RuntimeError("cut off")
            return step(self, *batch)

        monkeypatch.setattr(Training, "_step", fails)
        with pytest.raises(RuntimeError, match="cut off"):
            trained("plain-ms", part, tmp_path, average=average, augment=1.0)
        monkeypatch.setattr(Training, "_step", step)
        _, found = trained("plain-ms", part, tmp_path, average=average, augment=1.0)
        torch.testing.assert_close(found.state_dict(), expected.state_dict(), rtol=0, atol=0)

    @pytest.mark.slow
    def test_compiled_is_the_same_training(self, part, tmp_path):
        (tmp_path / "compiled").mkdir()
        training, expected = trained("preset-ms", part, tmp_path)
        compiled, found = trained("preset-ms", part, tmp_path / "compiled", compiled=True)
        assert compiled.passed.forward == training.passed.forward
        assert list(found.state_dict()) == list(expected.state_dict())
        torch.testing.assert_close(
            found[0].convolutions[0].weight, expected[0].convolutions[0].weight, atol=3e-3, rtol=0
        )

    @pytest.mark.parametrize(
        "method", ["preset-ms-awp", "preset-ms-one-step", "preset-ms-replaced", "trades-ms-decoupled"]
    )
    def test_what_the_field_learned_since(self, method, part, tmp_path):
        training, _ = trained(method, part, tmp_path)
        assert np.isfinite(training.passed.losses).all()
        passes = {"preset-ms-awp": 6, "preset-ms-one-step": 3, "preset-ms-replaced": 5, "trades-ms-decoupled": 5}
        assert training.passed.forward <= 3 * 6 * passes[method]

    def test_the_seed_paper_on_photographs_has_its_own_eps(self):
        protocol = named("helped", "cars", {"eps": 16 / 255})
        keywords = METHODS["seed-paper"].options(protocol)["attack"].keywords
        assert (keywords["eps"], keywords["alpha"], keywords["steps"]) == (0.01, 0.004, 5)


class TestTuned:
    def test_the_head_alone(self, part, tmp_path):
        training, model = trained("preset-ms", part, tmp_path, head=5, tuned="head")
        (group,) = training.optimizer.param_groups
        assert len(group["params"]) == 2
        start = Training(METHODS["preset-ms"], Protocol(**SLIM, head=5), part, 0, CPU).model
        torch.testing.assert_close(model.trunk.state_dict(), start.trunk.state_dict())
        assert not torch.equal(model.head.weight, start.head.weight)

    def test_low_rank_changes(self, part, tmp_path):
        training, model = trained("preset-ms", part, tmp_path, tuned="lora")
        start = Training(METHODS["preset-ms"], Protocol(**SLIM), part, 0, CPU).model
        assert list(model.state_dict()) == list(start.state_dict())  # merged
        change = model[1].convolutions[0].weight - start[1].convolutions[0].weight
        assert 1 <= torch.linalg.matrix_rank(change.detach().flatten(1), rtol=1e-3) <= lora.RANK
        for name in ("weight", "bias", "running_mean"):
            before, after = (getattr(network[0].convolutions[1], name) for network in (start, model))
            assert torch.equal(before, after)
        assert all(weight.shape[-1] <= 1000 for group in training.optimizer.param_groups for weight in group["params"])

    def test_averaging_leaves_the_statistics_of_the_start(self, part, tmp_path):
        _, model = trained("plain-ms", part, tmp_path, tuned="lora", average="swa")
        assert int(model[0].convolutions[1].num_batches_tracked) == 0

    def test_at_first_nothing_is_changed(self):
        network = slim_resnet().eval()
        images = torch.rand(2, 3, 16, 16)
        before = network(images)
        lora.tune(network, "lora")
        torch.testing.assert_close(network(images), before)

    def test_no_head(self):
        with pytest.raises(InputError, match="there is none"):
            Protocol(**SLIM, tuned="head")


class TestSmooth:
    def test_a_block_by_hand(self):
        network = smooth(slim_resnet()).eval()
        images, silu = torch.rand(2, 3, 16, 16), nn.functional.silu
        first, norm, _, second, last = network[0].convolutions
        inside = last(second(silu(norm(first(images)))))
        torch.testing.assert_close(network[0](images), silu(inside + network[0].shortcut(images)))

    def test_other_activations(self):
        network = smooth(nn.Sequential(nn.ReLU6(), nn.Sequential(nn.ReLU(inplace=True)), nn.Tanh()))
        assert [type(m) for m in network.modules() if not isinstance(m, nn.Sequential)] == [nn.SiLU, nn.SiLU, nn.Tanh]


class TestOriginal:
    @pytest.fixture
    def weights(self, tmp_path):
        torch.manual_seed(1)
        torch.save(slim_resnet().state_dict(), tmp_path / "w.pt")
        return tmp_path / "w.pt"

    @pytest.mark.parametrize("method", ["fare", "fare-clean"])
    def test_references_are_the_embeddings_of_the_network_at_the_start(self, method, weights, part, tmp_path):
        training, model = trained(method, part, tmp_path, pretrained=str(weights))
        original = slim_resnet()
        load_weights(original, weights)
        images, labels = training.batches[0]
        found, same = training._references(images, labels)
        torch.testing.assert_close(found, original.eval()(images))
        assert same is labels
        assert not torch.equal(model[0].convolutions[0].weight, original[0].convolutions[0].weight)

    def test_the_start_itself_is_not_trained(self, weights, part, tmp_path):
        training, model = trained("start", part, tmp_path, pretrained=str(weights))
        original = build_for(training.protocol, (3, 16, 16))
        load_weights(original, weights)
        torch.testing.assert_close(model.state_dict(), original.state_dict())
        assert (training.passed.steps, training.passed.forward) == (0, 0)

    @pytest.mark.parametrize("method", ["start", "fare"])
    def test_needs_weights(self, method, part, tmp_path):
        with pytest.raises(InputError, match="--pretrained FILE"):
            trained(method, part, tmp_path)

    @pytest.mark.parametrize("method", ["start", "fare"])
    def test_has_no_head(self, method, weights, part, tmp_path):
        with pytest.raises(InputError, match="a --head is not trained"):
            trained(method, part, tmp_path, pretrained=str(weights), head=5)

    def test_blended_images_are_for_methods_without_labels(self, weights, part, tmp_path):
        training, _ = trained("fare", part, tmp_path, pretrained=str(weights), mixed=True)
        assert training.passed.steps > 0
        for method in ("preset-ms", "fare-ms-one-step"):
            with pytest.raises(InputError, match=r"uses labels.*Leave out --mixed"):
                trained(method, part, tmp_path / "other", mixed=True, pretrained=str(weights))

    def test_what_is_not_trained_keeps_its_activations(self, weights, part, tmp_path):
        with pytest.raises(InputError, match=r"is not trained.*Leave out --smooth"):
            trained("start", part, tmp_path, pretrained=str(weights), smooth=True)

    def test_smooth_is_the_trained_network_alone(self, weights, part, tmp_path):
        training, model = trained("fare-ms-one-step", part, tmp_path, pretrained=str(weights), smooth=True)
        kinds = [{type(m) for m in network.modules()} & {nn.ReLU, nn.SiLU} for network in (model, training.original)]
        assert kinds == [{nn.SiLU}, {nn.ReLU}]
        for network in (training.model, training.original):  # both on the device, as it takes least time
            assert network[0].convolutions[0].weight.is_contiguous(memory_format=torch.channels_last)
        original = slim_resnet()
        load_weights(original, weights)
        images, labels = training.batches[0]
        torch.testing.assert_close(training._references(images, labels)[0], original.eval()(images))
        again = build_for(training.protocol, (3, 16, 16)).eval()
        again.load_state_dict(model.state_dict())
        torch.testing.assert_close(again(images), model(images))

    def test_the_gallery_keeps_the_embeddings_of_the_start(self, weights, tmp_path):
        photographs(tmp_path / "set", ["001", "002", "003", "004"], size=(16, 16))
        options = (
            f"--data tiny-imagenet --file {tmp_path / 'set'} --size 16 --pretrained {weights} --steps 2 --batch 2 2"
        )
        attacked = "--train-eps 2 --suite margin --queries 4 --eps 1 --quiet --device cpu"
        out = tmp_path / "out"
        asked = [*options.split(), *attacked.split(), "--out", str(out), "--methods", "start", "fare"]
        assert command.main(asked) == 0
        start, fare = (
            json.loads((out / name / "seed_0" / "run.json").read_text())["report"] for name in ("start", "fare")
        )
        assert (start["protocol"], fare["num_gallery"]) == ("leave-one-out", 6)
        report = json.loads((out / "fare" / "seed_0" / "report.json").read_text())
        assert "gallery_embeddings" in report["provenance"]
        model = (out / "fare" / "seed_0" / "model.pt").stat().st_mtime_ns
        assert command.main([*asked, "--new-gallery"]) == 0
        anew = json.loads((out / "fare" / "seed_0" / "run.json").read_text())
        assert (anew["report"]["protocol"], anew["evaluation"]["new_gallery"]) == ("leave-one-out", True)
        assert (out / "fare" / "seed_0" / "model.pt").stat().st_mtime_ns == model, "the same training"
