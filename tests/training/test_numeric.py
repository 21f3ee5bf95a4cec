"""Small operations on embeddings."""

import math

import pytest
import torch

from pml_adversarial.training.numeric import at_least_float, unit_length


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_single_precision_at_least(given, expected):
    assert at_least_float(torch.ones(2, 3, dtype=given)).dtype == expected
    assert unit_length(torch.ones(2, 3, dtype=given)).dtype == expected


@pytest.mark.parametrize("shape", [(3,), (5, 3), (2, 5, 3)])
def test_unit_length_by_loops(shape):
    embeddings = torch.randn(shape, dtype=torch.float64)
    rows, units = embeddings.reshape(-1, 3).tolist(), unit_length(embeddings).reshape(-1, 3).tolist()
    for row, found in zip(rows, units, strict=True):
        length = math.sqrt(sum(value * value for value in row))
        assert found == pytest.approx([value / length for value in row])


def test_zeros_stay_zeros():
    assert unit_length(torch.zeros(2, 3)).tolist() == [[0, 0, 0]] * 2
