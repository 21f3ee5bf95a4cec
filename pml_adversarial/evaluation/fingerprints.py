"""Hashes of a model and of images, which tell whether two evaluations measured the same."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..training.isolation import random_stream
from .images import ImageSet
from .retrieval_task import RetrievalTask

HASHED_IMAGES = 1024  #: Of a larger set, so many images are hashed, spread evenly over it.


def of_task(task: RetrievalTask, gallery_embeddings: Tensor | None = None) -> dict[str, Any]:
    """Fingerprints of the model, the queries, the gallery, and of the embeddings if they are given, by these names."""
    found = {
        "model": of_model(task.embed.model),
        "queries": of_images(task.queries),
        "gallery": "the queries" if task.items is task.queries else of_images(task.items),
    }
    return found if gallery_embeddings is None else {**found, "gallery_embeddings": of_tensor(gallery_embeddings)}


def of_model(model: nn.Module) -> dict[str, Any]:
    """The model's class, and a SHA-256.

    It is that of the names and classes of all modules, and of the names, types, shapes and values of all parameters and
    buffers. Options that are no buffers, such as the stride of a convolution, are not part of it.
    """
    digest = hashlib.sha256()
    for name, module in model.named_modules():
        digest.update(repr((name, type(module).__name__)).encode())
    state = {**model.state_dict(), **dict(model.named_buffers())}  # a state dict leaves some buffers out
    for name in sorted(state):
        digest.update(name.encode())
        for tensor in _tensors(state[name]):
            _add(digest, tensor)
    return {"class": type(model).__name__, "sha256": digest.hexdigest()}


def of_images(images: ImageSet) -> dict[str, Any]:
    """How many images there are, of how many the pixels were hashed, and the SHA-256 of all labels and these pixels.

    The pixels are those that the evaluation sees, so other types or sizes of the same pictures have another hash.
    """
    digest = hashlib.sha256()
    _add(digest, images.labels)
    rows = torch.linspace(0, len(images) - 1, min(len(images), HASHED_IMAGES), dtype=torch.float64).round().long()
    with random_stream(0, 0):  # for data sets that draw random numbers
        for row in rows.tolist():
            _add(digest, images[[row]])
    return {"images": len(images), "hashed": len(rows), "sha256": digest.hexdigest()}


def of_tensor(tensor: Tensor) -> dict[str, Any]:
    """The shape of a tensor, and the SHA-256 of its type, shape and values."""
    digest = hashlib.sha256()
    _add(digest, tensor)
    return {"shape": list(tensor.shape), "sha256": digest.hexdigest()}


def of_file(path: str | Path) -> dict[str, str]:
    """The path of a file and the SHA-256 of what is in it."""
    digest = hashlib.sha256()
    with Path(path).open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return {"path": str(path), "sha256": digest.hexdigest()}


def _tensors(value: Any) -> Iterator[Tensor]:
    """The tensors of an entry of a state dict; quantised modules keep several in a tuple."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for part in value:
            yield from _tensors(part)


def _add(digest: hashlib._Hash, tensor: Tensor) -> None:
    digest.update(repr((str(tensor.dtype), tuple(tensor.shape))).encode())
    tensor = tensor.detach().cpu().resolve_conj().resolve_neg()
    tensor = tensor.int_repr() if tensor.is_quantized else tensor.to_dense()
    digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
