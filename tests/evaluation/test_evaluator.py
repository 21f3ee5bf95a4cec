import pytest
import torch

from pml_adversarial.evaluation.evaluator import choose_queries


@pytest.mark.parametrize(
    ("labels", "preferred", "count", "chosen"),
    [
        ([5, 5, 6, 6, 7], [0, 1, 0, 0, 1], 3, [1, 4, 2]),
        ([5, 5, 6, 6, 7], [0, 1, 0, 0, 1], 9, [1, 4, 2, 0, 3]),
        ([5, 5, 5], [0, 0, 1], 2, [2, 0]),
        ([5, 6, 5, 6], [1, 0, 1, 0], 2, [0, 1]),
        ([], [], 5, []),
    ],
)
def test_one_query_of_each_class_first_and_preferred_ones_before_others(labels, preferred, count, chosen):
    found = choose_queries(torch.tensor(labels, dtype=torch.long), torch.tensor(preferred, dtype=torch.bool), count)
    assert found.tolist() == chosen
