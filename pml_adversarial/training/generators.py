"""Random number generators that a model holds itself: those of torch, of NumPy and of Python."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy
import torch

GENERATORS = (
    torch.Generator,
    numpy.random.Generator,
    numpy.random.BitGenerator,
    numpy.random.RandomState,
    random.Random,
)
"""Their classes. `random.SystemRandom` is one of Python, too, and has no state."""


def state_of(generator: Any) -> Any:
    """Its present state."""
    if isinstance(generator, torch.Generator):
        return generator.get_state()
    if isinstance(generator, random.Random):
        return generator.getstate()
    if isinstance(generator, numpy.random.RandomState):
        return generator.get_state(legacy=False)
    return _bits(generator).state


def set_state(generator: Any, state: Any) -> None:
    """Gives it a state that `state_of` returned."""
    if isinstance(generator, torch.Generator):
        generator.set_state(state)
    elif isinstance(generator, random.Random):
        generator.setstate(state)
    elif isinstance(generator, numpy.random.RandomState):
        generator.set_state(state)
    else:
        _bits(generator).state = state


def seed(generator: Any, number: int) -> None:
    """Lets it begin anew from a seed."""
    if isinstance(generator, torch.Generator):
        generator.manual_seed(number)
    elif isinstance(generator, random.Random | numpy.random.RandomState):
        generator.seed(number)
    else:
        _bits(generator).state = type(_bits(generator))(number).state


@contextmanager
def begun_at(generators: Sequence[Any], states: Sequence[Any]) -> Iterator[None]:
    """Inside, generators go on from other states; afterwards from where they were."""
    before = list(map(state_of, generators))
    try:
        for generator, state in zip(generators, states, strict=True):
            set_state(generator, state)
        yield
    finally:
        for generator, state in zip(generators, before, strict=True):
            set_state(generator, state)


def _bits(generator: Any) -> Any:
    return generator.bit_generator if isinstance(generator, numpy.random.Generator) else generator
