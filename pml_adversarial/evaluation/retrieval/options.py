"""Checks of what a user passes to an evaluation. What they refuse is an `InputError`."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Sequence
from numbers import Integral
from typing import Any

import numpy
import torch
from torch import Tensor

from ...attacks.ball import COUNTS, channel_dim, check_channels_first
from ...attacks.ball import NORMS as NORMS
from ...errors import InputError
from ...training.pixels import is_number

JUNK = -1  #: Label of items that are never found, as in Market-1501.


def check_probability(name: str, value: float) -> None:
    """Refuses what is not strictly between 0 and 1."""
    if not isinstance(value, int | float) or not 0 < value < 1:
        raise InputError(f"{name}={value!r}; expected a probability between 0 and 1, such as 0.001.")


def to_radii(eps: float | Iterable[float], norm: str, zero: bool = False, name: str = "eps") -> tuple[float, ...]:
    """One or more different radii, ascending: in pixels of [0, 1], or whole numbers in "L0" and "patch".

    In Linf none is above 1. 0 needs ``zero``.
    """
    has_dimensions = getattr(eps, "ndim", True)  # a tensor without dimensions is one number
    given: Iterable[Any] = eps if isinstance(eps, Iterable) and has_dimensions else [eps]
    try:
        radii = tuple(sorted({float(radius) for radius in given}))
    except (TypeError, ValueError):
        radii = ()
    has_bool = any(isinstance(radius, bool) for radius in given) if isinstance(eps, list | tuple) else False
    if (
        isinstance(eps, str | bool)
        or has_bool
        or not radii
        or not all(0 < r < math.inf or (zero and r == 0) for r in radii)
    ):
        smallest = "0 or larger" if zero else "above 0"
        raise InputError(f"{name}={eps!r}; expected one or more radii {smallest} {_UNITS[norm]}.")
    if norm in COUNTS and not all(radius.is_integer() for radius in radii):
        raise InputError(f"{name}={eps!r}; expected whole numbers from 1 on {_UNITS[norm]}, in norm={norm!r}.")
    if norm == "Linf" and radii[-1] > 1:
        raise InputError(f"{name}={radii[-1]:g} is wider than all pixels; expected 1 at most in Linf, such as 8/255.")
    return radii


_UNITS = {
    "Linf": "in pixels of [0, 1], such as 8/255",
    "L2": "in pixels of [0, 1], such as 0.25",
    "L1": "in pixels of [0, 1], such as 2",
    "L0": "of pixels that change, such as 10",
    "patch": "as the side of a square of pixels, such as 5",
}


def largest_radius(norm: str, shape: Sequence[int]) -> float:
    """The radius beyond which the ball around an image of a shape, such as ``(C, H, W)``, holds nothing more.

    For a patch it is the shorter side: no larger square fits.
    """
    values = math.prod(shape)
    if norm == "patch":
        return min(shape[-2:])
    if norm == "L0":
        channels = channel_dim(shape)
        return values if channels is None else values // shape[channels]
    return {"Linf": 1, "L2": math.sqrt(values), "L1": values}[norm]


def check_radii(radii: Iterable[float], norm: str, shape: Sequence[int]) -> None:
    """Refuses radii beyond `largest_radius`, and images whose channels are last where this matters."""
    check_channels_first(shape, norm)
    largest = largest_radius(norm, shape)
    for radius in radii:
        if radius > largest:
            raise InputError(
                f"eps={radius:g} in norm={norm!r} is wider than images of shape {tuple(shape)}; expected "
                f"{largest:.6g} at most. {_CAUSES[norm]}"
            )


_LEVELS = "Is it in levels of 0..255 (then divide it by 255), or meant in another norm?"
_CAUSES = {
    **dict.fromkeys(("Linf", "L2", "L1"), _LEVELS),
    "L0": "eps counts positions, all channels of one together. Is it meant in another norm?",
    "patch": "eps is the side of the square in pixels. Is it its area, or meant in another norm?",
}


def to_seed(seed: Any) -> int:
    """A whole number; refuses anything else."""
    if isinstance(seed, bool) or not isinstance(seed, Integral):
        raise InputError(f"seed={seed!r}; expected a whole number.")
    return int(seed)


def to_recall_at(values: Any) -> list[int]:
    """The k of R@k, whole numbers from 1 on, ascending; 1 is always among them."""
    found = sorted({1, *to_whole_numbers(values, "recall_at")})
    if found[0] < 1:
        raise InputError(f"recall_at={values!r}; expected whole numbers from 1 on.")
    return found


def to_whole_numbers(values: Any, name: str) -> list[int]:
    """Whole numbers from a list, a range, an array or a tensor; refuses anything else."""
    try:
        found = torch.as_tensor(values if hasattr(values, "dtype") else list(values))
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"{name}={values!r}; expected whole numbers, in a list or a tensor.") from error
    if found.ndim != 1 or (
        len(found) and (found.dtype == torch.bool or found.is_floating_point() or found.is_complex())
    ):
        raise InputError(
            f"{name} is {found.dtype} of shape {tuple(found.shape)}; expected whole numbers, in a list or a tensor."
        )
    return [int(value) for value in found.tolist()]


def as_numbers(pair: Any) -> list[float | list[float]]:
    """Two numbers, or two lists of numbers, in types that JSON knows."""
    return [float(part) if is_number(part) else [float(value) for value in part] for part in pair]


def description_of_mask(mask: Any) -> str | None:
    """What tells one mask from another: the hash of its values, or the name of the function."""
    if mask is None or callable(mask):
        return None if mask is None else getattr(mask, "__qualname__", type(mask).__qualname__)
    try:
        return digest_of([torch.as_tensor(mask)])
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(
            f"A mask is {type(mask).__name__}, {error}; expected torch.bool (Q, G), or a function."
        ) from error


def settings_of_inputs(normalization: Any, bounds: Any) -> dict[str, Any]:
    """Both in types that JSON knows, for a report."""
    return {
        "normalization": None if normalization is None else [list(map(float, part)) for part in normalization],
        "bounds": None if bounds is None else as_numbers(bounds),
    }


def digest_of(tensors: Iterable[Tensor]) -> str:
    """The SHA-256 of the values of tensors, one after the other."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def to_mask(mask: Any, rows: Tensor, shape: tuple[int, int], name: str) -> Tensor | None:
    """``(n, G)`` bool for the queries ``rows`` ``(n,)``; None: there is no mask.

    Args:
        mask: of all queries, ``shape`` ``(Q, G)``, or a function of the indices of some.
        rows: indices of the queries that are asked for.
        shape: how many queries and items there are.
        name: of the mask in messages.
    """
    if mask is None:
        return None
    is_function = callable(mask)
    found = _asked(mask, rows, name) if is_function else mask
    try:
        part = torch.as_tensor(found)
    except (TypeError, ValueError, RuntimeError):
        part = None
    expected = (len(rows), shape[1]) if is_function else shape
    if part is None or part.dtype != torch.bool or tuple(part.shape) != expected:
        shown = type(found).__name__ if part is None else f"{part.dtype} of shape {tuple(part.shape)}"
        whose = "of the indices that it was given" if is_function else "of all queries, also of those not in subset"
        raise InputError(
            f"{name} gives {shown}; expected torch.bool {expected}: for each query {whose}, which items of the "
            "gallery are meant. It may be a mask of all queries, or a function of their indices."
        )
    return (part if is_function else part[rows.to(part.device)]).to(rows.device)


def _asked(mask: Any, rows: Tensor, name: str) -> Any:
    """What a function gives for some queries. It is never asked for one alone, which numpy takes as a number."""
    asked = rows.repeat(2) if len(rows) == 1 else rows.clone()
    try:
        found = mask(asked)
        return found[:1] if len(rows) == 1 and len(found) == 2 else found
    except Exception as error:
        raise InputError(
            f"{name} fails for the indices of {len(asked)} queries, with {type(error).__name__}: {error}. Expected a "
            "function of a tensor of indices; numpy arrays take queries.numpy()."
        ) from error


def to_tensor(values: Any) -> Tensor:
    """A tensor of numbers in any form: a tensor, an array of any layout, a column of a table, a list.

    Raises:
        TypeError, ValueError, RuntimeError: these are no numbers.
    """
    if isinstance(values, Tensor) or not hasattr(values, "__array__"):
        return torch.as_tensor(values)
    array = numpy.asarray(values)
    if array.dtype.kind == "O":
        return torch.as_tensor(array if array.ndim > 1 else array.tolist())  # a list of labels, but not of images
    wide = numpy.dtype("i8") if array.dtype.kind == "u" and array.dtype.itemsize > 1 else array.dtype
    return torch.as_tensor(numpy.require(array, wide.newbyteorder("="), ["C", "W"]))


def to_embeddings(embeddings: Any) -> Tensor:
    """A tensor ``(G, D)`` from a tensor, an array, or a list of rows."""
    try:
        if isinstance(embeddings, list | tuple) and all(isinstance(part, Tensor) for part in embeddings):
            return torch.stack(list(embeddings)).detach()
        return to_tensor(embeddings).detach()
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(
            f"gallery_embeddings is {type(embeddings).__name__}; expected a tensor or an array (G, D)."
        ) from error


def to_rows(subset: Any, total: int) -> Tensor:
    """Different indices ``(n,)`` below ``total``, one at least; None: all of them."""
    everyone = torch.arange(total)
    rows = everyone if subset is None else everyone.new_tensor(to_whole_numbers(subset, "subset"))
    if not len(rows) or not torch.isin(rows, everyone).all() or len(rows.unique()) < len(rows):
        raise InputError(f"subset={rows.tolist()[:8]}; expected different indices, one at least, below {total}.")
    return rows
