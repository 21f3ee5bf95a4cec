"""What a user passes to an evaluation: what is taken, and what is refused."""

import math

import numpy
import pytest
import torch

from pml_adversarial.attacks.ball import project
from pml_adversarial.errors import InputError
from pml_adversarial.evaluation.retrieval.options import (
    NORMS,
    check_probability,
    check_radii,
    largest_radius,
    to_radii,
    to_recall_at,
    to_rows,
    to_whole_numbers,
)


class TestProbability:
    def test_between_0_and_1(self):
        check_probability("alpha", 1e-9)
        check_probability("alpha", 1 - 1e-9)

    @pytest.mark.parametrize("value", [0, 1, -0.1, 1.5, math.nan, math.inf, "0.1", None])
    def test_all_else_is_refused(self, value):
        with pytest.raises(InputError, match=f"beta={value!r}; expected a probability between 0 and 1, such as 0.001"):
            check_probability("beta", value)


class TestRadii:
    @pytest.mark.parametrize(
        ("eps", "radii"),
        [
            (0.05, (0.05,)),
            (1, (1.0,)),
            ([0.05, 0.02, 0.05], (0.02, 0.05)),
            (torch.tensor([0.5, 0.25]), (0.25, 0.5)),
            (torch.tensor(0.5), (0.5,)),
            (numpy.float32(0.5), (0.5,)),
            (numpy.array([0.5, 0.25]), (0.25, 0.5)),
            ((eps for eps in (0.5, 0.25)), (0.25, 0.5)),
        ],
    )
    def test_are_different_and_ascend(self, eps, radii):
        assert to_radii(eps, "Linf") == radii

    @pytest.mark.parametrize(
        "eps", [0, -0.1, (), (0.1, 0), math.nan, math.inf, None, "0.1", "8", ["a"], (0.1, None), True]
    )
    def test_what_is_no_radius_is_refused(self, eps):
        with pytest.raises(InputError, match=r"eps=.*; expected one or more radii above 0 in pixels of \[0, 1\]"):
            to_radii(eps, "Linf")

    def test_levels_are_refused_where_no_radius_is_so_large(self):
        with pytest.raises(InputError, match=r"eps=8 is wider than all pixels; expected 1 at most in Linf, such as"):
            to_radii((0.1, 8), "Linf")
        assert to_radii(3.0, "L2") == (3.0,)

    def test_zero_only_where_it_means_something(self):
        assert to_radii((0.5, 0), "L2", zero=True) == (0.0, 0.5)
        with pytest.raises(InputError, match=r"radii=\(0\.5, -1\); expected one or more radii 0 or larger"):
            to_radii((0.5, -1), "L2", zero=True, name="radii")

    @pytest.mark.parametrize(
        ("norm", "such_as"), [("Linf", "8/255"), ("L2", "0.25"), ("L1", "2"), ("L0", "10"), ("patch", "5")]
    )
    def test_the_message_names_a_radius_of_the_norm(self, norm, such_as):
        with pytest.raises(InputError, match=f"such as {such_as}"):
            to_radii(0, norm)

    @pytest.mark.parametrize("norm", ["L0", "patch"])
    def test_counts_are_whole(self, norm):
        assert to_radii([3, 1.0], norm) == (1.0, 3.0)
        with pytest.raises(InputError, match=rf"eps=\(1, 2\.5\); expected whole numbers from 1 on .*norm='{norm}'"):
            to_radii((1, 2.5), norm)


class TestLargestRadius:
    SHAPES = ((1, 4, 5), (3, 5, 4), (2, 4, 3, 5), (7,))

    @pytest.mark.parametrize(
        ("norm", "largest"),
        [
            ("Linf", (1, 1, 1, 1)),
            ("L2", (20**0.5, 60**0.5, 120**0.5, 7**0.5)),
            ("L1", (20, 60, 120, 7)),
            ("L0", (20, 20, 30, 7)),
            ("patch", (4, 4, 3, 7)),
        ],
    )
    def test_by_hand(self, norm, largest):
        for shape, most in zip(self.SHAPES, largest, strict=True):
            assert largest_radius(norm, shape) == most
            check_radii([1, most], norm, shape)
            with pytest.raises(
                InputError, match=rf"in norm='{norm}' is wider than images .*; expected {most:.6g} at most"
            ):
                check_radii([most / 2, most + 1], norm, shape)

    @pytest.mark.parametrize("norm", ["Linf", "L2", "L1", "L0"])
    def test_is_what_black_and_white_are_apart(self, norm):
        """No smaller ball around black holds white, and this one does."""
        black, most = torch.zeros(1, 2, 3, 4), largest_radius(norm, (2, 3, 4))
        less = most - 1 if norm == "L0" else 0.99 * most
        assert (project(black + 1, black, most, norm) > 1 - 1e-6).all()
        assert not (project(black + 1, black, less, norm) > 1 - 1e-6).all()

    @pytest.mark.parametrize(
        ("norm", "cause"), [("L2", "levels of 0..255"), ("L0", "counts positions"), ("patch", "its area")]
    )
    def test_says_what_it_may_be(self, norm, cause):
        with pytest.raises(InputError, match=cause):
            check_radii([1000], norm, (1, 8, 8))

    @pytest.mark.parametrize("norm", ["L0", "patch"])
    def test_images_with_channels_last_have_no_radius(self, norm):
        with pytest.raises(InputError, match=r"shape \(32, 32, 3\).*expected \(C, H, W\)"):
            check_radii([2], norm, (32, 32, 3))
        check_radii([2], norm, (3, 32, 32))
        check_radii([0.5], "Linf", (32, 32, 3))

    def test_norms(self):
        assert NORMS == ("Linf", "L2", "L1", "L0", "patch")


class TestRecallAt:
    @pytest.mark.parametrize(
        ("given", "taken"), [((), [1]), ([8, 2, 8], [1, 2, 8]), (range(1, 4), [1, 2, 3]), (torch.tensor([4]), [1, 4])]
    )
    def test_ascend_and_1_is_among_them(self, given, taken):
        assert to_recall_at(given) == taken

    @pytest.mark.parametrize("given", [(0,), (1, -2), (1.5,), 4, "ab", None, [1j]])
    def test_all_else_is_refused(self, given):
        with pytest.raises(InputError, match=r"recall_at.* whole numbers"):
            to_recall_at(given)


class TestWholeNumbers:
    @pytest.mark.parametrize(
        "given", [[3, 0, -1], (3, 0, -1), range(3, -2, -3), numpy.array([3, 0, -1]), torch.tensor([3, 0, -1])]
    )
    def test_from_any_list(self, given):
        found = to_whole_numbers(given, "own")
        assert found == [int(value) for value in given]
        assert {type(value) for value in found} == {int}

    def test_from_an_empty_one(self):
        assert to_whole_numbers([], "own") == []

    @pytest.mark.parametrize(
        ("given", "found"),
        [
            (3, "=3"),
            ("all", "='all'"),
            ([None], r"=\[None\]"),
            ([[1], [2, 3]], r"=\[\[1\], \[2, 3\]\]"),
            ([0.5], r" is torch\.float32 of shape \(1,\)"),
            ([True], r" is torch\.bool of shape \(1,\)"),
            ([[1, 2]], r" is torch\.int64 of shape \(1, 2\)"),
            (torch.tensor(3), r" is torch\.int64 of shape \(\)"),
        ],
    )
    def test_all_else_is_refused(self, given, found):
        with pytest.raises(InputError, match=rf"^own{found}; expected whole numbers, in a list or a tensor\.$"):
            to_whole_numbers(given, "own")


class TestRows:
    def test_none_is_all_and_an_order_is_kept(self):
        assert to_rows(None, 4).tolist() == [0, 1, 2, 3]
        for given in ([2, 0], torch.tensor([2, 0]), numpy.array([2, 0]), range(2, -1, -2)):
            found = to_rows(given, 4)
            assert found.tolist() == [2, 0]
            assert found.dtype == torch.int64

    @pytest.mark.parametrize("subset", [[24], [-1], [1, 1], [], [0.5], [True, False], 3, "all", [[1, 2]], [None]])
    def test_all_else_is_refused(self, subset):
        with pytest.raises(InputError, match=r"subset.*expected (different indices|whole numbers)"):
            to_rows(subset, 24)

    def test_none_of_nothing_is_refused(self):
        with pytest.raises(InputError, match=r"subset=\[\]; expected different indices, one at least, below 0"):
            to_rows(None, 0)
