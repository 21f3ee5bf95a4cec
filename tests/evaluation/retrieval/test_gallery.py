"""What queries find, against plain loops."""

import math

import by_loops
import pytest
import torch
from pytorch_metric_learning.distances import DotProductSimilarity, LpDistance, SNRDistance
from some_galleries import RECALL_AT, assert_same, expected, labels_of, measured, some
from torch.nn.functional import normalize

from pml_adversarial.evaluation.retrieval.distance import find_distance
from pml_adversarial.evaluation.retrieval.gallery import Gallery, ReplacedItems, Targets, unit_or_zero


class TestTargets:
    def test_right_items_and_chance_by_loops(self):
        labels = labels_of(9, 5, 3, 2, 1)
        gallery = Gallery(some(20), labels)
        asked = torch.tensor([7, -3, 5, 11, 99, -50, 7])  # 99 and -50 do not occur
        own = torch.tensor([int((labels == 7).nonzero()[0]), -1, -1, int((labels == 11).nonzero()), 4, -1, 3])
        right, chances = [], []
        for label, left_out in zip(asked.tolist(), own.tolist(), strict=True):
            others = [int(labels[j]) for j in range(20) if j != left_out]
            right.append(others.count(label))
            chances.append(others.count(label) / len(others))
        targets = Targets(asked, own)
        assert gallery.num_right(targets).tolist() == right
        assert right[:4] == [8, 5, 2, 0]
        assert gallery.chance(targets).tolist() == pytest.approx(chances)

    def test_items_that_search_all_others(self):
        gallery = Gallery(some(20), labels_of(9, 5, 3, 2, 1))
        targets = gallery.leave_one_out()
        assert torch.equal(targets.labels, gallery.labels)
        assert targets.own.tolist() == list(range(20))
        few = gallery.leave_one_out(torch.tensor([4, 0, 4]))
        assert torch.equal(few.labels, gallery.labels[[4, 0, 4]])
        assert few.own.tolist() == [4, 0, 4]
        assert len(few[1:]) == 2


class TestTies:
    @pytest.mark.parametrize("dimension", [2, 6, 64, 512, 511])
    @pytest.mark.parametrize("block", [7, 8192])
    def test_a_collapsed_model_finds_nothing(self, dimension, block):
        collapsed = some(1, dimension=dimension).expand(101, dimension)
        gallery = Gallery(collapsed, torch.arange(101) % 2, block)
        for count in (1, 3, 37, 101):
            targets = gallery.leave_one_out(torch.arange(count))
            found = measured(gallery, collapsed[:count], targets)
            assert all(values.eq(0).all() for name, values in found.items() if name != "recall_at_8")
            assert (gallery.margin(collapsed[:count], targets) >= 0).all()

    def test_are_as_wide_as_the_precision_of_the_embeddings(self):
        """All directions are nearly one, so similarities differ by some 1e-7."""
        embeddings = 1 + 3e-4 * some(40, dimension=16).double()
        labels = (embeddings - embeddings.mean(0)).sign()[:, 0].long()
        by_hand = torch.nn.functional.normalize(embeddings)
        similar = (by_hand @ by_hand.T).fill_diagonal_(-2)
        expected = labels[similar.argmax(1)] == labels
        assert 0 < expected.sum() < 40
        gallery = Gallery(embeddings, labels)
        found = measured(gallery, embeddings, gallery.leave_one_out())["recall_at_1"]
        assert torch.equal(found == 1, expected)
        coarse = Gallery(embeddings.float(), labels)
        assert not measured(coarse, embeddings.float(), coarse.leave_one_out())["recall_at_1"].any()

    @pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
    def test_an_embedding_that_is_not_finite_finds_nothing(self, bad):
        embeddings, labels = torch.eye(4).repeat_interleave(2, 0), torch.arange(8) // 2
        gallery, queries = Gallery(embeddings, labels), embeddings.clone()
        assert measured(gallery, queries, gallery.leave_one_out())["recall_at_1"].eq(1).all()
        queries[2, 3] = bad
        found = measured(gallery, queries, gallery.leave_one_out())
        assert found["recall_at_1"].tolist() == [1, 1, 0, 1, 1, 1, 1, 1]
        margin = gallery.margin(queries.requires_grad_(), gallery.leave_one_out())
        assert (margin >= 0).tolist() == [False, False, True, *[False] * 5]
        assert torch.autograd.grad(margin.sum(), queries)[0].isfinite().all()


class TestNearest:
    def test_by_loops_with_the_own_item_left_out_exactly(self):
        embeddings = some(30)
        embeddings[17] = embeddings[4]  # a duplicate is found all the same
        own = torch.tensor([4, 17, 0, -1])
        queries = torch.cat([embeddings[own[:3]], some(1, 1)])
        for block in (1, 4, 8192):
            found = Gallery(embeddings, torch.arange(30) % 3, block).nearest(queries, Targets(own, own), 6)
            for row, query in enumerate(queries):
                near = by_loops.similarities(query, int(own[row]), embeddings)
                assert found[row].tolist() == sorted(near, key=lambda j: -near[j])[:6]
            assert found[0, 0] == 17
            assert found[1, 0] == 4

    def test_no_more_than_there_are(self):
        assert Gallery(some(4), torch.arange(4)).nearest(
            some(2, 1), Targets(*torch.tensor([[0, 1], [0, 1]])), 3
        ).shape == (2, 3)

    def test_none_that_a_query_may_not_find(self):
        embeddings, own = some(4), torch.tensor([0, 1])
        ignored = torch.tensor([[False, True, False, False], [True, False, True, True]])
        found = Gallery(embeddings, torch.arange(4)).nearest(embeddings[:2], Targets(own, own, ignored), 3)
        assert sorted(found[0].tolist()) == [-1, 2, 3]
        assert found[0, 2] == -1
        assert found[1].tolist() == [-1, -1, -1]


class TestHardest:
    @pytest.mark.parametrize("block", [1, 3, 8192])
    @pytest.mark.parametrize("nth", [0, 1, 2, 50])
    def test_by_loops(self, block, nth):
        labels, embeddings = labels_of(6, 4, 2), some(12)
        gallery = Gallery(embeddings, labels, block)
        targets = gallery.leave_one_out()
        wrong, right = gallery.hardest(embeddings, targets, nth)
        for i in range(12):
            near = by_loops.similarities(embeddings[i], i, embeddings)
            for found, same in ((wrong[i], False), (right[i], True)):
                listed = sorted((j for j in near if (labels[j] == labels[i]) == same), key=lambda j: -near[j])
                assert int(found) == listed[min(nth, len(listed) - 1)]

    @pytest.mark.parametrize("block", [1, 3, 8192])
    def test_margin_by_loops_and_its_gradient_by_differences(self, block):
        labels, embeddings = labels_of(6, 4, 2), some(12).double()
        gallery, rows = Gallery(embeddings, labels, block), torch.tensor([5, 1, 1, 11])
        queries, targets = some(4, 1).double().requires_grad_(), gallery.leave_one_out(rows)
        found = gallery.margin(queries, targets)
        wanted = [
            by_loops.margin(q, labels[o], o, embeddings, labels)
            for q, o in zip(queries.detach(), rows.tolist(), strict=True)
        ]
        assert found.tolist() == pytest.approx(wanted, abs=2e-6)
        assert torch.autograd.gradcheck(lambda q: gallery.margin(q, targets), queries)
        assert torch.equal(found < 0, measured(gallery, queries, targets)["recall_at_1"] > 0)


class TestChangedItems:
    @pytest.mark.parametrize("block", [1, 4, 8192])
    def test_each_query_sees_its_own_change(self, block):
        labels, embeddings = labels_of(5, 4, 3), some(12)
        gallery, moved = Gallery(embeddings, labels, block), some(12, 1)
        items = torch.arange(12).roll(5)
        items[3] = 3  # the query's own item: left out as before
        found = measured(gallery, embeddings, gallery.leave_one_out(), ReplacedItems(items, moved))
        clean = measured(gallery, embeddings, gallery.leave_one_out())
        for i in range(12):
            changed = embeddings.clone()
            changed[items[i]] = moved[i]
            wanted = by_loops.measures(embeddings[i], labels[i], i, changed, labels, RECALL_AT)
            assert {name: found[name][i].item() for name in found} == pytest.approx(wanted)
        assert any(not torch.equal(found[name], clean[name]) for name in found)
        assert all(found[name][3] == clean[name][3] for name in found)


class TestPrecision:
    def test_half_is_compared_in_single_and_double_stays_double(self):
        labels, embeddings = labels_of(5, 4, 3), some(12)
        for kind, compared in ((torch.float16, torch.float32), (torch.bfloat16, torch.float32)):
            gallery = Gallery(embeddings.to(kind), labels)
            assert gallery.embeddings.dtype == compared
            rounded = embeddings.to(kind).float()
            found = measured(gallery, embeddings.to(kind), gallery.leave_one_out())
            assert_same(found, expected(rounded, gallery.leave_one_out(), rounded, labels))
        double = Gallery(embeddings.double(), labels)
        assert double.embeddings.dtype == torch.float64
        torch.testing.assert_close(double.embeddings, normalize(embeddings.double()), rtol=0, atol=1e-15)

    def test_unit_is_in_half_no_shorter_than_one(self):
        assert unit_or_zero(torch.full((1, 300), 60000.0, dtype=torch.float16)).norm().item() == pytest.approx(1)


def rank_by_loops(query, own, ignored, embeddings, distance):
    """Items that a query may find, nearest first, by a plain loop over PML's distance in double precision."""
    found = {
        j: float(distance(query.double()[None], embeddings[j].double()[None]))
        for j in range(len(embeddings))
        if j != own and not ignored[j]
    }
    return sorted(found, key=lambda j: found[j], reverse=distance.is_inverted)


@pytest.mark.parametrize(
    "distance",
    [
        LpDistance(normalize_embeddings=False),
        LpDistance(),
        DotProductSimilarity(normalize_embeddings=False),
        SNRDistance(),
    ],
    ids=["euclidean", "normalized", "inner", "snr"],
)
@pytest.mark.parametrize("block", [3, 8192])
class TestOtherDistancesAndMasks:
    def test_everything_by_loops(self, distance, block):
        embeddings, queries = some(14, 2) * torch.linspace(0.2, 3, 14)[:, None], some(6, 1)
        labels = labels_of(6, 5, 3)
        generator = torch.Generator().manual_seed(1)
        ignored = torch.rand(6, 14, generator=generator) < 0.2
        relevant = torch.rand(6, 14, generator=generator) < 0.4
        ignored[5] = False
        targets = Targets(labels[:6], torch.tensor([0, -1, 2, 3, -1, -1]), ignored, relevant)
        gallery = Gallery(embeddings, labels, block, find_distance(distance))
        wrong, right = gallery.hardest(queries, targets)
        near = gallery.nearest(queries, targets, 4)
        for i in range(6):
            ranked = rank_by_loops(queries[i], int(targets.own[i]), ignored[i], embeddings, distance)
            assert near[i].tolist() == ranked[:4]
            assert int(right[i]) == next(j for j in ranked if relevant[i, j])
            assert int(wrong[i]) == next(j for j in ranked if not relevant[i, j])
            stands = bool(relevant[i, ranked[0]])
            assert bool(gallery.margin(queries, targets)[i] < 0) == stands
            assert int(gallery.num_right(targets)[i]) == sum(bool(relevant[i, j]) for j in ranked)
            assert int(gallery.num_searched(targets)[i]) == len(ranked)
        found = measured(gallery, queries, targets)
        for i in range(6):
            ranked = [
                bool(relevant[i, j])
                for j in rank_by_loops(queries[i], int(targets.own[i]), ignored[i], embeddings, distance)
            ]
            total = sum(ranked)
            assert found["recall_at_3"][i] == any(ranked[:3])
            assert float(found["r_precision"][i]) == pytest.approx(sum(ranked[:total]) / total)

    def test_ties_count_against_the_query(self, distance, block):
        point = some(1)
        gallery = Gallery(point.expand(8, -1), torch.arange(8) % 2, block, find_distance(distance))
        targets = gallery.leave_one_out()
        assert (gallery.margin(point.expand(8, -1) + 1e-7, targets) >= 0).all()

    def test_a_query_that_is_not_finite_finds_nothing(self, distance, block):
        gallery = Gallery(some(8), torch.arange(8) % 2, block, find_distance(distance))
        queries = some(8).clone()
        queries[3, 1] = math.nan
        assert measured(gallery, queries, gallery.leave_one_out())["recall_at_1"][3] == 0
        assert gallery.margin(queries, gallery.leave_one_out())[3] >= 0


def test_an_attack_that_leads_to_a_label_leaves_out_what_is_right():
    relevant = torch.tensor([[True, False, False], [False, True, False]])
    aimed = Targets(torch.tensor([0, 1]), torch.tensor([-1, -1]), None, relevant).aimed_at(torch.tensor([5, 6]))
    assert aimed.relevant is None
    assert torch.equal(aimed.ignored, relevant)
    assert aimed.labels.tolist() == [5, 6]
