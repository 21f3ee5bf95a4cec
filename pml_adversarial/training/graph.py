"""What the graph of autograd tells of a tensor that is not followed."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as nn_module


def own_function(tensor: Tensor) -> str | None:
    """The name of an autograd function in Python that led to a tensor, before any other that it hides."""
    for node in nodes_of(tensor):
        if isinstance(node, torch.autograd.function.BackwardCFunction):
            return type(node).__name__.removesuffix("Backward")
    return None


def call_inside(function: str) -> str:
    """What helps against an autograd function that stands where it is not seen, in words."""
    if function == "BackwardHookFunction" and nn_module._global_backward_hooks:
        return (
            "It is that of register_module_full_backward_hook, for all modules: register the hook on the modules that "
            "stand inside of the model, with register_full_backward_hook."
        )
    if function == "BackwardHookFunction":
        return (
            "It is that of register_full_backward_hook: put the module that has the hook into another one, "
            "nn.Sequential(model), and call that."
        )
    return "Call it inside of a module, as a last layer of the model."


def is_of_data(tensor: Tensor) -> bool:
    """Whether a tensor was computed of data alone, such as images that need gradient and were flipped."""
    of = [node.variable for node in nodes_of(tensor) if hasattr(node, "variable")]
    return all(leaf.shape == tensor.shape and not isinstance(leaf, nn.Parameter) for leaf in of)


def nodes_of(tensor: Tensor, without: Collection[Any] = ()) -> Iterator[Any]:
    """The nodes of autograd's graph, those nearest to the tensor first, and not through some nodes."""
    todo, seen = [tensor.grad_fn], {None, *without}
    while todo:
        node: Any = todo.pop(0)
        if node not in seen:
            seen.add(node)
            yield node
            todo += [following for following, _ in node.next_functions]


def is_made_of(tensor: Tensor, inputs: Sequence[Tensor], others: Collection[Any]) -> bool | None:
    """Whether a tensor was made of inputs; None: of data that has as many rows as one of them.

    Args:
        tensor: one with gradient.
        inputs: as modules took them.
        others: nodes that lead to the same embeddings, and not through the tensor.
    """
    memories, lengths = {_memory(x) for x in inputs} - {0}, {len(x) for x in inputs}
    is_shared = takes_data = False
    for node in nodes_of(tensor):
        leaf = getattr(node, "variable", None)
        held = _data_in(node) if leaf is None else [leaf]
        if any(_memory(one) in memories for one in held):
            return True
        is_shared = is_shared or (leaf is None and node in others)
        takes_data = takes_data or (leaf is None and any(len(one) in lengths for one in held))
    return (is_shared or None) if takes_data else False


def _data_in(node: Any) -> list[Tensor]:
    """Tensors without gradient that a node saved."""
    found: list[Any] = []
    for name in dir(node):
        if name.startswith("_saved_") or name == "saved_tensors":
            try:
                value = getattr(node, name)
            except Exception:  # they were freed, or a hook of the user's on saved tensors raises
                continue
            found += value if isinstance(value, list | tuple) else [value]
    return [t for t in found if isinstance(t, Tensor) and t.ndim and t.is_floating_point() and not t.requires_grad]


def _memory(tensor: Tensor) -> int:
    try:
        return tensor.untyped_storage().data_ptr()
    except (NotImplementedError, RuntimeError):  # it has none
        return 0
