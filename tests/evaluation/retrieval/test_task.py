"""What is evaluated: which queries search which items, and what cannot be evaluated."""

import math

import pytest
import torch
from data_sets import Listed
from notes import Notes
from query_batches import bench_of, embedded, images_of, network

from pml_adversarial.errors import InputError
from pml_adversarial.evaluation.retrieval.embedder import Embedder
from pml_adversarial.evaluation.retrieval.task import RetrievalTask, Search


def task_of(gallery=None, queries=None, **options):
    return RetrievalTask(Embedder(network().eval()), queries or images_of(), gallery, "Linf", Search(**options))


def pixels_asked(task):
    """The images of each call of the model from now on."""
    asked = Notes()
    task.embed.modules[0].register_forward_pre_hook(lambda module, args: asked.append(args[0]))
    return asked


class TestOwn:
    def test_without_a_gallery_each_query_is_the_item_at_its_place(self):
        task = task_of()
        assert task.items is task.queries
        assert task.own.tolist() == list(range(24))
        assert task.leaves_own_out

    def test_in_another_gallery_there_are_no_queries(self):
        task = task_of(images_of(30, seed=1))
        assert len(task.items) == 30
        assert task.own.tolist() == [-1] * 24
        assert not task.leaves_own_out

    @pytest.mark.parametrize("kind", [list, tuple, torch.tensor])
    def test_is_taken_as_it_is_given(self, kind):
        own = [28, *range(1, 23), -1]
        task = task_of(images_of(30, seed=1), own=kind(own))
        assert task.own.tolist() == own
        assert task.leaves_own_out
        assert task.targets(torch.tensor([23, 0])).own.tolist() == [-1, 28]

    def test_of_another_label_than_the_query(self):
        own = [(row + 1) % 30 for row in range(24)]
        with pytest.raises(
            InputError, match="own: 24 of 24 own items have another label than their query, such as item 1"
        ):
            task_of(images_of(30, seed=1), own=own)
        task = task_of(images_of(30, seed=1), own=[1, *range(1, 24)])
        assert task.notes == ["own: 1 of 24 own items have another label than their query"]

    @pytest.mark.parametrize("own", [[0] * 23, [0] * 25, [-2] * 24, [30] + [0] * 23])
    def test_what_is_no_item_for_each_query_is_refused(self, own):
        message = rf"own holds \[{own[0]}, .* together with a gallery, for each of 24 queries the index .* or -1\."
        with pytest.raises(InputError, match=message):
            task_of(images_of(30, seed=1), own=own)

    def test_without_a_gallery_it_is_refused(self):
        with pytest.raises(InputError, match="expected, together with a gallery, for each of 24 queries"):
            task_of(own=range(24))

    def test_another_word_is_refused(self):
        with pytest.raises(InputError, match="own='all'; expected 'same', or the index"):
            task_of(images_of(30, seed=1), own="all")

    @pytest.mark.parametrize("own", [[0.0] * 24, 3])
    def test_what_is_no_whole_number_is_refused(self, own):
        with pytest.raises(InputError, match=r"own.*; expected whole numbers"):
            task_of(images_of(30, seed=1), own=own)


class TestNamesOfClasses:
    """Of data sets that list their classes, as folders of images do."""

    def listed(self, labels, classes, count=24):
        images = images_of(count)[0]
        named = Listed(lambda row: (images[row], int(labels[row])), count)
        named.classes = classes
        return named

    def test_labels_are_compared_by_the_names_where_the_lists_differ(self):
        queries = self.listed(torch.arange(24) % 3, ["bee", "cat", "ant"])
        gallery = self.listed(torch.tensor([*range(4), -1] * 6), ["ant", "bee", "cat", "dog"], 30)
        task = task_of(gallery, queries, own=[*range(24)], relevant=torch.ones(24, 30, dtype=torch.bool))
        assert task.items.labels.tolist() == [0, 1, 2, 3, -1] * 6  # which target= and junk_label= are about
        assert task.queries.labels.tolist() == [1, 2, 0] * 8
        assert [task.queries.name_of(row) for row in range(3)] == ["bee", "cat", "ant"]
        assert [task.items.name_of(row) for row in range(5)] == ["ant", "bee", "cat", "dog", "-1"]
        assert task.notes[0] == (
            "the queries list 3 classes, the gallery 4, and 3 are in both: labels are compared by the names of the "
            "classes"
        )

    def test_a_class_that_the_gallery_does_not_list_has_no_right_item(self):
        queries, gallery = (self.listed(torch.arange(24) % 2, names) for names in (["ant", "bee"], ["bee", "cat"]))
        task = task_of(gallery, queries)
        task.embed_and_set(task.rows(None), 8)
        rows, left_out = task.with_right_item(task.rows(None))
        assert (rows.tolist(), left_out) == ([*range(1, 24, 2)], 12)

    @pytest.mark.parametrize("names", [["ant", "bee"], [], None])
    def test_labels_stay_where_the_lists_are_alike_or_one_is_missing(self, names):
        queries, gallery = (self.listed(torch.arange(24) % 2, classes) for classes in (["ant", "bee"], names))
        task = task_of(gallery, queries)
        assert task.notes == []
        assert task.queries.labels.tolist() == task.items.labels.tolist() == [0, 1] * 12

    @pytest.mark.parametrize(
        ("labels", "names", "message"),
        [
            (torch.arange(24) % 2, ["cat", "dog"], r"list 2 classes \(ant, bee\).* 2 classes \(cat, dog\).* in both"),
            (torch.arange(24) % 2, ["ant", "cat", "ant"], "where a name occurs twice"),
        ],
    )
    def test_lists_that_cannot_be_compared_are_refused(self, labels, names, message):
        queries = self.listed(torch.arange(24) % 2, ["ant", "bee"])
        with pytest.raises(InputError, match=message):
            task_of(self.listed(labels, names), queries)

    def test_columns_of_other_classes_are_refused(self):
        several = torch.eye(3, dtype=torch.long)[torch.arange(24) % 3]
        images = images_of()[0]
        sets = []
        for names in (["ant", "bee", "cat"], ["ant", "cat", "bee"]):
            sets.append(Listed(lambda row: (images[row], several[row]), 24))
            sets[-1].classes = names
        assert task_of(sets[0], sets[0]).notes == []
        with pytest.raises(InputError, match="the columns of their labels differ"):
            task_of(sets[1], sets[0])


class TestGallery:
    def test_holds_the_items_with_their_labels(self):
        task, embeddings = task_of(images_of(30, seed=1)), torch.randn(30, 6)
        task.set_gallery(embeddings)
        assert torch.equal(task.gallery.labels, images_of(30, seed=1)[1])
        torch.testing.assert_close(task.gallery.embeddings, embeddings / embeddings.norm(dim=1, keepdim=True))

    @pytest.mark.parametrize("count", [23, 25])
    def test_one_embedding_per_item(self, count):
        with pytest.raises(InputError, match=f"There are {count} embeddings for 24 items of the gallery; expected one"):
            task_of().set_gallery(torch.randn(count, 6))

    def test_finite_ones(self):
        embeddings = torch.randn(24, 6)
        embeddings[5, 1] = math.nan
        with pytest.raises(InputError, match="NaN or infinite embeddings for 1 of 24 images"):
            task_of().set_gallery(embeddings)

    def test_of_two_classes_or_more(self):
        task = task_of((images_of()[0], torch.full((24,), 3)))
        with pytest.raises(InputError, match="All items of the gallery have one label; expected two or more"):
            task.set_gallery(torch.randn(24, 6))

    def test_of_two_classes_of_which_one_is_junk(self):
        labels = torch.where(torch.arange(24) % 2 > 0, 1, -1)
        with pytest.raises(InputError, match="label -1 are junk; with junk_label=None, it is a label as all others"):
            task_of((images_of()[0], labels)).set_gallery(torch.randn(24, 6))
        task_of((images_of()[0], labels), junk_label=None).set_gallery(torch.randn(24, 6))


class TestKnownEmbeddings:
    def test_of_the_model_are_taken(self):
        task = task_of(images_of(30, seed=1))
        known = embedded(task.embed.modules[0], images_of(30, seed=1)[0])
        task.embed.modules[0].eval()
        for given in (known, 3 * known, known.half()):  # of another length: a search by cosine does not see it
            assert torch.equal(task.check_embeddings(given), given)

    def test_of_another_model_are_refused(self):
        with pytest.raises(
            InputError, match=r"not those that the model gives: item \d+ is .* gallery=\(None, labels\)"
        ):
            task_of(images_of(30, seed=1)).check_embeddings(torch.randn(30, 6))

    def test_in_another_order_are_refused(self):
        task = task_of(images_of(30, seed=1))
        known = embedded(task.embed.modules[0], images_of(30, seed=1)[0])
        task.embed.modules[0].eval()
        with pytest.raises(InputError, match="in the order of the gallery"):
            task.check_embeddings(known.roll(1, 0))

    def test_of_another_model_are_taken_where_there_are_no_images(self):
        known = torch.randn(30, 6)
        assert torch.equal(task_of((None, images_of(30)[1])).check_embeddings(known), known)

    @pytest.mark.parametrize("shape", [(24, 7), (24,), (24, 6, 1), (24, 1, 6)])
    def test_of_another_are_refused(self, shape):
        found = ", ".join(map(str, shape))
        message = rf"gallery_embeddings are torch.float32 \({found},?\); expected \(24, 6\) real numbers, as the model"
        with pytest.raises(InputError, match=message):
            task_of(images_of(seed=1)).check_embeddings(torch.rand(shape))


class TestRowsWithRightItem:
    def made(self, labels, gallery_labels=None):
        gallery = None if gallery_labels is None else (torch.rand(len(gallery_labels), 1, 6, 6), gallery_labels)
        return bench_of(network(), (torch.rand(len(labels), 1, 6, 6), torch.tensor(labels)), gallery)

    def test_leave_one_out_a_label_has_to_occur_twice(self):
        task = self.made([5, 6, 5, 7, 8, 8])
        rows, left_out = task.with_right_item(task.rows(None))
        assert (rows.tolist(), left_out) == ([0, 2, 4, 5], 2)
        rows, left_out = task.with_right_item(task.rows([4, 3, 0]))
        assert (rows.tolist(), left_out) == ([4, 0], 1)
        with pytest.raises(InputError, match=r"None of 2 queries has a right item .* expected .* at least twice\."):
            task.with_right_item(task.rows([1, 3]))

    def test_in_another_gallery_once(self):
        task = self.made([5, 6, 5, 7], torch.tensor([6, 8, 8, 5]))
        rows, left_out = task.with_right_item(task.rows(None))
        assert (rows.tolist(), left_out) == ([0, 1, 2], 1)
        with pytest.raises(InputError, match=r"None of 1 queries has a right item .* that occur there\.$"):
            task.with_right_item(task.rows([3]))


class TestBatch:
    ROWS = torch.tensor([20, 3, 11])

    def test_holds_the_queries_and_what_they_search(self):
        (images, labels), (pixels, _) = images_of(), images_of(30, seed=1)
        task = bench_of(network(), (images, labels), (pixels, images_of(30, seed=1)[1]), "L2")
        batch = task.batch(self.ROWS)
        assert torch.equal(batch.images, images[self.ROWS])
        assert torch.equal(batch.targets.labels, labels[self.ROWS])
        assert batch.targets.own.tolist() == [-1] * 3
        assert torch.equal(batch.pixels_of(torch.tensor([29, 0])), pixels[[29, 0]])
        assert batch.gallery is task.gallery
        assert batch.modules == (task.embed.modules[0],)
        assert batch.norm == "L2"

    @pytest.mark.parametrize("gallery", [None, images_of(30, seed=1)])
    def test_no_query_is_embedded_again(self, gallery):
        task = bench_of(network(), images_of(), gallery)
        asked = pixels_asked(task)
        wanted = embedded(task.embed.modules[0], images_of()[0])[self.ROWS]
        asked.taken()
        assert torch.equal(task.batch(self.ROWS).clean, wanted)
        assert asked.taken() == []

    def test_queries_that_the_model_cannot_embed_are_refused(self):
        images, labels = images_of()
        model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Threshold(0.0, math.nan))
        images[:] = images.clamp(min=0.1)
        images[3, 0, 0], images[9] = 0.0, 0.0
        with pytest.raises(InputError, match="NaN or infinite embeddings for 2 of 24 images without attack"):
            bench_of(model, (images, labels), (images_of(seed=1)[0].clamp(min=0.1), labels))
