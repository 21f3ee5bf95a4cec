"""What a batch knows of itself."""

from dataclasses import FrozenInstanceError, replace

import pytest
import torch
from small_batch import LABELS, batch_of

from pml_adversarial import Batch

TUPLES = tuple(torch.tensor([row]) for row in (0, 1, 2, 3))


class TestForm:
    @pytest.mark.parametrize(
        ("make", "expected"),
        [
            (batch_of, (None, False, False, False)),
            (lambda: batch_of(tuples=TUPLES), (4, False, False, False)),
            (lambda: batch_of(tuples=TUPLES[:3]), (3, False, False, False)),
            (lambda: batch_of(num_queries=4), (None, True, False, False)),
            (lambda: replace(batch_of(num_queries=4), shared_labels=True), (None, True, True, False)),
            (lambda: batch_of(None, num_queries=5), (None, True, False, True)),
        ],
        ids=["labels", "pairs", "triplets", "reference", "views", "no labels"],
    )
    def test_says_how_the_loss_is_called(self, make, expected):
        signature = make().call_signature
        assert (signature.members, signature.has_reference) == expected[:2]
        assert (signature.shared_labels, signature.without_labels) == expected[2:]

    def test_follows_the_rows_when_they_are_replaced(self):
        batch = batch_of()
        longer = replace(batch, embeddings=torch.zeros(11, 4))
        assert (len(batch), batch.num_rows, batch.call_signature.has_reference) == (8, 8, False)
        assert (len(longer), longer.num_rows, longer.call_signature.has_reference) == (11, 11, True)

    def test_rows_without_inputs_cannot_be_attacked(self):
        batch = Batch(torch.rand(5, 1), torch.zeros(8, 4), torch.zeros(8, 4), LABELS, None, 5)
        assert (batch.num_rows, batch.num_attackable) == (8, 5)

    @pytest.mark.parametrize("name", ["strength", "inputs", "num_rows"])
    def test_is_frozen(self, name):
        with pytest.raises(FrozenInstanceError):
            setattr(batch_of(), name, None)


def test_alone_all_rows_are_own():
    batch = Batch(torch.arange(3.0), torch.zeros(3, 4), torch.zeros(3, 4), None, None, 3)
    rows = torch.tensor([2, 0, 2])
    assert batch.own(torch.arange(3), rows).tolist() == [0, 1, 2]
    assert batch.inputs_of(rows).tolist() == [2, 0, 2]
    assert (batch.num_attackable, batch.num_processes) == (3, 1)
    assert torch.equal(batch.gather_copies(rows, rows), rows)
    assert torch.equal(batch.gather_rows(rows), rows)


def test_alone_a_process_works_and_fails_for_itself():
    batch = batch_of()
    for of in (batch.decide, batch.agree):
        assert of(lambda: "found") == "found"
        with pytest.raises(ZeroDivisionError):
            of(lambda: 1 / 0)


def test_signatures_differ():
    pair = (torch.tensor([0]),) * 4
    batches = [batch_of(), batch_of(tuples=pair), batch_of(tuples=pair[:3]), batch_of(None), batch_of(num_queries=4)]
    batches.append(replace(batches[-1], shared_labels=True))
    assert len({batch.call_signature for batch in batches}) == 6
