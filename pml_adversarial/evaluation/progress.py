"""Progress bars, or none."""

from __future__ import annotations

from typing import Any

from ..errors import InputError


def progress_bar(shown: bool, total: int, desc: str) -> Any:
    """A progress bar of tqdm, or an object that takes the same calls and shows nothing.

    Raises:
        InputError: a bar is wanted and tqdm is not installed.
    """
    if not shown:
        return _NoBar()
    try:
        from tqdm.auto import tqdm
    except ImportError as error:
        raise InputError("progress=True needs tqdm; install it with `pip install tqdm`.") from error
    return tqdm(total=total, desc=desc)


class _NoBar:
    def __init__(self) -> None:
        self.n = 0

    def update(self, steps: int = 1) -> None:
        self.n += steps

    def __enter__(self) -> _NoBar:
        return self

    def __exit__(self, *error: object) -> None:
        pass
