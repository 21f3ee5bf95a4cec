"""How copies may stand in a loss, and whether rows meet in it: asked from the loss itself, hardly ever from its name.

Losses are asked on a batch in which nothing is degenerate, not on the one at hand: with few tuples, or classes of
equal size, a loss may give one value for every plan.

Who is perturbed: which batch rows get adversarial copies, and where the copies stand.

A batch row is not a tuple member: one row is the anchor of some tuples and the negative of others. To
perturb a *role*, the row gets a copy, and only the tuples in which it plays the role are readdressed to
that copy. Copies are numbered after the ``N`` clean rows: copy ``m`` has the address ``N + m``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor

from ..errors import PlanError
from .batch import Batch
from .tuples import MEMBERS, IndicesTuple, played, rank_in_group, shift_partners


def clean_loss(wrapped: Callable[..., Tensor], batch: Batch) -> Tensor:
    """The wrapped loss on the unperturbed batch, with gradient, as the caller would have had it."""
    loss: Tensor = untouched(batch, batch.indices_tuple).evaluate(wrapped, batch, batch.embeddings[:0])
    return loss


def untouched(batch: Batch, tuples: IndicesTuple | None) -> Plan:
    """The plan that perturbs nobody."""
    nobody = torch.empty(0, dtype=torch.long, device=batch.embeddings.device)
    return replace_rows(nobody, len(batch), tuples).split(batch.num_queries)


SharesCopy = Callable[[str, Tensor], Tensor]
"""Role and members ``(T,)`` -> keys ``(T,)``; members with equal keys are one copy."""


@dataclass(frozen=True, eq=False)
class Plan:
    """Which rows are perturbed and where their copies stand.

    Attributes:
        rows: ``(M,)`` batch rows to perturb; a row may stand twice (one copy per role or tuple).
        pool_indices: ``(K,)`` places in the pool (the clean rows, then the copies) of the rows that the loss evaluates.
        indices_tuple: tuples over the evaluated rows, or None to let the loss choose.
        ref_pool_indices: addresses of the reference rows, or None if the loss compares the rows with themselves.
        keeps_clean: whether training is to see the clean rows beside the perturbed ones.

    Example:
        >>> triplets = torch.tensor([0]), torch.tensor([1]), torch.tensor([2])
        >>> plan = plan_roles(triplets, ["positive"], num_rows=3)
        >>> plan.rows, plan.indices_tuple[1]  # row 1 as a positive is copy 0, address 3
        (tensor([1]), tensor([3]))
    """

    rows: Tensor
    pool_indices: Tensor
    indices_tuple: IndicesTuple | None
    ref_pool_indices: Tensor | None = None
    keeps_clean: bool = False

    def __len__(self) -> int:
        return len(self.rows)

    def replaces(self, num_rows: int) -> bool:
        """Whether as many rows are evaluated as the batch has: copies stand where their rows stood."""
        return len(self.pool_indices) + (0 if self.ref_pool_indices is None else len(self.ref_pool_indices)) == num_rows

    def evaluate(self, loss: Callable[..., Any], batch: Batch, adversarial: Tensor) -> Any:
        """Calls ``loss`` (PML's signature) on the evaluated rows.

        Args:
            loss: called with embeddings, labels, tuples and, where the plan has one, the reference.
            batch: gives the clean rows and their labels.
            adversarial: ``(M, D)`` embeddings of the copies.
        """
        clean, labels = batch.embeddings, batch.labels
        if self.ref_pool_indices is None and len(self.pool_indices) == len(self.rows) == len(clean):
            clean = clean.detach()  # every row is replaced: spares a backward pass that would carry zeros
        pool = torch.cat([clean, adversarial])
        pool_labels = None if labels is None else torch.cat([labels, labels[self.rows]])

        def seen(layout: Tensor) -> tuple[Tensor, Tensor | None]:
            return pool[layout], None if pool_labels is None else pool_labels[layout]

        queries, query_labels = seen(self.pool_indices)
        if self.ref_pool_indices is None:
            return loss(queries, query_labels, self.indices_tuple)
        reference, ref_labels = seen(self.ref_pool_indices)
        if batch.shared_labels and len(self.ref_pool_indices) == len(self.pool_indices):
            ref_labels = query_labels  # PML asks for the identity
        return loss(queries, query_labels, self.indices_tuple, reference, ref_labels)

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
        """Of a plan that replaces rows, the one in which copies stand beside the rows that they replace.

        Each member of a tuple is once the row and once its copy, in all combinations: of a triplet of which all rows
        have copies come eight.
        """
        pool_rows, replaced = self.pool_rows(num_rows), self.pool_indices >= num_rows
        layout = torch.cat([pool_rows[self.pool_indices], self.pool_indices[replaced]])
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
        return Plan(self.rows, layout, tuples, ref_pool_indices)

    def pool_rows(self, num_rows: int) -> Tensor:
        """``(N + M,)`` the batch row behind each address: the rows themselves, then those of the copies."""
        return torch.cat([torch.arange(num_rows, device=self.rows.device), self.rows])

    def keep(self, copies: Tensor, num_rows: int) -> Plan:
        """The same plan with some of the copies; where another one stood, its row stands unperturbed.

        Args:
            copies: ``(K,)`` which of the ``M`` copies, in any order.
            num_rows: ``N``, the rows of the batch.
        """
        address = self.pool_rows(num_rows)
        address[num_rows + copies] = torch.arange(num_rows, num_rows + len(copies), device=self.rows.device)
        ref_pool_indices = None if self.ref_pool_indices is None else address[self.ref_pool_indices]
        return replace(
            self, rows=self.rows[copies], pool_indices=address[self.pool_indices], ref_pool_indices=ref_pool_indices
        )

    def only_named(self) -> Plan:
        """The same plan without the rows that no tuple names; it has to have tuples, and no reference."""
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
            pool_indices=self.pool_indices[:num_queries],
            ref_pool_indices=self.pool_indices[num_queries:],
            indices_tuple=None if self.indices_tuple is None else shift_partners(self.indices_tuple, -num_queries),
        )

    def by_reference(self, num_rows: int, num_queries: int) -> Plan | None:
        """Anchors take their row's place among the queries; copies of the other roles join the reference.

        The number of queries stays what it was, which matters to losses that average over rows. None where
        an anchor has several copies, so that none of them can take its place.
        """
        if self.indices_tuple is None:
            return None
        names = MEMBERS[len(self.indices_tuple)]
        anchors = torch.cat([m for m, name in zip(self.indices_tuple, names, strict=True) if name == "anchor"])
        copies = anchors[anchors >= num_rows].unique()
        replaced = self.rows[copies - num_rows]
        if len(replaced.unique()) < len(replaced):
            return None
        layout = torch.arange(num_queries, device=self.pool_indices.device)
        layout[replaced] = copies
        pool_rows = self.pool_rows(num_rows)
        start = num_queries if num_queries < num_rows else 0
        members = tuple(
            pool_rows[m] if name == "anchor" else m - start for m, name in zip(self.indices_tuple, names, strict=True)
        )
        ref_pool_indices = torch.arange(start, len(pool_rows), device=self.pool_indices.device)
        return Plan(self.rows, layout, members, ref_pool_indices)

    def with_bystander(self, num_rows: int) -> Plan:
        """The same plan with one more copy, of row 0, that is evaluated but that no tuple names."""
        rows = torch.cat([self.rows, self.rows.new_zeros(1)])
        bystander = self.pool_indices.new_tensor([num_rows + len(self)])
        if self.ref_pool_indices is None:
            return Plan(rows, torch.cat([self.pool_indices, bystander]), self.indices_tuple)
        return Plan(rows, self.pool_indices, self.indices_tuple, torch.cat([self.ref_pool_indices, bystander]))

    def partners(self, indices_tuple: IndicesTuple, num_rows: int) -> tuple[Tensor, Tensor]:
        """Which clean rows stand with each copy in a tuple, as two masks instead of a list of tuples.

        Args:
            indices_tuple: tuples over the evaluated rows.
            num_rows: ``N``, the rows of the context.

        Returns:
            Two bool masks ``(M, N)``: the rows that share a positive pair with the copy (it is one's anchor or
            positive), and those that share a negative pair.
        """
        pool_rows = self.pool_rows(num_rows)
        reference = self.pool_indices if self.ref_pool_indices is None else self.ref_pool_indices
        addresses = [
            (self.pool_indices if name == "anchor" else reference)[member]
            for member, name in zip(indices_tuple, MEMBERS[len(indices_tuple)], strict=True)
        ]
        anchor, positive, *other_anchor, negative = addresses
        return (
            self._share_a_pair(anchor, positive, pool_rows, num_rows),
            self._share_a_pair(other_anchor[0] if other_anchor else anchor, negative, pool_rows, num_rows),
        )

    def _share_a_pair(self, left: Tensor, right: Tensor, pool_rows: Tensor, num_rows: int) -> Tensor:
        mask = torch.zeros(len(self) + 1, num_rows, dtype=torch.bool, device=left.device)  # last row: no copies
        true = mask.new_ones(())  # a Python number would be copied to the device, and waited for
        for member, partner in ((left, right), (right, left)):
            copy = torch.where(member >= num_rows, member - num_rows, len(self))
            mask.index_put_((copy, pool_rows[partner]), true)
        return mask[:-1]


def plan_rows(indices_tuple: IndicesTuple, roles: Iterable[str], num_rows: int) -> Plan:
    """Every row that plays one of the roles is replaced by its copy wherever it stands."""
    rows = torch.cat(played(indices_tuple, roles)).unique()
    return replace_rows(rows, num_rows, indices_tuple)


def replace_rows(rows: Tensor, num_rows: int, indices_tuple: IndicesTuple | None) -> Plan:
    """The given rows (no row twice) are replaced by their copies wherever they stand."""
    layout = torch.arange(num_rows, device=rows.device)
    layout[rows] = torch.arange(num_rows, num_rows + len(rows), device=rows.device)
    return Plan(rows, layout, indices_tuple)


def plan_roles(indices_tuple: IndicesTuple, roles: Iterable[str], num_rows: int) -> Plan:
    """One copy per row and role; the tuples in which the row plays the role are readdressed to it."""
    return _readdress(indices_tuple, roles, num_rows, lambda role, members: members)


def plan_tuples(indices_tuple: IndicesTuple, roles: Iterable[str], num_rows: int) -> Plan:
    """One copy per tuple and role. The n-th positive and negative pair of an anchor share its n-th copy."""

    def own_copy(role: str, members: Tensor) -> Tensor:
        order = torch.arange(len(members), device=members.device)
        if role != "anchor" or len(indices_tuple) == 3:
            return order
        rank = torch.cat([rank_in_group(indices_tuple[0]), rank_in_group(indices_tuple[2])])
        return members * (len(members) + 1) + rank

    return _readdress(indices_tuple, roles, num_rows, own_copy)


def _readdress(indices_tuple: IndicesTuple, roles: Iterable[str], num_rows: int, shares_copy: SharesCopy) -> Plan:
    names = MEMBERS[len(indices_tuple)]
    members, rows, total = list(indices_tuple), [], num_rows
    for role in roles:
        positions = [i for i, name in enumerate(names) if name == role]
        played = torch.cat([indices_tuple[i] for i in positions])
        keys, copy = shares_copy(role, played).unique(return_inverse=True)
        rows.append(torch.zeros_like(keys).scatter_(0, copy, played))
        addresses = (copy + total).split([len(indices_tuple[i]) for i in positions])
        for i, address in zip(positions, addresses, strict=True):
            members[i] = address
        total += len(keys)
    layout = torch.arange(total, device=members[0].device)
    return Plan(torch.cat(rows), layout, tuple(members))


def _clean_and_copied(members: IndicesTuple, replaced: Tensor, ref_replaced: Tensor) -> IndicesTuple:
    """Tuples (anchors first) in which each member that has a copy is once itself and once the copy, which stands last.

    Args:
        members: of triplets or of one kind of pairs.
        replaced: bool, which of the rows that anchors count in have copies.
        ref_replaced: the same of those that positives and negatives count in.
    """
    found = members
    for place in range(len(members)):
        has = replaced if place == 0 else ref_replaced
        chosen = has[found[place]]
        copies = [member[chosen] for member in found]
        copies[place] = len(has) - 1 + has.cumsum(0)[copies[place]]
        found = tuple(torch.cat(both) for both in zip(found, copies, strict=True))
    return found
