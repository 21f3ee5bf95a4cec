"""The tuples that a loss takes of a batch."""

from dataclasses import replace

import pytest
import torch
from pytorch_metric_learning import losses
from pytorch_metric_learning.losses import ContrastiveLoss, TripletMarginLoss
from pytorch_metric_learning.utils import loss_and_miner_utils as lmu
from small_batch import LABELS, batch_of

from pml_adversarial.errors import PlanError
from pml_adversarial.training.batch import Batch
from pml_adversarial.training.loss_tuples import (
    own_partners,
    own_triplets,
    own_tuples,
    rows_in_own_tuples,
    tuples_to_give,
)
from pml_adversarial.training.tuples import all_triplets


class TestTuples:
    def test_are_the_callers_if_there_are_any(self):
        tuples = torch.tensor([0]), torch.tensor([1]), torch.tensor([2])
        assert own_tuples(losses.TripletMarginLoss(), batch_of(tuples=tuples)) is tuples

    def test_are_all_pairs_or_triplets_by_hand(self):
        batch = batch_of()
        positive = {(a, p) for a in range(8) for p in range(8) if a != p and LABELS[a] == LABELS[p]}
        negative = {(a, n) for a in range(8) for n in range(8) if LABELS[a] != LABELS[n]}
        a1, p, a2, n = (member.tolist() for member in own_tuples(losses.ContrastiveLoss(), batch))
        assert ({*zip(a1, p, strict=True)}, {*zip(a2, n, strict=True)}) == (positive, negative)
        triplets = zip(*(member.tolist() for member in own_tuples(losses.TripletMarginLoss(), batch)), strict=True)
        assert {*triplets} == {(a, p, n) for a, p in positive for b, n in negative if a == b}

    def test_are_given_to_a_loss_that_would_choose_others(self):
        batch = batch_of()
        for limit, chosen, given in ((3, False, True), ("all", False, False), ("all", True, True)):
            loss = losses.TripletMarginLoss(triplets_per_anchor=limit)
            tuples = own_tuples(loss, batch)
            assert (tuples_to_give(loss, batch, tuples, chosen) is tuples) == given
        assert tuples_to_give(losses.ContrastiveLoss(), batch, tuples, False) is None


class TestTriplets:
    def sorted_rows(self, loss, batch):
        return sorted(zip(*(member.tolist() for member in own_triplets(loss, batch)), strict=True))

    def all_triplets(self, anchors=range(8), partners=range(8), offset=0):
        return sorted(
            (a, p + offset, n + offset)
            for a in anchors
            for p in partners
            for n in partners
            if (p != a or offset) and LABELS[p] == LABELS[a] != LABELS[n]
        )

    def test_are_the_callers(self):
        triplets = torch.tensor([0, 0]), torch.tensor([1, 1]), torch.tensor([2, 2])
        assert own_triplets(losses.ContrastiveLoss(), batch_of(tuples=triplets)) == triplets

    @pytest.mark.parametrize("labels", [LABELS, None])
    def test_of_pairs_are_all_that_share_an_anchor(self, labels):
        pairs = tuple(torch.tensor(m) for m in ([0, 0, 2, 5], [1, 3, 3, 4], [0, 2, 2, 7, 0], [2, 0, 5, 1, 6]))
        a1, p, a2, n = (member.tolist() for member in pairs)
        expected = [(a, x, y) for a, x in zip(a1, p, strict=True) for b, y in zip(a2, n, strict=True) if a == b]
        assert len(expected) == 6
        assert self.sorted_rows(losses.ContrastiveLoss(), batch_of(labels, pairs)) == sorted(expected)

    def test_of_pairs_that_share_none(self):
        pairs = tuple(torch.tensor(m) for m in ([0], [1], [2], [4]))
        assert [len(m) for m in own_triplets(losses.ContrastiveLoss(), batch_of(tuples=pairs))] == [0, 0, 0]

    @pytest.mark.parametrize("loss", [losses.ContrastiveLoss(), losses.TripletMarginLoss()])
    def test_are_all_of_the_batch(self, loss):
        assert self.sorted_rows(loss, batch_of()) == self.all_triplets()

    def test_as_many_as_the_loss_takes(self):
        found = self.sorted_rows(losses.TripletMarginLoss(triplets_per_anchor=5), batch_of())
        assert set(found) <= set(self.all_triplets())
        assert [sum(a == anchor for a, _, _ in found) for anchor in range(8)] == [5] * 8

    @pytest.mark.parametrize("loss", [losses.ContrastiveLoss(), losses.TripletMarginLoss()])
    def test_reach_into_the_reference_in_rows_of_the_batch(self, loss):
        batch = batch_of(torch.cat([LABELS, LABELS]))
        batch = Batch(torch.rand(16, 1), torch.randn(16, 4), torch.randn(16, 4), batch.labels, None, 8)
        assert self.sorted_rows(loss, batch) == self.all_triplets(offset=8)

    def test_without_labels_and_tuples(self):
        with pytest.raises(PlanError, match="neither labels nor tuples, so no triplets"):
            own_triplets(losses.VICRegLoss(), batch_of(None))


class TestAllTriplets:
    @pytest.mark.parametrize("classes", [[0, 1, 0, 1, 2, 0], [0, 0, 0], [0, 1, 2], [5], [], [3, 3, 1, 1, 3]])
    def test_are_those_of_pml_in_its_order(self, classes):
        labels = torch.tensor(classes, dtype=torch.long)
        expected = lmu.get_all_triplets_indices(labels)
        for found, member in zip(all_triplets(labels), expected, strict=True):
            assert found.dtype == torch.long
            assert found.tolist() == member.tolist()


class TestOwnPartners:
    """Against the list of tuples, member by member."""

    @pytest.mark.parametrize("loss", [ContrastiveLoss(), TripletMarginLoss()], ids=["pairs", "triplets"])
    @pytest.mark.parametrize("classes", [[0, 1, 0, 1, 2, 0], [0, 0, 0], [0, 1, 2], [3, 3, 1, 1, 3, 2]])
    @pytest.mark.parametrize("view", ["alone", "reference", "shared labels"])
    def test_are_those_of_the_tuples(self, loss, classes, view):
        labels = torch.tensor(classes)
        rows = len(labels) if view == "alone" else 2 * len(labels)
        reference = labels if view == "shared labels" else labels.flip(0)
        batch = Batch(
            inputs=torch.zeros(rows, 1),
            embeddings=torch.zeros(rows, 2),
            context=torch.zeros(rows, 2),
            labels=labels if view == "alone" else torch.cat([labels, reference]),
            indices_tuple=None,
            num_queries=len(labels),
            shared_labels=view == "shared labels",
        )
        tuples = own_tuples(loss, batch)
        pairs = [tuples[:2], tuples[2:]] if len(tuples) == 4 else [tuples[:2], (tuples[0], tuples[2])]
        for found, (left, right) in zip(own_partners(loss, batch), pairs, strict=True):
            expected = [[False] * rows for _ in range(rows)]
            for a, b in zip(left.tolist(), right.tolist(), strict=True):
                expected[a][b] = expected[b][a] = True
            assert found.tolist() == expected
        named = [row for row in range(rows) if any(a == row for pair in pairs for member in pair for a in member)]
        assert rows_in_own_tuples(loss, batch).tolist() == named

    def test_where_there_is_no_other_way_than_the_tuples(self):
        labels = torch.tensor([0, 0, 1, 1])
        batch = Batch(torch.zeros(4, 1), torch.zeros(4, 2), torch.zeros(4, 2), labels, None, 4)
        assert own_partners(TripletMarginLoss(triplets_per_anchor=1), batch) is None
        assert rows_in_own_tuples(TripletMarginLoss(triplets_per_anchor=1), batch) is None
        assert own_partners(ContrastiveLoss(), replace(batch, labels=None)) is None
        given = torch.tensor([0]), torch.tensor([1]), torch.tensor([2])
        assert own_partners(ContrastiveLoss(), replace(batch, indices_tuple=given)) is None
