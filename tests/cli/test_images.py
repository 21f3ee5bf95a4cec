import pytest
import torch

from pml_adversarial import InputError
from pml_adversarial.cli.images import digits, split_by_class


def test_digits_are_split_by_class():
    data = digits()
    assert data.train_images.shape == (901, 1, 8, 8)
    assert data.test_images.shape == (896, 1, 8, 8)
    assert (data.train_images.min(), data.train_images.max()) == (0, 1)
    assert sorted(data.train_labels.unique().tolist()) == [0, 1, 2, 3, 4]
    assert sorted(data.test_labels.unique().tolist()) == [5, 6, 7, 8, 9]


def test_other_classes():
    assert sorted(digits([7, 9]).train_labels.unique().tolist()) == [7, 9]


@pytest.mark.parametrize(("classes", "part"), [([0], "train"), (range(9), "test"), ([], "train")])
def test_too_few_classes(classes, part):
    with pytest.raises(InputError, match=f"The {part} part"):
        digits(classes)


def test_rows_keep_their_labels():
    labels = torch.tensor([0, 1, 2, 3, 0, 1, 2, 3])
    data = split_by_class(labels.float().reshape(8, 1, 1, 1), labels, [1, 3])
    assert data.train_images.flatten().tolist() == data.train_labels.tolist() == [1, 3, 1, 3]
    assert data.test_images.flatten().tolist() == data.test_labels.tolist() == [0, 2, 0, 2]
