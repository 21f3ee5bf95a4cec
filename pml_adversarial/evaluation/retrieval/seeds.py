"""Models that seed global random number generators whenever they are called: attacks would draw the same each time."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy
import torch
from torch import Tensor

_STATES: dict[str, tuple[Callable[[], Any], Callable[[Any], object]]] = {
    "torch": (torch.get_rng_state, torch.set_rng_state),
    "cuda": (torch.cuda.get_rng_state_all, torch.cuda.set_rng_state_all),
    "numpy": (numpy.random.get_state, numpy.random.set_state),
    "random": (random.getstate, random.setstate),
}
"""Each generator: what gives its state, and what sets it."""


def states_of_generators() -> dict[str, Any]:
    """The state of each generator, in lists and numbers, which can be compared."""
    names = [name for name in _STATES if name != "cuda" or torch.cuda.is_initialized()]
    return {name: _plain(_STATES[name][0]()) for name in names}


def seeded(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """The generators that a call seeds, by their states after two calls that began in different ones."""
    return [name for name in one if one[name] == other.get(name)]


@contextmanager
def generators_kept(names: Iterable[str]) -> Iterator[None]:
    """Restores some generators on exit; all others go on."""
    before = {name: _STATES[name][0]() for name in names}
    try:
        yield
    finally:
        for name, state in before.items():
            _STATES[name][1](state)


def _plain(state: Any) -> Any:
    if isinstance(state, Tensor | numpy.ndarray):
        return state.tolist()
    return list(map(_plain, state)) if isinstance(state, list | tuple) else state
