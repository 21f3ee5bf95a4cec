"""A small verification problem that attacks break in part, and verification in plain python, one pair at a time."""

import math

import torch
from query_batches import images_of, network

from pml_adversarial.evaluation import draw_pairs, evaluate_verification
from pml_adversarial.evaluation.retrieval.embedder import Embedder
from pml_adversarial.evaluation.verification.pairs import PairChoice
from pml_adversarial.evaluation.verification.task import PairTask

TIE = 1e-6
LISTED = draw_pairs(torch.arange(24) % 4, 20, 20, seed=3)


def verified(model=None, pairs=None, **options):
    """A report of few and short attacks."""
    options = {"eps": (0.02, 0.06), "steps": 4, "restarts": 1, "square": 4, "checks": False, **options}
    if pairs is None:
        pairs = images_of()
        options = {"indices": LISTED, "far": (0.5, 0.1, 0.001), "batch_size": 25, **options}
    return evaluate_verification(network() if model is None else model, pairs, **options)


def task_of(model=None, pairs=None, norm="Linf", distance="cosine", indices=LISTED, batch_size=8):
    """A task that is ready to make batches; the model is left in eval mode."""
    model = network() if model is None else model
    model.eval().requires_grad_(False)
    task = PairTask(Embedder(model), images_of() if pairs is None else pairs, norm, distance, PairChoice(indices))
    task.embed_all(batch_size, lambda count: None)
    model.eval()
    return task


# By plain loops.


def cosine(a, b):
    return sum(x * y for x, y in zip(a, b, strict=True)) / math.sqrt(sum(x * x for x in a) * sum(y * y for y in b))


def product(a, b):
    return sum(x * y for x, y in zip(a, b, strict=True))


def minus_distance(a, b):
    return -math.dist(a, b)


def minus_distance_of_directions(a, b):
    a, b = ([x / math.sqrt(product(v, v)) for x in v] for v in (a, b))
    return -math.dist(a, b)


SIMILARITIES = {
    "cosine": cosine,
    "euclidean": minus_distance,
    "normalized_euclidean": minus_distance_of_directions,
    "inner_product": product,
}


def similarities_by_loops(first, second, distance="cosine"):
    return [SIMILARITIES[distance](a, b) for a, b in zip(first.tolist(), second.tolist(), strict=True)]


def rates_by_loops(similarities, same, threshold, tie=TIE):
    """TAR and FAR."""
    accepted = {True: 0, False: 0}
    for similarity, genuine in zip(similarities, same, strict=True):
        accepted[genuine] += similarity + (0 if genuine else tie) >= threshold
    return accepted[True] / sum(same), accepted[False] / (len(same) - sum(same))
