import runpy
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import Omniglot

omniglot = SimpleNamespace(**runpy.run_path(str(Path(__file__).parents[2] / "benchmarks" / "omniglot.py")))


def test_a_file_is_split_as_it_says(tmp_path):
    images = np.full((4, 28, 28), 51, np.uint8) * np.arange(4, dtype=np.uint8)[:, None, None]
    np.savez(tmp_path / "x.npz", images=images, labels=[7, 8, 9, 8], is_test=[False, True, False, True])
    data = omniglot.load(tmp_path / "x.npz")
    assert data.train_images.shape == data.test_images.shape == (2, 1, 28, 28)
    torch.testing.assert_close(data.train_images[:, 0, 3, 4], torch.tensor([0, 0.4]))
    torch.testing.assert_close(data.test_images[:, 0, 3, 4], torch.tensor([0.2, 0.6]))
    assert (data.train_labels.tolist(), data.test_labels.tolist()) == ([7, 9], [8, 8])


def test_torchvisions_folders_are_split_by_alphabet(tmp_path, monkeypatch):
    """Two drawings per character, with ink in a corner: how much says which drawing it is."""
    names = ["Tagalog/character02", "Greek/character01", "Braille/character01", "Greek/character02"]
    names += ["Latin/character01", "Tagalog/character01"]
    for size, name in enumerate(names, start=1):
        folder = tmp_path / "omniglot-py" / "images_background" / name
        folder.mkdir(parents=True)
        for drawing in (2, 1):
            paper = np.full((105, 105), True)
            paper[: 15 * size, : 15 * drawing] = False
            Image.fromarray(paper).save(folder / f"0001_0{drawing}.png")
    monkeypatch.setattr(Omniglot, "_check_integrity", lambda self: True)  # there is no archive to check
    data = omniglot.fetch(tmp_path, download=False)
    assert data.train_images.shape == (6, 1, 28, 28)
    assert (data.train_labels.tolist(), data.test_labels.tolist()) == ([0, 0, 1, 1, 2, 2], [3, 3, 4, 4])
    ink = torch.cat([data.train_images, data.test_images]).sum(dim=(1, 2, 3))
    expected = [4 * size * 4 * drawing for size in (2, 4, 5, 6, 1) for drawing in (1, 2)]  # 15 of 105 are 4 of 28
    torch.testing.assert_close(ink, torch.tensor(expected).float(), rtol=0.02, atol=0)
    assert (data.train_images[0, 0, 0, 0], data.train_images[0, 0, -1, -1]) == (1, 0)


@pytest.mark.slow
def test_training_moves_every_weight_and_repeats_itself():
    data = SimpleNamespace(train_images=torch.rand(8, 1, 28, 28), train_labels=torch.arange(8) // 2)
    found = {}
    for name in omniglot.MODELS:
        options = {"adversarial": name == "adversarial", "batchnorm": name == "batchnorm", "steps": 2}
        first, second = (omniglot.train(data, **options).state_dict() for _ in range(2))
        torch.testing.assert_close(first, second, rtol=0, atol=0)
        torch.manual_seed(0)
        untrained = omniglot.network(name == "batchnorm").state_dict()
        assert not any(torch.equal(untrained[key], first[key]) for key in first)
        found[name] = first
    assert not torch.equal(found["plain"]["0.weight"], found["adversarial"]["0.weight"])
    assert sum("running_mean" in key for key in found["batchnorm"]) == 2


def test_augmented_images_stay_pixels_and_differ():
    images = torch.ones(64, 1, 28, 28)
    moved = omniglot.augment(images)
    assert moved.shape == images.shape
    assert moved.min() == 0
    assert moved.max() <= 1
    assert len(moved.flatten(1).unique(dim=0)) == 64
    assert (moved[:, 0, 12:16, 12:16] > 0.99).all()
