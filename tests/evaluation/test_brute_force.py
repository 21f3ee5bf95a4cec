"""No query that a plain search over tiny images breaks is reported robust, in any norm."""

import itertools
import math

import pytest
import torch
from torch import nn

from pml_adversarial.evaluation import evaluate_robustness
from pml_adversarial.evaluation.reports.results import decode_flags

ROW, PLANE = (1, 1, 3), (1, 5, 5)
QUERIES, ITEMS = 16, 12


def model_of(seed, shape):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(math.prod(shape), 12), nn.Tanh(), nn.Linear(12, 4)).eval()


def unit(vectors):
    return vectors / vectors.norm(dim=1, keepdim=True)


def lengths(change, norm):
    return {"Linf": change.abs().amax(1), "L2": change.norm(dim=1), "L1": change.abs().sum(1)}[norm]


def grid_of(image, eps, norm, parts):
    """All points of a grid within the ball and within [0, 1]: ``(N, *image.shape)``."""
    if norm in ("Linf", "L2", "L1"):
        axis = [eps * part / parts for part in range(-parts, parts + 1)]
        change = torch.tensor(list(itertools.product(axis, repeat=image.numel())))
        points = image.flatten() + change[lengths(change, norm) <= eps * (1 + 1e-6)]
        return points[((points >= 0) & (points <= 1)).all(1)].reshape(-1, *image.shape)
    _, height, width = image.shape
    if norm == "L0":
        places = itertools.combinations(itertools.product(range(height), range(width)), eps)
    else:
        corners = itertools.product(range(height - eps + 1), range(width - eps + 1))
        places = [[(y + i, x + j) for i in range(eps) for j in range(eps)] for y, x in corners]
    levels, count = [part / parts for part in range(parts + 1)], eps**2 if norm == "patch" else eps
    points = []
    for place in places:
        for values in itertools.product(levels, repeat=count):
            points.append(image.clone())
            for (y, x), value in zip(place, values, strict=True):
                points[-1][0, y, x] = value
    return torch.stack(points)


def highest_margin(model, points, label, embeddings, labels):
    """How much nearer a wrong item is than all right ones, at the worst of the points."""
    with torch.no_grad():
        similarities = unit(model(points).double()) @ embeddings.T
    return (similarities[:, labels != label].amax(1) - similarities[:, labels == label].amax(1)).max().item()


def problem(seed, shape):
    """A random model, queries that are right, and a gallery. Images of two rows or more are dark or light."""
    model, generator = model_of(seed, shape), torch.Generator().manual_seed(100 + seed)
    queries, items = (torch.rand(count, *shape, generator=generator) for count in (QUERIES, ITEMS))
    labels = torch.arange(ITEMS) % 3
    if shape[1] > 1:
        queries, items = (
            0.3 * part + 0.7 * (torch.arange(len(part)) % 2).reshape(-1, 1, 1, 1) for part in (queries, items)
        )
        labels = torch.arange(ITEMS) % 2
    with torch.no_grad():
        embeddings = unit(model(items).double())
        nearest = (unit(model(queries).double()) @ embeddings.T).argmax(1)
    return model, (queries, labels[nearest]), (items, labels), embeddings


@pytest.mark.slow
@pytest.mark.parametrize(
    ("norm", "eps", "shape", "parts"),
    [
        ("Linf", 0.1, ROW, 6),
        ("L2", 0.12, ROW, 6),
        ("L1", 0.15, ROW, 6),
        ("L0", 1, PLANE, 10),
        ("patch", 1, PLANE, 10),
    ],
)
def test_what_a_grid_breaks_is_not_robust(norm, eps, shape, parts):
    broken = robust = 0
    for seed in range(2):
        model, (queries, labels), gallery, embeddings = problem(seed, shape)
        report = evaluate_robustness(
            model,
            (queries, labels),
            gallery,
            eps=eps,
            norm=norm,
            attacks=["margin", "targeted", "shift"],
            checks=False,
            recall_at=(1,),
        )
        stands = torch.stack([decode_flags(found.robust_flags) for found in report.attacks]).all(0)
        for i in range(QUERIES):
            points = grid_of(queries[i], eps, norm, parts)
            margin = highest_margin(model, points, labels[i], embeddings, gallery[1])
            broken, robust = broken + (margin > 0), robust + bool(stands[i])
            if margin > 1e-6:
                assert not stands[i], f"seed {seed}, query {i}: margin {margin}"
    assert broken >= 5
    assert robust >= 5
