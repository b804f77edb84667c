"""When a launch is over: a thread waits for it, so that nobody has to ask."""

from __future__ import annotations

import threading
import weakref
from contextlib import suppress
from queue import SimpleQueue

from .driver import Context


class Ending:
    """The end of what had been launched when it was made."""

    def __init__(self, context: Context) -> None:
        self.over = False
        self._context, self._event = context, context.event(sleeping=True)
        self._under_way = threading.Lock()  # NOTE: it wakes at less cost than a threading.Event does
        self._under_way.acquire()

    def watch(self) -> None:
        """Wait for it; in a thread that does nothing else."""
        try:
            self._context.use()
            self._context.finish(self._event)
        finally:
            self._under_way.release()

    def wait(self, seconds: float = -1) -> bool:
        """Sleep until it comes, or so long; whether it has come."""
        self.over = self.over or self._under_way.acquire(timeout=seconds)
        return self.over


class Endings:
    """Watches one launch after another, in a thread that ends when nobody needs it any more."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._launched: SimpleQueue[Ending | None] = SimpleQueue()
        self._thread: threading.Thread | None = None
        self._close = weakref.finalize(self, self._launched.put, None)

    def next(self) -> Ending:
        """Of what has been launched until now."""
        ending = Ending(self._context)
        if self._thread is None:
            self._thread = threading.Thread(target=_watch, args=(self._launched,), name="flashformer-ending", daemon=True)
            self._thread.start()
        self._launched.put(ending)
        return ending

    def close(self) -> None:
        """Wait for all, and end the thread; safe to call twice."""
        self._close()
        if self._thread is not None:
            self._thread.join()


def _watch(launched: SimpleQueue[Ending | None]) -> None:
    while (ending := launched.get()) is not None:
        with suppress(Exception):  # whoever launched it asks for its results, and is told
            ending.watch()
        del ending  # or the context would be kept
