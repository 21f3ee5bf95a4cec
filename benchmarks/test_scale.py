"""What does an evaluation cost before a gallery as large as Stanford Online Products, in memory and per query?

The gallery holds 60,502 items of 11,316 classes in 512 dimensions. The model hardly costs anything: an image is its
embedding, a half taken off. What is timed is thus the search: similarities of queries and items, and what is made of
them. With a real model its own passes come on top.

    python -m pytest benchmarks/test_scale.py --no-cov -p no:cacheprovider

Nothing here asserts a time. Read the ratio of 512 to 256 queries, which are run right after one another: 2 is linear.
``python -m benchmarks.test_scale 256`` writes what one evaluation took as JSON, with its peak of memory.
"""

from __future__ import annotations

import json
import sys
import time
from functools import partial

import pytest
import torch
import torchattacks
from torch import Tensor, nn

from benchmarks.measure import DEVICE, compared, paired, peak
from pml_adversarial.evaluation import Report, evaluate_robustness
from pml_adversarial.evaluation.attacks.gradients import (
    classifier_attack,
    gradient_attack,
    margin_score,
    nearest_wrong,
    promotion,
)
from pml_adversarial.evaluation.attacks.kinds import GalleryAttack, QueryAttack, RetrievalAttack
from pml_adversarial.evaluation.retrieval.gallery import Gallery

ITEMS, CLASSES, SHAPE, EPS, PAIRS = 60_502, 11_316, (1, 16, 32), 0.02, 3


class Pixels(nn.Module):
    """The embedding of an image is its pixels, less a half: what is precomputed can be attacked so."""

    middle: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("middle", torch.tensor(0.5))  # says on which device to evaluate

    def forward(self, images: Tensor) -> Tensor:
        """``(N, 1, 16, 32)`` -> ``(N, 512)``."""
        return images.flatten(1) - self.middle


def gallery() -> tuple[Tensor, Tensor]:
    """Images around one pattern per class, made in place, so that their making needs no memory beyond them."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(ITEMS) % CLASSES
    patterns = torch.rand(CLASSES, *SHAPE, generator=generator)
    images = torch.empty(ITEMS, *SHAPE).normal_(0, 0.5, generator=generator)
    for start in range(0, ITEMS, CLASSES):
        part = images[start : start + CLASSES]
        part += patterns[: len(part)]
    return images.clamp_(0, 1), labels


def attacks(steps: int = 5) -> tuple[RetrievalAttack, ...]:
    """One of each kind: on the query by its margin, on the query as a class, on the gallery."""
    apgd = classifier_attack(partial(torchattacks.APGD, steps=steps))
    return (
        QueryAttack("margin", gradient_attack(margin_score, steps)),
        QueryAttack("apgd-ce", apgd),
        GalleryAttack("promote", nearest_wrong, promotion, steps),
    )


def evaluate(data: tuple[Tensor, Tensor], queries: int, steps: int = 5) -> Report:
    """The first queries before all items."""
    return evaluate_robustness(
        Pixels().to(DEVICE), data, eps=EPS, attacks=attacks(steps), subset=range(queries), checks=False, batch_size=128
    )


def measure(queries: int) -> dict[str, float]:
    """One evaluation: the memory that it needed beyond the data, its passes and its time."""
    data = gallery()
    before, start = peak(), time.perf_counter()
    report = evaluate(data, queries)
    return {
        "extra_bytes": peak() - before,
        "seconds": time.perf_counter() - start,
        "forward_passes": sum(result.forward_passes for result in report.attacks),
        "backward_passes": sum(result.backward_passes for result in report.attacks),
        "recall_at_1": report.clean["recall_at_1"],
        "worst_case": report.worst_case(EPS),
    }


@pytest.fixture(scope="module")
def data() -> tuple[Tensor, Tensor]:
    return gallery()


@pytest.fixture(scope="module")
def searched(data: tuple[Tensor, Tensor]) -> Gallery:
    return Gallery(Pixels()(data[0]), data[1])


def test_cost_is_linear_in_the_queries(benchmark, data, capsys, pytestconfig) -> None:
    pairs = 1 if benchmark.disabled else PAIRS
    sides = (lambda: evaluate(data, 512), lambda: evaluate(data, 256))
    benchmark.group = "evaluation: 512 / 256 queries before 60,502 items"
    found = compared(benchmark.pedantic(paired, args=(*sides, pairs), rounds=1))
    benchmark.extra_info.update(case="three attacks of 5 steps", **found)
    with capsys.disabled():
        pytestconfig.pluginmanager.get_plugin("terminalreporter").write_line(
            f"\n512 / 256 queries: {found['ratio']:.2f} times as long (median of {pairs} pairs)"
        )


@pytest.mark.parametrize("items", [1_000, 4_000, 16_000, ITEMS])
def test_queries_per_second(benchmark, data, items: int) -> None:
    rows = (data[1] < -(-items // 5)).nonzero().squeeze(1)[:items]  # five of each class
    part = data[0][rows], data[1][rows]
    benchmark.group = "evaluation: 64 queries, three attacks of 5 steps"
    benchmark.pedantic(evaluate, args=(part, 64), rounds=1 if benchmark.disabled else 3)
    if not benchmark.disabled:
        benchmark.extra_info.update(case=f"{items:,} items", queries_per_second=64 / benchmark.stats.stats.median)


@pytest.mark.parametrize("side", ["nearest wrong and right item", "product alone", "faiss, two nearest items"])
def test_nearest_wrong_and_right(benchmark, data, searched: Gallery, side: str) -> None:
    """128 queries: the nearest wrong and right item, beside the bare product and faiss's exact search for two items."""
    rows = torch.arange(128)
    queries, targets = searched.embeddings[rows], searched.leave_one_out(rows)
    benchmark.group = "128 queries before 60,502 items"
    benchmark.extra_info["case"] = side
    if side == "nearest wrong and right item":
        benchmark.pedantic(searched.margin, args=(queries, targets), rounds=5, warmup_rounds=1)
    elif side == "product alone":
        benchmark.pedantic(lambda: queries @ searched.embeddings.T, rounds=5, warmup_rounds=1)
    else:
        faiss = pytest.importorskip("faiss")
        index = faiss.IndexFlatIP(searched.embeddings.shape[1])
        index.add(searched.embeddings.numpy())
        benchmark.pedantic(index.search, args=(queries.numpy(), 2), rounds=5, warmup_rounds=1)


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.stdout.write(json.dumps(measure(int(sys.argv[1]))) + "\n")
