"""When the host looks for tokens that the kernel writes to its memory."""

from __future__ import annotations

import time

SHORTEST = 20e-6  # seconds between two looks
LONGEST = 10e-3  # for what else may have happened meanwhile: a cancellation
SLACK = 2e-3  # that a token may be late
EARLY = 60e-6  # before a token is expected: a sleep takes about so much longer than it is asked to


class Pace:
    """Sleeps between looks until shortly before the next token is expected, so that few looks find it soon after it has come.

    It is expected as long after the last one as that came after the one before.
    """

    def __init__(self) -> None:
        self._last: float | None = None
        self._interval = 0.0

    @property
    def overdue(self) -> bool:
        """Whether it is time to ask if anything is still on its way, which costs more than a look."""
        return self._last is None or time.perf_counter() > self._last + 1.5 * self._interval + SLACK

    def made(self) -> None:
        """A token has been found, or several that came together."""
        now = time.perf_counter()
        if self._last is not None:
            self._interval = now - self._last
        self._last = now

    def wait(self, soon: bool = False) -> None:
        """Before the next look. soon: it is not for a token."""
        left = 0.0 if soon or self._last is None else self._last + self._interval - time.perf_counter()
        time.sleep(min(max(left - EARLY, SHORTEST), LONGEST))
