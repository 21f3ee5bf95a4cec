"""Measures of retrieval and of collapse, against plain loops and against PML."""

import math
import sys

import by_loops
import pytest
import torch
from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator
from some_galleries import assert_same, expected, labels_of, measured, some
from torch.nn.functional import normalize

from pml_adversarial.errors import InputError
from pml_adversarial.evaluation.retrieval import metrics
from pml_adversarial.evaluation.retrieval.distance import find_distance
from pml_adversarial.evaluation.retrieval.gallery import Gallery, Ranking, Targets
from pml_adversarial.evaluation.retrieval.metrics import collapse, effective_rank, nmi, per_query


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

    def test_a_wrong_item_as_near_as_the_right_one_stands_before_it(self):
        gallery = Gallery(torch.eye(2)[[0, 0, 0, 1]], torch.tensor([1, 1, 2, 2]))
        found = measured(gallery, gallery.embeddings[:1], gallery.leave_one_out(torch.tensor([0])))
        assert found["recall_at_1"].item() == 0
        assert found["recall_at_2"].item() == 1

    @pytest.mark.parametrize(("nearer_by", "first"), [(0.0, 0), (5e-7, 0), (2e-6, 1)])
    def test_what_rounding_could_have_made_is_a_tie(self, nearer_by, first):
        right = torch.tensor([[0.25, -0.5]], dtype=torch.double)
        ranking = Ranking(right, right - nearer_by, torch.tensor([2]))
        found = per_query(ranking, (1, 2))
        assert found["recall_at_1"].item() == first
        assert found["recall_at_2"].item() == 1
        assert found["r_precision"].item() == 0.5
        assert found["map_at_r"].item() == (0.5 if first else 0.25)


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

    @pytest.mark.parametrize("name", ["euclidean", "inner_product"])
    def test_where_lengths_count_it_is_of_distances(self, name):
        labels, embeddings = labels_of(5, 4, 1), some(10).double() * torch.arange(1, 11)[:, None]
        found = collapse(Gallery(embeddings, labels, 4, find_distance(name)))
        squares = {(i, j): math.dist(embeddings[i], embeddings[j]) ** 2 for i in range(10) for j in range(10) if i != j}
        same = [value for (i, j), value in squares.items() if labels[i] == labels[j]]
        other = [value for (i, j), value in squares.items() if labels[i] != labels[j]]
        wanted = {"": [*squares.values()], "_same": same, "_other": other}
        for part, values in wanted.items():
            assert found["rms_distance" + part] == pytest.approx(math.sqrt(sum(values) / len(values)))

    @pytest.mark.parametrize("shape", [(30, 200), (200, 30)])
    def test_rank_of_either_shape_and_of_a_sample(self, shape, monkeypatch):
        embeddings = torch.randn(shape, generator=torch.Generator().manual_seed(0)).double()

        def by_loops(rows):
            strengths = torch.linalg.svdvals(rows).tolist()
            return math.exp(-sum(s / sum(strengths) * math.log(s / sum(strengths)) for s in strengths))

        assert effective_rank(embeddings) == pytest.approx(by_loops(embeddings))
        monkeypatch.setattr(metrics, "_LARGEST_GRAM", 20)
        rows = torch.linspace(0, shape[0] - 1, 20).long()
        assert effective_rank(embeddings) == pytest.approx(by_loops(embeddings[rows]))

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
        monkeypatch.setitem(sys.modules, "faiss", None)
        with pytest.raises(InputError, match="nmi=True needs faiss for k-means; install it with"):
            nmi(some(4), torch.arange(4))
