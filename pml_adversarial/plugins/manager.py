"""Plugins are found by name, and each wrapper asks its own plugins in their order."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping
from importlib.metadata import EntryPoint, entry_points
from types import ModuleType
from typing import Any, Protocol, TypeVar, cast

import pluggy
from torch import Tensor, nn

from ..attacks.objective import Attack, Objective, Score
from ..errors import PluginError
from ..training.batch import Adversarial, Batch
from ..training.isolation import random_stream
from ..training.plan import Plan
from .hookspecs import PROJECT, HookSpecs

T = TypeVar("T")

_FIRST_RESULT = ("plan", "score", "attack", "training_loss")
"""The questions that one plugin answers: the first with an opinion."""


class OwnMethod(Protocol):
    """The plugin that is asked last, with the options that the user set."""

    @property
    def given(self) -> Mapping[str, tuple[str, ...]]:
        """Question -> names of options that the user set, and that only count where this plugin answers it."""

    def pml_adversarial_attack(self, objective: Objective, batch: Batch) -> Attack:
        """The attack that the user set."""


class Hooks:
    """The five questions, asked of the plugins of one wrapper.

    Args:
        plugins: the plugins that the user named, in the order in which they are asked.
        own: the package's own plugin, which is asked last.

    Raises:
        PluginError: a plugin is given twice, answers no question, or answers one that does not exist.
    """

    def __init__(self, plugins: Iterable[Any], own: OwnMethod) -> None:
        self.named, self.own = tuple(plugins), own
        self._manager = make_manager(self.plugins)
        self._unchecked = self._to_be_checked()
        self._never_asked: dict[int, set[str]] = {}

    @property
    def plugins(self) -> tuple[Any, ...]:
        """All plugins in the order in which they are asked."""
        return (*self.named, self.own)

    def plan(self, wrapped: nn.Module, batch: Batch) -> Plan:
        """Who is perturbed, and where the copies stand."""
        return self._first("plan", Plan, wrapped=wrapped, batch=batch)

    def score(self, wrapped: nn.Module, batch: Batch, plan: Plan) -> Score:
        """What the attack raises."""
        return self._first("score", cast(type[Score], Callable), wrapped=wrapped, batch=batch, plan=plan)

    def attack(self, objective: Objective, batch: Batch, plan: Plan) -> Attack:
        """How it is raised."""
        return self._first("attack", cast(type[Attack], Callable), objective=objective, batch=batch, plan=plan)

    def own_attack(self, objective: Objective, batch: Batch, plan: Plan) -> Attack | None:
        """The attack that the user set; None where a plugin brings its own."""
        if self._answering("attack"):
            return None
        return self._checked("attack", self.own.pml_adversarial_attack(objective, batch), cast(type[Attack], Callable))

    def training_loss(self, wrapped: nn.Module, batch: Batch, plan: Plan, adversarial: Adversarial) -> Tensor:
        """What training minimises."""
        question = {"wrapped": wrapped, "batch": batch, "plan": plan}

        def ask(plugin: Any, adversarial: Adversarial) -> Tensor:
            others = self._manager.subset_hook_caller(f"{PROJECT}_training_loss", [plugin])
            return self._checked("training_loss", others(**question, adversarial=adversarial, ask=ask), Tensor)

        return self._first("training_loss", Tensor, **question, adversarial=adversarial, ask=ask)

    def record(self, batch: Batch, plan: Plan, adversarial: Adversarial) -> list[Mapping[str, Any]]:
        """What the plugins find worth recording. Only here they may change their state."""
        answers: list[Any] = self._hook("record")(batch=batch, plan=plan, adversarial=adversarial)
        return [self._checked("record", answer, cast(type[Mapping[str, Any]], Mapping)) for answer in answers]

    def questions_of(self, plugin: Any) -> set[str]:
        """The questions that a plugin answers, such as "plan"."""
        callers = self._manager.get_hookcallers(plugin) or ()
        return {caller.name.removeprefix(f"{PROJECT}_") for caller in callers}

    def state_dict(self) -> dict[str, Any]:
        """What the plugins remember: number and class of each plugin with a state -> its state."""
        return {name: plugin.state_dict() for name, plugin in self._stateful().items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues from a state that `state_dict` returned.

        Raises:
            PluginError: the state is that of other plugins.
        """
        stateful = self._stateful()
        if set(state) != set(stateful):
            raise PluginError(
                f"The saved state is of the plugins {sorted(state)}, this wrapper has {sorted(stateful)}; expected the "
                "same plugins in the same order. Build the wrapper as it was built when it was saved."
            )
        for name, plugin in stateful.items():
            plugin.load_state_dict(state[name])

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_manager"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._manager = make_manager(self.plugins)

    def _hook(self, question: str) -> Any:
        return getattr(self._manager.hook, f"{PROJECT}_{question}")

    def _first(self, question: str, expected: type[T], **arguments: Any) -> T:
        if question in self._unchecked:
            self._check_that_all_count(question, arguments)
            self._unchecked.discard(question)  # not where it was refused: then the next step is refused too
        return self._checked(question, self._hook(question)(**arguments), expected)

    def _checked(self, question: str, answer: Any, expected: type[T]) -> T:
        if not isinstance(answer, expected):
            raise PluginError(
                f"A plugin answered {PROJECT}_{question} with {type(answer).__name__}; expected {expected.__name__}, "
                "or None for no opinion."
            )
        return answer

    def _to_be_checked(self) -> set[str]:
        """Questions in which a plugin, or an option of the user, might never count."""
        return {q for q in _FIRST_RESULT if len(self._answering(q)) > (q not in self.own.given)}

    def _answering(self, question: str) -> list[Any]:
        """The named plugins with an answer of their own, in the order in which they are asked."""
        implementations = reversed(self._hook(question).get_hookimpls())  # pluggy asks the last one first
        own_answers = [impl.plugin for impl in implementations if not (impl.wrapper or impl.hookwrapper)]
        return [plugin for plugin in own_answers if plugin is not self.own]

    def _check_that_all_count(self, question: str, arguments: Mapping[str, Any]) -> None:
        """Refuses a plugin that is never asked, and an option that nobody reads. The first step tells which.

        Raises:
            PluginError: there is such a plugin, or such an option.
        """
        answering = self._answering(question)
        first = next((plugin for plugin in answering if self._has_opinion(plugin, question, arguments)), None)
        if first is None:
            return
        if ignored := self.own.given.get(question):
            options = " and ".join(ignored)
            raise PluginError(
                f"{_name(first)} answers {PROJECT}_{question} itself, so {options} would change nothing. Leave out "
                f"{options}, or the plugin {_name(first)}."
            )
        for plugin in answering[answering.index(first) + 1 :]:
            self._never_asked.setdefault(id(plugin), set()).add(question)
            if self._never_asked[id(plugin)] == self.questions_of(plugin) - {"record"}:
                raise PluginError(
                    f"{_name(plugin)} would never be asked: {_name(first)}, which is named before it, answers "
                    f"{PROJECT}_{question} and what else {_name(plugin)} answers. Name one of them."
                )

    def _has_opinion(self, plugin: Any, question: str, arguments: Mapping[str, Any]) -> bool:
        others = [other for other in self.plugins if other is not plugin]
        alone = self._manager.subset_hook_caller(f"{PROJECT}_{question}", others)
        with random_stream(0, 0):  # a resumed run asks again, and must not draw other numbers than an unbroken one
            return alone(**arguments) is not None

    def _stateful(self) -> dict[str, Any]:
        both = ("state_dict", "load_state_dict")
        return {
            f"{number}_{type(plugin).__name__}": plugin
            for number, plugin in enumerate(self.plugins)
            if all(hasattr(plugin, method) for method in both)
        }


def find_all(plugins: Iterable[Any]) -> list[Any]:
    """Plugin objects, see `find`.

    Raises:
        PluginError: it is a single plugin, or `find` does not find one.
    """
    if isinstance(plugins, str) or not isinstance(plugins, Iterable):
        raise PluginError(f"plugins={plugins!r}; expected a list, such as plugins=[{plugins!r}].")
    return [find(plugin) for plugin in plugins]


def find(plugin: Any) -> Any:
    """A plugin object, from an object, a class, or the name of an installed one.

    Names are entry points of the group ``pml_adversarial``. Installed plugins act only when named.

    Raises:
        PluginError: no installed plugin has that name, or it cannot be loaded.
    """
    if isinstance(plugin, str):
        plugin = _load(plugin)
    if not isinstance(plugin, type):
        return plugin
    try:
        return plugin()
    except TypeError as error:
        raise PluginError(f"{plugin.__name__} cannot be made without arguments ({error}); pass an object.") from error


def make_manager(plugins: Iterable[Any]) -> pluggy.PluginManager:
    """A manager that asks ``plugins`` in the order given; the first answer that is not None counts.

    Raises:
        PluginError: a plugin is given twice, answers no question, or one that does not exist.
    """
    manager = pluggy.PluginManager(PROJECT)
    manager.add_hookspecs(HookSpecs)
    for plugin in reversed(list(plugins)):  # pluggy asks the last registered first
        try:
            manager.register(plugin)
        except pluggy.PluginValidationError as error:
            raise PluginError(f"{error} Hooks are {', '.join(_hooks())}.") from error
        except ValueError as error:
            raise PluginError(f"{plugin!r} is among the plugins twice; name each once.") from error
        if not manager.get_hookcallers(plugin):
            raise PluginError(
                f"{type(plugin).__name__} answers no hook; expected methods marked with pml_adversarial.hookimpl, "
                f"named {', '.join(_hooks())}."
            )
    try:
        manager.check_pending()
    except pluggy.PluginValidationError as error:
        raise PluginError(f"{error} Hooks are {', '.join(_hooks())}.") from error
    return manager


def _name(plugin: Any) -> str:
    return plugin.__name__ if isinstance(plugin, ModuleType | type) else type(plugin).__name__


def _load(name: str) -> Any:
    installed = {entry.name: entry for entry in entry_points(group=PROJECT)}
    if name not in installed:
        close = difflib.get_close_matches(name.lower(), installed, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise PluginError(
            f"No plugin named {name!r} is installed; found {sorted(installed) or 'none'}.{hint} Install the "
            f"distribution that brings it, or pass the plugin object itself."
        )
    return _loaded(installed[name])


def _loaded(entry: EntryPoint) -> Any:
    try:
        return entry.load()
    except Exception as error:
        raise PluginError(f"The plugin {entry.name!r} ({entry.value}) cannot be loaded: {error}") from error


def _hooks() -> list[str]:
    return [name for name in vars(HookSpecs) if name.startswith(PROJECT)]
