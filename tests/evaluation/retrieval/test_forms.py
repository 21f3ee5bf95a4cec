"""Labelled images in the forms in which users have them, and what is none of them."""

import numpy
import pytest
import torch
from data_sets import Listed
from PIL import Image
from query_batches import images_of
from torch.utils.data import (
    ConcatDataset,
    DataLoader,
    IterableDataset,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    default_collate,
)

from pml_adversarial.errors import InputError
from pml_adversarial.evaluation.retrieval.forms import labelled_images
from pml_adversarial.evaluation.retrieval.images import ImageSet


def pairs(images, labels):
    return Listed(lambda row: (images[row], int(labels[row])), len(images))


class TestForms:
    def test_data_sets(self):
        images, labels = images_of()

        class Targeted(Listed):
            targets = labels.tolist()

        class Labelled(Listed):
            labels = images_of()[1].numpy()

        class Short(Listed):
            targets = (3, 4)  # something else

        class Renamed(Listed):
            """As torchvision's do: ``targets`` are those before ``target_transform``."""

            targets = (labels % 2).tolist()
            target_transform = staticmethod(lambda label: label)

        sets = [kind(pairs(images, labels).get, 24) for kind in (Listed, Targeted, Labelled, Short, Renamed)]
        for queries in (*sets, TensorDataset(images, labels), [images, labels], (images, labels)):
            self.check(queries, images, labels)

    def test_dicts_and_loaders(self):
        images, labels = images_of()
        of_dicts = Listed(lambda row: {"img": images[row], "y": int(labels[row])}, 24)

        def collate(items):
            return {"image": torch.stack([item["img"] for item in items]), "target": [item["y"] for item in items]}

        self.check({"pixel_values": images, "labels": labels}, images, labels)
        self.check(of_dicts, images, labels)
        for given in (TensorDataset(images, labels), pairs(images, labels), of_dicts):
            self.check(DataLoader(given, 7, shuffle=True), images, labels)
        self.check(DataLoader(of_dicts, 5, collate_fn=collate), images, labels)

    def test_collate_functions_see_each_item_alone(self):
        """What they make of a batch may depend on the other items: they sort, pad or normalise."""
        images, labels = images_of()

        def longest_first(items):
            items = sorted(items, key=lambda item: -float(item[0].sum()))
            return torch.stack([image for image, _ in items]), torch.tensor([label for _, label in items])

        def centred(items):
            found = torch.stack([image for image, _ in items])
            return found - found.mean(0) * (len(items) > 1), [label for _, label in items]

        for collate in (longest_first, centred):
            self.check(DataLoader(pairs(images, labels), 7, collate_fn=collate), images, labels)

    @pytest.mark.parametrize(
        ("collate", "message"),
        [
            (lambda items: (torch.stack([items[0][0]] * 2), [items[0][1]]), "item 0: collate_fn gives 2 images and 1"),
            (lambda items: default_collate([]), "item 0: collate_fn fails on this item alone, with IndexError"),
        ],
        ids=["two crops", "items left out"],
    )
    def test_collate_functions_that_do_not_keep_items(self, collate, message):
        with pytest.raises(InputError, match=f"queries, {message}"):
            labelled_images(DataLoader(pairs(*images_of()), 7, collate_fn=collate), "queries")

    def test_the_sampler_is_not_advanced(self):
        images, labels = images_of()
        generator = torch.Generator().manual_seed(3)
        loader = DataLoader(pairs(images, labels), 2, sampler=SubsetRandomSampler([3, 20, 8], generator=generator))
        before = generator.get_state()
        self.check(loader, images[[3, 8, 20]], labels[[3, 8, 20]])
        assert torch.equal(generator.get_state(), before)

    @pytest.mark.parametrize("kind", ["u2", "u4", "u8", ">i8", "reversed", "table"])
    def test_labels_in_any_array(self, kind):
        images, labels = images_of()
        given = labels.numpy()
        if kind == "table":
            given = pytest.importorskip("pandas").Series(given, index=range(5, 29))
        else:
            given = given[::-1].copy()[::-1] if kind == "reversed" else given.astype(kind)
        self.check((images, given), images, labels)

    def test_a_loader_that_leaves_out_images(self):
        images, labels = images_of()
        chosen = [3, 20, 8]
        loader = DataLoader(pairs(images, labels), 2, sampler=SubsetRandomSampler(chosen))
        self.check(loader, images[sorted(chosen)], labels[sorted(chosen)])

    def test_a_loader_that_is_read_once(self):
        images, labels = images_of()

        class Stream(IterableDataset):
            def __iter__(self):
                yield from zip(images, labels, strict=True)

        self.check(DataLoader(Stream(), 7), images, labels)

    def test_what_a_subclass_does_to_its_items_is_done(self):
        images, labels = images_of()

        class Mirrored(TensorDataset):
            def __getitem__(self, row):
                image, label = super().__getitem__(row)
                return image.flip(-1), label

        class Relabelled(DataLoader):
            def __iter__(self):
                for batch, wanted in super().__iter__():
                    yield batch, wanted + 5

        def collate(items):
            return {"image": tuple(item[0].flip(-1) for item in items), "label": [int(item[2]) for item in items]}

        self.check(Mirrored(images, labels), images.flip(-1), labels)
        with_camera = TensorDataset(images, torch.zeros(24), labels)
        self.check(DataLoader(with_camera, 7, collate_fn=collate), images.flip(-1), labels)
        self.check(Relabelled(TensorDataset(images, labels), 7), images, labels + 5)

    def test_arrays_as_files_hold_them(self):
        images, labels = images_of()

        class Rising:
            """Reads rows in rising order alone, as h5py does."""

            shape = tuple(images.shape)

            def __len__(self):
                return len(images)

            def __getitem__(self, rows):
                assert (numpy.diff(rows) > 0).all()
                return images.numpy()[rows]

        self.check((Rising(), labels), images, labels)
        self.check((images.numpy().astype(">f4"), labels.numpy().astype(object)), images, labels)
        with pytest.raises(InputError, match="queries has images of object; expected numbers"):
            labelled_images((images.numpy().astype(object), labels), "queries").read(torch.tensor([1]))

    def test_listed_names_where_items_carry_numbers(self):
        images, labels = images_of()
        named = Listed(lambda row: (images[row], int(labels[row])), 24)
        named.labels = [f"class {label}" for label in labels.tolist()]
        self.check(named, images, labels)

    def test_a_list_of_items(self):
        images, labels = images_of()
        self.check(list(zip(images, labels.tolist(), strict=True)), images, labels)
        self.check(
            [{"image": image, "label": label} for image, label in zip(images, labels, strict=True)], images, labels
        )

    def test_a_list_of_two_items_and_a_list_of_lists(self):
        images, labels = images_of()
        items = list(zip(images, labels, strict=True))
        self.check([[image.numpy(), int(label)] for image, label in items], images, labels)
        of_two = (items[:2], [(images[0], 0), (images[1], 1)], [{"image": images[row], "label": row} for row in (0, 1)])
        pairs_of_two = ([(images[0], images[1]), (0, 1)], ((images[0], images[1]), (0, 1)), [images[:2], labels[:2]])
        for given in (*of_two, *pairs_of_two):
            found = labelled_images(given, "queries")
            assert found.labels.tolist() == [0, 1]
            assert torch.equal(found.read(torch.tensor([1, 0])), images[[1, 0]])

    def test_of_several_keys_the_first_that_can_be_used(self):
        images, labels = images_of()
        picture = Image.new("L", (6, 6))
        items = [
            {"image": picture, "pixel_values": image, "label": "five", "labels": int(label)}
            for image, label in zip(images, labels, strict=True)
        ]
        self.check(items, images, labels)
        self.check(DataLoader(items, 5, collate_fn=lambda batch: {
            "image": [picture] * len(batch), "pixel_values": [item["pixel_values"] for item in batch],
            "label": [item["labels"] for item in batch]}), images, labels)  # fmt: skip

    def test_labels_that_are_pictures_are_not_printed(self):
        images = images_of()[0]
        with pytest.raises(InputError, match=r"^queries has labels as Tensor; expected whole") as caught:
            labelled_images((images, [images[0], "x"]), "queries")
        assert len(str(caught.value)) < 100

    def test_names_of_classes(self):
        images, labels = images_of(6, 3)
        named = pairs(images, labels)
        named.classes = ["ant", "bee", "cat"]
        for given in (named, Subset(named, [3, 4]), DataLoader(named, batch_size=2)):
            found = ImageSet(given, torch.device("cpu"), "queries")
            assert [found.name_of(row) for row in range(2)] == ["ant", "bee"]
        named.classes = [0, 1, 2]
        assert ImageSet(named, torch.device("cpu"), "queries").name_of(1) == "1"
        assert ImageSet((images, labels + 7), torch.device("cpu"), "queries").name_of(1) == "8"

    def test_names_that_do_not_name_all_labels_are_left_out(self):
        images, labels = images_of(6, 3)
        named = pairs(images, labels)
        named.classes = ["ant", "bee"]
        assert ImageSet(named, torch.device("cpu"), "queries").name_of(1) == "1"

    def test_joined_data_sets_have_one_list_of_classes(self):
        images, labels = images_of(6, 3)
        one, other = pairs(images, labels), pairs(images, labels)
        joined = ConcatDataset([Subset(one, [3, 4]), other])
        for lists, name in ((["ant", "bee", "cat"], ["ant", "bee", "cat"]), "ant"), ((["ant", "bee", "cat"], []), "0"):
            one.classes, other.classes = lists
            assert ImageSet(joined, torch.device("cpu"), "queries").name_of(0) == name
        one.classes, other.classes = ["ant", "bee", "cat"], ["bee", "cat", "dog"]
        with pytest.raises(InputError, match="queries joins data sets whose lists of classes differ"):
            ImageSet(joined, torch.device("cpu"), "queries")

    def test_labels_alone(self):
        found = labelled_images((None, [0, 1, 1]), "gallery")
        assert (found.has_images, found.count, found.labels.tolist()) == (False, 3, [0, 1, 1])
        with pytest.raises(InputError, match="there are no images, only labels and embeddings"):
            found.read(torch.tensor([0]))

    def check(self, given, images, labels):
        found = labelled_images(given, "queries")
        assert (found.count, found.has_images) == (len(images), True)
        assert torch.equal(torch.as_tensor(found.labels), labels)
        for rows in ([*range(found.count)], [2, 0, 2], [1]):
            assert torch.equal(torch.as_tensor(found.read(torch.tensor(rows))), images[rows])

    @pytest.mark.parametrize("name", ["targets", "labels"])
    def test_known_labels_are_taken_without_reading_an_image(self, name):
        def get(row):
            raise AssertionError("an image was read")

        queries = Listed(get, 4)
        setattr(queries, name, (0, 1, 0, 1))
        assert labelled_images(queries, "queries").labels.tolist() == [0, 1, 0, 1]

    def test_only_the_images_asked_for_are_read(self):
        images, labels = images_of()
        read = []

        class Targeted(Listed):
            targets = labels

        def get(row):
            read.append(row)
            return images[row], int(labels[row])

        labelled_images(Targeted(get, 24), "queries").read(torch.tensor([7, 2]))
        assert read == [7, 2]


@pytest.mark.parametrize("given", ["abcd", {"a": 1}, torch.zeros(4, 1, 2).numpy(), Listed(lambda row: (row,), 4)])
def test_what_holds_no_pairs_is_refused(given):
    with pytest.raises(InputError, match=r"queries.*expected \(images, labels\) or a data set of such pairs"):
        labelled_images(given, "queries")
