"""How copies may stand in a loss, and whether rows meet in it: asked from the loss itself, hardly ever from its name.

Losses are asked on a batch in which nothing is degenerate, not on the one at hand: with few tuples, or classes of
equal size, a loss may give one value for every plan.

What flows through one training step: a `Batch` in, an `Adversarial` out.

Who is perturbed: which batch rows get adversarial copies, and where the copies stand.

A batch row is not a tuple member: one row is the anchor of some tuples and the negative of others. To
perturb a *role*, the row gets a copy, and only the tuples in which it plays the role are readdressed to
that copy. Copies are numbered after the ``N`` clean rows: copy ``m`` has the address ``N + m``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from ..errors import PlanError


def all_triplets(labels: Tensor) -> IndicesTuple:
    """Those of PML, in its order, in memory that grows with their number and not with the cube of the rows."""
    number = torch.arange(len(labels), device=labels.device)
    same = labels[:, None] == labels
    anchor, positive = (same & (number[:, None] != number)).nonzero(as_tuple=True)
    _, negative = (~same).nonzero(as_tuple=True)  # row by row: those of an anchor stand side by side
    of_anchor = (~same).sum(1)
    of_pair = of_anchor[anchor]
    pair = torch.repeat_interleave(of_pair)
    first = (of_anchor.cumsum(0) - of_anchor)[anchor] - (of_pair.cumsum(0) - of_pair)
    return anchor[pair], positive[pair], negative[torch.arange(len(pair), device=labels.device) + first[pair]]


IndicesTuple = tuple[Tensor, ...]
"""PML's tuples: triplets ``(a, p, n)`` or pairs ``(a1, p, a2, n)``, one long tensor per member."""

ROLES = ("anchor", "positive", "negative")
MEMBERS = {3: ("anchor", "positive", "negative"), 4: ("anchor", "positive", "anchor", "negative")}


def checked_tuples(indices_tuple: Any, num_anchors: int, num_partners: int) -> IndicesTuple:
    """What a caller gave as tuples, if it is what PML's miners return.

    Args:
        indices_tuple: three or four index tensors.
        num_anchors: rows that an anchor may name.
        num_partners: rows that a positive or negative may name.

    Raises:
        PlanError: it has another form, or names rows that do not exist.
    """
    members = tuple(indices_tuple) if isinstance(indices_tuple, tuple | list) else (indices_tuple,)
    if not _well_formed(members):
        found = [f"{m.dtype} {tuple(m.shape)}" if isinstance(m, Tensor) else type(m).__name__ for m in members]
        raise PlanError(
            f"indices_tuple is {', '.join(found)}; expected torch.long tensors of one dimension, (anchors, positives, "
            "negatives) of one length or (anchors, positives, anchors, negatives) of two, as PML's miners return them."
        )
    limits = [num_anchors if name == "anchor" else num_partners for name in MEMBERS[len(members)]]
    outside = [((m < 0) | (m >= limit)).any() for m, limit in zip(members, limits, strict=True)]
    if torch.stack(outside).any():
        raise PlanError(
            f"indices_tuple names rows from {min(int(m.min()) for m in members if len(m))} to "
            f"{max(int(m.max()) for m in members if len(m))}; expected anchors below {num_anchors}, positives and "
            f"negatives below {num_partners}. Mine in the batch that the loss is called with."
        )
    return members


def parse_roles(perturb: str | Iterable[str]) -> tuple[str, ...]:
    """One or several role names, or "all", as a tuple of roles in a fixed order.

    Raises:
        PlanError: a name is not a role.
    """
    names = {perturb} if isinstance(perturb, str) or not isinstance(perturb, Iterable) else set(perturb)
    unknown = names - {*ROLES, "all"}
    if unknown or not names:
        raise PlanError(
            f"perturb={perturb!r}: found {sorted(map(str, unknown)) or 'no role'}, expected one or several of "
            f"{', '.join(map(repr, ROLES))}, or 'all'."
        )
    return ROLES if "all" in names else tuple(role for role in ROLES if role in names)


def keep_tuples(indices_tuple: IndicesTuple, tuples_per_anchor: int) -> IndicesTuple:
    """At most ``tuples_per_anchor`` tuples of each anchor (of pairs: of each kind), chosen at random."""
    kept: list[Tensor] = []
    for members in (indices_tuple,) if len(indices_tuple) == 3 else (indices_tuple[:2], indices_tuple[2:]):
        shuffled = torch.randperm(len(members[0]), device=members[0].device)
        chosen = shuffled[rank_in_group(members[0][shuffled]) < tuples_per_anchor].sort().values
        kept += [member[chosen] for member in members]
    return tuple(kept)


def rank_in_group(values: Tensor) -> Tensor:
    """How many equal values stand before each value: ``[7, 3, 7, 7] -> [0, 0, 1, 2]``."""
    order = torch.argsort(values, stable=True)
    grouped = values[order]
    position = torch.arange(len(values), device=values.device)
    starts = torch.ones_like(values, dtype=torch.bool)
    starts[1:] = grouped[1:] != grouped[:-1]
    first = torch.where(starts, position, 0).cummax(0).values if len(values) else position
    return torch.empty_like(position).scatter_(0, order, position - first)


def _well_formed(members: tuple[Any, ...]) -> bool:
    if not all(isinstance(m, Tensor) and m.ndim == 1 and m.dtype == torch.long for m in members):
        return False
    lengths = [len(m) for m in members]
    return (len(lengths) == 3 and len({*lengths}) == 1) or (len(lengths) == 4 and lengths[::2] == lengths[1::2])


def played(indices_tuple: IndicesTuple, roles: Iterable[str]) -> list[Tensor]:
    """The members of the tuples that play one of the roles."""
    wanted = set(roles)
    names = MEMBERS[len(indices_tuple)]
    return [member for member, name in zip(indices_tuple, names, strict=True) if name in wanted]


def shift_partners(indices_tuple: IndicesTuple, by: int) -> IndicesTuple:
    """Positives and negatives moved by ``by`` rows: between PML's count of a reference and the batch's."""
    return map_members(indices_tuple, lambda role, member: member if role == "anchor" else member + by)


def map_members(indices_tuple: IndicesTuple, renumber: Callable[[str, Tensor], Tensor]) -> IndicesTuple:
    """The same tuples with other numbers: ``renumber`` is told a role and the rows that play it."""
    names = MEMBERS[len(indices_tuple)]
    return tuple(renumber(name, member) for name, member in zip(names, indices_tuple, strict=True))
