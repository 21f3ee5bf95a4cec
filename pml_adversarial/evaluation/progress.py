"""Progress bars, or none."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

from ..errors import InputError


def progress_bar(shown: bool, total: int, desc: str) -> Any:
    """A progress bar of tqdm, or an object that takes the same calls and shows nothing."""
    if not shown:
        return nullcontext(SimpleNamespace(n=0, update=lambda steps=1: None))
    try:
        from tqdm.auto import tqdm
    except ImportError as error:
        raise InputError("progress=True needs tqdm; install it with `pip install tqdm`.") from error
    return tqdm(total=total, desc=desc)
