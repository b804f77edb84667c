"""When the host looks for tokens that the kernel writes to its memory."""

from __future__ import annotations

import time

SHORTEST = 20e-6  # seconds between two looks
LONGEST = 2e-3  # for what else may have happened meanwhile: an error, a cancellation


class Pace:
    """Sleeps between looks: half of the time until the next token is expected, so that few looks find it soon after it has come.

    It is expected as long after the last one as that came after the one before.
    """

    def __init__(self) -> None:
        self._last: float | None = None
        self._interval = 0.0

    def made(self) -> None:
        """A token has been found, or several that came together."""
        now = time.perf_counter()
        if self._last is not None:
            self._interval = now - self._last
        self._last = now

    def wait(self) -> None:
        """Before the next look."""
        left = 0.0 if self._last is None else self._last + self._interval - time.perf_counter()
        time.sleep(min(max(left / 2, SHORTEST), LONGEST))
