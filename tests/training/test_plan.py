import itertools
from dataclasses import replace

import pytest
import torch
from some_tuples import KINDS, N, random_tuples

from pml_adversarial import Batch, Plan, PlanError
from pml_adversarial.training.plan import (
    as_slice,
    call,
    consecutive,
    plan_roles,
    plan_rows,
    plan_tuples,
    replace_rows,
    untouched,
)
from pml_adversarial.training.tuples import ROLES

SOME_ROLES = [("anchor",), ("positive",), ("negative",), ("positive", "negative"), ("anchor", "negative"), ROLES]
NAMES = {3: ("anchor", "positive", "negative"), 4: ("anchor", "positive", "anchor", "negative")}


def named(tuples):
    return list(zip(NAMES[len(tuples)], [member.tolist() for member in tuples], strict=True))


def pool_rows(plan, num_rows=N):
    return [*range(num_rows), *plan.rows.tolist()]


def resolved(plan):
    """For each member of the tuples, the place in the pool of clean rows and copies that PML reads."""
    reference = plan.pool_indices if plan.ref_pool_indices is None else plan.ref_pool_indices
    return [
        [(plan.pool_indices if name == "anchor" else reference)[i].item() for i in member]
        for name, member in named(plan.indices_tuple)
    ]


def check_copies(plan, tuples, roles, keys):
    """Members with one key are one copy, others are different copies; who plays no chosen role stays."""
    key_of_copy = {}
    for (name, rows), after, their_keys in zip(named(tuples), resolved(plan), keys, strict=True):
        if name not in roles:
            assert after == rows
            continue
        for row, address, key in zip(rows, after, their_keys, strict=True):
            assert address >= N
            assert pool_rows(plan)[address] == row
            assert key_of_copy.setdefault(address, (name, key)) == (name, key)
    assert len(set(key_of_copy.values())) == len(key_of_copy)
    assert sorted(key_of_copy) == list(range(N, N + len(plan)))
    assert plan.pool_indices.tolist() == list(range(N + len(plan)))


def keys_per_tuple(tuples):
    """Positives and negatives are one copy per tuple; of pairs, an anchor's n-th ones share its n-th copy."""
    keys = []
    for i, (name, rows) in enumerate(named(tuples)):
        if name == "anchor" and len(tuples) == 4:
            keys.append([(row, rows[:position].count(row)) for position, row in enumerate(rows)])
        else:
            keys.append([(i, position) for position in range(len(rows))])
    return keys


@pytest.mark.parametrize("roles", SOME_ROLES)
@pytest.mark.parametrize("kind", KINDS)
class TestPlans:
    def test_rows_are_replaced_wherever_they_stand(self, kind, roles):
        tuples = random_tuples(kind)
        plan = plan_rows(tuples, roles, N)
        played = sorted({row for name, rows in named(tuples) if name in roles for row in rows})
        assert plan.rows.tolist() == played
        expected = [N + played.index(row) if row in played else row for row in range(N)]
        assert plan.pool_indices.tolist() == expected
        assert [rows for _, rows in named(plan.indices_tuple)] == [rows for _, rows in named(tuples)]
        assert plan.ref_pool_indices is None

    def test_one_copy_per_row_and_role(self, kind, roles):
        tuples = random_tuples(kind)
        plan = plan_roles(tuples, roles, N)
        check_copies(plan, tuples, roles, keys=[rows for _, rows in named(tuples)])

    def test_one_copy_per_tuple_and_role(self, kind, roles):
        tuples = random_tuples(kind)
        plan = plan_tuples(tuples, roles, N)
        check_copies(plan, tuples, roles, keys=keys_per_tuple(tuples))

    @pytest.mark.parametrize("make", [plan_rows, plan_roles, plan_tuples])
    def test_partners_share_a_tuple_with_the_copy(self, kind, roles, make):
        plan = make(random_tuples(kind), roles, N)
        found = plan.partners(plan.indices_tuple, N)
        for mask, expected in zip(found, partners_by_loop(plan), strict=True):
            assert mask.dtype == torch.bool
            assert mask.shape == (len(plan), N)
            assert [set(row.nonzero().flatten().tolist()) for row in mask] == expected


def partners_by_loop(plan):
    """For each copy the clean rows that share a positive pair with it, and those that share a negative pair."""
    members, rows = resolved(plan), pool_rows(plan)
    kinds = []
    for left, right in (members[:2], members[2:] if len(members) == 4 else [members[0], members[2]]):
        of_copy = [set() for _ in range(len(plan))]
        for a, b in zip(left, right, strict=True):
            if a >= N:
                of_copy[a - N].add(rows[b])
            if b >= N:
                of_copy[b - N].add(rows[a])
        kinds.append(of_copy)
    return kinds


def test_partners_of_tuples_other_than_the_plans_own():
    plan = replace_rows(torch.tensor([1, 4]), N, None)
    same, different = plan.partners(tuple(torch.tensor([i]) for i in (1, 4, 6)), N)
    assert [row.nonzero().flatten().tolist() for row in same] == [[4], [1]]
    assert [row.nonzero().flatten().tolist() for row in different] == [[6], []]


def test_partners_of_a_split_plan_are_those_of_the_unsplit_one():
    tuples = by_queries(random_tuples("triplets"), 4)
    plan = plan_rows(tuples, ROLES, N)
    split = plan.split(4)
    assert split.ref_pool_indices is not None
    assert all(map(torch.equal, split.partners(split.indices_tuple, N), plan.partners(tuples, N)))


def by_queries(tuples, num_queries, rows=N):
    """Anchors among the first rows, the other members among the rest."""
    names = NAMES[len(tuples)]
    return tuple(
        m % num_queries if name == "anchor" else num_queries + m % (rows - num_queries)
        for m, name in zip(tuples, names, strict=True)
    )


class TestSplit:
    @pytest.mark.parametrize("kind", KINDS)
    def test_addresses_the_same_rows(self, kind):
        plan = plan_rows(by_queries(random_tuples(kind), 4), ("anchor", "positive"), N)
        split = plan.split(4)
        assert resolved(split) == resolved(plan)
        assert torch.cat([split.pool_indices, split.ref_pool_indices]).tolist() == plan.pool_indices.tolist()
        assert len(split.pool_indices) == 4

    def test_without_reference_is_the_plan_itself(self):
        plan = plan_rows(random_tuples("pairs"), ROLES, N)
        assert plan.split(N) is plan

    def test_of_a_split_plan_is_the_plan_itself(self):
        split = plan_rows(by_queries(random_tuples("pairs"), 4), ROLES, N).split(4)
        assert split.split(4) is split

    def test_without_tuples(self):
        split = replace_rows(torch.tensor([1, 6]), N, None).split(5)
        assert split.indices_tuple is None
        assert split.pool_indices.tolist() == [0, 9, 2, 3, 4]
        assert split.ref_pool_indices.tolist() == [5, 10, 7, 8]


class TestByReference:
    @pytest.mark.parametrize("num_queries", [4, N])
    @pytest.mark.parametrize("roles", SOME_ROLES)
    @pytest.mark.parametrize("kind", KINDS)
    def test_addresses_the_same_rows(self, kind, roles, num_queries):
        tuples = random_tuples(kind)
        tuples = by_queries(tuples, num_queries) if num_queries < N else tuples
        plan = plan_roles(tuples, roles, N)
        other = plan.by_reference(N, num_queries)
        assert resolved(other) == resolved(plan)
        assert [pool_rows(other)[address] for address in other.pool_indices] == list(range(num_queries))
        assert other.rows.tolist() == plan.rows.tolist()
        first_reference = num_queries if num_queries < N else 0
        assert other.ref_pool_indices.tolist() == list(range(first_reference, N + len(plan)))

    @pytest.mark.parametrize("kind", ["triplets", "pairs"])
    def test_partners_are_the_same(self, kind):
        tuples = by_queries(random_tuples(kind), 4)
        plan = plan_roles(tuples, ROLES, N)
        other = plan.by_reference(N, 4)
        found = other.partners(other.indices_tuple, N)
        assert all(map(torch.equal, found, plan.partners(plan.indices_tuple, N)))

    def test_is_none_where_an_anchor_has_several_copies(self):
        tuples = torch.tensor([0, 0]), torch.tensor([1, 1]), torch.tensor([2, 3])
        assert plan_tuples(tuples, ("anchor",), N).by_reference(N, N) is None
        assert plan_tuples(tuples, ("positive",), N).by_reference(N, N) is not None

    def test_is_none_without_tuples(self):
        assert replace_rows(torch.tensor([0]), N, None).by_reference(N, N) is None


class TestMembers:
    """Row i of the clean ones is (i, 0.0), copy m is (m, 1.0)."""

    clean = torch.stack([torch.arange(N), torch.zeros(N)], 1).float()

    def copies(self, plan):
        return torch.stack([torch.arange(len(plan)), torch.ones(len(plan))], 1).float()

    def expected(self, plan):
        pool = [(i, 0) for i in range(N)] + [(m, 1) for m in range(len(plan))]
        return [[pool[address] for address in member] for member in resolved(plan)]

    def found(self, plan):
        members = plan.members(self.clean, self.copies(plan))
        return [[tuple(row) for row in member.tolist()] for member in members]

    @pytest.mark.parametrize("roles", SOME_ROLES)
    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("make", [plan_rows, plan_roles, plan_tuples])
    def test_are_the_rows_in_each_place(self, make, kind, roles):
        plan = make(random_tuples(kind), roles, N)
        assert self.found(plan) == self.expected(plan)

    @pytest.mark.parametrize("roles", SOME_ROLES)
    @pytest.mark.parametrize("kind", ["triplets", "pairs"])
    def test_of_the_reference(self, kind, roles):
        tuples = by_queries(random_tuples(kind), 4)
        whole = plan_rows(tuples, roles, N)
        assert self.found(whole.split(4)) == self.expected(whole)
        plan = plan_roles(tuples, roles, N)
        assert self.found(plan.by_reference(N, 4)) == self.expected(plan)

    def test_by_hand(self):
        triplets = torch.tensor([0, 2]), torch.tensor([1, 0]), torch.tensor([2, 1])
        plan = Plan(torch.tensor([1]), torch.tensor([0, N, 2]), triplets)
        assert self.found(plan) == [[(0, 0), (2, 0)], [(0, 1), (0, 0)], [(2, 0), (0, 1)]]

    def test_gradient_reaches_both(self):
        clean, copies = self.clean.clone().requires_grad_(), torch.zeros(2, 2, requires_grad=True)
        plan = plan_roles((torch.tensor([3]), torch.tensor([4]), torch.tensor([5])), ("anchor", "negative"), N)
        anchors, positives, negatives = plan.members(clean, copies)
        (anchors + 10 * positives + 100 * negatives).sum().backward()
        assert copies.grad[:, 0].tolist() == [1, 100]
        assert {row: value for row, value in enumerate(clean.grad[:, 0].tolist()) if value} == {4: 10}

    @pytest.mark.parametrize(("clean", "copies"), [(torch.float64, torch.float16), (torch.float16, torch.float64)])
    def test_are_of_the_clean_type(self, clean, copies):
        plan = plan_rows(random_tuples("triplets"), ROLES, N)
        for member in plan.members(self.clean.to(clean), self.copies(plan).to(copies)):
            assert member.dtype == clean

    def test_without_tuples(self):
        with pytest.raises(PlanError, match=r"no tuples; expected one made from triplets or pairs"):
            replace_rows(torch.tensor([0]), N, None).members(self.clean, self.clean[:1])


@pytest.mark.parametrize("roles", SOME_ROLES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("make", [plan_rows, plan_roles, plan_tuples])
class TestOnlyNamed:
    def test_keeps_what_tuples_name(self, make, kind, roles):
        plan = make(random_tuples(kind), roles, N)
        named_only = plan.only_named()
        assert resolved(named_only) == resolved(plan)
        assert set(named_only.pool_indices.tolist()) == {address for member in resolved(plan) for address in member}
        assert len(set(named_only.pool_indices.tolist())) == len(named_only.pool_indices)
        assert named_only.rows.tolist() == plan.rows.tolist()
        assert named_only.ref_pool_indices is None

    def test_drops_bystanders(self, make, kind, roles):
        few = tuple(member[:2] for member in random_tuples(kind))
        plan = make(few, roles, N).with_bystander(N).only_named()
        assert len(plan.pool_indices) == len({address for member in resolved(plan) for address in member}) < N


class TestEvaluate:
    clean = torch.arange(5.0).reshape(-1, 1)
    adversarial = torch.tensor([[10.0], [13.0]])
    labels = torch.tensor([7, 8, 9, 7, 8])
    rows = torch.tensor([0, 3])

    def batch(self, **changes):
        fields = {"embeddings": self.clean, "context": self.clean, "labels": self.labels, "num_queries": 5}
        return Batch(**{"inputs": self.clean, "indices_tuple": None, **fields, **changes})

    def arguments(self, plan, **changes):
        arguments = []
        result = plan.evaluate(
            lambda *given: arguments.extend(given) or "value", self.batch(**changes), self.adversarial
        )
        assert result == "value"
        return arguments

    def seen(self, plan, **changes):
        arguments = self.arguments(plan, **changes)
        return [a if a is None or isinstance(a, tuple) else a.flatten().tolist() for a in arguments]

    def test_appended(self):
        tuples = tuple(torch.tensor([i]) for i in (5, 6, 1))
        plan = Plan(self.rows, torch.arange(7), tuples)
        assert self.seen(plan) == [[0, 1, 2, 3, 4, 10, 13], [7, 8, 9, 7, 8, 7, 7], tuples]

    def test_in_place(self):
        plan = Plan(self.rows, torch.tensor([5, 1, 2, 6, 4]), None)
        assert self.seen(plan) == [[10, 1, 2, 13, 4], [7, 8, 9, 7, 8], None]

    def test_with_reference(self):
        plan = Plan(self.rows, torch.tensor([5, 1]), None, ref_pool_indices=torch.tensor([2, 6, 4]))
        assert self.seen(plan) == [[10, 1], [7, 8], None, [2, 13, 4], [9, 7, 8]]

    def test_without_labels(self):
        plan = Plan(self.rows, torch.tensor([5, 1]), None, ref_pool_indices=torch.tensor([2]))
        assert self.seen(plan, labels=None) == [[10, 1], None, None, [2], None]

    @pytest.mark.parametrize("shared", [True, False])
    def test_labels_that_were_one_tensor_stay_one(self, shared):
        labels = torch.tensor([7, 8, 7, 8, 9])
        plan = Plan(self.rows, torch.tensor([5, 1]), None, ref_pool_indices=torch.tensor([2, 6]))
        found = self.arguments(plan, labels=labels, shared_labels=shared)
        assert (found[4] is found[1]) == shared
        assert found[4].tolist() == [7, 8]
        longer = Plan(self.rows, torch.tensor([5, 1]), None, ref_pool_indices=torch.tensor([2, 6, 4]))
        assert self.seen(longer, labels=labels, shared_labels=shared)[4] == [7, 8, 9]

    def test_gradient_reaches_clean_and_adversarial_rows(self):
        clean, adversarial = self.clean.clone().requires_grad_(), self.adversarial.clone().requires_grad_()
        plan = Plan(self.rows, torch.tensor([5, 1, 5]), None)
        plan.evaluate(lambda embeddings, *_: embeddings.sum(), self.batch(embeddings=clean), adversarial).backward()
        assert clean.grad.flatten().tolist() == [0, 1, 0, 0, 0]
        assert adversarial.grad.flatten().tolist() == [2, 0]


def test_to_another_device_moves_every_tensor():
    split = plan_rows(by_queries(random_tuples("pairs"), 4), ROLES, N).split(4).to("meta")
    tensors = [split.rows, split.pool_indices, split.ref_pool_indices, *split.indices_tuple]
    assert {tensor.device.type for tensor in tensors} == {"meta"}
    assert replace_rows(torch.tensor([0]), N, None).to("meta").indices_tuple is None


class TestBesideClean:
    """Of a plan that replaces rows; tuples by loops over who is clean and who is a copy."""

    TRIPLETS = torch.tensor([0, 1, 2]), torch.tensor([1, 0, 3]), torch.tensor([2, 3, 0])
    PAIRS = torch.tensor([0, 2]), torch.tensor([1, 3]), torch.tensor([1, 0, 3]), torch.tensor([2, 3, 1])

    @staticmethod
    def seen(plan, num_rows, rows):
        """Tuples as names: "2" for clean row 2, "2'" for its copy."""
        name = [str(row) for row in range(num_rows)] + [f"{row}'" for row in rows]
        partners = plan.pool_indices if plan.ref_pool_indices is None else plan.ref_pool_indices
        members = plan.indices_tuple
        anchors = {0} if len(members) == 3 else {0, 2}
        named = [
            [name[(plan.pool_indices if place in anchors else partners)[i]] for i in member]
            for place, member in enumerate(members)
        ]
        halves = [named] if len(members) == 3 else [named[:2], named[2:]]
        return [sorted(zip(*half, strict=True)) for half in halves]

    @staticmethod
    def expected(tuples, copied):
        halves = [tuples] if len(tuples) == 3 else [tuples[:2], tuples[2:]]
        found = []
        for half in halves:
            of_half = []
            for members in zip(*(member.tolist() for member in half), strict=True):
                choices = [[str(row), f"{row}'"] if row in copied else [str(row)] for row in members]
                of_half += itertools.product(*choices)
            found.append(sorted(of_half))
        return found

    @pytest.mark.parametrize("tuples", [TRIPLETS, PAIRS], ids=["triplets", "pairs"])
    @pytest.mark.parametrize("copied", [[0, 1, 2, 3], [1, 3], [2]], ids=str)
    def test_each_member_is_once_itself_and_once_its_copy(self, tuples, copied):
        plan = replace_rows(torch.tensor(copied), 4, tuples).beside_clean(4)
        assert plan.pool_indices.tolist() == [0, 1, 2, 3, *range(4, 4 + len(copied))]
        assert self.seen(plan, 4, copied) == self.expected(tuples, copied)

    def test_the_loss_chooses_where_it_did(self):
        plan = replace_rows(torch.tensor([1, 2]), 4, None).beside_clean(4)
        assert (plan.pool_indices.tolist(), plan.indices_tuple, plan.ref_pool_indices) == (
            [0, 1, 2, 3, 4, 5],
            None,
            None,
        )

    def test_with_a_reference(self):
        triplets = torch.tensor([0, 1]), torch.tensor([2, 3]), torch.tensor([3, 4])  # two queries, three references
        plan = replace_rows(torch.tensor([0, 2, 4]), 5, triplets).split(2).beside_clean(5)
        assert plan.pool_indices.tolist() == [0, 1, 5]
        assert plan.ref_pool_indices.tolist() == [2, 3, 4, 6, 7]
        assert self.seen(plan, 5, [0, 2, 4]) == self.expected(triplets, [0, 2, 4])


class TestOfConsecutiveRows:
    """Rows that are known to be in order are not picked one by one; nothing else changes."""

    embeddings, labels, copies = torch.randn(N, 3), torch.arange(N) // 2, torch.randn(N, 3)

    def seen(self, plan, copies=None):
        batch = Batch(self.embeddings[:, :1], self.embeddings, self.embeddings, self.labels, None, N)
        return plan.evaluate(lambda *given: given, batch, self.copies if copies is None else copies)

    @staticmethod
    def plain(plan):
        """The same plan, of rows that are not known to be in order."""
        reference = None if plan.ref_pool_indices is None else plan.ref_pool_indices.clone()
        return replace(plan, rows=plan.rows.clone(), pool_indices=plan.pool_indices.clone(), ref_pool_indices=reference)

    def test_each_row_is_replaced(self):
        plan = replace_rows(consecutive(0, N, self.copies.device), N, None)
        queries, labels, tuples = self.seen(plan)
        assert queries is self.copies
        assert labels is self.labels
        assert tuples is None
        for found, expected in zip(self.seen(plan), self.seen(self.plain(plan)), strict=True):
            assert found is expected or torch.equal(found, expected)

    def test_no_row_is(self):
        batch = Batch(self.embeddings[:, :1], self.embeddings, self.embeddings, self.labels, None, N)
        plan = untouched(batch, None)
        assert self.seen(plan, self.copies[:0])[0] is self.embeddings
        split = untouched(replace(batch, num_queries=4), None)
        assert split.pool_indices.tolist() + split.ref_pool_indices.tolist() == list(range(N))
        assert as_slice(split.ref_pool_indices) == slice(4, N)

    def test_rows_stand_beside_their_copies(self):
        plan = replace_rows(consecutive(0, N, self.copies.device), N, None)
        both, plain = plan.beside_clean(N), self.plain(plan).beside_clean(N)
        assert both.pool_indices.tolist() == plain.pool_indices.tolist() == list(range(2 * N))
        for found, expected in zip(self.seen(both)[:2], self.seen(plain)[:2], strict=True):
            assert torch.equal(found, expected)

    def test_of_other_rows_nothing_is_known(self):
        plan = replace_rows(torch.arange(N).flip(0), N, None)
        assert as_slice(plan.pool_indices) is None
        assert torch.equal(self.seen(plan)[0], self.copies.flip(0))
        kept = replace_rows(consecutive(0, N, self.copies.device), N, None).keep(torch.tensor([2, 1]), N)
        assert as_slice(kept.rows) is None
        assert as_slice(kept.pool_indices) is None

    @pytest.mark.parametrize("num_queries", [4, N])
    @pytest.mark.parametrize("kind", ["triplets", "pairs"])
    def test_with_tuples(self, kind, num_queries):
        tuples = random_tuples(kind)
        plan = plan_roles(by_queries(tuples, num_queries) if num_queries < N else tuples, ("positive",), N)
        for one in (plan, plan.by_reference(N, num_queries)):
            copies = torch.randn(len(plan), 3)
            found, expected = self.seen(one, copies), self.seen(self.plain(one), copies)
            assert all(
                torch.equal(a, b) for a, b in zip(found[:2] + found[3:], expected[:2] + expected[3:], strict=True)
            )


class TestCall:
    def test_leaves_out_what_is_none_and_not_taken(self):
        class Own(torch.nn.Module):
            def forward(self, embeddings, labels):
                return embeddings, labels

        assert call(Own(), 1, 2, None) == (1, 2)
        assert call(Own(), 1, 2, None, None, None) == (1, 2)
        with pytest.raises(PlanError, match="Own takes 2 arguments"):
            call(Own(), 1, 2, (3,))
        with pytest.raises(PlanError, match="there are embeddings, labels, ref_emb"):
            call(Own(), 1, 2, None, 4, None)

    def test_hands_on_what_is_taken(self):
        class Own(torch.nn.Module):
            def forward(self, embeddings, labels, indices_tuple, *reference):
                return embeddings, labels, indices_tuple, reference

        assert call(Own(), 1, 2, None) == (1, 2, None, ())
        assert call(Own(), 1, 2, None, 4, None) == (1, 2, None, (4, None))
        assert call(lambda *given: given, 1, None, None) == (1, None, None)
