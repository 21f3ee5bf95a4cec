"""Who is perturbed: which rows of the batch get adversarial copies, and where the copies stand.

To perturb a *role*, a row gets a copy, and the tuples in which the row plays the role are re-pointed to the copy. Other
tuples keep naming the clean row. The clean rows and the copies together are the pool: the ``N`` clean rows have the
pool indices 0 to ``N - 1``, copy ``m`` has the pool index ``N + m``.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass, replace
from functools import cache
from inspect import Parameter, signature
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from ..errors import PlanError
from .batch import Batch
from .tuples import MEMBERS, IndicesTuple, played, rank_in_group, shift_partners

_OF_PML = ("embeddings", "labels", "indices_tuple", "ref_emb", "ref_labels")


def consecutive(start: int, stop: int, device: torch.device) -> Tensor:
    """``start, start + 1, ..., stop - 1`` as a tensor that `as_slice` recognises."""
    numbers = torch.arange(start, stop, device=device)
    numbers.consecutive_from = start  # type: ignore[attr-defined]
    return numbers


def as_slice(rows: Tensor) -> slice | None:
    """The same rows as a slice, if `consecutive` made them; else None.

    The tensor itself carries the mark, so that nobody has to look at its values and wait for the device.
    """
    start = getattr(rows, "consecutive_from", None)
    return None if start is None else slice(start, start + len(rows))


def take(values: Tensor, rows: Tensor) -> Tensor:
    """``values[rows]``, without an operation where these are all of the values, in order."""
    part = as_slice(rows)
    if part is None:
        return values[rows]
    return values if part == slice(0, len(values)) else values[part]


def attackable_rows(batch: Batch) -> Tensor:
    """``(P,)`` the rows of a batch that can be perturbed."""
    if batch.known_rows is not None:
        return batch.known_rows
    return consecutive(0, batch.num_attackable, batch.embeddings.device)


def call(loss: Callable[..., Any], *arguments: Any) -> Any:
    """Calls a loss with ``embeddings, labels`` and what PML's losses take after them.

    What follows the labels is left out if all of it is None and the loss takes less: a loss of one's own may be
    ``forward(embeddings, labels)``.

    Raises:
        PlanError: there are tuples or a reference, and the loss does not take them.
    """
    limit = _num_arguments(cast(Hashable, type(loss))) if isinstance(loss, nn.Module) else len(arguments)
    if all(argument is None for argument in arguments[2:]):
        return loss(*arguments[:limit])
    if limit is not None and len(arguments) > limit:
        given = [name for name, value in zip(_OF_PML, arguments, strict=False) if value is not None]
        raise PlanError(
            f"{type(loss).__name__} takes {limit} arguments, and there are {', '.join(given)}. Leave out the miner, "
            "the reference or the plugin that brings them, or let the loss's forward take what PML's losses take: "
            f"{', '.join(_OF_PML)}."
        )
    return loss(*arguments)


@cache
def _num_arguments(kind: Any) -> int | None:
    """How many positional arguments ``forward`` takes; None: any number."""
    parameters = [*signature(kind.forward).parameters.values()][1:]
    if any(p.kind is Parameter.VAR_POSITIONAL for p in parameters):
        return None
    return sum(p.kind in (Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD) for p in parameters)


def clean_loss(wrapped: Callable[..., Tensor], batch: Batch) -> Tensor:
    """The wrapped loss of the unperturbed batch, with gradient: what the caller would have had without the wrapper."""
    loss: Tensor = untouched(batch, batch.indices_tuple).evaluate(wrapped, batch, batch.embeddings[:0])
    return loss


def untouched(batch: Batch, tuples: IndicesTuple | None) -> Plan:
    """The plan that perturbs no row."""
    none = torch.empty(0, dtype=torch.long, device=batch.embeddings.device)
    return Plan(none, consecutive(0, batch.num_rows, none.device), tuples).split(batch.num_queries)


SharesCopy = Callable[[str, Tensor], Tensor]
"""Role and members ``(T,)`` -> keys ``(T,)``; members with equal keys share one copy."""


class Pool(NamedTuple):
    """The rows that a loss may see, from a place in the pool on, and their labels."""

    start: int
    embeddings: Tensor
    labels: Tensor | None


@dataclass(frozen=True, eq=False)
class Plan:
    """Which rows are perturbed, and where their copies stand.

    Attributes:
        rows: ``(M,)`` rows of the batch, one per copy; a row may have several copies (one per role or tuple).
        pool_indices: ``(K,)`` the rows that the loss sees, as places in the pool: clean rows first, then the copies.
        indices_tuple: tuples that count in the ``K`` rows; None: the loss forms its own.
        ref_pool_indices: ``(R,)`` the rows that the loss sees as reference, as places in the pool; None: no reference.
        keeps_clean: whether training sees the clean rows beside the perturbed ones.

    Example:
        >>> triplets = torch.tensor([0]), torch.tensor([1]), torch.tensor([2])
        >>> plan = plan_roles(triplets, ["positive"], num_rows=3)
        >>> plan.rows, plan.indices_tuple[1]  # as a positive, row 1 is copy 0, which has the pool index 3
        (tensor([1]), tensor([3]))
    """

    rows: Tensor
    pool_indices: Tensor
    indices_tuple: IndicesTuple | None
    ref_pool_indices: Tensor | None = None
    keeps_clean: bool = False

    def __len__(self) -> int:
        return len(self.rows)

    def rows_of(self, values: Tensor) -> Tensor:
        """``(M, ...)`` the values of the perturbed rows, out of values ``(N, ...)`` of all rows of the batch."""
        return take(values, self.rows)

    def replaces(self, num_rows: int) -> bool:
        """Whether the loss sees as many rows as the batch has: copies stand in place of their rows."""
        return len(self.pool_indices) + (0 if self.ref_pool_indices is None else len(self.ref_pool_indices)) == num_rows

    def evaluate(self, loss: Callable[..., Any], batch: Batch, adversarial: Tensor) -> Any:
        """Calls a loss with PML's signature on the rows of the plan.

        Args:
            loss: called with embeddings, labels and tuples, and with the reference where the plan has one.
            batch: gives the clean rows and their labels.
            adversarial: ``(M, D)`` embeddings of the copies.

        Returns:
            What the loss returns.
        """
        pool = self._pool(batch, adversarial)
        queries, labels = _seen(pool, self.pool_indices)
        if self.ref_pool_indices is None:
            return call(loss, queries, labels, self.indices_tuple)
        reference, ref_labels = _seen(pool, self.ref_pool_indices)
        if batch.shared_labels and len(reference) == len(queries):
            ref_labels = labels  # PML looks whether both are one tensor
        return call(loss, queries, labels, self.indices_tuple, reference, ref_labels)

    def _pool(self, batch: Batch, adversarial: Tensor) -> Pool:
        """The clean rows and the copies; without the clean rows where the loss sees copies alone."""
        clean, labels = batch.embeddings, batch.labels
        labels_of_copies = None if labels is None else self.rows_of(labels)
        if self.ref_pool_indices is None and as_slice(self.pool_indices) == slice(len(clean), len(clean) + len(self)):
            return Pool(len(clean), adversarial, labels_of_copies)
        if not len(self):
            return Pool(0, clean, labels)
        if self.ref_pool_indices is None and len(self.pool_indices) == len(self) == len(clean):
            clean = clean.detach()  # each row is replaced: spares a backward pass that would carry zeros
        labels = None if labels is None else torch.cat([labels, cast(Tensor, labels_of_copies)])
        return Pool(0, torch.cat([clean, adversarial]), labels)

    def members(self, clean: Tensor, adversarial: Tensor) -> tuple[Tensor, ...]:
        """The rows ``(T, D)`` that stand in each place of the tuples, from ``(N, D)`` clean and ``(M, D)`` of copies.

        Raises:
            PlanError: the plan leaves the tuples to the loss.
        """
        if self.indices_tuple is None:
            raise PlanError("The plan has no tuples; expected one made from triplets or pairs.")
        pool = torch.cat([clean, adversarial.to(clean.dtype)])
        partners = self.pool_indices if self.ref_pool_indices is None else self.ref_pool_indices
        names = MEMBERS[len(self.indices_tuple)]
        return tuple(
            pool[(self.pool_indices if name == "anchor" else partners)[member]]
            for member, name in zip(self.indices_tuple, names, strict=True)
        )

    def beside_clean(self, num_rows: int) -> Plan:
        """Of a plan that replaces rows, the plan in which the copies stand beside the rows that they replace.

        Each member of a tuple is once the row and once its copy, in all combinations: one triplet of three rows that
        all have copies becomes eight triplets.
        """
        copies = slice(num_rows, num_rows + len(self))
        if self.indices_tuple is None and self.ref_pool_indices is None and as_slice(self.pool_indices) == copies:
            return Plan(self.rows, consecutive(0, copies.stop, self.rows.device), None)
        pool_rows, replaced = self.pool_rows(num_rows), self.pool_indices >= num_rows
        pool_indices = torch.cat([pool_rows[self.pool_indices], self.pool_indices[replaced]])
        if self.ref_pool_indices is None:
            ref_pool_indices, ref_replaced = None, replaced
        else:
            ref_replaced = self.ref_pool_indices >= num_rows
            ref_pool_indices = torch.cat([pool_rows[self.ref_pool_indices], self.ref_pool_indices[ref_replaced]])
        tuples = None
        if self.indices_tuple is not None:
            pairs = (
                [self.indices_tuple]
                if len(self.indices_tuple) == 3
                else [self.indices_tuple[:2], self.indices_tuple[2:]]
            )
            tuples = tuple(member for part in pairs for member in _clean_and_copied(part, replaced, ref_replaced))
        return Plan(self.rows, pool_indices, tuples, ref_pool_indices)

    def pool_rows(self, num_rows: int) -> Tensor:
        """``(N + M,)`` the batch row at each place of the pool: ``N`` clean rows, then the rows of the copies."""
        return torch.cat([torch.arange(num_rows, device=self.rows.device), self.rows])

    def keep(self, copies: Tensor, num_rows: int) -> Plan:
        """The same plan with some of the copies; in place of another copy its row stands, unperturbed.

        Args:
            copies: ``(K,)`` which of the ``M`` copies, in any order.
            num_rows: ``N``, the rows of the batch.
        """
        moved_to = self.pool_rows(num_rows)
        moved_to[num_rows + copies] = torch.arange(num_rows, num_rows + len(copies), device=self.rows.device)
        ref_pool_indices = None if self.ref_pool_indices is None else moved_to[self.ref_pool_indices]
        return replace(
            self, rows=self.rows[copies], pool_indices=moved_to[self.pool_indices], ref_pool_indices=ref_pool_indices
        )

    def only_named(self) -> Plan:
        """The same plan, of which the loss sees only rows that its tuples name; it needs tuples, and no reference."""
        members = cast(IndicesTuple, self.indices_tuple)
        named, member = torch.cat(members).unique(return_inverse=True)
        return Plan(self.rows, self.pool_indices[named], member.split([len(m) for m in members]))

    def to(self, device: torch.device | str) -> Plan:
        """The same plan on another device."""
        tuples = None if self.indices_tuple is None else tuple(member.to(device) for member in self.indices_tuple)
        ref_pool_indices = None if self.ref_pool_indices is None else self.ref_pool_indices.to(device)
        return Plan(self.rows.to(device), self.pool_indices.to(device), tuples, ref_pool_indices, self.keeps_clean)

    def split(self, num_queries: int) -> Plan:
        """The same plan for a batch whose rows from ``num_queries`` on are the reference.

        Positives and negatives are counted from the start of the reference, as PML does it.
        """
        if self.ref_pool_indices is not None or num_queries == len(self.pool_indices):
            return self
        return replace(
            self,
            pool_indices=_part(self.pool_indices, 0, num_queries),
            ref_pool_indices=_part(self.pool_indices, num_queries, len(self.pool_indices)),
            indices_tuple=None if self.indices_tuple is None else shift_partners(self.indices_tuple, -num_queries),
        )

    def by_reference(self, num_rows: int, num_queries: int) -> Plan | None:
        """Of a plan that appends copies, the plan that hands them over as reference.

        A copy of an anchor takes its row's place among the queries; the clean rows and the copies of the other roles
        are the reference. So the number of queries stays what it was, which matters to losses that average over rows.

        Returns:
            The plan; None if there are no tuples, or an anchor has several copies, which cannot all take its place.
        """
        if self.indices_tuple is None:
            return None
        names = MEMBERS[len(self.indices_tuple)]
        anchors = torch.cat([m for m, name in zip(self.indices_tuple, names, strict=True) if name == "anchor"])
        copies = anchors[anchors >= num_rows].unique()
        replaced = self.rows[copies - num_rows]
        if len(replaced.unique()) < len(replaced):
            return None
        queries = torch.arange(num_queries, device=self.pool_indices.device)
        queries[replaced] = copies
        pool_rows = self.pool_rows(num_rows)
        start = num_queries if num_queries < num_rows else 0
        members = tuple(
            pool_rows[m] if name == "anchor" else m - start for m, name in zip(self.indices_tuple, names, strict=True)
        )
        reference = consecutive(start, len(pool_rows), self.pool_indices.device)
        return Plan(self.rows, queries, members, reference)

    def with_bystander(self, num_rows: int) -> Plan:
        """The same plan with one more copy, of row 0, that the loss sees and no tuple names."""
        rows = torch.cat([self.rows, self.rows.new_zeros(1)])
        bystander = self.pool_indices.new_tensor([num_rows + len(self)])
        if self.ref_pool_indices is None:
            return Plan(rows, torch.cat([self.pool_indices, bystander]), self.indices_tuple)
        return Plan(rows, self.pool_indices, self.indices_tuple, torch.cat([self.ref_pool_indices, bystander]))

    def partners(self, indices_tuple: IndicesTuple, num_rows: int) -> tuple[Tensor, Tensor]:
        """Which clean rows stand in a tuple with each copy.

        Args:
            indices_tuple: tuples that count in the rows that the loss sees.
            num_rows: ``N``, the rows of the batch.

        Returns:
            Two bool masks ``(M, N)``: rows that form a positive pair with the copy, and rows that form a negative one.
        """
        pool_rows = self.pool_rows(num_rows)
        reference = self.pool_indices if self.ref_pool_indices is None else self.ref_pool_indices
        members = [
            (self.pool_indices if name == "anchor" else reference)[member]
            for member, name in zip(indices_tuple, MEMBERS[len(indices_tuple)], strict=True)
        ]
        anchor, positive, *other_anchor, negative = members
        return (
            self._share_a_pair(anchor, positive, pool_rows, num_rows),
            self._share_a_pair(other_anchor[0] if other_anchor else anchor, negative, pool_rows, num_rows),
        )

    def _share_a_pair(self, left: Tensor, right: Tensor, pool_rows: Tensor, num_rows: int) -> Tensor:
        mask = torch.zeros(len(self) + 1, num_rows, dtype=torch.bool, device=left.device)  # the last row: of no copy
        true = mask.new_ones(())  # a Python number would be copied to the device, which has to be waited for
        for member, partner in ((left, right), (right, left)):
            copy = torch.where(member >= num_rows, member - num_rows, len(self))
            mask.index_put_((copy, pool_rows[partner]), true)
        return mask[:-1]


def plan_rows(indices_tuple: IndicesTuple, roles: Iterable[str], num_rows: int) -> Plan:
    """Each row that plays one of the roles is replaced by its copy in all of its tuples."""
    rows = torch.cat(played(indices_tuple, roles)).unique()
    return replace_rows(rows, num_rows, indices_tuple)


def replace_rows(rows: Tensor, num_rows: int, indices_tuple: IndicesTuple | None) -> Plan:
    """The given rows (no row twice) are replaced by their copies."""
    if as_slice(rows) == slice(0, num_rows):
        return Plan(rows, consecutive(num_rows, 2 * num_rows, rows.device), indices_tuple)
    pool_indices = torch.arange(num_rows, device=rows.device)
    pool_indices[rows] = torch.arange(num_rows, num_rows + len(rows), device=rows.device)
    return Plan(rows, pool_indices, indices_tuple)


def plan_roles(indices_tuple: IndicesTuple, roles: Iterable[str], num_rows: int) -> Plan:
    """One copy per row and role; the tuples in which the row plays the role are re-pointed to the copy."""
    return _repoint(indices_tuple, roles, num_rows, lambda role, members: members)


def plan_tuples(indices_tuple: IndicesTuple, roles: Iterable[str], num_rows: int) -> Plan:
    """One copy per tuple and role. Of pairs, the n-th positive and the n-th negative one of an anchor share a copy."""

    def own_copy(role: str, members: Tensor) -> Tensor:
        order = torch.arange(len(members), device=members.device)
        if role != "anchor" or len(indices_tuple) == 3:
            return order
        rank = torch.cat([rank_in_group(indices_tuple[0]), rank_in_group(indices_tuple[2])])
        return members * (len(members) + 1) + rank

    return _repoint(indices_tuple, roles, num_rows, own_copy)


def _repoint(indices_tuple: IndicesTuple, roles: Iterable[str], num_rows: int, shares_copy: SharesCopy) -> Plan:
    names = MEMBERS[len(indices_tuple)]
    members, rows, total = list(indices_tuple), [], num_rows
    for role in roles:
        positions = [i for i, name in enumerate(names) if name == role]
        played = torch.cat([indices_tuple[i] for i in positions])
        keys, copy = shares_copy(role, played).unique(return_inverse=True)
        rows.append(torch.zeros_like(keys).scatter_(0, copy, played))
        repointed = (copy + total).split([len(indices_tuple[i]) for i in positions])
        for i, member in zip(positions, repointed, strict=True):
            members[i] = member
        total += len(keys)
    return Plan(torch.cat(rows), consecutive(0, total, members[0].device), tuple(members))


def _seen(pool: Pool, indices: Tensor) -> tuple[Tensor, Tensor | None]:
    """Embeddings and labels at these places of the pool."""
    if pool.start:  # then the pool holds the copies alone, and the loss sees all of them in order
        return pool.embeddings, pool.labels
    return take(pool.embeddings, indices), None if pool.labels is None else take(pool.labels, indices)


def _part(indices: Tensor, start: int, stop: int) -> Tensor:
    """``indices[start:stop]``, still recognised by `as_slice`."""
    of = as_slice(indices)
    return indices[start:stop] if of is None else consecutive(of.start + start, of.start + stop, indices.device)


def _clean_and_copied(members: IndicesTuple, replaced: Tensor, ref_replaced: Tensor) -> IndicesTuple:
    """Tuples in which each member that has a copy is once itself and once its copy.

    Args:
        members: triplets, or pairs of one kind; anchors first.
        replaced: bool, which of the rows that anchors name have copies; copies follow all rows.
        ref_replaced: the same of the rows that positives and negatives name.
    """
    found = members
    for place in range(len(members)):
        has = replaced if place == 0 else ref_replaced
        chosen = has[found[place]]
        copies = [member[chosen] for member in found]
        copies[place] = len(has) - 1 + has.cumsum(0)[copies[place]]
        found = tuple(torch.cat(both) for both in zip(found, copies, strict=True))
    return found
