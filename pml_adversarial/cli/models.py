"""Loads a saved model: an exported program, or weights for a network that is built anew."""

from __future__ import annotations

import pickle
import re
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.nn.modules.utils import consume_prefix_in_state_dict_if_present
from torch.nn.parameter import is_lazy

from ..errors import InputError
from ..evaluation.retrieval.modes import as_deployed
from ..training.pixels import Normalization, PixelSpace

_EXPORT_ENTRIES = {"archive_format", "serialized_exported_program.json"}  # of newer and of older versions of torch
_OTHER_INPUTS = "If it takes images of another size or in grey, choose them with --size and --grayscale."
_NESTED = ("state_dict", "model_state_dict", "model")
_PREFIXES = ("module.", "_orig_mod.", "module.")  # of DistributedDataParallel and of torch.compile, in either order
_HOW_TO_SAVE = (
    'Save its weights with `torch.save(model.state_dict(), "weights.pt")`, or the model, in eval mode, with '
    '`torch.export.save(torch.export.export(...), "model.pt2")`.'
)
_HOW_TO_EXPORT = (
    "Export it with `torch.export.export(model.eval(), (images,), dynamic_shapes="
    '({0: torch.export.Dim("batch")},))` on two or more images.'
)


class ExportedModel(nn.Module):
    """An exported program, which stays in its mode: ``train`` and ``eval`` do nothing; those of torch's module fail."""

    def __init__(self, program: ExportedProgram) -> None:
        super().__init__()
        self.program = program.module()

    def forward(self, images: Tensor) -> Tensor:
        """Embeddings ``(N, D)`` that the program computes."""
        return self.program(images)

    def train(self, mode: bool = True) -> ExportedModel:
        """Changes nothing in the program. `nn.Module.eval` calls this too."""
        self.training = mode
        return self


def load_model(
    path: str | Path, network: Callable[[], nn.Module] | None = None, device: torch.device | str = "cpu"
) -> nn.Module:
    """Loads the model of a file.

    Load only files that you trust: exported programs may hold pickled objects.

    Args:
        path: an exported program (``.pt2``), or a state dict (of ``torch.save``, or ``.safetensors``). The state dict
            may be an entry "state_dict", "model_state_dict" or "model" of a dict, and may be of a model in
            ``DistributedDataParallel`` or of a compiled one.
        network: builds the module that a state dict is for.
        device: of the model.

    Raises:
        InputError: the file is something else, or does not fit the network.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"There is no file {path}.")
    if path.suffix == ".py":
        raise InputError(
            f"{path} is Python code; expected the saved weights, and beside them what builds the network: "
            f"--model weights.pt --network {path.stem}:NAME, with the class or function NAME of {path.name}."
        )
    if _is_exported(path):
        if network is not None:
            raise InputError(f"{path} is an exported program, which is a whole model; expected no network beside it.")
        return _exported(path, torch.device(device))
    weights = _state_dict(_saved(path), path)
    if network is None:
        raise InputError(
            f"{path} holds weights only; expected an exported program, or a network that the weights are for (on the "
            "command line --network module:callable)."
        )
    return _filled(network(), weights, path).to(device)


def check_model(model: nn.Module, images: Tensor, normalization: Normalization | None = None) -> None:
    """Checks that a model embeds one image, and all of the images at once.

    Attacks go on with the queries that are still robust, so a model has to take any number of images.

    Args:
        model: images -> embeddings.
        images: ``(N, C, H, W)`` in [0, 1], on the device of the model.
        normalization: see `PixelSpace`.

    Raises:
        InputError: the model does not take the images, or does not return one embedding for each.
    """
    inputs = PixelSpace(normalization).to_inputs(images)
    with as_deployed(model, learns=True), torch.no_grad():
        for count in sorted({1, len(images)}):
            try:
                found = model(inputs[:count])
            except Exception as error:
                cure = _OTHER_INPUTS if count == 1 else "It takes one image; use smaller batches."
                raise InputError(
                    f"The model does not take {count} image(s) of {tuple(images.shape[1:])}, channels first: "
                    f"{_in_one_line(error)}. {cure}"
                ) from error
            _check_embeddings(found, count)


def _check_embeddings(found: Any, count: int) -> None:
    shape = f"shape {tuple(found.shape)}" if isinstance(found, Tensor) else f"a {type(found).__name__}"
    if not isinstance(found, Tensor) or found.ndim != 2 or len(found) != count or not found.numel():
        raise InputError(f"The model gives {shape} for {count} image(s); expected embeddings, ({count}, D).")
    if not found.is_floating_point():
        raise InputError(f"The model gives {found.dtype}; expected embeddings in floating point.")
    if not found.isfinite().all():
        raise InputError("The model gives NaN or infinite values for the images as they are.")


def _is_exported(path: Path) -> bool:
    """By what is in the file, since weights are called .pt2 too, and programs .pt."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.rpartition("/")[2] in _EXPORT_ENTRIES for name in archive.namelist())


def _exported(path: Path, device: torch.device) -> nn.Module:
    try:
        program = torch.export.load(path)
    except Exception as error:  # of many kinds, by the version of torch
        raise InputError(
            f"{path} is not an exported program that torch {torch.__version__} can read: {_in_one_line(error)}. "
            f"{_HOW_TO_SAVE}"
        ) from error
    _check_exported(program, path)
    try:
        from torch.export.passes import move_to_device_pass
    except ImportError:  # an older torch; devices that the model's code names stay as they are
        return ExportedModel(program).to(device)
    return ExportedModel(move_to_device_pass(program, str(device)))


def _check_exported(program: ExportedProgram, path: Path) -> None:
    names = program.graph_signature.user_inputs
    inputs = [node.meta["val"] for node in program.graph.nodes if node.op == "placeholder" and node.name in names]
    if len(names) != 1 or not isinstance(inputs[0], Tensor):
        raise InputError(f"{path} takes the inputs {', '.join(map(str, names))}; expected one, images.")
    size = inputs[0].shape[0]
    if isinstance(size, int):
        raise InputError(
            f"{path} was exported for batches of exactly {size} image(s), and an attack needs batches of any size. "
            f"{_HOW_TO_EXPORT}"
        )
    trained = sorted({str(node.target) for node in program.graph.nodes if _as_in_training(node)})
    if trained:
        raise InputError(
            f"{path} was exported in train mode, which cannot be changed ({', '.join(trained)}). {_HOW_TO_EXPORT}"
        )


def _as_in_training(node: torch.fx.Node) -> bool:
    """Whether an operation is dropout or batch normalisation in train mode."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return False
    names = [argument.name for argument in node.target._schema.arguments]
    given = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
    by_batch = given.get("training") and given.get("running_mean") is not None  # else as in eval mode
    return bool(by_batch or given.get("train") or given.get("dropout_p"))


def _saved(path: Path) -> Any:
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except ModuleNotFoundError as error:
        raise InputError(f"{path} needs the package safetensors; install it, or save with torch.save.") from error
    except Exception as error:  # of many kinds, by what the file is
        raise InputError(f"{path} {_why_not(error)}. {_HOW_TO_SAVE}") from error


def _why_not(error: Exception) -> str:
    if "TorchScript" in str(error):
        return "is a TorchScript archive, which is not supported"
    pickled = re.search(r"GLOBAL (\S+)", str(error))
    if isinstance(error, pickle.UnpicklingError) and pickled:
        return f"holds more than weights, a pickled {pickled[1]}, and pickles are not read, since they may run code"
    return f"cannot be read as weights: {_in_one_line(error)}"


def _state_dict(saved: Any, path: Path) -> dict[str, Any]:
    while nested := _nested(saved):
        saved = nested
    named = isinstance(saved, dict) and all(isinstance(key, str) for key in saved)
    if named and any(isinstance(value, Tensor) for value in saved.values()):
        return saved
    found = f"a dict with {_some(list(saved)) or 'no keys'}" if isinstance(saved, dict) else f"a {type(saved).__name__}"
    raise InputError(
        f"{path} holds {found}; expected a state dict, at the top or under {', '.join(_NESTED)}. {_HOW_TO_SAVE}"
    )


def _nested(saved: Any) -> Any:
    found = [saved.get(key) for key in _NESTED] if isinstance(saved, dict) else []
    return next((value for value in found if isinstance(value, dict)), None)


def _filled(network: Any, weights: dict[str, Any], path: Path) -> nn.Module:
    if not isinstance(network, nn.Module):
        raise InputError(f"The network is a {type(network).__name__}; expected a torch.nn.Module.")
    own = network.state_dict()
    for prefix in _PREFIXES:
        if all(name.startswith(prefix) for name in weights) and not all(name.startswith(prefix) for name in own):
            consume_prefix_in_state_dict_if_present(weights, prefix)
    try:
        network.load_state_dict(weights)
    except RuntimeError as error:
        raise InputError(
            f"{path} does not fit {type(network).__name__}: {_differences(own, weights) or _in_one_line(error)}. "
            "Choose the network whose weights were saved, with its options."
        ) from error
    return network


def _differences(own: Mapping[str, Any], weights: Mapping[str, Any]) -> str:
    """A few of the differences between the weights of a network and those of a file."""
    shapes = [
        f"{name} of {tuple(weights[name].shape)} in place of {tuple(own[name].shape)}"
        for name in own
        if isinstance(weights.get(name), Tensor) and not is_lazy(own[name]) and own[name].shape != weights[name].shape
    ]
    kinds = {
        "missing": [name for name in own if name not in weights],
        "unknown to it": [name for name in weights if name not in own],
        "of another shape": shapes,
    }
    return "; ".join(f"{len(names)} {kind} ({_some(names)})" for kind, names in kinds.items() if names)


def _some(names: Sequence[Any]) -> str:
    return ", ".join(map(str, names[:3])) + (", ..." if len(names) > 3 else "")


def _in_one_line(error: Exception) -> str:
    """The class of an exception and the first line of its message."""
    first = shorten(str(error).strip().partition("\n")[0], 160, placeholder=" ...").rstrip(".")
    return f"{type(error).__name__}: {first}" if first else type(error).__name__
