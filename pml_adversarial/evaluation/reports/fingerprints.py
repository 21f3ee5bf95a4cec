"""Hashes of a model and of images, which tell whether two evaluations measured the same."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...training.isolation import random_stream
from ..retrieval.images import ImageSet
from ..retrieval.options import to_embeddings
from ..retrieval.task import RetrievalTask

HASHED_IMAGES = 1024  #: Of more images, so many are hashed, spread evenly over them.


def of_task(task: RetrievalTask, rows: Tensor, gallery_embeddings: Any = None) -> dict[str, Any]:
    """Fingerprints of the model, the queries ``rows`` ``(n,)``, and the gallery, by these names.

    Of a gallery whose embeddings are given no image is read; the embeddings have a fingerprint, ``gallery_embeddings``.
    If ``ignore`` or ``relevant`` is a function, what it gives for the queries has one too.
    """
    items = of_images(task.items, None if gallery_embeddings is None else torch.arange(0))
    found = {
        "model": of_modules(task.embed.modules),
        "queries": of_images(task.queries, rows),
        "gallery": {"is_the_queries": task.items is task.queries, **items},
    }
    if gallery_embeddings is not None:
        found["gallery_embeddings"] = of_tensor(to_embeddings(gallery_embeddings))
    return {**found, **task.mask_digests(rows)}


def of_modules(modules: Sequence[nn.Module]) -> dict[str, Any]:
    """The classes of the modules that a model runs, and a SHA-256.

    It is that of the names and classes of all submodules, and of the names, types, shapes and values of all parameters
    and buffers. Options that are no buffers, such as the stride of a convolution, and code are not part of it.
    """
    digest = hashlib.sha256()
    modules = [m.module if isinstance(m, nn.parallel.DistributedDataParallel) else m for m in modules]
    for module in modules:
        for name, part in module.named_modules():
            digest.update(repr((name, type(part).__name__)).encode())
        state = {**module.state_dict(), **dict(module.named_buffers())}  # a state dict leaves some buffers out
        for name in sorted(state):
            digest.update(name.encode())
            for tensor in _tensors(state[name]):
                _add(digest, tensor)
    names = [type(module).__name__ for module in modules]
    return {"class": ", ".join(names) or "a function without modules", "sha256": digest.hexdigest()}


def of_images(images: ImageSet, rows: Tensor | None = None) -> dict[str, Any]:
    """How many images there are, of how many the pixels were hashed, and the SHA-256 of all labels and these pixels.

    Hashed are the images ``rows`` (None: all), or `HASHED_IMAGES` of them if there are more. Their pixels are those
    that an attack changes, in single precision: pictures of another size have another hash.
    """
    digest = hashlib.sha256()
    _add(digest, images.labels if images.label_sets is None else images.label_sets)
    rows = torch.arange(len(images) * images.has_images) if rows is None else rows.cpu()
    chosen = torch.linspace(0, len(rows) - 1, min(len(rows), HASHED_IMAGES), dtype=torch.float64).round().long()
    with random_stream(0, 0):  # for data sets that draw random numbers
        for row in rows[chosen].tolist():
            _add(digest, images[[row]].float())
    return {"images": len(images), "hashed": len(chosen), "sha256": digest.hexdigest()}


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
