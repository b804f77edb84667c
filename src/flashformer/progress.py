"""Progress bars for whatever a backend does while a person waits."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from .backends import Progress, no_progress

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress
    from rich.progress import TaskID

DELAY_SECONDS = 0.5  # what is done sooner shows no bar


class Bars:
    """A `Progress` callback that shows one bar a kind of work on stderr."""

    def __init__(self, bars: RichProgress, delay: float = DELAY_SECONDS) -> None:
        self._bars, self._delay = bars, delay
        self._began: dict[str, float] = {}
        self._tasks: dict[str, TaskID] = {}

    def __call__(self, what: str, done: int, total: int) -> None:
        """See `Progress`. A total of 1 is work whose parts cannot be counted."""
        now = time.monotonic()
        began = self._began.setdefault(what, now)
        if what not in self._tasks and (total == 1 or now - began >= self._delay) and done < total:
            self._tasks[what] = self._bars.add_task(what, total=total if total > 1 else None)
        if what in self._tasks:
            self._bars.update(self._tasks[what], completed=done, total=total if total > 1 or done else None)


@contextmanager
def bars(progress: Progress | None = None) -> Iterator[Progress]:
    """The given callback, or bars on stderr if that is a terminal; they vanish at the end."""
    if progress is not None:
        yield progress
    elif not sys.stderr.isatty():
        yield no_progress
    else:
        from rich.console import Console
        from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
        from rich.progress import Progress as RichProgress

        columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f} %"), TimeElapsedColumn())
        with RichProgress(*columns, console=Console(stderr=True), transient=True) as shown:
            yield Bars(shown)
