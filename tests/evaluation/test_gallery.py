"""What queries find and what that is worth, against plain loops and against PML."""

import math

import by_loops
import pytest
import torch
from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator
from torch.nn.functional import normalize

from pml_adversarial.errors import InputError
from pml_adversarial.evaluation.embedder import batches, embed_all
from pml_adversarial.evaluation.gallery import Gallery, ReplacedItems, Targets, unit_or_zero
from pml_adversarial.evaluation.metrics import collapse, nmi, per_query

RECALL_AT = (1, 2, 3, 8)


def some(rows, seed=0, dimension=5):
    return torch.randn(rows, dimension, generator=torch.Generator().manual_seed(seed))


def labels_of(*sizes):
    """Classes of these sizes, mixed, with labels that are neither consecutive nor sorted."""
    names = torch.tensor([7, -3, 40, 5, 11, 2])[: len(sizes)]
    labels = names.repeat_interleave(torch.tensor(sizes))
    return labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(3))]


def measured(gallery, queries, targets, changed=None):
    depth = max(int(gallery.num_right(targets).max()), *RECALL_AT)
    return per_query(gallery.ranking(queries, targets, depth, changed), RECALL_AT)


def expected(queries, targets, embeddings, labels):
    rows = [
        by_loops.measures(query, label, own, embeddings, labels, RECALL_AT)
        for query, label, own in zip(queries, targets.labels.tolist(), targets.own.tolist(), strict=True)
    ]
    return {name: torch.tensor([row[name] for row in rows]) for name in rows[0]}


def assert_same(found, wanted):
    assert found.keys() == wanted.keys()
    for name, values in wanted.items():
        torch.testing.assert_close(found[name], values, rtol=0, atol=1e-6, check_dtype=False, msg=name)


class TestMeasures:
    @pytest.mark.parametrize("block", [1, 2, 5, 19, 20, 8192])
    @pytest.mark.parametrize("seed", range(3))
    def test_leave_one_out_by_loops(self, block, seed):
        labels, embeddings = labels_of(9, 5, 3, 2, 1), some(20, seed)
        gallery = Gallery(embeddings, labels, block)
        found = measured(gallery, embeddings, gallery.leave_one_out())
        assert_same(found, expected(embeddings, gallery.leave_one_out(), embeddings, labels))
        assert 0 < found["map_at_r"].mean() < found["r_precision"].mean() < 1

    @pytest.mark.parametrize("block", [3, 8192])
    def test_separate_gallery_by_loops(self, block):
        labels, embeddings, queries = labels_of(9, 5, 3, 2, 1), some(20), some(7, 1)
        targets = Targets(torch.tensor([7, 7, -3, 40, 99, 11, -50]), torch.full((7,), -1))  # 99 and -50 do not occur
        gallery = Gallery(embeddings, labels, block)
        assert gallery.num_right(targets).tolist() == [9, 9, 5, 3, 0, 1, 0]
        found = measured(gallery, queries, targets)
        assert_same(found, expected(queries, targets, embeddings, labels))
        assert all(values[[4, 6]].eq(0).all() for values in found.values())

    def test_perturbed_queries_do_not_find_their_clean_selves(self):
        labels, embeddings, rows = labels_of(6, 4, 3), some(13), torch.tensor([3, 0, 12, 3])
        queries = embeddings[rows] + 0.01 * some(4, 1)
        gallery = Gallery(embeddings, labels)
        targets = gallery.leave_one_out(rows)
        assert_same(measured(gallery, queries, targets), expected(queries, targets, embeddings, labels))

    def test_as_pml_measures_where_there_are_no_ties(self):
        labels, embeddings = labels_of(20, 13, 8, 5, 3, 2), some(51)
        gallery = Gallery(embeddings, labels)
        found = measured(gallery, embeddings, gallery.leave_one_out())
        names = ("precision_at_1", "mean_average_precision_at_r", "r_precision")
        theirs = AccuracyCalculator(include=names, k="max_bin_count", device=torch.device("cpu"))
        accuracy = theirs.get_accuracy(normalize(embeddings), labels)
        ours = [found[name].double().mean().item() for name in ("recall_at_1", "map_at_r", "r_precision")]
        assert ours == pytest.approx([accuracy[name] for name in names], abs=1e-6)
        assert 0.1 < ours[1] < 0.9

    def test_one_list_by_hand(self):
        angles = torch.tensor([0.0, 0.1, 0.2, 0.3, 0.4, 0.5])
        embeddings = torch.stack([angles.cos(), angles.sin()], 1)
        gallery = Gallery(embeddings, torch.tensor([1, 2, 1, 2, 1, 1]))  # wrong, right, wrong, right, right
        found = measured(gallery, embeddings[:1], gallery.leave_one_out(torch.tensor([0])))
        wanted = {"recall_at_1": 0, "recall_at_2": 1, "recall_at_3": 1, "map_at_r": 1 / 6, "r_precision": 1 / 3}
        assert {name: found[name].item() for name in wanted} == pytest.approx(wanted)


class TestTies:
    def test_a_wrong_item_as_near_as_the_right_one_stands_before_it(self):
        gallery = Gallery(torch.eye(2)[[0, 0, 0, 1]], torch.tensor([1, 1, 2, 2]))
        found = measured(gallery, gallery.embeddings[:1], gallery.leave_one_out(torch.tensor([0])))
        assert found["recall_at_1"].item() == 0
        assert found["recall_at_2"].item() == 1

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
            found = Gallery(embeddings, torch.arange(30) % 3, block).nearest(queries, own, 6)
            for row, query in enumerate(queries):
                near = by_loops.similarities(query, int(own[row]), embeddings)
                assert found[row].tolist() == sorted(near, key=lambda j: -near[j])[:6]
            assert found[0, 0] == 17
            assert found[1, 0] == 4

    def test_no_more_than_there_are(self):
        assert Gallery(some(4), torch.arange(4)).nearest(some(2, 1), torch.tensor([0, 1]), 3).shape == (2, 3)


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


class TestCollapse:
    @pytest.mark.parametrize("block", [1, 4, 8192])
    def test_by_loops(self, block):
        labels, embeddings = labels_of(5, 4, 1), some(10).double()
        found = collapse(Gallery(embeddings, labels, block))
        pairs = {(i, j): by_loops.cosine(embeddings[i], embeddings[j]) for i in range(10) for j in range(10) if i != j}
        same = [value for (i, j), value in pairs.items() if labels[i] == labels[j]]
        other = [value for (i, j), value in pairs.items() if labels[i] != labels[j]]
        strengths = torch.linalg.svdvals(normalize(embeddings)).tolist()
        shares = [strength / sum(strengths) for strength in strengths]
        wanted = {
            "mean_similarity": sum(pairs.values()) / 90,
            "mean_similarity_same": sum(same) / len(same),
            "mean_similarity_other": sum(other) / len(other),
            "effective_rank": math.exp(-sum(share * math.log(share) for share in shares)),
        }
        assert found == pytest.approx(wanted)

    def test_of_a_point_and_of_all_directions(self):
        point = collapse(Gallery(torch.ones(6, 3), torch.arange(6) % 2))
        assert list(point.values()) == pytest.approx([1, 1, 1, 1], abs=1e-3)
        spread = collapse(Gallery(torch.eye(6), torch.arange(6) % 2))
        assert list(spread.values()) == pytest.approx([0, 0, 0, 6])

    def test_without_pairs_of_one_class(self):
        assert collapse(Gallery(torch.eye(3), torch.arange(3)))["mean_similarity_same"] == 0


class TestNMI:
    def test_is_pml_s(self):
        labels, embeddings = torch.arange(40) % 4, some(40) + 3 * some(4, 1)[torch.arange(40) % 4]
        calculator = AccuracyCalculator(include=("NMI",), device=torch.device("cpu"))
        assert nmi(embeddings, labels) == calculator.get_accuracy(embeddings, labels)["NMI"]
        assert 0.3 < nmi(embeddings, labels) < 1.01

    def test_without_faiss(self, monkeypatch):
        monkeypatch.setitem(__import__("sys").modules, "faiss", None)
        with pytest.raises(InputError, match="nmi=True needs faiss for k-means; install it with"):
            nmi(some(4), torch.arange(4))


def test_batches_cover_everything_once():
    assert [list(range(10))[piece] for piece in batches(10, 4)] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert list(batches(0, 4)) == []


def test_embed_all_is_without_gradient_and_in_batches():
    asked, weight = [], torch.ones(3, requires_grad=True)

    def embed(images):
        asked.append(len(images))
        return images * weight

    found = embed_all(embed, some(7, dimension=3), 3)
    assert asked == [3, 3, 1]
    assert torch.equal(found, some(7, dimension=3))
    assert not found.requires_grad
