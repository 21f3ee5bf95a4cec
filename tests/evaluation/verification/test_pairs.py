"""Pairs from all that users pass, and pairs that are drawn."""

import itertools
from collections import Counter

import numpy
import pytest
import torch
from query_batches import images_of
from torch.utils.data import DataLoader, TensorDataset

from pml_adversarial.errors import InputError
from pml_adversarial.evaluation.verification.pairs import PairChoice, PairSet, draw_pairs

CPU = torch.device("cpu")
FIRST, SECOND = images_of(6)[0], images_of(6, seed=1)[0]
SAME = torch.tensor([True, False, True, False, False, True])
LABELS = torch.tensor([3, 1, 3, 2, 1, 3, 9])


class Items:
    """A data set of its items, which counts how often it is read."""

    def __init__(self, *items, **attributes):
        self.items, self.reads = items, 0
        vars(self).update(attributes)

    def __len__(self):
        return len(self.items)

    def __getitem__(self, row):
        self.reads += 1
        return self.items[row]


class Unsized:
    """Items without a number of them."""

    def __getitem__(self, row):
        return FIRST[row], SECOND[row], int(SAME[row])


def triples(same=int):
    return [(first, second, same(s)) for first, second, s in zip(FIRST, SECOND, SAME, strict=True)]


def shown(pairs):
    """Both images of each pair, and whether it is genuine."""
    first, second = pairs.indices.T
    return pairs.first[first], pairs.second[second], pairs.same


def all_pairs(labels, same):
    return [(i, j) for i, j in itertools.combinations(range(len(labels)), 2) if (labels[i] == labels[j]) == same]


def test_same_may_be_floating_point():
    for kind in (torch.float32, torch.float64):
        pairs = PairSet((FIRST, SECOND, torch.tensor([1, 0, 1, 0, 0, 1], dtype=kind)), torch.device("cpu"))
        assert pairs.same.tolist() == [True, False, True, False, False, True]
    with pytest.raises(InputError, match=r"labels torch\.float32"):
        PairSet((FIRST, SECOND, torch.tensor([1, 0, 0.5, 0, 0, 1])), torch.device("cpu"))


class TestGivenPairs:
    @pytest.mark.parametrize(
        "given",
        [
            (FIRST, SECOND, SAME),
            [FIRST, SECOND, SAME.long()],
            (FIRST.numpy(), SECOND.numpy(), SAME.numpy()),
            (list(FIRST), list(SECOND), SAME.tolist()),
            TensorDataset(FIRST, SECOND, SAME),
            Items(*triples()),
            Items(*triples(bool)),
            Items(*triples(), targets=SAME.int().tolist()),
            Items(*((a.numpy(), b.numpy(), numpy.bool_(s)) for a, b, s in triples())),
        ],
        ids=[
            "tensors",
            "whole numbers",
            "arrays",
            "lists",
            "TensorDataset",
            "items",
            "bools",
            "targets",
            "array items",
        ],
    )
    def test_forms(self, given):
        pairs = PairSet(given, CPU)
        first, second, same = shown(pairs)
        assert torch.equal(first, FIRST)
        assert torch.equal(second, SECOND)
        assert torch.equal(same, SAME)
        assert (pairs.protocol, pairs.notes, pairs.most_uses(), len(pairs)) == ("given pairs", [], 1, 6)

    def test_a_list_of_labels_spares_reading(self):
        read, listed = Items(*triples()), Items(*triples(), targets=SAME.int().tolist())
        for dataset in (read, listed):
            PairSet(dataset, CPU)
        assert read.reads > 12 > listed.reads

    def test_images_of_two_sizes(self):
        pairs = PairSet((FIRST, images_of(6, size=4)[0], SAME), CPU)
        assert pairs.first[:1].shape != pairs.second[:1].shape

    @pytest.mark.parametrize(
        ("given", "message"),
        [
            ((FIRST, SECOND, torch.arange(6)), r"same holds \[0, 1, 2, 3, 4, 5\]; expected for each pair True"),
            ((FIRST, SECOND, torch.eye(6)[:, :2].long()), "same holds .* expected for each pair True"),
            ((FIRST, SECOND[:5], SAME), r"second images has labels .* for 5 images"),
            ((FIRST, SECOND, SAME[:5]), r"first images has labels .* for 6 images"),
            ((FIRST, SECOND, torch.ones(6).long()), "There are 6 genuine and 0 impostor pairs; expected one of each"),
            ((FIRST, SECOND, torch.zeros(6).long()), "There are 0 genuine and 6 impostor pairs"),
            ((FIRST, None, SAME), "expected images, as they are what is compared"),
            (FIRST, "pairs is Tensor"),
            (5, "pairs is int"),
            (Unsized(), "pairs is Unsized"),
            (DataLoader(Items(*triples())), r"a data loader of pairs; expected their data set\. Pass loader\.dataset"),
        ],
    )
    def test_refusals(self, given, message):
        with pytest.raises(InputError, match=message):
            PairSet(given, CPU)

    @pytest.mark.parametrize("choice", [PairChoice([[0, 1]]), PairChoice(genuine=3), PairChoice(impostors=3)])
    def test_a_choice_would_change_nothing(self, choice):
        with pytest.raises(InputError, match="would change nothing, as the pairs are given"):
            PairSet((FIRST, SECOND, SAME), CPU, choice=choice)


class TestLabelledImages:
    images = images_of(7)[0]

    @pytest.mark.parametrize("indices", [[(0, 2), (6, 1), (4, 1)], numpy.array([[0, 2], [6, 1], [4, 1]])])
    def test_listed(self, indices):
        pairs = PairSet((self.images, LABELS), CPU, choice=PairChoice(indices))
        first, second, same = shown(pairs)
        assert torch.equal(first, self.images[[0, 6, 4]])
        assert torch.equal(second, self.images[[2, 1, 1]])
        assert same.tolist() == [True, False, True]
        assert (pairs.protocol, pairs.most_uses()) == ("listed pairs", 2)

    @pytest.mark.parametrize(
        "images", [(images, LABELS), {"image": images, "label": LABELS}, TensorDataset(images, LABELS)]
    )
    def test_drawn(self, images):
        pairs = PairSet(images, CPU, seed=4)
        assert torch.equal(pairs.indices, draw_pairs(LABELS, seed=4))
        assert pairs.same.tolist() == [LABELS[i] == LABELS[j] for i, j in pairs.indices.tolist()]
        assert (pairs.protocol, pairs.notes) == ("drawn pairs", [])

    def test_a_data_loader_of_labelled_images(self):
        loader = DataLoader(list(zip(self.images, LABELS.tolist(), strict=True)), batch_size=3)
        assert torch.equal(PairSet(loader, CPU).first[:], self.images)

    def test_items_of_image_label_and_camera_are_no_pairs(self):
        items = Items(*((image, int(label), 5) for image, label in zip(self.images, LABELS, strict=True)))
        assert PairSet(items, CPU).protocol == "drawn pairs"

    def test_fewer_than_asked_for_is_said(self):
        pairs = PairSet((self.images, LABELS), CPU, choice=PairChoice(genuine=3, impostors=100))
        assert pairs.notes == ["100 impostor pairs were asked for, the images give 17"]

    @pytest.mark.parametrize(
        ("indices", "message"),
        [
            ([(0, 7), (0, 1)], r"torch.int64 of shape \(2, 2\) with values from 0 to 7; .* from 0 to 6"),
            ([(0, -1), (0, 1)], "values from -1 to 1"),
            ([(0, 1, 2)], r"of shape \(1, 3\)"),
            ([0, 1], "expected pairs of whole numbers"),
            ([(0.0, 1.0)], "torch.float32"),
            (torch.ones(2, 2).bool(), "torch.bool"),
            ([], r"of shape \(0,\) with no values"),
        ],
    )
    def test_refused_indices(self, indices, message):
        with pytest.raises(InputError, match=message):
            PairSet((self.images, LABELS), CPU, choice=PairChoice(indices))

    @pytest.mark.parametrize(
        ("choice", "message"),
        [
            (PairChoice([(0, 2), (0, 1)], genuine=2), "genuine would change nothing"),
            (PairChoice([(0, 2), (0, 1)], impostors=2), "impostors would change nothing"),
            (PairChoice([(0, 2)]), "There are 1 genuine and 0 impostor pairs"),
            (PairChoice(genuine=0), "genuine=0; expected a whole number from 1 on, or None"),
            (PairChoice(impostors=1.5), "impostors=1.5; expected a whole number"),
        ],
    )
    def test_refused_choices(self, choice, message):
        with pytest.raises(InputError, match=message):
            PairSet((self.images, LABELS), CPU, choice=choice)

    def test_several_labels_per_image(self):
        with pytest.raises(InputError, match="several labels per image"):
            PairSet((self.images, torch.eye(7).long()), CPU)

    @pytest.mark.parametrize("labels", [torch.zeros(7).long(), torch.arange(7)])
    def test_one_kind_only(self, labels):
        with pytest.raises(InputError, match="expected one of each"):
            PairSet((self.images, labels), CPU)


class TestDrawPairs:
    @pytest.mark.parametrize("same", [True, False])
    def test_all_there_are(self, same):
        found = draw_pairs(LABELS, impostors=10_000)
        chosen = [(i, j) for i, j in found.tolist() if (LABELS[i] == LABELS[j]) == same]
        assert sorted(tuple(sorted(pair)) for pair in chosen) == all_pairs(LABELS, same)

    @pytest.mark.parametrize(("genuine", "impostors"), [(1, 1), (3, 9), (4, 17), (None, None), (2, None)])
    def test_as_many_as_asked_for_and_all_different(self, genuine, impostors):
        found = draw_pairs(LABELS, genuine, impostors, seed=1)
        same = [bool(LABELS[i] == LABELS[j]) for i, j in found.tolist()]
        wanted = 4 if genuine is None else genuine
        assert same == [True] * wanted + [False] * (wanted if impostors is None else impostors)
        assert len({tuple(sorted(pair)) for pair in found.tolist()}) == len(found)

    def test_every_pair_is_as_likely_and_either_image_is_the_first(self):
        drawn = [tuple(pair) for seed in range(1500) for pair in draw_pairs(LABELS, 2, 2, seed).tolist()]
        counts = Counter(drawn)
        for same, expected in ((True, 1500 * 2 / 8), (False, 1500 * 2 / 34)):
            for i, j in all_pairs(LABELS, same):
                for pair in ((i, j), (j, i)):
                    assert abs(counts[pair] - expected) < 4.5 * expected**0.5

    def test_the_seed_decides(self):
        labels = torch.arange(60) % 6
        assert torch.equal(draw_pairs(labels, 20, 20, 5), draw_pairs(labels, 20, 20, 5))
        assert not torch.equal(draw_pairs(labels, 20, 20, 5), draw_pairs(labels, 20, 20, 6))

    def test_the_callers_random_numbers_stay(self):
        before = torch.get_rng_state()
        draw_pairs(LABELS)
        assert torch.equal(torch.get_rng_state(), before)

    def test_a_few_of_many_images_that_nearly_all_have_one_label(self):
        labels = torch.zeros(30_000).long()
        labels[17] = 1
        found = draw_pairs(labels, 5, 200)
        assert [bool((pair == 17).any()) for pair in found] == [False] * 5 + [True] * 200
        assert len(found.unique(dim=0)) == 205


def test_junk_is_in_no_drawn_pair():
    labels = LABELS.clone()
    labels[[1, 3, 4]] = -1
    pairs = PairSet((images_of(7)[0], labels), CPU)
    assert pairs.notes == ["3 images of the label -1 are junk and in no pair"]
    assert set(pairs.indices.flatten().tolist()) == {0, 2, 5, 6}
    assert torch.equal(pairs.same, labels[pairs.indices[:, 0]] == labels[pairs.indices[:, 1]])
    with_all = PairSet((images_of(7)[0], labels), CPU, choice=PairChoice(junk_label=None))
    assert set(with_all.indices.flatten().tolist()) == set(range(7))
    assert not with_all.notes


def test_junk_is_named_where_no_pairs_are_left():
    labels = torch.tensor([1, 1, -1, -1])
    with pytest.raises(InputError, match=r"0 impostor pairs.*2 images of the label -1 are junk"):
        PairSet((images_of(4)[0], labels), CPU)


def test_a_list_of_items():
    items = [(first, second, int(same)) for first, second, same in zip(FIRST, SECOND, SAME, strict=True)]
    for given in (items, items[:3]):
        pairs = PairSet(given, CPU)
        assert torch.equal(pairs.same, SAME[: len(given)])
        assert torch.equal(pairs.second[:], SECOND[: len(given)])
