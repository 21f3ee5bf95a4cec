"""ACT: an attack draws positive and negative together, training pulls them apart (Zhou et al., arXiv 2106.03614)."""

from __future__ import annotations

from torch import Tensor, nn

from ..attacks.objective import Score
from ..plugins.hookspecs import hookimpl
from ..training.batch import Batch
from ..training.plan import Plan
from .triplets import check_sampling, distance, per_copy, perturb_members, three_members, triplets_for


class ACT:
    """Anti-collapse triplet training (arXiv 2106.03614).

    Each triplet has its own copies of positive and negative. The attack perturbs both to lower ``d(p', n')``, the
    Euclidean distance at unit length: it collapses them. The wrapped loss is taken on the triplets ``(a, p', n')``
    alone, with clean anchors. The published loss is ``TripletMarginLoss(0.2, reducer=MeanReducer())``.

    The module `triplets` says where triplets come from, and what holds with reference rows, several processes, and
    losses that look beyond the triplets.

    Args:
        source: how triplets are drawn: "random", "semihard" or "softhard", see `triplets.sample_triplets`.
        anchors_per_class: the largest number of anchors that are drawn of a class; None: every row is an anchor.

    Raises:
        InputError: an option is out of its range.
    """

    def __init__(self, source: str = "random", anchors_per_class: int | None = None) -> None:
        check_sampling(source, anchors_per_class)
        self.source, self.anchors_per_class = source, anchors_per_class

    @hookimpl
    def pml_adversarial_plan(self, wrapped: nn.Module, batch: Batch) -> Plan:
        """The positives and negatives of the triplets are perturbed."""
        triplets = triplets_for(wrapped, batch, self.source, anchors_per_class=self.anchors_per_class)
        return perturb_members(triplets, ("positive", "negative"), batch)

    @hookimpl
    def pml_adversarial_score(self, batch: Batch, plan: Plan) -> Score:
        """How near to one another the positive and the negative of a triplet are."""

        def score(embeddings: Tensor) -> Tensor:
            _, positives, negatives = three_members(plan, batch.context, embeddings)
            return per_copy(plan, -distance(positives, negatives), len(batch))

        return score
