"""Which triplets are drawn, and what methods on triplets share, against plain loops."""

from collections import Counter

import pytest
import torch

from pml_adversarial import Batch, InputError, PlanError
from pml_adversarial.defenses.triplets import (
    STRATEGIES,
    check_sampling,
    distance,
    harder_triplets,
    hardness,
    per_copy,
    perturb_members,
    sample_triplets,
    three_members,
)
from pml_adversarial.training.plan import Plan, plan_roles, replace_rows
from pml_adversarial.training.tuples import ROLES

LABELS = [0, 0, 0, 0, 1, 1, 1, 2, 2, 3]
MARGIN = 0.2


def batch_of(labels=LABELS, num_queries=None, shared_labels=False, seed=0, known=None, dtype=torch.float32):
    draw = torch.Generator().manual_seed(seed)
    rows = len(labels)
    context = (torch.randn(rows, 3, generator=draw) * torch.rand(rows, 1, generator=draw) * 9).to(dtype)
    return Batch(
        torch.rand(known or rows, 1, 2, 2),
        context,
        context,
        torch.tensor(labels),
        None,
        num_queries or rows,
        shared_labels=shared_labels,
    )


def euclidean(left, right):
    left, right = [float(x) for x in left], [float(x) for x in right]
    sizes = [sum(x * x for x in side) ** 0.5 for side in (left, right)]
    return sum((x / sizes[0] - y / sizes[1]) ** 2 for x, y in zip(left, right, strict=True)) ** 0.5


def candidates(kind, batch, anchor):
    """The positives that may be drawn, and a function that says which negatives may with a positive."""
    labels, reference = batch.labels.tolist(), batch.num_queries < len(batch)
    partners = range(batch.num_queries, len(batch)) if reference else range(len(batch))
    itself = {anchor} | ({anchor + batch.num_queries} if batch.shared_labels and reference else set())
    d = {row: euclidean(batch.context[anchor], batch.context[row]) for row in partners}
    positives = {row for row in partners if labels[row] == labels[anchor] and row not in itself}
    negatives = {row for row in partners if labels[row] != labels[anchor]}
    if not positives or not negatives:
        return set(), lambda positive: set()
    if kind == "random":
        return positives, lambda positive: negatives
    if kind == "semihard":
        return positives, lambda p: {n for n in negatives if d[p] < d[n] < d[p] + MARGIN} or negatives
    near, far = min(d[n] for n in negatives), max(d[p] for p in positives)
    found = {p for p in positives if d[p] > near} or positives
    return found, lambda positive: {n for n in negatives if d[n] < far} or negatives


def drawn(kind, batch, times=300, **options):
    """Every triplet that was drawn, anchor -> (positive, negative) -> how often."""
    found = {}
    for _ in range(times):
        for a, p, n in zip(*(m.tolist() for m in sample_triplets(kind, batch, MARGIN, **options)), strict=True):
            found.setdefault(a, Counter())[p, n] += 1
    return found


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("kind", STRATEGIES)
class TestSample:
    def test_draws_all_that_qualify_and_no_others(self, kind, seed):
        batch = batch_of(seed=seed)
        found = drawn(kind, batch)
        for anchor in range(len(batch)):
            positives, negatives_with = candidates(kind, batch, anchor)
            expected = {(p, n) for p in positives for n in negatives_with(p)}
            assert set(found.get(anchor, ())) == expected
        assert 9 not in found  # it is alone in its class

    def test_one_triplet_per_row(self, kind, seed):
        anchors = sample_triplets(kind, batch_of(seed=seed))[0]
        assert anchors.tolist() == list(range(9))

    def test_partners_are_of_the_reference(self, kind, seed):
        labels = [0, 1, 2, 3, 0, 1, 2, 2]
        for shared in (False, True):
            batch = batch_of(labels, num_queries=4, shared_labels=shared, seed=seed)
            found = drawn(kind, batch, times=100)
            for anchor in range(4):
                positives, negatives_with = candidates(kind, batch, anchor)
                assert set(found.get(anchor, ())) == {(p, n) for p in positives for n in negatives_with(p)}
            assert set(found) == ({2} if shared else {0, 1, 2})

    def test_so_many_anchors_of_each_class(self, kind, seed):
        batch, chosen = batch_of(seed=seed), set()
        for _ in range(50):
            anchors, positives, negatives = sample_triplets(kind, batch, anchors_per_class=2)
            classes = batch.labels[anchors]
            assert Counter(classes.tolist()) == {0: 2, 1: 2, 2: 2}
            assert len(set(anchors.tolist())) == 6
            assert torch.equal(batch.labels[positives], classes)
            assert (batch.labels[negatives] != classes).all()
            chosen |= set(anchors.tolist())
        assert chosen == set(range(9))


def test_candidates_differ_by_kind():
    """Else the tests above could not tell the kinds apart; also the fallbacks are met."""
    fell_back = set()
    for seed in range(3):
        batch = batch_of(seed=seed)
        sets = {kind: [candidates(kind, batch, a) for a in range(9)] for kind in STRATEGIES}
        for kind in ("semihard", "softhard"):
            pairs = [
                (len(positives), len(negatives_with(p)), len(sets["random"][a][0]), len(sets["random"][a][1](p)))
                for a, (positives, negatives_with) in enumerate(sets[kind])
                for p in positives
            ]
            assert any(one != all_ for _, one, _, all_ in pairs)
            if any((ps, ns) == (all_p, all_n) for ps, ns, all_p, all_n in pairs):
                fell_back.add(kind)
    assert fell_back == {"semihard", "softhard"}


def test_is_uniform():
    counts = drawn("random", batch_of([0, 0, 0, 1, 1]), times=2000)[0]
    assert set(counts) == {(p, n) for p in (1, 2) for n in (3, 4)}
    assert all(abs(count - 500) < 5 * (2000 * 0.25 * 0.75) ** 0.5 for count in counts.values())


@pytest.mark.parametrize("labels", [[0, 0, 0], [0, 1, 2], [4]])
def test_no_triplets_in_the_batch(labels):
    for kind in STRATEGIES:
        assert [len(member) for member in sample_triplets(kind, batch_of(labels))] == [0, 0, 0]


class TestHarder:
    triplets = tuple(torch.tensor(m) for m in ([0, 0, 4, 7], [1, 3, 6, 8], [5, 9, 0, 2]))

    @pytest.mark.parametrize("seed", [0, 1, 2])
    @pytest.mark.parametrize("kind", ["semihard", "softhard"])
    def test_is_drawn_as_its_kind_for_the_same_anchor(self, kind, seed):
        batch = batch_of(seed=seed)
        found = [set() for _ in range(4)]
        for _ in range(300):
            anchors, *others = harder_triplets(kind, batch, self.triplets, MARGIN)
            assert torch.equal(anchors, self.triplets[0])
            for seen, one in zip(found, zip(*(m.tolist() for m in others), strict=True), strict=True):
                seen.add(one)
        for seen, anchor, positive in zip(found, *self.triplets[:2], strict=True):
            positives, negatives_with = candidates(kind, batch, int(anchor))
            positives = positives if kind == "softhard" else {int(positive)}
            assert seen == {(p, n) for p in positives for n in negatives_with(p)}

    def test_without_others_it_is_the_triplet_itself(self):
        triplet = torch.tensor([0]), torch.tensor([1]), torch.tensor([2])
        batch = batch_of([5, 5, 5])
        for _ in range(20):
            assert [m.item() for m in harder_triplets("semihard", batch, triplet)] == [0, 1, 2]


def test_without_labels():
    batch = Batch(torch.rand(3, 1), torch.rand(3, 2), torch.rand(3, 2), None, None, 3)
    with pytest.raises(PlanError, match="no labels to draw triplets by"):
        sample_triplets("random", batch)


def test_distances_of_rows_that_half_precision_cannot_tell_apart():
    near = torch.nn.functional.normalize(torch.tensor([[1.0, 0.1, 0.0], [1.0, 0.1, 0.004], [1.0, 0.1, 0.008]]))
    far = distance(near.bfloat16()[:1], near.bfloat16()[2:])
    assert far.dtype == torch.float32
    expected = euclidean(near.bfloat16()[0], near.bfloat16()[2])
    assert far.item() == pytest.approx(expected, rel=1e-2)


@pytest.mark.parametrize("value", ["hard", None, 3])
def test_an_unknown_kind(value):
    with pytest.raises(InputError, match=r"source=.*'random', 'semihard' or 'softhard'"):
        check_sampling(value, None)


@pytest.mark.parametrize("value", [0, -1, 1.0, True, "all"])
def test_no_number_of_anchors(value):
    with pytest.raises(InputError, match=r"anchors_per_class=.*None for every row"):
        check_sampling("random", value)


class TestSharedByMethods:
    triplets = tuple(torch.tensor(m) for m in ([0, 4, 0], [1, 5, 2], [7, 1, 7]))

    def test_each_triplet_has_copies_of_its_own(self):
        plan = perturb_members(self.triplets, ROLES, batch_of())
        assert plan.rows.tolist() == [0, 4, 0, 1, 5, 2, 7, 1, 7]
        assert plan.pool_indices.tolist() == list(range(10, 19))
        assert torch.stack(plan.indices_tuple).flatten().tolist() == list(range(9))

    def test_who_is_not_perturbed_is_seen_once(self):
        plan = perturb_members(self.triplets, ("positive", "negative"), batch_of())
        assert plan.rows.tolist() == [1, 5, 2, 7, 1, 7]
        assert plan.pool_indices.tolist() == [0, 4, *range(10, 16)]
        assert [m.tolist() for m in plan.indices_tuple] == [[0, 1, 0], [2, 3, 4], [5, 6, 7]]

    def test_of_no_triplets(self):
        empty = (torch.empty(0, dtype=torch.long),) * 3
        plan = perturb_members(empty, ROLES, batch_of(known=4))
        assert len(plan) == len(plan.pool_indices) == 0

    @pytest.mark.parametrize("known", [5, 7])  # row 7 is the highest that is perturbed
    def test_members_without_inputs_are_refused(self, known):
        batch = batch_of(num_queries=known, known=known)
        with pytest.raises(PlanError, match=r"members in ref_emb.*positive, negative"):
            perturb_members(self.triplets, ("positive", "negative"), batch)
        assert len(perturb_members(self.triplets, ("anchor",), batch)) == 3
        assert len(perturb_members(self.triplets, ROLES, batch_of(num_queries=8, known=8))) == 9

    def test_values_per_copy(self):
        values = torch.tensor([1.0, 10.0, 100.0])
        own = perturb_members(self.triplets, ("anchor", "negative"), batch_of())
        assert per_copy(own, values, 10).tolist() == [1, 10, 100, 1, 10, 100]
        shared = plan_roles(self.triplets, ["anchor", "positive"], 10)  # rows 0, 4; 1, 2, 5
        assert shared.rows.tolist() == [0, 4, 1, 2, 5]
        assert per_copy(shared, values, 10).tolist() == [101, 10, 1, 100, 10]

    def test_hardness(self):
        anchors, positives, negatives = torch.randn(3, 4, 5)
        expected = [euclidean(a, p) - euclidean(a, n) for a, p, n in zip(anchors, positives, negatives, strict=True)]
        assert hardness(anchors, positives, negatives).tolist() == pytest.approx(expected, abs=1e-5)

    def test_distance_is_differentiable_at_zero(self):
        rows = torch.randn(2, 3, requires_grad=True)
        distance(rows, rows.detach()).sum().backward()
        assert rows.grad.isfinite().all()

    def test_pairs_are_no_triplets(self):
        pairs = (torch.tensor([0]), torch.tensor([1]), torch.tensor([0]), torch.tensor([7]))
        plan = Plan(torch.tensor([0]), torch.tensor([10, *range(1, 10)]), pairs)
        with pytest.raises(PlanError, match="has pairs; expected triplets"):
            three_members(plan, torch.rand(10, 2), torch.rand(1, 2))
        with pytest.raises(PlanError, match="no tuples"):
            three_members(replace_rows(torch.tensor([0]), 10, None), torch.rand(10, 2), torch.rand(1, 2))
