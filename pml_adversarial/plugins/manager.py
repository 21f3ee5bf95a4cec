"""Who answers: finds plugins by name, and gives each wrapper a manager of its own."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from importlib.metadata import EntryPoint, entry_points
from typing import Any

import pluggy

from ..errors import PluginError
from .hookspecs import PROJECT, HookSpecs


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
