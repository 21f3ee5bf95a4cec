"""The state of a wrapper as one tensor of bytes, which tools that save, copy or average tensors can handle.

All numbers take the same room, so its length does not change while a run goes on, unless a plugin remembers more. A
cast to half precision keeps bytes exactly. Reading the bytes runs no code.
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Mapping
from io import BytesIO
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError, PluginError

_MARK = b"pml_adversarial 1\n"
_HEADER = len(_MARK) + 4  # bytes: the mark and a checksum
_LENGTH = 8  # bytes, after the header: the length of the text that follows


def packed(state: Mapping[str, Any]) -> Tensor:
    """``(B,)`` uint8 on the CPU, which `unpacked` turns back into the state.

    Args:
        state: mappings, lists and tuples that hold tensors, numbers, bools, strings and None.

    Raises:
        PluginError: the state holds something else.
    """
    tensors: list[Tensor] = []
    text = json.dumps(_written(state, "", tensors), separators=(",", ":")).encode()
    content = b"".join([len(text).to_bytes(_LENGTH, "big"), text, *map(_bytes_of, tensors)])
    return torch.frombuffer(bytearray(_header(content) + content), dtype=torch.uint8)


def unpacked(saved: Any) -> dict[str, Any] | None:
    """The state that `packed` was given. None if the bytes changed since, as when a tool averaged all tensors.

    Raises:
        InputError: ``saved`` is not a tensor.
    """
    if not isinstance(saved, Tensor):
        raise InputError(
            f"The saved state of the wrapper is a {type(saved).__name__}; expected a tensor. Version 0.1 saved a dict, "
            "which this version does not read. To load the weights alone, remove the entries that end in _extra_state "
            "and call load_state_dict with strict=False."
        )
    stored = saved.detach().cpu().to(torch.uint8).numpy().tobytes()
    content = stored[_HEADER:]
    if not stored.startswith(_header(content)):
        return None
    tensors = BytesIO(content)
    text = tensors.read(int.from_bytes(tensors.read(_LENGTH), "big"))
    state: dict[str, Any] = _read(json.loads(text), tensors)
    return state


def _header(content: bytes) -> bytes:
    return _MARK + zlib.crc32(content).to_bytes(4, "big")


def _written(value: Any, place: str, tensors: list[Tensor]) -> list[Any]:
    """The value as ``[kind, content]`` for JSON. Tensors go to the list. A number, bool or None takes 32 characters."""
    if isinstance(value, Tensor) and value.layout == torch.strided:
        tensors.append(value)
        return ["tensor", [str(value.dtype).removeprefix("torch."), list(value.shape)]]
    if isinstance(value, Mapping):
        return ["dict", [[_written(item, f"{place}[{key!r}]", tensors) for item in (key, value[key])] for key in value]]
    if isinstance(value, list | tuple):
        kind = "list" if isinstance(value, list) else "tuple"
        return [kind, [_written(item, f"{place}[{i}]", tensors) for i, item in enumerate(value)]]
    if isinstance(value, str):
        return ["text", value]
    if isinstance(value, float):
        return ["real", struct.pack(">dq", value, 0).hex()]
    if value is None:
        return ["none", 32 * "0"]
    if isinstance(value, int) and -(2**127) <= value < 2**127:
        return ["bool" if isinstance(value, bool) else "int_", int(value).to_bytes(16, "big", signed=True).hex()]
    raise PluginError(
        f"The state to be saved holds {type(value).__name__} at {place}; expected tensors, numbers of up to 128 bits, "
        "bools, strings, None, and mappings, lists and tuples of them. Change what the plugin's state_dict returns."
    )


def _read(written: list[Any], tensors: BytesIO) -> Any:
    kind, content = written
    if kind == "tensor":
        empty = torch.empty(content[1], dtype=getattr(torch, content[0]))
        found = bytearray(tensors.read(empty.nbytes))
        return torch.frombuffer(found, dtype=empty.dtype).reshape(empty.shape) if found else empty
    if kind == "dict":
        return {_read(key, tensors): _read(value, tensors) for key, value in content}
    if kind in ("list", "tuple"):
        values = [_read(value, tensors) for value in content]
        return values if kind == "list" else tuple(values)
    if kind in ("text", "none"):
        return content if kind == "text" else None
    if kind == "real":
        return struct.unpack(">dq", bytes.fromhex(content))[0]
    number = int.from_bytes(bytes.fromhex(content), "big", signed=True)
    return bool(number) if kind == "bool" else number


def _bytes_of(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
