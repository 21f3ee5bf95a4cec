"""ACT: positives and negatives that an adversary drew together are trained apart (Zhou et al., arXiv 2106.03614)."""

from __future__ import annotations

from torch import Tensor, nn

from ..attacks.objective import Score
from ..plugins.hookspecs import hookimpl
from ..training.batch import Batch
from ..training.plan import Plan
from .sampling import check_options, triplets_for
from .triplets import distance, per_copy, perturb_members, three_members


class ACT:
    """Anti-collapse triplet training (arXiv 2106.03614).

    The positive and the negative of each triplet are perturbed jointly, in copies of their own, to lower ``d(p', n')``,
    the Euclidean distance at unit length: the adversary collapses them. The wrapped loss is taken on the triplets
    ``(a, p', n')`` alone, anchors clean. The published loss is ``TripletMarginLoss(0.2, reducer=MeanReducer())``.

    Triplets are the caller's; of pairs, all that they form. Where none are given they are drawn, one for each row that
    has a positive and a negative. The published batches hold two images of each class, of which the first is the
    anchor: half as many triplets, as with ``anchors_per_class=1``, which draws the anchor.

    A loss that looks at rows beyond its triplets sees anchors and all copies, also those of one row. With reference
    rows, triplets reach into these, and the loss is taken on the members without a reference. Where processes share a
    batch, each moves its members while those of the others stay clean.

    Args:
        source: how triplets are drawn: "random", "semihard" or "softhard", see `sampling.sample_triplets`.
        anchors_per_class: draw at most so many anchors of each class; None: every row is one.

    Raises:
        InputError: an option cannot be.
    """

    def __init__(self, source: str = "random", anchors_per_class: int | None = None) -> None:
        check_options(source, anchors_per_class)
        self.source, self.anchors_per_class = source, anchors_per_class

    @hookimpl
    def pml_adversarial_plan(self, wrapped: nn.Module, batch: Batch) -> Plan:
        """The positives and negatives of the triplets."""
        triplets = triplets_for(wrapped, batch, self.source, anchors_per_class=self.anchors_per_class)
        return perturb_members(triplets, ("positive", "negative"), batch)

    @hookimpl
    def pml_adversarial_score(self, batch: Batch, plan: Plan) -> Score:
        """How near the positive and the negative of its triplet are."""

        def score(embeddings: Tensor) -> Tensor:
            _, positives, negatives = three_members(plan, batch.context, embeddings)
            return per_copy(plan, -distance(positives, negatives), len(batch))

        return score
