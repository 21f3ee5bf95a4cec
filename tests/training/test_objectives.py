"""What an attack step costs beside the distance or the loss, in operations that are dispatched."""

from collections import Counter

import pytest
import torch
from pytorch_metric_learning.distances import CosineSimilarity, LpDistance
from pytorch_metric_learning.losses import ArcFaceLoss
from torch.utils._python_dispatch import TorchDispatchMode

from pml_adversarial.training.batch import Batch
from pml_adversarial.training.objectives import OwnLoss, ViolationScore, unreduced
from pml_adversarial.training.plan import consecutive, replace_rows

LABELS = torch.arange(8) // 2


class Operations(TorchDispatchMode):
    """Names of the operations that are dispatched inside."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(str(function).split(".")[1])
        return function(*args, **(kwargs or {}))


def operations(function, *arguments):
    with Operations() as found:
        function(*arguments)
    return found.names


def masks(lacking=False):
    same = LABELS[:, None] == LABELS
    different = ~same
    same.fill_diagonal_(False)
    if lacking:
        same[1], different[2] = False, False
    return same, different


@pytest.mark.parametrize("distance", [LpDistance(), CosineSimilarity()], ids=["distance", "similarity"])
class TestViolationScore:
    @pytest.mark.parametrize("lacking", [False, True])
    def test_by_loops(self, distance, lacking):
        context, embeddings = torch.randn(8, 4), torch.randn(8, 4)
        same, different = masks(lacking)
        apart = -distance(embeddings, context) if distance.is_inverted else distance(embeddings, context)
        expected = [
            max((apart[i, j].item() for j in range(8) if same[i, j]), default=0)
            - min((apart[i, j].item() for j in range(8) if different[i, j]), default=0)
            for i in range(8)
        ]
        assert ViolationScore(distance, context, same, different)(embeddings).tolist() == pytest.approx(expected)

    def test_a_copy_that_lacks_partners_has_a_finite_gradient(self, distance):
        embeddings = torch.randn(8, 4, requires_grad=True)
        ViolationScore(distance, torch.randn(8, 4), *masks(lacking=True))(embeddings).sum().backward()
        assert embeddings.grad.isfinite().all()

    def test_takes_five_operations_beside_the_distance(self, distance):
        context, embeddings = torch.randn(8, 4), torch.randn(8, 4)
        score = ViolationScore(distance, context, *masks())
        of_distance = Counter(operations(distance, embeddings, context))
        found = Counter(operations(score, embeddings))
        beside = found - of_distance
        assert sorted(beside.elements()) == ["amax", "amin", "sub", "where", "where"]
        spared = of_distance - found  # the context has unit length already
        assert spared == Counter(operations(distance.maybe_normalize, context))


def test_own_loss_takes_the_operations_of_the_plain_loss():
    loss, context = ArcFaceLoss(4, 4), torch.randn(8, 4)
    batch = Batch(torch.rand(8, 1), context, context, LABELS, None, 8)
    plan = replace_rows(consecutive(0, 8, context.device), 8, None)
    score, embeddings = OwnLoss(unreduced(loss), batch, plan), torch.randn(8, 4)
    assert operations(score, embeddings) == operations(unreduced(loss), embeddings, LABELS)
    torch.testing.assert_close(score(embeddings).mean(), loss(embeddings, LABELS))
