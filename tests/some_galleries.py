"""Random embeddings in classes of given sizes, and what is measured of them, by the package and by plain loops."""

import by_loops
import torch

from pml_adversarial.evaluation.retrieval.metrics import per_query

RECALL_AT = (1, 2, 3, 8)


def some(rows, seed=0, dimension=5):
    return torch.randn(rows, dimension, generator=torch.Generator().manual_seed(seed))


def labels_of(*sizes):
    """Classes of these sizes, mixed, with labels that are neither consecutive nor sorted."""
    names = torch.tensor([7, -3, 40, 5, 11, 2])[: len(sizes)]
    labels = names.repeat_interleave(torch.tensor(sizes))
    return labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(3))]


def measured(gallery, queries, targets, changed=None):
    depth = max(int(gallery.num_right(targets).max()), *RECALL_AT)
    return per_query(gallery.ranking(queries, targets, depth, changed), RECALL_AT)


def expected(queries, targets, embeddings, labels):
    rows = [
        by_loops.measures(query, label, own, embeddings, labels, RECALL_AT)
        for query, label, own in zip(queries, targets.labels.tolist(), targets.own.tolist(), strict=True)
    ]
    return {name: torch.tensor([row[name] for row in rows]) for name in rows[0]}


def assert_same(found, wanted):
    assert found.keys() == wanted.keys()
    for name, values in wanted.items():
        torch.testing.assert_close(found[name], values, rtol=0, atol=1e-6, check_dtype=False, msg=name)
