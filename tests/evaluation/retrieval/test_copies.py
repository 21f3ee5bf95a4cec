"""Items that are the image of a query itself, by pixels or by embeddings."""

import pytest
import torch
from query_batches import images_of

from pml_adversarial.evaluation.retrieval.copies import Copies
from pml_adversarial.evaluation.retrieval.gallery import Gallery, Targets
from pml_adversarial.evaluation.retrieval.images import ImageSet

IMAGES, LABELS = images_of()
CPU = torch.device("cpu")
ORDER = torch.tensor([5, 0, 17, 3])  # the gallery holds the images of these queries, and then others


def embed(images):
    return images.flatten(1)[:, :8]


def found(gallery_images, embeddings=None, own=None, stored_in=torch.float32, embed=embed):
    labels = torch.zeros(len(embeddings) if gallery_images is None else len(gallery_images), dtype=torch.long)
    queries, items = ImageSet((IMAGES, LABELS), CPU, "queries"), ImageSet((gallery_images, labels), CPU, "gallery")
    embeddings = embed(gallery_images) if embeddings is None else embeddings
    rows = torch.arange(len(IMAGES))
    targets = Targets(LABELS, torch.full((len(IMAGES),), -1) if own is None else own)
    return Copies(queries, items, Gallery(embeddings, labels), stored_in)(rows, embed(IMAGES), targets).tolist()


EXPECTED = [{5: 0, 0: 1, 17: 2, 3: 3}.get(query, -1) for query in range(24)]
OTHERS = images_of(10, seed=8)[0]


@pytest.mark.parametrize(
    "stored",
    [lambda images: images, lambda images: images.half().float(), lambda images: (images * 255).round() / 255],
    ids=["as they are", "half", "8 bit"],
)
def test_by_their_pixels(stored):
    assert found(torch.cat([stored(IMAGES[ORDER]), OTHERS])) == EXPECTED


def test_an_image_that_differs_in_one_pixel_is_another_one():
    images = IMAGES[ORDER].clone()
    images[:, 0, 5, 5] = (images[:, 0, 5, 5] + 0.02) % 1  # the embedding does not see it
    assert found(torch.cat([images, OTHERS])) == [-1] * 24


@pytest.mark.parametrize("kind", [torch.float32, torch.float16, torch.bfloat16])
def test_by_their_embeddings(kind):
    embeddings = embed(torch.cat([IMAGES[ORDER], OTHERS])).to(kind)
    assert found(None, embeddings.float(), stored_in=kind) == EXPECTED


def test_images_of_another_size_are_others():
    larger = torch.nn.functional.interpolate(torch.cat([IMAGES[ORDER], OTHERS]), scale_factor=2)
    assert found(larger, embed(torch.cat([IMAGES[ORDER], OTHERS]))) == [-1] * 24


def test_items_that_are_left_out_do_not_count():
    own = torch.full((24,), -1)
    own[5] = 0
    assert found(torch.cat([IMAGES[ORDER], OTHERS]), own=own) == [
        -1 if query == 5 else e for query, e in enumerate(EXPECTED)
    ]


def test_among_many_items_with_the_same_embedding():
    """As of codes of few bits. All are compared by their pixels."""
    others = images_of(60, seed=8)[0]
    gallery = torch.cat([others, (IMAGES[ORDER] * 255).round() / 255])
    codes = lambda images: (embed(images) > 0.99).float() + 1  # noqa: E731
    assert len(codes(gallery).unique(dim=0)) < 8
    assert found(gallery, embed=codes) == [-1 if e < 0 else 60 + e for e in EXPECTED]
