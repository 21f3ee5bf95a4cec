"""The tuples of pytorch-metric-learning (PML): triplets and pairs of row indices, and what is done with them.

All functions here are pure. A batch row is not a member of a tuple: one row may be the anchor of some tuples and the
negative of others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from torch import Tensor

from ..errors import PlanError

IndicesTuple = tuple[Tensor, ...]
"""PML's tuples: triplets ``(a, p, n)`` or pairs ``(a1, p, a2, n)``, one long tensor per member."""

Role = Literal["anchor", "positive", "negative", "all"]
"""The part that a row plays in a tuple; "all" names each of them."""

ROLES: tuple[Role, ...] = ("anchor", "positive", "negative")
MEMBERS = {3: ("anchor", "positive", "negative"), 4: ("anchor", "positive", "anchor", "negative")}


def all_triplets(labels: Tensor) -> IndicesTuple:
    """All triplets of the labels ``(N,)``, in PML's order.

    Unlike PML's own function, it needs memory for the triplets alone, not for ``N ** 3`` candidates.
    """
    number = torch.arange(len(labels), device=labels.device)
    same = labels[:, None] == labels
    anchor, positive = (same & (number[:, None] != number)).nonzero(as_tuple=True)
    _, negative = (~same).nonzero(as_tuple=True)  # sorted by anchor
    of_anchor = (~same).sum(1)
    of_pair = of_anchor[anchor]
    pair = torch.repeat_interleave(of_pair)
    first = (of_anchor.cumsum(0) - of_anchor)[anchor] - (of_pair.cumsum(0) - of_pair)
    return anchor[pair], positive[pair], negative[torch.arange(len(pair), device=labels.device) + first[pair]]


def checked_tuples(indices_tuple: Any, num_anchors: int, num_partners: int) -> IndicesTuple:
    """The tuples that a caller gave, after a check that PML's miners could have returned them.

    Args:
        indices_tuple: three or four index tensors.
        num_anchors: rows that an anchor may name.
        num_partners: rows that a positive or negative may name.

    Raises:
        PlanError: the tuples have another form, or name rows that do not exist.
    """
    members = tuple(indices_tuple) if isinstance(indices_tuple, tuple | list) else (indices_tuple,)
    if not _well_formed(members):
        found = [f"{m.dtype} {tuple(m.shape)}" if isinstance(m, Tensor) else type(m).__name__ for m in members]
        raise PlanError(
            f"indices_tuple is {', '.join(found)}; expected torch.long tensors of one dimension, (anchors, positives, "
            "negatives) of one length or (anchors, positives, anchors, negatives) of two, as PML's miners return them. "
            "If they are something else to your loss, such as the clusters of ManifoldLoss, pass them as labels, to a "
            "module whose forward(embeddings, labels) calls loss(embeddings, indices_tuple=labels)."
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


def parse_roles(perturb: str | Iterable[str]) -> tuple[Role, ...]:
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
