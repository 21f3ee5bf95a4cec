"""Progress bars, or none; and how far an evaluation is, with the cost that is expected."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

from ...errors import InputError
from .sharing import Ranks

logger = logging.getLogger("pml_adversarial")

LONG = 180.0  #: Seconds. What an evaluation costs is logged if it is expected to take longer, or if a bar is shown.


def progress_bar(shown: bool, total: int | None, desc: str, **options: Any) -> Any:
    """A progress bar of tqdm, or an object that takes the same calls and shows nothing."""
    if not shown:
        return nullcontext(SimpleNamespace(n=0, total=total, update=lambda steps=1: None))
    try:
        from tqdm.auto import tqdm
    except ImportError as error:
        raise InputError("progress=True needs tqdm; install it with `pip install tqdm`.") from error
    return tqdm(total=total, desc=desc, **options)


class Progress:
    """How far an evaluation is, counted in image passes. A bar names what runs.

    After the first batch of queries, what the evaluation costs in all is logged.

    Attributes:
        passes: so far.
    """

    def __init__(self, bar: Any, title: str, is_shown: bool, ranks: Ranks) -> None:
        self.passes = 0
        self._bar, self._title, self._is_shown, self._ranks = bar, title, is_shown, ranks

    def begin(self, task: str) -> None:
        """Names what runs from now on."""
        if self._is_shown:
            self._bar.set_description_str(f"{self._title}: {task}")

    def add(self, passes: int) -> None:
        """Counts passes."""
        self.passes += passes
        self._bar.update(passes)

    def expect(self, passes: int | None) -> None:
        """Sets how many passes are to follow; None: it is not known."""
        self._bar.total = None if passes is None else self.passes + passes
        if self._is_shown:
            self._bar.refresh()

    def batches(self, sizes: Sequence[int], then: int) -> Iterator[Any]:
        """A context for each batch of queries; ``then`` passes follow after all of them.

        The batches still to come are expected to cost as much for each query as those that are done.
        """
        start = self.passes
        for number in range(len(sizes)):
            yield self._batch(start, sizes, number, then)

    @contextmanager
    def _batch(self, start: int, sizes: Sequence[int], number: int, then: int) -> Iterator[None]:
        before, began = self.passes, time.perf_counter()
        yield
        passes, seconds = self.passes - before, time.perf_counter() - began
        done, left = sum(sizes[: number + 1]), sum(sizes[number + 1 :])
        self.expect(round((self.passes - start) / done * left) + then)
        if number == 0:
            self._log(sizes, passes, seconds, then)

    def _log(self, sizes: Sequence[int], passes: int, seconds: float, then: int) -> None:
        rate, share = seconds / max(passes, 1), sum(sizes) / sizes[0]
        is_long = self._is_shown or share * seconds + then * rate > LONG
        if not is_long or not self._ranks.is_first:
            return
        logger.info(
            "%d of %d queries took %s image passes and %s. Expected for all: %s passes and %s%s%s.",
            sizes[0],
            sum(sizes),
            f"{passes:,}",
            duration(seconds),
            f"{share * passes:,.0f}",
            duration(share * seconds),
            f"; for the checks: {then:,} passes and {duration(then * rate)}" if then else "",
            f"; in each of {self._ranks.count} processes" if self._ranks.count > 1 else "",
        )


@contextmanager
def progress_of(is_asked: bool, title: str, ranks: Ranks) -> Iterator[Progress]:
    """Shows the progress of an evaluation if it is asked for; of several processes, the first shows its own."""
    is_shown = is_asked and ranks.is_first
    with progress_bar(is_shown, None, title, unit=" passes", unit_scale=True) as bar:
        progress = Progress(bar, title, is_shown, ranks)
        yield progress
        progress.expect(0)


def duration(seconds: float) -> str:
    """A time in words.

    >>> duration(3.21), duration(200), duration(9000)
    ('3.2 s', '3 min 20 s', '2 h 30 min')
    """
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes = round(seconds) // 60
    if minutes < 60:
        return f"{minutes} min {round(seconds) % 60} s"
    return f"{minutes // 60} h {minutes % 60} min"
