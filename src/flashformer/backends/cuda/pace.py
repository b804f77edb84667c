"""When the host looks for tokens that the kernel writes to its memory."""

from __future__ import annotations

import time

SHORTEST = 40e-6  # seconds between two looks
LONGEST = 10e-3  # for what else may have happened meanwhile: a cancellation
SLACK = 2e-3  # that a token may be late
SOONER, LATER = 3e-6, 12e-6  # by which the first look for a token moves where the last one has found one, and where it has not
MOST_EARLY = 100e-6  # before a token is expected: a sleep takes some 60 us longer than it is asked to
SHARE = 8  # of how many tokens' time the mean is taken


class Pace:
    """Sleeps between looks until about when the next token comes, so that one look finds most tokens, soon after they have come.

    Each look wakes the host, which is most of what a token costs it. How long before a token is expected the host must wake is learnt: a
    little more where the first look has found one, less where it has not.
    """

    def __init__(self) -> None:
        self._last: float | None = None
        self._interval = 0.0
        self._early = 0.0
        self._looks = 0  # since the last token
        self._misses = 0  # of these, after it was expected

    @property
    def overdue(self) -> bool:
        """Whether it is time to ask if anything is still on its way, which costs more than a look."""
        return self._last is None or time.perf_counter() > self._last + 1.5 * self._interval + SLACK

    def made(self) -> None:
        """A token has been found, or one for each of some sequences."""
        now = time.perf_counter()
        if self._last is not None:
            self._interval += (now - self._last - self._interval) / (SHARE if self._interval else 1)
        if self._looks:
            self._early = max(self._early - LATER, -SHORTEST) if self._misses else min(self._early + SOONER, MOST_EARLY)
        self._last, self._looks, self._misses = now, 0, 0

    def wait(self, soon: bool = False) -> None:
        """Before the next look. soon: it is not for a token."""
        left = 0.0
        if self._last is not None and not soon:
            left = self._last + self._interval - self._early - time.perf_counter()
            self._misses += left <= 0 and self._looks > 0
        self._looks += 1
        time.sleep(min(max(left, SHORTEST), LONGEST))
