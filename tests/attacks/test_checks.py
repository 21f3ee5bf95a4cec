"""Checks of options."""

import math

import pytest

from pml_adversarial.attacks.checks import check_choice, check_eps, check_number, check_steps, check_whole
from pml_adversarial.errors import AttackError, InputError

NO_NUMBERS = [None, "1", True, math.nan, math.inf, -math.inf, 1 + 0j]


class TestNumber:
    @pytest.mark.parametrize("value", [0, 0.0, 0.5, 1])
    def test_within_the_range_is_a_float(self, value):
        found = check_number("share", value, 0, 1)
        assert found == value
        assert type(found) is float

    @pytest.mark.parametrize("value", [*NO_NUMBERS, -1e-9, 1.001])
    def test_anything_else_is_refused(self, value):
        with pytest.raises(InputError, match=r"^share=.*; expected a number from 0 to 1\.$"):
            check_number("share", value, 0, 1)

    @pytest.mark.parametrize("value", [0, 0.0, -1])
    def test_above_leaves_the_lowest_out(self, value):
        with pytest.raises(InputError, match="expected a number above 0, such as 2"):
            check_number("margin", value, above=True, hint=", such as 2")
        assert check_number("margin", 1e-9, above=True) == 1e-9

    def test_without_an_upper_end(self):
        with pytest.raises(AttackError, match=r"alpha=-1; expected a number from 0 on\.$"):
            check_number("alpha", -1, error=AttackError)


class TestWhole:
    @pytest.mark.parametrize("value", [2, 3, 10**9])
    def test_from_the_lowest_on(self, value):
        assert check_whole("steps", value, 2) == value

    @pytest.mark.parametrize("value", [*NO_NUMBERS, 2.0, 1, -5])
    def test_anything_else_is_refused(self, value):
        with pytest.raises(AttackError, match=r"^steps=.*; expected a whole number from 2 on, or nothing\.$"):
            check_whole("steps", value, 2, hint=", or nothing", error=AttackError)


class TestChoice:
    def test_of_the_words(self):
        assert check_choice("norm", "L2", ("Linf", "L2")) == "L2"

    @pytest.mark.parametrize("value", ["l2", "", None, 2, ["L2"]])
    def test_anything_else_is_refused(self, value):
        with pytest.raises(InputError, match=r"^norm=.*; expected 'Linf', 'L1' or 'L2'\.$"):
            check_choice("norm", value, ("Linf", "L1", "L2"))

    def test_of_one_word(self):
        with pytest.raises(InputError, match=r"expected 'a'\.$"):
            check_choice("word", "b", ["a"])


@pytest.mark.parametrize(("eps", "norm"), [(1, "Linf"), (1.0, "Linf"), (8 / 255, "Linf"), (0.5, "L2"), (3, "L2")])
def test_a_radius(eps, norm):
    assert check_eps(eps, norm) == eps


@pytest.mark.parametrize("eps", [*NO_NUMBERS, 0, -0.1, 8])
def test_no_radius(eps):
    with pytest.raises(AttackError, match=r"eps=.*; expected a number above 0 and up to 1, in pixels.*eps=8/255"):
        check_eps(eps)


@pytest.mark.parametrize("eps", [*NO_NUMBERS, 0, -0.1])
def test_no_radius_in_l2(eps):
    with pytest.raises(InputError, match=r"eps=.*; expected a number above 0, in pixels"):
        check_eps(eps, "L2", InputError)


@pytest.mark.parametrize("steps", [*NO_NUMBERS, 0, 2.5])
def test_no_number_of_steps(steps):
    with pytest.raises(AttackError, match=r"steps=.*; expected a whole number from 1 on, as the number"):
        check_steps(steps)
