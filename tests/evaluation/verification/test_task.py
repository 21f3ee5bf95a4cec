"""Similarities without attack, and what is noted about pairs."""

import math

import pytest
import torch
from query_batches import Made, images_of, network
from some_pairs import LISTED, SIMILARITIES, similarities_by_loops, task_of
from torch.nn.functional import normalize

from pml_adversarial.errors import InputError
from pml_adversarial.evaluation.retrieval.distance import find_distance
from pml_adversarial.evaluation.retrieval.embedder import Embedder
from pml_adversarial.evaluation.verification.roc import PairScores
from pml_adversarial.evaluation.verification.task import PairTask

IMAGES, LABELS = images_of()


class TestSimilarities:
    @pytest.mark.parametrize("distance", list(SIMILARITIES))
    @pytest.mark.parametrize("batch_size", [1, 9, 100])
    def test_by_loops_whatever_the_batch_size(self, distance, batch_size):
        model = network()
        task = task_of(model, distance=distance, batch_size=batch_size)
        with torch.no_grad():
            embeddings = model(IMAGES).double()
        wanted = similarities_by_loops(embeddings[LISTED[:, 0]], embeddings[LISTED[:, 1]], distance)
        assert task.scores.similarities.dtype == torch.float64
        assert task.scores.similarities.tolist() == pytest.approx(wanted, rel=1e-5, abs=1e-6)
        assert torch.equal(task.scores.same, LABELS[LISTED[:, 0]] == LABELS[LISTED[:, 1]])

    def test_each_image_is_embedded_once(self):
        model = network().eval()
        task = PairTask(Embedder(model), (IMAGES, LABELS), choice=None)
        counted = []
        task.embed_all(5, counted.append)
        assert task.embed.forward_passes == sum(counted) == task.num_images == 24

    def test_images_that_are_in_no_pair_are_not_embedded(self):
        images = IMAGES.clone()
        images[20:] = math.nan  # would be refused
        task = task_of(pairs=(images, LABELS), indices=[(0, 4), (16, 1)])
        assert task.num_images == task.embed.forward_passes == 4

    def test_given_pairs(self):
        model = network()
        pairs = IMAGES, images_of(seed=1)[0], LABELS == 0
        task = task_of(model, pairs, indices=None)
        with torch.no_grad():
            wanted = similarities_by_loops(model(pairs[0]).double(), model(pairs[1]).double())
        assert task.scores.similarities.tolist() == pytest.approx(wanted, rel=1e-5, abs=1e-6)
        assert task.num_images == task.embed.forward_passes == 48

    def test_a_batch_has_what_belongs_together(self):
        task, rows = task_of(), torch.tensor([31, 4, 17])
        batch = task.batch(rows)
        assert torch.equal(batch.images, IMAGES[LISTED[rows, 0]])
        assert torch.equal(batch.enrolled_images, IMAGES[LISTED[rows, 1]])
        assert torch.allclose(batch.similarities(batch.images), task.scores.similarities[rows], atol=1e-6)
        assert torch.equal(batch.same, task.same[rows])


class TestTie:
    @pytest.mark.parametrize("distance", [*SIMILARITIES])
    @pytest.mark.parametrize("size", [1e-2, 1.0, 1e3])
    def test_equal_embeddings_tie_whatever_their_size(self, distance, size):
        """Their similarities differ by rounding only, so no genuine pair is told from an impostor pair."""
        direction = torch.tensor([0.3, -0.7, 0.2])
        model = Made(lambda x: size * direction * (1 + 1e-7 * (x.flatten(1)[:, :1] * 1000).sin()))
        scores = task_of(model, distance=distance).scores
        assert scores.roc().equal_error_rate.rate == 1
        assert PairScores(scores.similarities, scores.same).roc().equal_error_rate.rate < 1

    def test_of_an_inner_product_grows_with_the_square(self):
        ties = [task_of(Made(lambda x, s=s: s * x.flatten(1)), distance="inner_product").scores.tie for s in (1, 10)]
        assert ties[1] == pytest.approx(100 * ties[0])


class TestNotes:
    def test_the_same_image_twice(self):
        images = IMAGES.clone()
        images[4], images[9] = images[0], images[2]  # of one label, and of two
        task = task_of(pairs=(images, LABELS), indices=[(0, 4), (1, 5), (9, 2), (3, 6), (7, 7)])
        assert task.notes[0] == (
            "3 of 5 pairs hold the same image twice, 1 of them as impostors; they show nothing of the model"
        )

    def test_labels_that_mean_the_opposite(self):
        model = Made(lambda x: x.flatten(1) - x.mean())
        rows = torch.combinations(torch.arange(24))
        same = LABELS[rows[:, 0]] == LABELS[rows[:, 1]]
        pairs = IMAGES[rows[:, 0]], IMAGES[rows[:, 1]]
        assert not any("less similar" in note for note in task_of(model, (*pairs, same.long()), indices=None).notes)
        task = task_of(model, (*pairs, 1 - same.long()), indices=None)
        assert task.notes[0] == (
            "genuine pairs are less similar than impostor pairs, AUC without attack is "
            f"{100 * task.scores.roc().auc:.1f}: if 1 stands for different images in same, pass 1 - same; else look at "
            "the labels, the distance and the model"
        )
        labels = torch.arange(24) // 6  # in each pair of one label, the images differ, and the other way round
        odd = rows[(labels[rows[:, 0]] == labels[rows[:, 1]]) != same]
        by_labels = task_of(model, (IMAGES, labels), indices=odd)
        assert by_labels.notes[0].endswith(": look at the labels, the distance and the model")

    def test_images_with_equal_embeddings_are_not_the_same(self):
        task = task_of(Made(lambda x: torch.ones(len(x), 2) + 0 * x.flatten(1)[:, :2]), indices=[(0, 4), (1, 2)])
        assert task.notes == []

    def test_of_given_pairs(self):
        pairs = IMAGES, IMAGES.flip(0), LABELS.flip(0) == LABELS
        images = torch.cat([IMAGES[:12], IMAGES[:12].flip(0)])  # equal to their mirror images
        task = task_of(pairs=(images, images, torch.arange(24) < 12), indices=None)
        assert task.notes[0].startswith("24 of 24 pairs hold the same image twice, 12 of them as impostors")
        with pytest.raises(InputError, match="0 genuine"):
            task_of(pairs=pairs, indices=None)

    def test_pairs_that_share_images(self):
        note = "an image is in up to 3 pairs; intervals presume independent pairs, so they are too narrow"
        assert note in task_of(indices=[(0, 4), (0, 8), (0, 1)]).notes
        assert task_of(indices=[(0, 4), (1, 2)]).notes == []

    def test_lengths_that_cosine_leaves_out(self):
        model = Made(lambda x: normalize(x.flatten(1) - 0.5) * (9 * x[:, :, 0, 0]).exp())
        (note,) = (note for note in task_of(model).notes if note.startswith("lengths"))
        scores = [task_of(model, distance=distance).scores for distance in ("euclidean", "cosine")]
        rates = [100 * found.roc().equal_error_rate.rate for found in scores]
        assert f"Euclidean distance EER without attack would be {rates[0]:.1f}, by cosine it is {rates[1]:.1f};" in note
        assert abs(rates[0] - rates[1]) >= 0.5
        of_one_length = Made(lambda x: normalize(x.flatten(1) - 0.5))
        assert not any(note.startswith("lengths") for note in task_of(of_one_length).notes)
        assert not any(note.startswith("lengths") for note in task_of(model, distance="euclidean").notes)


class TestRows:
    def test_all_or_those_of_a_list(self):
        task = task_of()
        assert task.rows(None, 0).tolist() == list(range(40))
        assert task.rows([30, 2, 25], 0).tolist() == [30, 2, 25]

    @pytest.mark.parametrize(("subset", "genuine", "impostors"), [(1, 1, 1), (7, 7, 7), (50, 20, 20)])
    def test_so_many_of_each_kind(self, subset, genuine, impostors):
        task = task_of()
        rows = task.rows(subset, 0)
        assert int(task.same[rows].sum()) == genuine
        assert len(rows.unique()) == len(rows) == genuine + impostors
        assert torch.equal(rows, task.rows(subset, 0))

    def test_the_seed_chooses(self):
        task = task_of()
        assert len({tuple(task.rows(5, seed).tolist()) for seed in range(20)}) > 15

    @pytest.mark.parametrize(
        ("subset", "message"),
        [
            ([0, 1], "subset has 2 genuine and 0 impostor pairs; expected one of each at least"),
            ([0, 0, 39], r"subset=\[0, 0, 39\]; expected different indices"),
            ([0, 40], "below 40"),
            (0, "subset=0; expected whole numbers"),
            (True, "subset=True; expected whole numbers"),
        ],
    )
    def test_refusals(self, subset, message):
        with pytest.raises(InputError, match=message):
            task_of().rows(subset, 0)


class TestRefusals:
    @pytest.mark.parametrize("distance", ["cosine", "normalized_euclidean"])
    def test_one_dimension_of_unit_length(self, distance):
        model = Made(lambda x: x.flatten(1).sum(1, keepdim=True))
        with pytest.raises(InputError, match=r"The embeddings have one dimension, and by .* they are 1 or -1"):
            task_of(model, distance=distance)
        assert len(task_of(model, distance="euclidean").scores.similarities) == 40  # the cure

    def test_embeddings_that_are_not_finite(self):
        images = IMAGES.clone()
        images[0] = 1.0
        model = Made(lambda x: torch.where(x[:, :1, 0, 0] == 1, math.nan, x.flatten(1)))
        with pytest.raises(InputError, match="NaN or infinite embeddings for 3 of 40 images"):
            task_of(model, (images, LABELS), indices=[[0, 1]] * 3 + [[4, 8]] * 37)

    def test_similarities_that_are_not_finite(self):
        model = Made(lambda x: x.flatten(1).double() * 1e200)
        with pytest.raises(InputError, match="By inner_product, similarities without attack are not finite"):
            task_of(model, distance="inner_product")
        assert task_of(model).scores.similarities.isfinite().all()  # the cure

    def test_embeddings_of_different_sizes(self):
        pairs = IMAGES, images_of(size=4)[0], LABELS == 0
        with pytest.raises(InputError, match="of first images have 36 dimensions, those of second images 16"):
            task_of(Made(lambda x: x.flatten(1)), pairs, indices=None)

    def test_a_distance_that_is_none(self):
        with pytest.raises(InputError, match="distance='manhattan'"):
            task_of(distance="manhattan")
        assert find_distance("cosine").name == task_of().distance.name
