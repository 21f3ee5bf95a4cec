"""Who searches what: queries within the gallery, ignored and junk items, several labels, galleries of vectors.

Each number is compared with a plain loop over the embeddings.
"""

import by_loops
import pytest
import torch
from query_batches import embedded, images_of, network
from torch import nn
from torch.utils.data import TensorDataset

from pml_adversarial import InputError, evaluate_robustness
from pml_adversarial.evaluation.suites import attacks_by_name, quick, standard

EPS = 0.05
FAST = quick(5, 1)
IMAGES, LABELS = images_of()
OTHERS, OTHER_LABELS = images_of(30, seed=1)


def evaluated(queries=(IMAGES, LABELS), gallery=None, model=None, **options):
    options = {"eps": EPS, "attacks": FAST, "checks": False} | options
    return evaluate_robustness(network() if model is None else model, queries, gallery, **options)


def right_by_loops(queries, items, left_out, is_right):
    """One character per query: whether the most similar item that it may find is right."""
    flags = ""
    for i, query in enumerate(queries):
        found = {j: by_loops.cosine(query, item) for j, item in enumerate(items) if not left_out(i, j)}
        flags += "01"[bool(is_right(i, max(found, key=found.get)))]
    return flags


EMBEDDED, OTHERS_EMBEDDED = embedded(network(), IMAGES), embedded(network(), OTHERS)


def same_label(i, j):
    return LABELS[i] == OTHER_LABELS[j]


def own_images(report):
    return [note for note in report.notes if "own image" in note]


class TestQueriesWithinTheGallery:
    def test_saved_adversarial_images_are_embedded_themselves(self):
        saved = evaluated(eps=0.15, keep_attacked=True).attacked[0.15]
        moved = embedded(network(), saved)
        wanted = right_by_loops(moved, EMBEDDED, lambda i, j: i == j, lambda i, j: LABELS[i] == LABELS[j])
        found = evaluated((saved, LABELS), (IMAGES, LABELS), own=range(24), eps=1e-6)
        assert found.clean_flags == wanted
        assert wanted != evaluated().clean_flags

    @pytest.mark.parametrize(
        "form",
        [pytest.param(tuple, marks=pytest.mark.slow), lambda pair: TensorDataset(*pair)],
        ids=["tensors", "one object"],
    )
    def test_the_same_set_twice_is_told_and_left_out(self, form):
        data = form((IMAGES, LABELS))
        told = evaluated(data, data, checks=True)
        assert told.clean["recall_at_1"] == 1
        assert "no copies in the gallery" in {check.name for check in told.flagged}
        note = "24 of 24 queries find their own image in the gallery; own='same' leaves it out"
        assert note in told.notes
        assert note in str(told)
        left_out, expected = evaluated(data, data, own="same", checks=True), evaluated(checks=True)
        assert left_out.clean_flags == expected.clean_flags
        assert left_out.worst == expected.worst
        assert "no copies in the gallery" not in {check.name for check in left_out.flagged}
        assert left_out.protocol == expected.protocol == "leave-one-out"

    @pytest.mark.parametrize(
        "stored", [lambda images: images.half(), lambda images: (images * 255).round() / 255], ids=["half", "8 bit"]
    )
    def test_images_that_are_stored_in_another_form(self, stored):
        told = evaluated(gallery=(stored(IMAGES), LABELS))
        assert "24 of 24 queries find their own image in the gallery; own='same' leaves it out" in told.notes
        found = evaluated(gallery=(stored(IMAGES), LABELS), own="same")
        assert found.clean_flags == evaluated(gallery=(stored(IMAGES), LABELS), own=range(24)).clean_flags
        assert "own='same': 24 of 24 queries have their image in the gallery, and do not find this item" in found.notes

    @pytest.mark.parametrize("kind", [torch.float32, torch.float16, torch.bfloat16])
    @pytest.mark.parametrize("images", [IMAGES, None])
    def test_vectors_that_are_stored_in_another_type(self, kind, images):
        options = {"gallery": (images, LABELS), "gallery_embeddings": EMBEDDED.to(kind)}
        assert (
            "24 of 24 queries find their own image in the gallery; own='same' leaves it out"
            in evaluated(**options).notes
        )
        found, expected = evaluated(own="same", **options), evaluated(own=range(24), **options)
        assert found.clean_flags == expected.clean_flags

    def test_other_vectors_are_not_taken_for_own_ones(self):
        options = {"gallery": (None, OTHER_LABELS), "gallery_embeddings": OTHERS_EMBEDDED}
        with pytest.raises(InputError, match="own='same': no query has its embedding among those of the gallery"):
            evaluated(own="same", **options)
        images = {"gallery": (OTHERS, OTHER_LABELS)}
        assert "own='same': 0 of 24 queries have" in evaluated(own="same", **images).notes[0]
        assert evaluated(own="same", **images).clean_flags == evaluated(**images).clean_flags

    @pytest.mark.parametrize("images", [IMAGES, None])
    def test_own_items_that_are_ignored_too(self, images):
        """As by the mask of re-identification, which covers images of the same person by the same camera."""
        options = {"gallery": (images, LABELS), "ignore": torch.eye(24, dtype=torch.bool)}
        options |= {"gallery_embeddings": EMBEDDED} if images is None else {}
        found = evaluated(own="same", **options)
        assert "own='same': 24 of 24 queries have their image in the gallery" in " ".join(found.notes)
        assert found.clean_flags == evaluated(**options).clean_flags

    def test_a_second_copy_is_told(self):
        twice = torch.cat([IMAGES, IMAGES]), torch.cat([LABELS, LABELS])
        for own in ("same", range(24)):
            note = "24 of 24 queries find their own image in the gallery; expected one of each image"
            assert note in evaluated(gallery=twice, own=own).notes

    def test_without_a_gallery_it_changes_nothing(self):
        found, expected = evaluated(own="same"), evaluated()
        assert (found.clean_flags, found.worst, found.notes) == (
            expected.clean_flags,
            expected.worst,
            expected.notes,
        )

    def test_some_of_them_are_counted(self):
        images = torch.cat([OTHERS, IMAGES[[3, 20]]])
        labels = torch.cat([OTHER_LABELS, LABELS[[3, 20]]])
        assert any("2 of 24 queries find their own image" in note for note in evaluated(gallery=(images, labels)).notes)
        found = evaluated(gallery=(images, labels), own="same")
        expected = evaluated(gallery=(images, labels), own=[30 if i == 3 else 31 if i == 20 else -1 for i in range(24)])
        assert found.clean_flags == expected.clean_flags
        assert found.worst == expected.worst
        assert own_images(found) == []

    def test_no_word_where_there_are_none(self):
        assert own_images(evaluated(gallery=(OTHERS, OTHER_LABELS))) == []
        assert own_images(evaluated()) == []


class TestIgnored:
    """As in person re-identification: an item of the same person and camera is no success and no failure."""

    CAMERAS, OTHER_CAMERAS = torch.arange(24) // 4 % 2, torch.arange(30) // 4 % 2

    def mask(self, rows):
        same = LABELS[rows].unsqueeze(1) == OTHER_LABELS
        return same & (self.CAMERAS[rows].unsqueeze(1) == self.OTHER_CAMERAS)

    @pytest.mark.parametrize("as_function", [True, False])
    def test_by_loops(self, as_function):
        ignore = self.mask if as_function else self.mask(torch.arange(24))
        found = evaluated(gallery=(OTHERS, OTHER_LABELS), ignore=ignore)

        def ignored(i, j):
            return same_label(i, j) and self.CAMERAS[i] == self.OTHER_CAMERAS[j]

        wanted = right_by_loops(EMBEDDED, OTHERS_EMBEDDED, ignored, same_label)
        assert found.clean_flags == wanted
        assert wanted != evaluated(gallery=(OTHERS, OTHER_LABELS)).clean_flags
        assert "ignored items" in found.protocol

    def test_chance_and_queries_without_right_items(self):
        mask = self.mask(torch.arange(24))
        mask[5] |= LABELS[5] == OTHER_LABELS
        found = evaluated(gallery=(OTHERS, OTHER_LABELS), ignore=mask)
        assert (found.num_queries, found.left_out) == (23, 1)
        assert found.queries == tuple(row for row in range(24) if row != 5)
        shares = []
        for i in range(24):
            searched = [j for j in range(30) if not mask[i, j]]
            shares.append(sum(int(same_label(i, j)) for j in searched) / len(searched))
        shares.pop(5)
        assert found.chance == pytest.approx(sum(shares) / 23)

    @pytest.mark.parametrize("attacks", ["standard", "apgd-ce"])
    def test_every_attack_heeds_it(self, attacks):
        """With all other items ignored but one right and one wrong, each attack aims at these two."""
        keep = torch.stack([(label == OTHER_LABELS).nonzero()[0, 0] for label in LABELS])
        wrong = torch.stack([((label + 1) % 4 == OTHER_LABELS).nonzero()[0, 0] for label in LABELS])
        ignore = torch.ones(24, 30, dtype=torch.bool)
        ignore[torch.arange(24), keep] = ignore[torch.arange(24), wrong] = False
        members = standard(10, 1, 30, 3) if attacks == "standard" else [attacks_by_name()[attacks]]
        whole = evaluated(gallery=(OTHERS, OTHER_LABELS), ignore=ignore, attacks=members)
        for i in (0, 5, 11):
            pair = [int(keep[i]), int(wrong[i])]
            alone = evaluated((IMAGES[[i]], LABELS[[i]]), (OTHERS[pair], OTHER_LABELS[pair]), attacks=FAST)
            assert whole.clean_flags[i] == alone.clean_flags
            assert whole.worst[0].robust_flags[i] <= alone.clean_flags

    def test_junk_items_are_found_by_nobody(self):
        labels = OTHER_LABELS.clone()
        labels[::3] = -1
        found = evaluated(gallery=(OTHERS, labels))
        wanted = right_by_loops(EMBEDDED, OTHERS_EMBEDDED, lambda i, j: labels[j] == -1, same_label)
        assert found.clean_flags == wanted
        assert "10 items of the label -1 are junk: no query finds them" in found.notes
        assert found.num_classes == 4
        counted = evaluated(gallery=(OTHERS, labels), junk_label=None)
        assert counted.num_classes == 5
        assert counted.clean_flags != wanted

    @pytest.mark.parametrize(
        ("ignore", "message"),
        [
            (torch.zeros(24, 29, dtype=torch.bool), r"ignore gives torch.bool of shape \(24, 29\); .* \(24, 30\)"),
            (torch.zeros(23, 30, dtype=torch.bool), r"of shape \(23, 30\); expected torch.bool \(24, 30\)"),
            (torch.zeros(24, 30), r"ignore gives torch.float32"),
            (lambda rows: torch.zeros(2, 30, dtype=torch.bool), r"of shape \(2, 30\); expected torch.bool \(24, 30\)"),
            (lambda rows: None, r"ignore gives NoneType; expected torch.bool \(24, 30\)"),
            (torch.ones(24, 30, dtype=torch.bool), "24 queries finds any item: all are its own, junk or ignored"),
        ],
    )
    def test_what_is_no_mask(self, ignore, message):
        with pytest.raises(InputError, match=message):
            evaluated(gallery=(OTHERS, OTHER_LABELS), ignore=ignore)

    @pytest.mark.parametrize("rows", [3, 25])
    def test_a_mask_is_of_all_queries_and_not_of_a_subset(self, rows):
        mask = torch.zeros(rows, 30, dtype=torch.bool)
        with pytest.raises(InputError, match=r"expected torch.bool \(24, 30\): for each query of all queries, also"):
            evaluated(gallery=(OTHERS, OTHER_LABELS), ignore=mask, subset=[5, 3, 1])


class TestSeveralLabels:
    SETS = torch.tensor([[1, 0, 0], [0, 1, 0], [1, 1, 0], [0, 0, 1]])

    def test_items_that_share_a_label_are_right(self):
        queries, items = self.SETS[LABELS], self.SETS[OTHER_LABELS]

        def shares(i, j):
            return bool((queries[i] & items[j]).any())

        wanted = right_by_loops(EMBEDDED, OTHERS_EMBEDDED, lambda i, j: False, shares)
        for kind in (torch.int64, torch.bool, torch.float32):
            found = evaluated((IMAGES, queries.to(kind)), (OTHERS, items.to(kind)), attacks=standard(5, 1, 20, 3))
            assert found.clean_flags == wanted
            assert "several labels per image" in found.protocol
            assert found.worst_case(EPS) < found.clean["recall_at_1"]
        assert wanted != evaluated(gallery=(OTHERS, OTHER_LABELS)).clean_flags

    def test_relevance_that_is_given(self):
        relevant = torch.rand(24, 30, generator=torch.Generator().manual_seed(0)) < 0.5
        wanted = right_by_loops(EMBEDDED, OTHERS_EMBEDDED, lambda i, j: False, lambda i, j: relevant[i, j])
        found = evaluated(gallery=(OTHERS, OTHER_LABELS), relevant=relevant, attacks=standard(5, 1, 20, 3))
        assert found.clean_flags == wanted

    def test_another_number_of_labels_is_refused(self):
        with pytest.raises(InputError, match=r"\(24, 3\) for the queries, \(30, 4\) for the gallery"):
            evaluated((IMAGES, self.SETS[LABELS]), (OTHERS, torch.eye(4, dtype=torch.long)[OTHER_LABELS]))

    def test_all_items_right_is_refused(self):
        with pytest.raises(InputError, match="has a wrong item in the gallery"):
            evaluated(gallery=(OTHERS, OTHER_LABELS), relevant=torch.ones(24, 30, dtype=torch.bool))


class TestVectors:
    """A gallery of vectors with labels and no images."""

    def test_by_loops_and_gallery_attacks_are_not_made(self):
        vectors = torch.stack([EMBEDDED[label == LABELS].mean(0) for label in range(4)])
        report = evaluated(
            gallery=(None, torch.arange(4)), gallery_embeddings=vectors, attacks=standard(5, 1, 20, 3), checks=True
        )
        wanted = right_by_loops(EMBEDDED, vectors, lambda i, j: False, lambda i, j: LABELS[i] == j)
        assert report.clean_flags == wanted
        assert {result.target for result in report.attacks} == {"query"}
        assert "promote is left out: it needs images of the gallery, and there are none" in report.notes
        assert [neighbour.image for example in report.examples for neighbour in example.before] == [None] * 8 * 4
        assert "item 0" in report_page(report)

    def test_numpy_vectors(self):
        vectors = EMBEDDED.numpy()
        found = evaluated(gallery=(None, LABELS.numpy()), gallery_embeddings=vectors)
        assert found.clean["recall_at_1"] == 1

    @pytest.mark.parametrize(
        ("gallery", "message"),
        [
            (None, r"expected one each\. A gallery without images is gallery=\(None, labels\)"),
            ((torch.zeros(4, 1, 6, 6), torch.arange(4)), r"not those that the model gives.* gallery=\(None, labels\)"),
        ],
    )
    def test_what_is_no_such_gallery(self, gallery, message):
        vectors = torch.stack([EMBEDDED[label == LABELS].mean(0) for label in range(4)])
        with pytest.raises(InputError, match=message):
            evaluated(gallery=gallery, gallery_embeddings=vectors)

    def test_without_embeddings(self):
        with pytest.raises(InputError, match=r"gallery has labels only; expected gallery_embeddings"):
            evaluated(gallery=(None, LABELS))


def report_page(report):
    from pml_adversarial.evaluation.reports.html import render

    return render(report)


@pytest.mark.parametrize("distance", ["euclidean", "inner_product", "normalized_euclidean"])
class TestDistances:
    """A model whose embeddings have very different lengths, so that each distance finds other items."""

    MODEL = staticmethod(lambda: nn.Sequential(network(), nn.Linear(6, 5)))

    @staticmethod
    def compared(distance, one, other):
        if distance == "inner_product":
            return float(one @ other)
        if distance == "normalized_euclidean":
            one, other = one / one.norm(), other / other.norm()
        return -float((one - other).norm())

    def model(self):
        torch.manual_seed(3)
        return self.MODEL()

    def test_clean_numbers_by_loops_and_attacks_follow(self, distance):
        embeddings = embedded(self.model(), IMAGES).double()
        flags = ""
        for i in range(24):
            near = {j: self.compared(distance, embeddings[i], embeddings[j]) for j in range(24) if j != i}
            flags += "01"[bool(LABELS[max(near, key=near.get)] == LABELS[i])]
        report = evaluated(model=self.model(), distance=distance, attacks=standard(20, 1, 50, 3), keep_attacked=True)
        assert report.clean_flags == flags
        assert report.settings["distance"] == distance
        assert f"Linf, {distance}, leave-one-out" in str(report)
        moved = embedded(self.model(), report.attacked[EPS]).double()
        for i, robust in enumerate(report.worst[0].robust_flags):
            near = {j: self.compared(distance, moved[i], embeddings[j]) for j in range(24) if j != i}
            right = LABELS[max(near, key=near.get)] == LABELS[i]
            assert bool(right) == (robust == "1") or flags[i] == "0"
        assert report.worst_case(EPS) < report.clean["recall_at_1"]

    @pytest.mark.slow
    def test_checks_do_not_flag_an_honest_model(self, distance):
        images = images_of(80, 4, spread=0.1)
        report = evaluated(images, model=network(), distance=distance, attacks=quick(), checks=True, eps=0.03)
        assert report.flagged == ()
        assert {check.name for check in report.checks if check.passed} > {"gradients are there", "gradients are true"}


def test_a_cosine_that_finds_other_items_than_euclidean_search_is_told():
    scale = torch.linspace(0.1, 3, 24)[torch.randperm(24, generator=torch.Generator().manual_seed(0))]
    vectors = EMBEDDED * scale[:, None]
    report = evaluated(gallery=(None, LABELS), gallery_embeddings=vectors, own=range(24))
    flags = ""
    for i in range(24):
        near = {j: -float((EMBEDDED[i] - vectors[j]).norm()) for j in range(24) if j != i}
        flags += "01"[bool(LABELS[max(near, key=near.get)] == LABELS[i])]
    by_euclidean = 100 * flags.count("1") / 24
    assert any(f"by Euclidean distance R@1 without attack would be {by_euclidean:.1f}" in note for note in report.notes)
    found = evaluated(gallery=(None, LABELS), gallery_embeddings=vectors, own=range(24), distance="euclidean")
    assert found.clean_flags == flags
    assert found.notes == ()
