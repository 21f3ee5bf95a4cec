"""What do properties of the model, and lower precision in the attack, change in the time of a step?

A step of `AdversarialLoss` with the option and one without, in turn. "compiled, no attack" compares a training step of
the wrapped loss alone: where that is slower, so is ours. Compilation itself is not timed; it takes minutes.

    python -m pytest benchmarks/test_options.py --no-cov -p no:cacheprovider

Nothing here asserts a time.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from benchmarks.measure import compared, paired
from benchmarks.test_step import Bench, Case, every_case
from pml_adversarial.attacks.autocast import Autocast


def channels_last(bench: Bench) -> None:
    bench.model.to(memory_format=torch.channels_last)
    bench.images = bench.images.contiguous(memory_format=torch.channels_last)


def bfloat16_attack(bench: Bench) -> None:
    bench.wrap(Autocast(bench.attack))


def compiled(bench: Bench) -> None:
    bench.model = torch.compile(bench.model)
    bench.wrap(bench.attack)


def without_attack(bench: Bench) -> Tensor:
    loss: Tensor = bench.loss(bench.model(bench.images), bench.labels)
    loss.backward()
    return loss.detach()


OPTIONS: dict[str, tuple[Callable[[Bench], None], Callable[[Bench], Tensor]]] = {
    "channels last": (channels_last, Bench.library),
    "attack in bfloat16": (bfloat16_attack, Bench.library),
    "compiled": (compiled, Bench.library),
    "compiled, no attack": (compiled, without_attack),
}
"""What is changed, and the step that is timed."""


@every_case
@pytest.mark.parametrize("option", OPTIONS)
def test_option(benchmark, case: Case, option: str) -> None:
    if "compiled" in option and (benchmark.disabled or not shutil.which("g++")):
        pytest.skip("compiles for minutes, with a C++ compiler")
    (change, step), changed = OPTIONS[option], Bench(case)
    change(changed)
    with_it, without = partial(step, changed), partial(step, Bench(case))
    for _ in range(2):  # compilers see a frozen model and a trainable one
        with_it()
    benchmark.group = "step with an option / without"
    pairs = 1 if benchmark.disabled else case.pairs // 4
    times = benchmark.pedantic(paired, args=(with_it, without, pairs), rounds=1)
    benchmark.extra_info.update(case=f"{option}, {case.name}", **compared(times))
