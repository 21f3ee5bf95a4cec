"""Labelled images as pixels: their values and labels, and what is refused."""

import math

import pytest
import torch
from data_sets import Listed
from query_batches import images_of
from torch.utils.data import TensorDataset

from pml_adversarial.errors import InputError
from pml_adversarial.evaluation.retrieval.images import ImageSet
from pml_adversarial.training.pixels import PixelSpace

CPU = torch.device("cpu")


class TestValues:
    @pytest.mark.parametrize("kind", [torch.int32, torch.uint8, torch.int64])
    def test_labels_are_of_one_kind(self, kind):
        images, labels = images_of()
        found = ImageSet((images, labels.to(kind)), CPU, "queries")
        assert found.labels.dtype == torch.int64
        assert torch.equal(found.labels, labels)

    def test_pixels_carry_no_gradient(self):
        images, labels = images_of()
        assert not ImageSet((images.clone().requires_grad_(), labels), CPU, "queries")[:3].requires_grad


PIXELS = torch.rand(4, 1, 6, 6, generator=torch.Generator().manual_seed(0))


class TestRefusals:
    @pytest.mark.parametrize(
        ("queries", "message"),
        [
            (PIXELS, r"queries is Tensor; expected \(images, labels\) or a data set"),
            ((PIXELS,), r"queries is \(Tensor\); expected two tensors or arrays, \(images, labels\)"),
            ((PIXELS, [0.0, 0, 1, 1]), r"queries has labels torch.float32 of shape \(4,\)"),
            (
                TensorDataset(PIXELS),
                r"queries: an item is tuple of length 1; expected \(images, labels\) or a data set",
            ),
            (3, r"queries is int; expected \(images, labels\) or a data set"),
            ((PIXELS[:0], torch.zeros(0).long()), r"queries holds no images\."),
            ((PIXELS, torch.arange(3)), r"queries has labels torch.int64 of shape \(3,\) for 4 images; expected one"),
            ((PIXELS, torch.rand(4)), r"queries has labels torch.float32 of shape \(4,\)"),
            ((PIXELS, torch.zeros(4).cfloat()), r"queries has labels torch.complex64 of shape \(4,\)"),
            (
                (PIXELS, torch.zeros(4, 1).long()),
                r"of shape \(4, 1\) for 4 images; expected one whole number",
            ),
            (Listed(lambda row: (PIXELS[row], "cat"), 4), "queries has labels such as 'cat'; expected whole numbers"),
        ],
    )
    def test_what_is_no_set_of_labelled_images(self, queries, message):
        with pytest.raises(InputError, match=message):
            ImageSet(queries, CPU, "queries")

    @pytest.mark.parametrize(
        ("images", "message"),
        [
            (PIXELS - 0.5, r"range from -0\.\d+ to 0\.\d+; expected pixels in \[0, 1\]\. .* pass normalization="),
            (torch.full_like(PIXELS, math.nan), "hold NaN or infinite values"),
            (PIXELS.byte(), r"are torch.uint8; expected floating point"),
        ],
    )
    def test_what_is_no_pixels_when_it_is_read(self, images, message):
        found = ImageSet((images, torch.arange(4)), CPU, "gallery")
        with pytest.raises(InputError, match=rf"^gallery, images 1 to 3: .*{message}"):
            found[1:]

    @pytest.mark.parametrize(
        ("get", "message"),
        [
            (lambda row: ("picture", row % 2), r"found str; expected tensors \(C, H, W\) of one size\. Add ToTensor"),
            (lambda row: (PIXELS[row, :, :, : 3 + row], 0), r"found a tensor \(1, 6, 3\), a tensor \(1, 6, 4\), a"),
        ],
    )
    def test_what_is_no_picture_in_a_data_set(self, get, message):
        found = ImageSet(Listed(get, 4), CPU, "queries")
        with pytest.raises(InputError, match=f"queries, images 0 to 3: {message}"):
            found[:]


@pytest.mark.parametrize("given", [(torch.zeros(0, 1, 2, 2), torch.zeros(0)), Listed(lambda row: None, 0)])
def test_no_images_are_refused_as_such(given):
    with pytest.raises(InputError, match=r"queries holds no images"):
        ImageSet(given, CPU, "queries")


@pytest.mark.parametrize("carried", ["cat", [0, 1], torch.tensor([0, 1])])
def test_items_that_carry_no_numbers_are_not_compared_with_the_list(carried):
    listed = Listed(lambda row: (PIXELS[row], carried), 4)
    listed.targets = [0, 1, 0, 1]
    found = ImageSet(listed, CPU, "queries")
    assert found.check(PixelSpace()) is None
    assert found.labels.tolist() == [0, 1, 0, 1]


@pytest.mark.parametrize(
    ("images", "cure"),
    [
        ((PIXELS * 255).byte(), r"torch.uint8; .*: divide them by 255\."),
        (PIXELS > 0.5, r"torch.bool; .*: convert them by \.float\(\)\."),
        ((PIXELS * 255).int(), r"torch.int32; expected floating point in \[0, 1\]\."),
    ],
)
def test_whole_numbers_have_a_cure_of_their_own(images, cure):
    with pytest.raises(InputError, match=rf"^queries, image 2: they are {cure}"):
        ImageSet((images, torch.arange(4)), CPU, "queries")[[2]]


def test_whole_numbers_within_bounds_are_taken():
    found = ImageSet(((PIXELS * 255).byte(), torch.arange(4)), CPU, "queries")
    found.check(PixelSpace(bounds=(0, 255)))
    torch.testing.assert_close(found[:], (PIXELS * 255).byte().float() / 255)


def test_channels_that_do_not_fit_are_named():
    found = ImageSet((PIXELS, torch.arange(4)), CPU, "queries")
    with pytest.raises(InputError, match="images have 1 channels, and normalization or bounds has 3; expected one"):
        found.check(PixelSpace(([0.5] * 3, [0.2] * 3)))


@pytest.mark.parametrize(("low", "high", "is_said"), [(0, 1, False), (0.3, 0.32, False), (0.1, 0.105, True)])
@pytest.mark.parametrize("normalization", [None, ((0.4,), (0.02,))])
def test_images_that_span_next_to_nothing_are_said(low, high, is_said, normalization):
    pixels = torch.linspace(low, high, 2 * 16).reshape(2, 1, 4, 4)
    given = pixels if normalization is None else (pixels - 0.4) / 0.02
    images = ImageSet((given, torch.arange(2)), torch.device("cpu"), "queries")
    note = images.check(PixelSpace(normalization)) or ""
    said = f"values of 2 images lie between {low:.3g} and {high:.3g} of a range from 0 to 1"
    assert (said in note) is is_said
    assert ("normalised images" in note) is (normalization is not None)


@pytest.mark.parametrize(
    ("labels", "cure"),
    [(torch.zeros(4, 1).long(), r"Pass labels\[:, 0\]\."), (torch.zeros(4), r"Pass labels\.long\(\)")],
)
def test_labels_of_another_form_have_a_cure(labels, cure):
    with pytest.raises(InputError, match=rf"several labels it has\. {cure}"):
        ImageSet((PIXELS, labels), CPU, "queries")
