"""Folders of tiny images and npz of every kind, and what is refused."""

import shutil
import unicodedata

import numpy
import pytest
import torch
from PIL import Image

from pml_adversarial import InputError
from pml_adversarial.cli.images import images_from, same_classes


def write(path, pixels, mode=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(numpy.asarray(pixels, dtype=numpy.uint8), mode=mode).save(path)


def pixels_of(number, height=5, width=4):
    return numpy.random.default_rng(number).integers(0, 256, (height, width, 3))


@pytest.fixture
def folder(tmp_path):
    """Two classes, two and three images of 3x5x4."""
    for number, name in enumerate(["owl/1.png", "owl/0.png", "cat/b.png", "cat/more/a.PNG", "cat/a.bmp"]):
        write(tmp_path / "images" / name, pixels_of(number))
    return tmp_path / "images"


class TestFolder:
    def test_classes_are_subfolders_and_pixels_are_those_of_the_files(self, folder):
        found = images_from(folder)
        assert found.classes == ("cat", "owl")
        assert found.labels.tolist() == [0, 0, 0, 1, 1]
        for row, number in enumerate([4, 2, 3, 1, 0]):  # a.bmp, b.png, more/a.PNG; 0.png, 1.png
            image, label = found[row]
            assert torch.equal(image, torch.tensor(pixels_of(number)).permute(2, 0, 1) / 255)
            assert label == found.labels[row]

    def test_what_is_hidden_or_no_image_is_passed_over(self, folder):
        (folder / ".hidden").mkdir()
        write(folder / ".hidden" / "a.png", pixels_of(9))
        write(folder / "cat" / ".a.png", pixels_of(9))
        write(folder / "cat" / ".thumbnails" / "a.png", pixels_of(9))
        (folder / "owl" / "notes.txt").write_text("two owls")
        (folder / "README.md").write_text("images")
        found = images_from(folder)
        assert found.labels.tolist() == [0, 0, 0, 1, 1]
        assert found.note == f"{folder}: 1 files are no images that can be read, and are left out: 1 .txt"

    def test_all_that_pillow_reads_is_an_image(self, folder):
        (folder / "cat" / "b.png").rename(folder / "cat" / "b.jfif")  # by its content it is still a png
        (folder / "owl" / "scores.h5").write_bytes(b"")
        (folder / "owl" / "scores").write_bytes(b"")
        found = images_from(folder)
        assert found.labels.tolist() == [0, 0, 0, 1, 1]
        assert torch.equal(found[1][0], torch.tensor(pixels_of(2)).permute(2, 0, 1) / 255)
        said = "2 files are no images that can be read, and are left out: 1 without a suffix, 1 .h5"
        assert found.note == f"{folder}: {said}"
        assert found.with_classes(["cat", "dog", "owl"]).note == found.note
        for name in ("scores.h5", "scores"):
            (folder / "owl" / name).unlink()
        assert images_from(folder).note == ""

    @pytest.mark.parametrize("parts", [("train", "test"), ("Query", "Gallery"), ("val",)])
    def test_parts_of_a_data_set_are_no_classes(self, folder, tmp_path, parts):
        for part in parts:
            shutil.copytree(folder, tmp_path / "whole" / part)
        with pytest.raises(InputError, match=rf"holds .*parts of a data set.* such as .*whole/{sorted(parts)[0]}\."):
            images_from(tmp_path / "whole")
        assert len(images_from(tmp_path / "whole" / parts[0])) == 5

    def test_classes_may_have_names_of_parts(self, tmp_path):
        for name in ("test/a.png", "train/b.png", "train/station/c.png"):
            write(tmp_path / name, pixels_of(1))
        assert images_from(tmp_path).classes == ("test", "train")

    def test_one_name_in_two_forms_of_unicode_is_one_class(self, folder, tmp_path):
        for form in ("NFC", "NFD"):
            shutil.copytree(folder / "owl", tmp_path / form / unicodedata.normalize(form, "café"))
        composed, decomposed = images_from(tmp_path / "NFC"), images_from(tmp_path / "NFD")
        assert composed.classes == decomposed.classes == (unicodedata.normalize("NFC", "café"),)

    def test_are_read_when_they_are_asked_for(self, folder):
        found = images_from(folder)
        (folder / "owl" / "1.png").write_bytes(b"no image")
        assert found[3][0].shape == (3, 5, 4)
        with pytest.raises(InputError, match=r"owl/1\.png cannot be read as an image"):
            found[4]

    def test_ends_where_the_images_end(self, folder):
        found = images_from(folder)
        assert len(list(found)) == len(found) == 5

    def test_truncated_image_is_named(self, folder):
        whole = (folder / "owl" / "0.png").read_bytes()
        (folder / "owl" / "0.png").write_bytes(whole[: len(whole) // 2])
        with pytest.raises(InputError, match=r"owl/0\.png cannot be read as an image"):
            images_from(folder)[3]

    def test_grayscale_is_one_channel_of_luma(self, folder):
        image, _ = images_from(folder, grayscale=True)[0]
        luma = torch.tensor(pixels_of(4)).double() @ torch.tensor([0.299, 0.587, 0.114], dtype=torch.float64) / 255
        torch.testing.assert_close(image[0].double(), luma, atol=1 / 255, rtol=0)
        assert image.shape == (1, 5, 4)

    def test_gray_files_get_three_channels_unless_grayscale(self, tmp_path):
        for name in ("a", "b"):
            write(tmp_path / name / "0.png", numpy.full((3, 3), 51), mode="L")
        assert torch.equal(images_from(tmp_path)[0][0], torch.full((3, 3, 3), 0.2))
        assert torch.equal(images_from(tmp_path, grayscale=True)[0][0], torch.full((1, 3, 3), 0.2))

    def test_transparency_is_dropped(self, tmp_path):
        pixels = pixels_of(0)
        for name in ("a", "b"):
            write(tmp_path / name / "0.png", numpy.concatenate([pixels, pixels[..., :1] // 2], 2))
        assert torch.equal(images_from(tmp_path)[0][0], torch.tensor(pixels).permute(2, 0, 1) / 255)

    def test_size_resizes_the_shorter_side_and_cuts_out_the_middle(self, tmp_path):
        half = numpy.zeros((8, 16, 3))
        half[:, 4:12] = 255  # the middle square is white
        for name in ("a", "b"):
            write(tmp_path / name / "0.png", half)
            write(tmp_path / name / "1.png", half.transpose(1, 0, 2))
        for row in range(4):
            assert torch.equal(images_from(tmp_path, size=8)[row][0], torch.ones(3, 8, 8))
        assert images_from(tmp_path, size=(4, 4))[0][0].shape == (3, 4, 4)
        border = images_from(tmp_path, size=4)[0][0]
        assert torch.equal(images_from(tmp_path, size=(4, 2))[0][0], border[:, 1:3, 1:3])

    def test_unequal_sizes_need_a_size(self, folder):
        write(folder / "cat" / "z.png", pixels_of(7, 6, 4))
        with pytest.raises(InputError, match=r"z\.png is 6x4 pixels, .*a\.bmp 5x4; .*Choose a size"):
            images_from(folder)[3]
        assert images_from(folder, size=4)[3][0].shape == (3, 4, 4)

    def test_more_than_eight_bits_are_refused(self, tmp_path):
        for name in ("a", "b"):
            (tmp_path / name).mkdir()
            Image.fromarray(numpy.full((3, 3), 3000, dtype=numpy.uint16)).save(tmp_path / name / "0.png")
        with pytest.raises(InputError, match=r"0\.png has more than 8 bits"):
            images_from(tmp_path)[0]

    def test_class_without_images_is_named(self, folder):
        (folder / "dog").mkdir()
        (folder / "dog" / "a.heic").write_bytes(b"")
        with pytest.raises(InputError, match=r"class folders without an image: dog\. .*\.jpeg"):
            images_from(folder)

    def test_no_subfolders(self, folder):
        with pytest.raises(InputError, match=r"no subfolders \(1 images lie in it directly\).*one subfolder per class"):
            images_from(folder / "cat" / "more")

    def test_nothing_there(self, tmp_path):
        with pytest.raises(InputError, match=r"There is no .*nowhere"):
            images_from(tmp_path / "nowhere")

    @pytest.mark.parametrize("size", [0, (4, 5), (4, 0)])
    def test_impossible_size(self, folder, size):
        with pytest.raises(InputError, match="size="):
            images_from(folder, size=size)


LABELS = numpy.array([7, 7, 3, 3])
RAMP = numpy.linspace(0, 1, 100).reshape(4, 5, 5)


def save(path, images, labels=LABELS, **more):
    numpy.savez(path, images=images, labels=labels, **more)
    return path


def bytes_of(*shape):
    return numpy.random.default_rng(0).integers(0, 256, shape, dtype=numpy.uint8)


class TestShape:
    def test_is_height_and_width_whatever_the_proportions(self, tmp_path):
        pixels = numpy.zeros((6, 8, 3))
        pixels[:, 4:] = 255  # the right half is white
        write(tmp_path / "a" / "1.png", pixels)
        write(tmp_path / "a" / "2.png", pixels_of(1, 20, 7))
        found = images_from(tmp_path, shape=(4, 2))
        assert [image.shape for image, _ in found] == [(3, 4, 2)] * 2
        assert (found[0][0][:, :, 0] < 0.5).all()
        assert (found[0][0][:, :, 1] > 0.5).all()

    @pytest.mark.parametrize(
        ("options", "message"),
        [({"shape": (0, 4)}, "a height and a width above 0"), ({"shape": (4, 4), "size": 4}, "expected one of them")],
    )
    def test_what_is_refused(self, folder, options, message):
        with pytest.raises(InputError, match=message):
            images_from(folder, **options)


class TestNpz:
    def test_bytes_become_pixels(self, tmp_path):
        images = bytes_of(4, 3, 5, 6)
        found = images_from(save(tmp_path / "a.npz", images))
        assert torch.equal(torch.stack([image for image, _ in found]), torch.from_numpy(images).float() / 255)
        assert (found.classes, found.labels.tolist()) == (("3", "7"), [1, 1, 0, 0])

    @pytest.mark.parametrize("kind", [numpy.float16, numpy.float32, numpy.float64])
    def test_floating_point_stays(self, tmp_path, kind):
        images = (bytes_of(4, 3, 5, 6) / 255).astype(kind)
        found = images_from(save(tmp_path / "a.npz", images))
        assert torch.equal(found[2][0], torch.from_numpy(images[2].astype(numpy.float32)))

    def test_roundings_are_cut_off(self, tmp_path):
        images = numpy.full((4, 5, 5), 1.00005)
        assert torch.equal(images_from(save(tmp_path / "a.npz", images))[0][0], torch.ones(1, 5, 5))

    def test_channels_first_last_or_none(self, tmp_path):
        images = bytes_of(4, 5, 6, 3)
        last = images_from(save(tmp_path / "last.npz", images))[1][0]
        first = images_from(save(tmp_path / "first.npz", images.transpose(0, 3, 1, 2)))[1][0]
        none = images_from(save(tmp_path / "none.npz", images[..., 0]))[1][0]
        assert last.shape == first.shape == (3, 5, 6)
        assert torch.equal(last, first)
        assert torch.equal(none, first[:1])

    def test_labels_may_be_words(self, tmp_path):
        found = images_from(save(tmp_path / "a.npz", bytes_of(4, 5, 5), numpy.array(["owl", "owl", "cat", "cat"])))
        assert (found.classes, found.labels.tolist()) == (("cat", "owl"), [1, 1, 0, 0])

    @pytest.mark.parametrize(
        ("images", "labels", "message"),
        [
            (bytes_of(4, 5, 5), LABELS[:3], r"labels of .* are int64 of shape \(3,\), for 4 images"),
            (bytes_of(4, 5, 5), LABELS[:, None], r"shape \(4, 1\), for 4 images"),
            (bytes_of(4, 5, 5), LABELS / 2, "float64 of shape"),
            (bytes_of(4, 5), LABELS, r"shape \(4, 5\); expected \(N, H, W\)"),
            (bytes_of(0, 5, 5), LABELS[:0], r"shape \(0, 5, 5\)"),
            (bytes_of(4, 5, 6, 5), LABELS, "channels may be the second axis or the last"),
            (bytes_of(4, 5, 5).astype(int), LABELS, "are int64; expected uint8, or floating point"),
            (RAMP * 255, LABELS, r"from 0 to 255; expected finite values in \[0, 1\]"),
            (RAMP - 0.5, LABELS, r"from -0.5 to 0.5"),
            (numpy.where(numpy.arange(4)[:, None, None] % 2, numpy.nan, numpy.ones((4, 5, 5))), LABELS, "2 of 4 hold"),
            (
                numpy.where(numpy.arange(4)[:, None, None] == 1, -numpy.inf, numpy.ones((4, 5, 5))),
                LABELS,
                "1 of 4 hold",
            ),
            (numpy.array([None] * 4), LABELS, "allow_pickle=False"),
        ],
    )
    def test_refusals(self, tmp_path, images, labels, message):
        with pytest.raises(InputError, match=message):
            images_from(save(tmp_path / "a.npz", images, labels))

    def test_missing_arrays(self, tmp_path):
        numpy.savez(tmp_path / "a.npz", x=LABELS, images=bytes_of(4, 5, 5))
        with pytest.raises(InputError, match=r"has no labels, only x, images; expected .*numpy\.savez"):
            images_from(tmp_path / "a.npz")

    @pytest.mark.parametrize("content", [b"", b"hello", b"PK\x03\x04"])
    def test_no_npz(self, tmp_path, content):
        (tmp_path / "a.npz").write_bytes(content)
        with pytest.raises(InputError, match=r"a\.npz is no npz, which is a zip file"):
            images_from(tmp_path / "a.npz")

    def test_npy(self, tmp_path):
        numpy.save(tmp_path / "a.npy", LABELS)
        with pytest.raises(InputError, match=r"a\.npy is no npz, which is a zip file"):
            images_from(tmp_path / "a.npy")

    @pytest.mark.parametrize("option", [{"size": 4}, {"shape": (4, 4)}, {"grayscale": True}])
    def test_is_not_changed(self, tmp_path, option):
        with pytest.raises(InputError, match="is an npz file; sizes and grayscale are for folders only"):
            images_from(save(tmp_path / "a.npz", bytes_of(4, 5, 5)), **option)


def of(tmp_path, name, *labels):
    return images_from(save(tmp_path / f"{name}.npz", bytes_of(len(labels), 5, 5), numpy.array(labels)))


class TestSameClasses:
    def test_labels_mean_the_same_in_both(self, tmp_path):
        queries, gallery = same_classes(of(tmp_path, "q", "owl", "dog"), of(tmp_path, "g", "owl", "ant", "owl", "cat"))
        assert queries.classes == gallery.classes == ("ant", "cat", "dog", "owl")
        assert queries.labels.tolist() == [3, 2]
        assert gallery.labels.tolist() == [3, 0, 3, 1]

    def test_images_stay(self, tmp_path):
        before = of(tmp_path, "g", "owl", "ant", "owl")
        _, after = same_classes(of(tmp_path, "q", "zebu", "owl"), before)
        assert all(torch.equal(before[row][0], after[row][0]) for row in range(3))

    def test_folder_and_npz(self, folder, tmp_path):
        queries, gallery = same_classes(images_from(folder), of(tmp_path, "g", "owl", "ant"))
        assert [queries.classes[label] for label in queries.labels] == ["cat", "cat", "cat", "owl", "owl"]
        assert [gallery.classes[label] for label in gallery.labels] == ["owl", "ant"]

    def test_without_a_gallery(self, tmp_path):
        queries = of(tmp_path, "q", "a", "a", "b")
        assert same_classes(queries) == (queries, None)

    def test_one_class_of_queries_is_enough_before_a_gallery(self, tmp_path):
        queries, _ = same_classes(of(tmp_path, "q", "b"), of(tmp_path, "g", "a", "b"))
        assert queries.labels.tolist() == [1]

    @pytest.mark.parametrize(
        ("queries", "gallery", "message"),
        [
            ("aaa", None, "All 3 images that are searched are of one class, 'a'"),
            ("ab", "aa", "All 2 images that are searched are of one class, 'a'"),
            ("abc", None, "one image of each of the 3 classes"),
            ("ab", "cd", r"No class of the queries \(a, b\) is in the gallery \(c, d\)"),
        ],
    )
    def test_nothing_to_be_found(self, tmp_path, queries, gallery, message):
        with pytest.raises(InputError, match=message):
            same_classes(of(tmp_path, "q", *queries), gallery and of(tmp_path, "g", *gallery))


@pytest.mark.parametrize("kind", ["npz", "folder"])
def test_the_label_minus_1_is_junk(kind, tmp_path):
    """As in Market-1501, and as `evaluate_robustness` takes it."""
    if kind == "npz":
        labels = numpy.array([3, -1, 7, 3, 7, -1])
        numpy.savez(tmp_path / "a.npz", images=numpy.zeros((6, 4, 4), numpy.uint8), labels=labels)
        found = images_from(tmp_path / "a.npz")
        assert found.labels.tolist() == [0, -1, 1, 0, 1, -1]
    else:
        for number, name in enumerate(["-1/a.png", "3/a.png", "3/b.png", "7/a.png"]):
            write(tmp_path / "set" / name, pixels_of(number))
        found = images_from(tmp_path / "set")
        assert found.labels.tolist() == [-1, 0, 0, 1]
    assert found.classes == ("3", "7")
    queries, gallery = same_classes(found, found)
    assert queries.classes == gallery.classes == ("3", "7")
    assert torch.equal(queries.labels, found.labels)
    assert same_classes(found)[0].labels.min() == -1
