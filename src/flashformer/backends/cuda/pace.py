"""When the host looks for tokens that the kernel writes to its memory."""

from __future__ import annotations

import math
import time

SHORTEST = 40e-6  # seconds between two looks
LONGEST = 15e-3  # where nothing else is known
SOONER, LATER = 3e-6, 12e-6  # by which the first look for a token moves where the last one has found one, and where it has not
MOST_EARLY = 100e-6  # before a token is expected: a sleep takes some 60 us longer than it is asked to
SHARE = 8  # of how many tokens' time the mean is taken
TOGETHER = 14e-3  # tokens that come within so long are looked for at once, and seen within 16 ms, a frame of a screen;
GROWTH = 4  # but no more than this part of those that a launch has made: the first ones are seen as they come


class Pace:
    """How long to sleep between looks: until about when the next tokens come, so that one look finds them, soon after they have come.

    Each look wakes the host, which is most of what a token costs it. How long before a token is expected the host must wake is learnt: a
    little more where the first look has found one, less where it has not. What is known of one launch serves the next. Of several tokens
    that are looked for at once a look tells only that so many came before it, and the next one after: bounds of the time that one takes.
    """

    def __init__(self) -> None:
        self._interval = 0.0  # from token to token; 0: not known
        self._since = self._due = 0.0  # the latest tokens, or the launch; when the next ones are expected
        self._ahead = 0.0  # passes before the one that makes the first token; 0: it has been found; less: a part of one makes it
        self._found = 0  # tokens of the launch, of each sequence
        self._expected = 1  # that are looked for
        self._known = 0.0, 0  # when about how many of them had come
        self._least, self._most = 0.0, math.inf  # bounds of the interval since then
        self._early = 0.0
        self._looks = 0  # since the latest tokens
        self._misses = 0  # of these, after they were expected

    def begin(self, passes: float) -> None:
        """A launch begins that makes its first token, or one for each of some sequences, in so many passes, or a part of one."""
        self._ahead, self._found = passes - 1, 0
        self._expect(time.perf_counter(), passes)

    def made(self, count: int, left: int) -> None:
        """`count` tokens have been found at once, or so many for each of some sequences; at most `left` more will follow."""
        now = time.perf_counter()
        self._found += count
        if self._looks and self._expected > 1:  # NOTE: without a look they may have waited for the host, and tell nothing
            came = self._bound(now)
        else:
            if self._looks:
                if self._ahead >= 0:  # NOTE: a part of a pass tells little of a whole one
                    seconds = (now - self._since) / (self._ahead + count)
                    self._interval += (seconds - self._interval) / (SHARE if self._interval else 1)
                self._early = max(self._early - LATER, -SHORTEST) if self._misses else min(self._early + SOONER, MOST_EARLY)
            came = now
            self._begin_bounds(came)
        self._ahead = 0
        together = min(left, 1 + self._found // GROWTH, int(TOGETHER / self._interval)) if self._interval else 1
        self._expect(came, max(1, together))

    def next_look(self) -> float:
        """Seconds until the next look, if the launch does not end before."""
        left = self._due - self._early - time.perf_counter()
        self._misses += left <= 0 and self._looks > 0
        self._looks += 1
        return min(max(left, SHORTEST), LONGEST)

    def _begin_bounds(self, came: float) -> None:
        self._known = came, self._found
        self._least, self._most = 0.0, math.inf

    def _bound(self, now: float) -> float:
        """What a look now tells about the interval, and when the latest token has come then."""
        since, found = self._known
        count = self._found - found
        self._least, self._most = max(self._least, (now - since) / (count + 1)), min(self._most, (now - since + MOST_EARLY) / count)
        if self._least > self._most:  # tokens have become slower, or faster
            came = now - self._interval / 2
            self._begin_bounds(came)
            return came
        self._interval = (self._least + self._most) / 2
        return min(since + count * self._interval, now)

    def _expect(self, came: float, passes: float) -> None:
        """The next tokens so many passes after the latest one came."""
        self._since, self._expected = came, round(passes - self._ahead)
        self._due = came + passes * self._interval
        self._looks = self._misses = 0
