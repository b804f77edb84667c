"""Guesses of the tokens to come, which one pass of columns verifies: what is wrong costs time, never a token.

`Lookup` guesses that a text goes on as it went on before; `DraftModel` asks a smaller model. `Speculation` decides for one generation how
many guesses a pass gets, and whether they pay: it compares the seconds that a token takes with and without them.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Protocol

from .backends import Runner, Turn
from .backends.sampling import Sampling
from .errors import DeviceError
from .scheduler import common_length

LONGEST, SHORTEST = 4, 2  # tokens that must have come before for `Lookup` to guess what follows
PROBE = 4  # tokens that are made without drafts to know what they take
FIRST_LENGTH = 3  # drafts of the first pass that has some
LEAST_REST, MOST_REST = 8, 256  # tokens without drafts, once there were none or they have not paid
MEMORY = 0.8  # what a launch's figures still count after the next


class Drafter(Protocol):
    """Guesses how texts go on."""

    def draft(self, slot: int, tokens: Sequence[int], count: int, sampling: Sampling) -> list[int]:
        """Up to `count` tokens that may follow `tokens`, the text of a slot of the engine; may be none."""
        ...


class Lookup:
    """What followed the last few tokens when the same ones came before. One for each generation."""

    def __init__(self) -> None:
        self._next: dict[tuple[int, ...], int] = {}  # where the latest continuation of some tokens begins
        self._known = 0  # tokens that are in it

    def draft(self, slot: int, tokens: Sequence[int], count: int, sampling: Sampling) -> list[int]:
        """See `Drafter.draft`; `tokens` begin with those of the last call."""
        for end in range(self._known, len(tokens)):  # what ends at the last token has no continuation yet
            for n in range(SHORTEST, min(LONGEST, end) + 1):
                self._next[tuple(tokens[end - n : end])] = end
        self._known = len(tokens)
        for n in range(min(LONGEST, len(tokens)), SHORTEST - 1, -1):
            if (at := self._next.get(tuple(tokens[len(tokens) - n :]))) is not None:
                guesses: list[int] = []
                for place in range(at, at + count):  # what repeats goes on repeating
                    guesses.append(tokens[place] if place < len(tokens) else guesses[place - len(tokens)])
                return guesses
        return []


class DraftModel:
    """A model with the same vocabulary, on a runner with as many slots and columns for itself."""

    def __init__(self, runner: Runner, max_context: int) -> None:
        self._runner, self._max_context = runner, max_context
        self._cached: list[list[int]] = [[] for _ in range(runner.slots)]

    def draft(self, slot: int, tokens: Sequence[int], count: int, sampling: Sampling) -> list[int]:
        """See `Drafter.draft`. It samples with the large model's noise, which makes the same choices likely."""
        count = min(count, self._max_context - len(tokens) + 1)
        if count < 1:
            return []
        start = min(common_length(self._cached[slot], tokens), len(tokens) - 1)
        self._cached[slot] = []
        turn = Turn(slot, tokens[start:], start, count, sampling=replace(sampling, seen=None, logprobs=None))
        made = []
        try:
            with closing(self._runner.run([turn])) as results:
                made = [one.token for one in results if one.error is None]
        except DeviceError:
            return []  # the large model goes on without
        self._cached[slot] = [*tokens, *made][: start + turn.fed]
        return made


@dataclass(frozen=True)
class Proposal:
    """What a generation wants of the next launch: drafts for one pass, or so many passes without."""

    drafts: list[int]
    passes: int


@dataclass
class _Pace:
    """Seconds that a token takes, lately."""

    tokens: float = 0.0
    seconds: float = 0.0

    def add(self, tokens: int, seconds: float) -> None:
        """Count a launch."""
        self.tokens, self.seconds = self.tokens * MEMORY + tokens, self.seconds * MEMORY + seconds

    @property
    def per_token(self) -> float:
        """Seconds; infinity where nothing is known."""
        return self.seconds / self.tokens if self.tokens else math.inf


class Speculation:
    """How one generation uses a drafter: more drafts while they are right, fewer when they are not, none for a while if they do not pay."""

    def __init__(self, drafter: Drafter) -> None:
        self._drafter = drafter
        self._length = FIRST_LENGTH
        self._rest = LEAST_REST
        self._passes = 1  # without drafts, before the next that has some: first the prompt's, then the probe
        self._drafted, self._plain = _Pace(), _Pace()
        self._begun = False
        self._planned = 0.0  # when `plan` was last called
        self._tokens, self._seconds = 0, 0.0  # of all launches but the prompt's

    @property
    def speedup(self) -> float:
        """How much longer all tokens but the first would have taken at the pace of those without drafts."""
        return self._plain.per_token * self._tokens / self._seconds if self._plain.tokens and self._seconds else 1.0

    def plan(self, slot: int, tokens: Sequence[int], room: int, sampling: Sampling) -> Proposal:
        """What to do next with a text; there is room for so many drafts."""
        self._planned = time.perf_counter()
        if self._passes:
            return Proposal([], self._passes)
        count = min(self._length, room)
        drafts = self._drafter.draft(slot, tokens, count, sampling) if count > 0 else []
        return Proposal(drafts, 1 if drafts else LEAST_REST)

    def learn(self, turn: Turn, made: int) -> None:
        """So many tokens came of the launch that was planned last, which has just ended."""
        seconds = time.perf_counter() - self._planned
        if not self._begun:  # the prompt took most of it
            self._begun, self._passes = True, PROBE
            return
        self._tokens, self._seconds = self._tokens + made, self._seconds + seconds
        if not turn.drafts:
            self._plain.add(made, seconds)
            self._passes = 0
            return
        self._drafted.add(made, seconds)
        self._length = min(2 * self._length, 64) if made > turn.drafts else max(made, 1)
        if self._drafted.per_token < self._plain.per_token:
            self._rest = LEAST_REST
        else:
            # The longer, the more often it has come to this.
            self._passes, self._rest = self._rest, min(2 * self._rest, MOST_REST)
            self._drafted = _Pace()
