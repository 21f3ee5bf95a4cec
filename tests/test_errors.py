"""What may be raised: each error is one of the package's and one of Python's, and gets from process to process."""

import pickle

import pytest

import pml_adversarial
from pml_adversarial import errors

BUILTIN = {
    "AttackError": RuntimeError,
    "CaptureError": RuntimeError,
    "InputError": ValueError,
    "PlanError": ValueError,
    "PluginError": ValueError,
    "ReplayError": RuntimeError,
}
EVERY = ["AdversarialError", *BUILTIN]
MESSAGE = "eps=8; expected a number up to 1. Divide it by 255."


def raised(name):
    """An error as it is caught, with its cause."""
    with pytest.raises(getattr(errors, name)) as caught:
        raise getattr(errors, name)(MESSAGE) from ZeroDivisionError("inside")
    return caught.value


def test_these_are_all():
    defined = {name for name, value in vars(errors).items() if getattr(value, "__module__", "") == errors.__name__}
    assert defined == set(EVERY)


@pytest.mark.parametrize("name", BUILTIN)
def test_is_caught_as_an_error_of_the_package_and_as_pythons(name):
    with pytest.raises(errors.AdversarialError, match="Divide it by 255"):
        raise raised(name)
    with pytest.raises(BUILTIN[name], match="Divide it by 255"):
        raise raised(name)


@pytest.mark.parametrize("name", BUILTIN)
def test_is_caught_as_no_other(name):
    others = tuple(getattr(errors, other) for other in BUILTIN if other != name)
    assert not isinstance(raised(name), (*others, *({RuntimeError, ValueError} - {BUILTIN[name]})))


def test_the_base_is_an_exception_and_nothing_narrower():
    assert errors.AdversarialError.__bases__ == (Exception,)


@pytest.mark.parametrize("name", EVERY)
def test_comes_out_of_a_pickle_as_it_went_in(name):
    error = raised(name)
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        found = pickle.loads(pickle.dumps(error, protocol))
        assert type(found) is type(error)
        assert str(found) == MESSAGE


@pytest.mark.parametrize("name", EVERY)
def test_is_exported_by_the_package(name):
    assert name in pml_adversarial.__all__
    assert name in errors.__all__
    assert getattr(pml_adversarial, name) is getattr(errors, name)
