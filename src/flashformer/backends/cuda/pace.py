"""When the host looks for tokens that the kernel writes to its memory."""

from __future__ import annotations

import time

SHORTEST = 40e-6  # seconds between two looks
LONGEST = 10e-3
SOONER, LATER = 3e-6, 12e-6  # by which the first look for a token moves where the last one has found one, and where it has not
MOST_EARLY = 100e-6  # before a token is expected: a sleep takes some 60 us longer than it is asked to
SHARE = 8  # of how many tokens' time the mean is taken
TOGETHER = 4e-3  # tokens that come within so long are looked for at once: a quarter of what a screen takes to show them,
GROWTH = 4  # but no more than this part of those that a launch has made: it may end with each


class Pace:
    """How long to sleep between looks: until about when the next tokens come, so that one look finds them, soon after they have come.

    Each look wakes the host, which is most of what a token costs it. How long before a token is expected the host must wake is learnt: a
    little more where the first look has found one, less where it has not. What is known of one launch serves the next.
    """

    def __init__(self) -> None:
        self._interval = 0.0  # from token to token; 0: not known
        self._since = self._due = 0.0  # the latest tokens, or the launch; when the next ones are expected
        self._ahead = 0  # passes of the launch before that which makes its first token; 0: it has been found
        self._found = 0  # tokens of the launch, of each sequence
        self._early = 0.0
        self._looks = 0  # since the latest tokens
        self._misses = 0  # of these, after they were expected

    def begin(self, passes: int) -> None:
        """A launch begins that makes its first token, or one for each of some sequences, in so many passes."""
        self._ahead, self._found = passes - 1, 0
        self._expect(passes)

    def made(self, count: int, left: int) -> None:
        """`count` tokens have been found at once, or so many for each of some sequences; at most `left` more will follow."""
        if self._looks:  # NOTE: else they may have waited for the host, and tell nothing
            seconds = (time.perf_counter() - self._since) / (self._ahead + count)
            self._interval += (seconds - self._interval) / (SHARE if self._interval else 1)
            self._early = max(self._early - LATER, -SHORTEST) if self._misses else min(self._early + SOONER, MOST_EARLY)
        self._ahead = 0
        self._found += count
        together = min(left, 1 + self._found // GROWTH, int(TOGETHER / self._interval)) if self._interval else 1
        self._expect(max(1, together))

    def next_look(self) -> float:
        """Seconds until the next look, if the launch does not end before."""
        left = self._due - self._early - time.perf_counter()
        self._misses += left <= 0 and self._looks > 0
        self._looks += 1
        return min(max(left, SHORTEST), LONGEST)

    def _expect(self, passes: int) -> None:
        """The next tokens after so many passes from now on."""
        self._since = time.perf_counter()
        self._due = self._since + passes * self._interval
        self._looks = self._misses = 0
