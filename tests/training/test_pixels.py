import numpy
import pytest
import torch

from pml_adversarial import InputError
from pml_adversarial.training.pixels import PixelSpace

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
GREY = (0.5,), (0.25,)


def levels(channels=3):
    """All 256 levels of an 8-bit image in every channel."""
    return (torch.arange(256.0) / 255).reshape(1, 1, 16, 16).repeat(2, channels, 1, 1)


def by_hand(pixels, normalization):
    mean, std = normalization
    return torch.stack([(pixels[:, c] - mean[c]) / std[c] for c in range(pixels.shape[1])], dim=1)


class TestRoundTrip:
    def test_without_normalization_nothing_changes(self):
        space = PixelSpace()
        assert torch.equal(space.to_pixels(levels()), levels())
        assert torch.equal(space.to_inputs(levels()), levels())

    def test_inputs_are_normalised_per_channel(self):
        torch.testing.assert_close(PixelSpace(IMAGENET).to_inputs(levels()), by_hand(levels(), IMAGENET))

    @pytest.mark.parametrize(("normalization", "channels"), [(IMAGENET, 3), (GREY, 1)])
    def test_pixels_come_back(self, normalization, channels):
        pixels = PixelSpace(normalization).to_pixels(by_hand(levels(channels), normalization))
        torch.testing.assert_close(pixels, levels(channels), rtol=0, atol=1e-6)
        assert pixels.min() >= 0
        assert pixels.max() <= 1

    def test_one_value_serves_all_channels(self):
        expected = by_hand(levels(), ((0.5,) * 3, (0.25,) * 3))
        assert torch.equal(PixelSpace(GREY).to_inputs(levels()), expected)

    @pytest.mark.parametrize("shape", [(4, 3), (4, 3, 7), (4, 3, 2, 5), (4, 3, 2, 2, 2)])
    def test_any_number_of_dimensions(self, shape):
        pixels = torch.rand(shape)
        space = PixelSpace(IMAGENET)
        torch.testing.assert_close(space.to_inputs(pixels), by_hand(pixels, IMAGENET))
        torch.testing.assert_close(space.to_pixels(space.to_inputs(pixels)), pixels, rtol=0, atol=1e-6)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
    def test_type_is_kept(self, dtype):
        space = PixelSpace(IMAGENET)
        inputs = space.to_inputs(levels()).to(dtype)
        assert space.to_pixels(inputs).dtype == dtype
        assert space.to_inputs(space.to_pixels(inputs)).dtype == dtype

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_coarse_inputs_as_fine_pixels_and_back(self, dtype):
        for normalization in (None, IMAGENET):
            space = PixelSpace(normalization)
            inputs = space.to_inputs(levels(), dtype)
            pixels = space.to_pixels(inputs, torch.float32)
            assert (inputs.dtype, pixels.dtype) == (dtype, torch.float32)
            torch.testing.assert_close(pixels, levels(), rtol=0, atol=2 * torch.finfo(dtype).eps)
            again = space.to_inputs(pixels, dtype)
            inside = (space.scaled(inputs.float()) >= 0) & (space.scaled(inputs.float()) <= 1)
            assert torch.equal(again[inside], inputs[inside])

    def test_gradient_flows_to_the_pixels(self):
        pixels = levels().requires_grad_()
        PixelSpace(IMAGENET).to_inputs(pixels).sum().backward()
        expected = (1 / torch.tensor(IMAGENET[1])).reshape(1, 3, 1, 1).expand_as(pixels)
        torch.testing.assert_close(pixels.grad, expected)

    def test_rounding_beyond_the_range_is_clamped(self):
        pixels = PixelSpace().to_pixels(torch.tensor([[-5e-5, 1 + 5e-5]]))
        assert pixels.tolist() == [[0, 1]]

    def test_empty_batch(self):
        assert PixelSpace().to_pixels(torch.rand(0, 3, 2, 2)).shape == (0, 3, 2, 2)


class TestRefusals:
    @pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.bool])
    def test_integers(self, dtype):
        with pytest.raises(InputError, match=r"float\(\) / 255"):
            PixelSpace().to_pixels(torch.ones(2, 3, dtype=dtype))

    @pytest.mark.parametrize("wrong", [-0.01, 1.01, 255.0])
    def test_values_outside(self, wrong):
        inputs = levels()
        inputs[1, 2, 3, 4] = wrong
        with pytest.raises(InputError, match=r"range from .*normalization=\(mean, std\)"):
            PixelSpace().to_pixels(inputs)

    @pytest.mark.parametrize("wrong", [float("nan"), float("inf"), -float("inf")])
    @pytest.mark.parametrize("normalization", [None, IMAGENET])
    def test_values_that_are_not_finite(self, wrong, normalization):
        inputs = torch.zeros(4, 3, 2, 2)
        inputs[1:3, 0, 0, 0] = wrong
        with pytest.raises(InputError, match="2 of 4 inputs hold NaN or infinite"):
            PixelSpace(normalization).to_pixels(inputs)

    def test_normalised_inputs_that_were_not_announced(self):
        with pytest.raises(InputError, match=r"range from -2\.12 to 2\.64"):
            PixelSpace().to_pixels(by_hand(levels(), IMAGENET))

    def test_another_normalization_than_announced(self):
        with pytest.raises(InputError, match="Pass the mean and std with which"):
            PixelSpace(((0.0,), (1.0,))).to_pixels(by_hand(levels(), IMAGENET))

    def test_announced_normalization_of_plain_pixels_beyond_its_range(self):
        with pytest.raises(InputError, match=r"With normalization=\(\(0.5,\), \(2.0,\)\) undone"):
            PixelSpace(((0.5,), (2.0,))).to_pixels(levels(1))

    @pytest.mark.parametrize("ask", [PixelSpace.to_pixels, PixelSpace.to_inputs])
    def test_another_number_of_channels(self, ask):
        with pytest.raises(InputError, match=r"3 channels, and of the inputs \(2, 4, 5\) no dimension"):
            ask(PixelSpace(IMAGENET), torch.rand(2, 4, 5))

    @pytest.mark.parametrize(
        "normalization",
        [
            ((0.5, 0.5), (0.5,)),
            ((0.5,), (0.0,)),
            ((0.5,), (-1.0,)),
            ((0.5,), (float("nan"),)),
            (0.5, 0.5),
            0.5,
            (0.5, 0.5, 0.5),
        ],
    )
    def test_what_is_no_normalization(self, normalization):
        with pytest.raises(InputError, match=r"expected \(mean, std\)"):
            PixelSpace(normalization)

    def test_is_a_value_error(self):
        with pytest.raises(ValueError, match="floating point"):
            PixelSpace().to_pixels(torch.ones(2, 2, dtype=torch.long))


def test_bfloat16_images_normalised_as_usual_are_taken():
    mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    images = torch.rand(4, 3, 5, 5).bfloat16()
    normalised = (images - torch.tensor(mean).bfloat16().reshape(3, 1, 1)) / torch.tensor(std).bfloat16().reshape(
        3, 1, 1
    )
    pixels = PixelSpace((mean, std)).to_pixels(normalised)
    assert pixels.min() >= 0
    assert pixels.max() <= 1


def test_nan_in_inputs_without_channels():
    with pytest.raises(InputError, match="1 of 3 inputs hold NaN"):
        PixelSpace().to_pixels(torch.tensor([0.5, torch.nan, 0.5]))


def test_a_number_per_row():
    space = PixelSpace(((0.5,), (0.25,)))
    inputs = torch.tensor([-2.0, 0.0, 2.0])
    pixels = space.to_pixels(inputs)
    assert pixels.tolist() == [0.0, 0.5, 1.0]
    assert torch.equal(space.to_inputs(pixels), inputs)
    with pytest.raises(InputError, match="normalization has 2 channels"):
        PixelSpace(((0.5, 0.5), (0.25, 0.25))).to_pixels(inputs)


@pytest.mark.parametrize("inputs", [torch.rand(3, 4).to_sparse(), torch.rand(3, 0)], ids=["sparse", "no pixels"])
def test_inputs_without_dense_pixels(inputs):
    with pytest.raises(InputError, match="expected dense pixels, one or more per row"):
        PixelSpace().to_pixels(inputs)


def test_a_batch_without_rows():
    assert PixelSpace().to_pixels(torch.rand(0, 1, 2, 2)).shape == (0, 1, 2, 2)


@pytest.mark.parametrize(
    ("normalization", "bounds", "mean"),
    [
        (((123.675, 116.28, 103.53), (58.395, 57.12, 57.375)), None, "123.675"),
        (((0.5, -0.2), (0.2, 0.2)), None, "-0.2"),
        (((0.5,), (0.2,)), (1.0, 2.0), "0.5"),
    ],
)
def test_a_mean_outside_of_the_inputs_is_refused(normalization, bounds, mean):
    with pytest.raises(InputError, match=rf"has the mean {mean}, .*divide both by 255; .*pass bounds=\(0, 255\)"):
        PixelSpace(normalization, bounds)


def test_levels_with_their_bounds_and_means_at_the_ends_are_taken():
    space = PixelSpace(((123.675,), (58.395,)), (0, 255))
    assert space.to_pixels(torch.tensor([[(51 - 123.675) / 58.395]])).item() == pytest.approx(0.2)
    for mean in (0.0, 1.0):
        PixelSpace(((mean,), (1 / 255,)))


@pytest.mark.parametrize("kind", [numpy.float32, numpy.int64, torch.tensor, float])
def test_bounds_in_any_type_of_number(kind):
    inputs = torch.rand(2, 3, 4, 4) * 4 - 2
    expected = PixelSpace(bounds=(-2, 2)).to_pixels(inputs)
    assert torch.equal(PixelSpace(bounds=(kind(-2), kind(2))).to_pixels(inputs), expected)
