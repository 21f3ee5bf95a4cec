"""Two fingerprints are the same if and only if model, images and labels are."""

import copy
import hashlib
import random

import numpy
import pytest
import torch
from query_batches import images_of, network
from torch import nn
from torch.utils.data import Dataset

from pml_adversarial.evaluation.reports import fingerprints
from pml_adversarial.evaluation.retrieval.embedder import Embedder
from pml_adversarial.evaluation.retrieval.images import ImageSet
from pml_adversarial.evaluation.retrieval.task import RetrievalTask

CPU = torch.device("cpu")


class Buffered(nn.Module):
    """With a buffer that is in no state dict."""

    def __init__(self, value):
        super().__init__()
        self.register_buffer("kept", torch.tensor(value), persistent=False)


def changed(change):
    model = network()
    change(model)
    return model


def of_model(model):
    return fingerprints.of_modules((model,))


def of_images(images, labels, rows=None):
    return fingerprints.of_images(ImageSet((images, labels), CPU, "queries"), rows)


class TestModel:
    @pytest.mark.parametrize(
        "change",
        [
            lambda model: model[0].weight.data.view(-1)[7].add_(1e-6),
            lambda model: model[1].running_mean.add_(1),
            lambda model: model[1].num_batches_tracked.add_(1),
            lambda model: model.double(),
            lambda model: model.insert(6, nn.Tanh()),
            lambda model: model.__setitem__(2, nn.ReLU()),
            lambda model: model.register_buffer("more", torch.zeros(1)),
            lambda model: setattr(model[5], "bias", None),
            lambda model: setattr(model[0], "weight", nn.Parameter(model[0].weight.reshape(3, 3, 1, 3))),
        ],
    )
    def test_a_change_is_noticed(self, change):
        assert of_model(changed(change)) != of_model(network())

    @pytest.mark.parametrize(
        "change",
        [
            lambda model: model.eval(),
            lambda model: model.requires_grad_(False),
            lambda model: setattr(model[0].weight, "grad", torch.ones_like(model[0].weight)),
            lambda model: setattr(
                model[0].weight, "data", model[0].weight.transpose(2, 3).contiguous().transpose(2, 3)
            ),
        ],
    )
    def test_what_does_not_count(self, change):
        assert of_model(changed(change)) == of_model(network())

    def test_names_count(self):
        one, other = nn.Linear(2, 2), nn.Linear(2, 2)
        first, second = nn.ModuleDict({"a": one, "b": other}), nn.ModuleDict({"b": one, "a": other})
        assert of_model(first) != of_model(second)

    def test_buffers_that_no_state_dict_holds_count(self):
        assert of_model(Buffered(1.0)) != of_model(Buffered(2.0))

    def test_of_a_copy_it_is_the_same_and_names_the_class(self):
        found = of_model(network())
        assert found == of_model(copy.deepcopy(network()))
        assert found["class"] == "Sequential"
        assert len(found["sha256"]) == 64

    @pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
    def test_quantised_weights_count(self):
        models = [nn.Sequential(nn.Linear(3, 3)) for _ in range(2)]
        models[1].load_state_dict({**models[0].state_dict(), "0.bias": torch.zeros(3)})
        quantised = [torch.ao.quantization.quantize_dynamic(m, {nn.Linear}, dtype=torch.qint8) for m in models]
        assert of_model(quantised[0]) != of_model(quantised[1])


class TestImages:
    def test_a_change_of_one_image_or_label_is_noticed(self):
        images, labels = images_of()
        found = of_images(images, labels)
        assert found == of_images(images.clone(), labels.int())
        assert (found["images"], found["hashed"]) == (24, 24)
        for row in range(24):
            other, names = images.clone(), labels.clone()
            other[row, 0, 2, 3] += 1e-6
            names[row] = 9
            assert of_images(other, labels) != found != of_images(images, names)
        assert of_images(images.double(), labels) == found  # an attack sees both in the model's type
        assert of_images(images.reshape(24, 1, 4, 9), labels) != found

    def test_of_a_large_set_all_labels_and_images_that_are_spread_evenly(self, monkeypatch):
        monkeypatch.setattr(fingerprints, "HASHED_IMAGES", 5)
        images, labels = images_of()
        found = of_images(images, labels)
        assert (found["images"], found["hashed"]) == (24, 5)
        noticed = []
        for row in range(24):
            other, names = images.clone(), labels.clone()
            other[row] = 0.5
            names[row] = 9
            assert of_images(images, names) != found
            noticed += [row] * (of_images(other, labels) != found)
        assert noticed == [0, 6, 12, 17, 23]

    def test_of_some_rows_and_all_labels(self):
        images, labels = images_of()
        found = of_images(images, labels, torch.tensor([20, 3]))
        assert (found["images"], found["hashed"]) == (24, 2)
        assert found != of_images(images, labels, torch.tensor([3, 20]))
        for row in range(24):
            other, names = images.clone(), labels.clone()
            other[row] = 0.5
            names[row] = 9
            assert (of_images(other, labels, torch.tensor([20, 3])) != found) == (row in (20, 3))
            assert of_images(images, names, torch.tensor([20, 3])) != found

    def test_of_labels_alone(self):
        images, labels = images_of()
        found = of_images(None, labels)
        assert (found["images"], found["hashed"]) == (24, 0)
        assert found == of_images(images, labels, torch.arange(0)) != of_images(None, labels.flip(0))

    def test_of_several_labels_per_image(self):
        images, sets = images_of()[0], torch.eye(4)[torch.arange(24) % 4]
        found = of_images(images, sets)
        assert found == of_images(images, sets.bool())
        assert found != of_images(images, sets.flip(1))  # the same combinations, of other labels

    def test_is_that_of_the_bytes(self):
        """By hand: of labels, then of each image, the type, the shape and the values."""
        images, labels = images_of(3)
        by_hand = hashlib.sha256(f"('torch.int64', {tuple(labels.shape)})".encode() + labels.numpy().tobytes())
        for image in images:
            by_hand.update(b"('torch.float32', (1, 1, 6, 6))" + image.numpy().tobytes())
        assert of_images(images, labels)["sha256"] == by_hand.hexdigest()

    def test_a_data_set_has_that_of_its_tensors(self):
        class Pairs(Dataset):
            def __len__(self):
                return 24

            def __getitem__(self, row):
                return images[row], int(labels[row])

        images, labels = images_of()
        assert fingerprints.of_images(ImageSet(Pairs(), CPU, "queries")) == of_images(images, labels)

    def test_a_data_set_that_draws_random_numbers_draws_the_same_and_no_others(self):
        class Noisy(Dataset):
            targets = torch.arange(6) % 2

            def __len__(self):
                return 6

            def __getitem__(self, row):
                noise = torch.rand(1, 4, 4) + random.random() + numpy.random.random()  # noqa: NPY002
                return noise / 3, int(self.targets[row])

        before = torch.get_rng_state(), random.getstate(), str(numpy.random.get_state())  # noqa: NPY002
        found = fingerprints.of_images(ImageSet(Noisy(), CPU, "queries"))
        assert torch.equal(before[0], torch.get_rng_state())
        assert before[1:] == (random.getstate(), str(numpy.random.get_state()))  # noqa: NPY002
        torch.manual_seed(7)
        random.seed(7)
        assert fingerprints.of_images(ImageSet(Noisy(), CPU, "queries")) == found


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.tensor(2.5),
        lambda: torch.zeros(0, 3),
        lambda: torch.rand(3).bfloat16(),
        lambda: torch.tensor([True, False]),
        lambda: torch.rand(3, dtype=torch.complex64).conj(),
        lambda: torch.eye(3).to_sparse(),
        lambda: torch.rand(3, 4).T,
        lambda: torch.rand(3, requires_grad=True),
    ],
)
def test_any_tensor_has_one(make):
    one = make()
    assert fingerprints.of_tensor(one) == fingerprints.of_tensor(one.clone())
    assert fingerprints.of_tensor(one)["shape"] == list(one.shape)
    if one.numel():
        assert fingerprints.of_tensor(one) != fingerprints.of_tensor(~one if one.dtype == torch.bool else one * 2)


@pytest.mark.parametrize("size", [0, 5, 2**20, 2**20 + 3])
def test_of_a_file(tmp_path, size):
    content = random.Random(size).randbytes(size)
    (tmp_path / "file").write_bytes(content)
    found = fingerprints.of_file(tmp_path / "file")
    assert found == {"path": str(tmp_path / "file"), "sha256": hashlib.sha256(content).hexdigest()}


class TestTask:
    def task(self, gallery=None):
        return RetrievalTask(Embedder(network()), images_of(), gallery)

    def test_of_model_queries_and_gallery(self):
        items = images_of(30, seed=1)
        for gallery, searched in ((None, images_of()), (items, items)):
            assert fingerprints.of_task(self.task(gallery), torch.arange(24)) == {
                "model": of_model(network()),
                "queries": of_images(*images_of()),
                "gallery": {"is_the_queries": gallery is None, **of_images(*searched)},
            }

    def test_of_a_subset_all_images_that_are_attacked(self):
        found = fingerprints.of_task(self.task(), torch.tensor([5, 2]))
        assert found["queries"] == of_images(*images_of(), torch.tensor([5, 2]))
        assert found["gallery"]["sha256"] == of_images(*images_of())["sha256"]

    def test_of_embeddings_that_are_given_in_place_of_images(self):
        known, items = torch.rand(30, 6), images_of(30, seed=1)
        for embeddings in (known, known.numpy()):
            found = fingerprints.of_task(self.task(items), torch.arange(24), embeddings)
            assert found["gallery"] == {"is_the_queries": False, **of_images(None, items[1])}
            assert found["gallery_embeddings"] == fingerprints.of_tensor(known)

    def test_of_a_function_its_modules(self):
        model = network().eval()
        task = RetrievalTask(Embedder(lambda images: model(images) + 1), images_of(), None)
        assert fingerprints.of_task(task, torch.arange(24))["model"] == of_model(model)
        task = RetrievalTask(Embedder(lambda images: images.flatten(1)), images_of(), None)
        assert fingerprints.of_task(task, torch.arange(24))["model"]["class"] == "a function without modules"
