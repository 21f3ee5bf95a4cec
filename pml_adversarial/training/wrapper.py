"""What the adversarial loss and the adversarial miner have in common: how they stand in for what they wrap."""

from __future__ import annotations

import logging
from typing import Any, cast

from pytorch_metric_learning.losses import CrossBatchMemory
from torch import Tensor, nn

from .capture import Models
from .state import packed, unpacked
from .step import AdversarialStep

logger = logging.getLogger("pml_adversarial")

_EXTRA_STATE = "_extra_state"


class StandIn(nn.Module):
    """A module on which attributes and methods of the module that it wraps are found and set, if it has none itself."""

    _wraps = "loss"
    """The name of the attribute that holds the wrapped module."""

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            inner = vars(self).get("_modules", {}).get(self._wraps)
            if inner is None or name.startswith("_"):
                raise
        try:
            return getattr(inner, name)
        except AttributeError:
            found = f"neither {type(self).__name__} nor the wrapped {type(inner).__name__}"
            raise AttributeError(f"{found} has an attribute {name!r}.", name=name, obj=self) from None

    def __setattr__(self, name: str, value: Any) -> None:
        inner = vars(self).get("_modules", {}).get(self._wraps)
        mine = name.startswith("_") or name in vars(self) or name in self._modules or hasattr(type(self), name)
        if inner is None or mine or not hasattr(inner, name):
            super().__setattr__(name, value)
        else:
            setattr(inner, name, value)


class Wrapper(StandIn):
    """A stand-in that takes adversarial steps, and saves what they depend on as one tensor more.

    The state of a plain loss or miner can be loaded too: step, seed and plugins then stay as they are.
    """

    wraps_a_loss_or_miner = True
    """Says to `tracing` that calls of modules inside are noted."""

    adversary: AdversarialStep
    _shown: str

    def extra_repr(self) -> str:
        """The options in force."""
        return self._shown

    def watch(self, model: Models) -> None:
        """Takes inputs from ``model`` from now on. Call it when the model was replaced by another one."""
        self.adversary.capture.watch(model)

    def get_extra_state(self) -> Tensor:
        """Step, seed, and what plugins and the wrapped module remember outside of their buffers, as one tensor."""
        return packed({**self.adversary.state_dict(), "attributes": _attributes(self._inner)})

    def set_extra_state(self, state: Any) -> None:
        """Continues from what `get_extra_state` returned.

        Raises:
            InputError: the state was saved by version 0.1.
            PluginError: the state is that of other plugins.
        """
        found = unpacked(state)
        if found is None:
            logger.warning(
                f"The saved step, seed and state of plugins of {type(self).__name__} cannot be read, and stay what "
                "they are. A tool that averages or casts all tensors may have changed them. Weights and buffers are "
                "loaded."
            )
            return
        self.adversary.load_state_dict(found)
        modules = dict(self._inner.named_modules())
        for name in modules.keys() & found["attributes"]:
            for attribute, value in found["attributes"][name].items():
                setattr(modules[name], attribute, value)

    @property
    def _inner(self) -> nn.Module:
        return cast(nn.Module, self._modules[self._wraps])

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        saved = [name.removeprefix(prefix) for name in state_dict if name.startswith(prefix)]
        own = {f"{self._wraps}.{name}" for name in self._inner.state_dict()}
        if _EXTRA_STATE not in saved and not (saved and own.issuperset(saved)):  # these are of the wrapped module alone
            for name in saved:
                state_dict[f"{prefix}{self._wraps}.{name}"] = state_dict.pop(prefix + name)
            state_dict[prefix + _EXTRA_STATE] = self.get_extra_state()
        super()._load_from_state_dict(state_dict, prefix, *args)


def _attributes(module: nn.Module) -> dict[str, dict[str, Any]]:
    """Submodule -> attribute -> value, of what changes while training and a state dict leaves out."""
    memories = {name: m for name, m in module.named_modules() if isinstance(m, CrossBatchMemory)}
    return {name: {key: getattr(m, key) for key in ("queue_idx", "has_been_filled")} for name, m in memories.items()}
