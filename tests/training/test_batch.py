"""What a batch knows of itself."""

from dataclasses import replace

import torch
from small_batch import batch_of

from pml_adversarial import Batch


def test_alone_all_rows_are_own():
    batch = Batch(torch.arange(3.0), torch.zeros(3, 4), torch.zeros(3, 4), None, None, 3)
    rows = torch.tensor([2, 0, 2])
    assert batch.own(torch.arange(3), rows).tolist() == [0, 1, 2]
    assert batch.inputs_of(rows).tolist() == [2, 0, 2]
    assert (batch.num_attackable, batch.num_processes) == (3, 1)
    assert torch.equal(batch.gather_copies(rows, rows), rows)


def test_signatures_differ():
    pair = (torch.tensor([0]),) * 4
    batches = [batch_of(), batch_of(tuples=pair), batch_of(tuples=pair[:3]), batch_of(None), batch_of(num_queries=4)]
    batches.append(replace(batches[-1], shared_labels=True))
    assert len({batch.call_signature for batch in batches}) == 6
