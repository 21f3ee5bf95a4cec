"""Pictures as another library reads them from the page."""

import pytest
import torch
from page_trees import decoded, levels

from pml_adversarial.evaluation.reports.html.pictures import data_uri, magnified, picture, small, visible


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 8, 8), (2, 9, 9), (5, 7, 11), (3, 1, 1), (1, 224, 224), (3, 60, 200)])
def test_png(shape):
    image = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    expected = image if shape[0] in (1, 3) else image.mean(0, keepdim=True)
    assert torch.equal(decoded(data_uri(visible(image))), levels(expected))


def test_png_of_what_is_no_image():
    odd = torch.tensor([[[-1.0, 2.0, float("nan"), 0.5]]])
    assert decoded(data_uri(visible(odd))).tolist() == [[[0, 255, 0, 128]]]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_png_of_other_types(dtype):
    image = torch.tensor([[[0.0, 1.0], [0.25, 0.5]]], dtype=dtype).expand(3, 2, 2).requires_grad_()
    assert torch.equal(decoded(data_uri(visible(image))), levels(image.detach().float()))


@pytest.mark.parametrize(
    ("largest", "factor"),
    [(0.1, 5), (0.05, 10), (26 / 255, 2), (8 / 255, 10), (0.5, 1), (0.9, 1), (1e-3, 500), (0, 1)],
)
def test_magnified(largest, factor):
    clean = torch.full((1, 2, 2), 0.5)
    perturbed = clean + torch.tensor([[[largest, -largest], [0.0, largest / 2]]])
    found, by = magnified(clean, perturbed)
    assert by == factor
    torch.testing.assert_close(found, 0.5 + factor * (perturbed - clean))
    assert largest > 0.5 or (found.min() > -1e-3 and found.max() < 1.001)


def test_magnified_of_rounded_pixels():
    generator = torch.Generator().manual_seed(0)
    clean = torch.rand(3, 50, 50, generator=generator) * 0.8 + 0.1
    assert magnified(clean, clean + 0.1 * torch.sign(torch.randn(3, 50, 50, generator=generator)))[1] == 5


def test_neighbours_of_large_images_are_means_of_squares():
    image = torch.rand(3, 224, 224)
    found = small(image, 64)
    assert found.shape == (3, 112, 112)
    torch.testing.assert_close(found[:, 3, 5], image[:, 6:8, 10:12].mean((1, 2)))
    assert small(image[:, :128, :100], 64).shape == (3, 128, 100)


@pytest.mark.parametrize(
    ("shape", "pixelated"), [((1, 79, 40), True), ((3, 40, 79), True), ((3, 80, 4), False), ((1, 4, 80), False)]
)
def test_a_picture_has_its_size_and_shows_the_squares_of_small_images(shape, pixelated):
    image = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    found = picture(image, "what is seen", "below it")
    assert torch.equal(decoded(found.pop("uri")), levels(image))
    size = {"height": shape[1], "width": shape[2], "pixelated": pixelated}
    assert found == {"description": "what is seen", "caption": "below it", **size}
