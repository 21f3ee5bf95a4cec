"""Attacks with all of their options as JSON, and attacks that are made from it again."""

from __future__ import annotations

import hashlib
import inspect
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from functools import partial
from types import CodeType, FunctionType, MethodType
from typing import Any

import torchattacks
from torchattacks.attack import Attack as TorchAttack

from ...errors import InputError
from . import gradients, square
from .kinds import GalleryAttack, QueryAttack, RetrievalAttack

_KINDS: dict[str, type] = {kind.__name__: kind for kind in (QueryAttack, GalleryAttack)}
_MODULES = (gradients, square)
_THEIRS = f"{torchattacks.__name__}."
_DEPTH = 8  # to which functions are looked for in one another
_GIVEN_LATER = ("eps", "norm", "seed", "n_classes", "eot_iter")  # see `gradients.classifier_attack`


def to_json(value: object) -> Any:
    """An attack, or an option of one, in types that JSON knows.

    - ``{"kind": ...}`` is a `QueryAttack` or `GalleryAttack`, with its attributes.
    - ``{"function": ...}`` is a function of the modules `gradients` and `square`, or a class of torchattacks, with the
      ``options`` that are bound to it (`functools.partial`); of a class of torchattacks, also its default options.
    - ``{"own": ...}`` describes anything else, such as a function of the user, see `description`. No attack can be made
      from it.
    """
    if value is None or isinstance(value, str | int) or (isinstance(value, float) and math.isfinite(value)):
        return value
    if isinstance(value, tuple | list):
        return [to_json(part) for part in value]
    if isinstance(value, QueryAttack | GalleryAttack):
        if type(value) not in _KINDS.values():
            return {"own": description(value), "name": value.name}
        return {"kind": type(value).__name__, **{one.name: to_json(getattr(value, one.name)) for one in fields(value)}}
    name = _name(value.func if isinstance(value, partial) else value)
    if name is None or (isinstance(value, partial) and value.args):
        return {"own": description(value)}
    bound = value.keywords if isinstance(value, partial) else {}
    options = {**_defaults(_named(name)), **{key: to_json(part) for key, part in bound.items()}}
    return {"function": name, **({"options": options} if options else {})}


def from_json(specs: Sequence[Mapping[str, Any]], own: Sequence[RetrievalAttack] = ()) -> tuple[RetrievalAttack, ...]:
    """Attacks from what `to_json` made of them.

    Args:
        specs: what `to_json` returned for each attack.
        own: the attacks with code of the user. Each takes the place of the one with its name.

    Raises:
        InputError: an attack has code of the user and is not in ``own``, or one in ``own`` is another attack.
    """
    given = {attack.name: attack for attack in own}
    names = [str(spec["name"]) for spec in specs]
    for spec in specs:
        _check_given(given.get(spec["name"]), spec)
    missing = [f"{spec['name']} ({_own(spec)})" for spec in specs if _own(spec) and spec["name"] not in given]
    if missing:
        raise InputError(
            f"{', '.join(missing)} cannot be made from the report, as it holds code of your own, a model or images. "
            "Pass these attacks: repeat(report, ..., attacks=[...])."
        )
    if given.keys() - set(names):
        raise InputError(
            f"attacks holds {', '.join(given)}; expected none but those of the report: {', '.join(names)}."
        )
    return tuple(given[spec["name"]] if spec["name"] in given else _attack(spec) for spec in specs)


def description(value: object) -> str:
    """A value as text that is the same in every process; of a callable, its name and the values bound to it.

    >>> description(partial(print, 3, end=""))
    "partial(print, 3, end='')"
    """
    if isinstance(value, partial):
        bound = [description(part) for part in (value.func, *value.args)]
        return _call("partial", [*bound, *(f"{key}={description(part)}" for key, part in value.keywords.items())])
    if isinstance(value, FunctionType):
        cells = dict(zip(value.__code__.co_freevars, value.__closure__ or (), strict=True))
        bound = [f"{name}={description(cell.cell_contents)}" for name, cell in cells.items()]
        return _call(value.__qualname__, bound) if bound else value.__qualname__
    if is_dataclass(value) and not isinstance(value, type):
        parts = [f"{part.name}={description(getattr(value, part.name))}" for part in fields(value)]
        return _call(type(value).__qualname__, parts)
    if isinstance(value, tuple | list):
        return f"({', '.join(map(description, value))})"
    if value is None or isinstance(value, str | int | float):
        return repr(value)
    return getattr(value, "__qualname__", type(value).__qualname__)


def code_of(attacks: Iterable[RetrievalAttack]) -> list[str]:
    """The SHA-256 of the code of all functions that each attack holds, of which `description` gives the names alone."""
    return [hashlib.sha256("".join(_codes(attack, _DEPTH)).encode()).hexdigest() for attack in attacks]


def _codes(value: Any, depth: int) -> Iterator[str]:
    if isinstance(value, CodeType):
        plain = [
            sorted(map(repr, constant)) if isinstance(constant, frozenset) else constant  # has no order of its own
            for constant in value.co_consts
            if not isinstance(constant, CodeType)
        ]
        yield f"{value.co_code.hex()} {value.co_names} {plain}"
    if depth:
        for part in _parts(value):
            yield from _codes(part, depth - 1)


def _parts(value: Any) -> Iterable[Any]:
    """What an attack or a function consists of, as far as it decides what is done."""
    if isinstance(value, tuple | list):
        return value
    if isinstance(value, CodeType):
        return value.co_consts
    if isinstance(value, partial):
        return value.func, *value.args, *value.keywords.values()
    if isinstance(value, FunctionType):
        return value.__code__, value.__defaults__, *(cell.cell_contents for cell in value.__closure__ or ())
    if isinstance(value, MethodType):
        return value.__func__, value.__self__
    if isinstance(value, type):
        return ()
    own = [getattr(value, one.name) for one in fields(value)] if is_dataclass(value) else []
    return [type(value).__call__, *own] if callable(value) else own


def _call(name: str, arguments: Iterable[str]) -> str:
    return f"{name}({', '.join(arguments)})"


def _name(value: Any) -> str | None:
    """The name by which `_named` finds a function or a class; None: it does not."""
    name = getattr(value, "__qualname__", "")
    for candidate in (name, _THEIRS + name):
        if _named(candidate) is value:
            return candidate
    return None


def _named(name: str) -> Any:
    """A function of the modules that define attacks, or a class of torchattacks; None: there is none."""
    if name.startswith(_THEIRS):
        kind = getattr(torchattacks, name.removeprefix(_THEIRS), None)
        return kind if isinstance(kind, type) and issubclass(kind, TorchAttack) else None
    found = next((vars(module)[name] for module in _MODULES if name in vars(module)), None)
    return found if isinstance(found, FunctionType) and found.__module__ in [m.__name__ for m in _MODULES] else None


def _defaults(function: Any) -> dict[str, Any]:
    """Default options of a class of torchattacks, but those that are given with every call."""
    if not isinstance(function, type):
        return {}
    parameters = inspect.signature(function).parameters.items()
    defaults = {key: one.default for key, one in parameters if one.default is not one.empty}
    return {key: to_json(default) for key, default in defaults.items() if key not in _GIVEN_LATER}


def _check_given(attack: RetrievalAttack | None, spec: Mapping[str, Any]) -> None:
    found = None if attack is None else to_json(attack)
    if found not in (None, spec):
        raise InputError(f"The attack {spec['name']} that was given is {found}; the report has {spec}.")


def _own(spec: Any) -> str:
    """What describes the user's code in a spec; empty if there is none."""
    if isinstance(spec, Mapping):
        return str(spec["own"]) if "own" in spec else next(filter(None, map(_own, spec.values())), "")
    return next(filter(None, map(_own, spec)), "") if isinstance(spec, list) else ""


def _attack(spec: Mapping[str, Any]) -> RetrievalAttack:
    try:
        made: RetrievalAttack = _made(spec)
    except (KeyError, TypeError) as error:  # of another version
        raise InputError(
            f"The attack {spec['name']} cannot be made from {spec} ({error!r}). Install the versions that the report "
            "lists."
        ) from error
    return made


def _made(spec: Any) -> Any:
    """The value that `to_json` was given, without code of the user."""
    if isinstance(spec, list):
        return [_made(part) for part in spec]
    if not isinstance(spec, Mapping):
        return spec
    if "kind" in spec:
        return _KINDS[spec["kind"]](**{key: _made(part) for key, part in spec.items() if key != "kind"})
    function = _named(spec["function"])
    if function is None:
        raise InputError(
            f"The report names {spec['function']}, which the installed versions do not have. Install the versions that "
            "the report lists."
        )
    options = {key: _made(part) for key, part in spec.get("options", {}).items()}
    return partial(function, **options) if options else function
