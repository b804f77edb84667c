"""A backend turns a plan and a checkpoint into a `Runner`: the whole-model kernel, ready to be launched.

A launch takes a list of `Turn`s, each a sequence's part of it, and makes tokens for all of them. Sequences have *slots* of the KV cache;
a pass of the kernel carries up to `Runner.columns` token positions of any of them, and no bit of one depends on the others.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Generator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import numpy as np

from ..errors import ScoreError
from .sampling import Sampling, Scores

if TYPE_CHECKING:
    from ..plan import Plan

GREEDY = Sampling()
Progress = Callable[[str, int, int], None]  # what is being done, how much is done, of how much


def no_progress(what: str, done: int, total: int) -> None:
    """The progress callback of someone who does not want to see any."""


@dataclass
class RunStats:
    """What the last `generate` did: seconds are device time where the device can tell, else wall time."""

    prompt_tokens: int = 0  # fed by it
    reused_tokens: int = 0  # before them, whose KV entries earlier calls had left
    prompt_seconds: float = 0.0
    generated_tokens: int = 0
    generate_seconds: float = 0.0  # from the first generated token to the last: generated_tokens - 1 steps
    bytes_read: int = 0  # weights and KV cache read by those steps
    drafted: int = 0  # tokens that speculation guessed
    accepted: int = 0  # of those, how many the model chose, too
    speedup: float = 1.0  # of speculation: by its passes' cost and tokens, against passes without it; see speculate.py


@dataclass(eq=False)
class Turn:
    """A sequence's part of a launch: `tokens` at positions start, start + 1, ... of its slot, then up to `count` of the model's own.

    The last `drafts` of the tokens are guesses, of which at least one other token precedes. Each is compared with the token that the
    model chooses in its place: what is chosen is made, and the first guess that differs ends the turn. A token of `stop` is made, too,
    and ends it.
    """

    slot: int
    tokens: Sequence[int]
    start: int
    count: int
    stop: Collection[int] = ()
    sampling: Sampling = GREEDY
    drafts: int = 0
    again: bool = False  # whether its tokens follow some that the model has made: none of them is a prompt's
    fed: int = 0  # after the launch: how many positions from start on are in the KV cache for certain
    flag: np.ndarray = field(default_factory=lambda: np.zeros(1, np.uint32))  # the kernel of the CPU looks at it before each pass
    on_cancel: Callable[[], None] | None = None  # tells another kernel, while it runs

    def cancel(self) -> None:
        """End the turn with its present token; from any thread, also while it runs."""
        self.flag[0] = 1
        if tell := self.on_cancel:
            tell()

    @property
    def cancelled(self) -> bool:
        """Whether `cancel` was called."""
        return bool(self.flag[0])


@dataclass(frozen=True)
class Made:
    """A token that a launch has made, or the error that ended a turn in its place."""

    turn: int  # its number in the list
    token: int
    seconds: float  # from the start of the launch
    scores: Scores | None = None  # if its sampling asks for them
    error: ScoreError | None = None


def alone(plan: Plan, turn: Turn, seconds: Sequence[float]) -> RunStats:
    """What a launch of one turn did, whose tokens were made after so many seconds each."""
    first, last = (seconds[0], seconds[-1]) if seconds else (0.0, 0.0)
    context = turn.start + len(turn.tokens)
    nbytes = plan.bytes_of(context, max(len(seconds) - 1, 0))
    return RunStats(len(turn.tokens), turn.start, first, len(seconds), last - first, nbytes)


def generate_alone(runner: Runner, plan: Plan, turn: Turn) -> Generator[int, None, None]:
    """`Runner.generate` by way of `Runner.run`."""
    seconds: list[float] = []
    try:
        with closing(runner.run([turn])) as made:
            for one in made:
                if one.error:
                    raise one.error
                seconds.append(one.seconds)
                yield one.token
    finally:
        runner.stats = alone(plan, turn, seconds)


class Runner(Protocol):
    """A model in memory, ready to run. Positions before a start must have been computed by earlier calls, in the same slot."""

    stats: RunStats  # of the last `generate`
    columns: int  # token positions of a pass, at most
    slots: int

    def run(self, turns: Sequence[Turn]) -> Generator[Made, None, None]:
        """One launch: the tokens of all turns, each as it is made. Closing the iterator early ends all of them.

        What is wrong with one turn's scores ends that turn alone. Raises DeviceError where the kernel fails, or the turns do not fit:
        their slots must differ.
        """
        ...

    def copy(self, source: int, target: int, positions: int) -> None:
        """The first `positions` of one slot become those of another. Only while nothing runs."""
        ...

    def generate(
        self, tokens: Sequence[int], start: int, count: int, stop: Collection[int], sampling: Sampling = GREEDY
    ) -> Generator[int, None, None]:
        """A launch of one turn, in slot 0: its tokens as they are made. Closing the iterator early stops the kernel.

        Raises DeviceError where logits are not finite or no token is allowed, naming the position."""
        ...

    def feeder(self, prompt: int) -> int:
        """Which other kernel `run` leaves a prompt of so many tokens to, but for its last one, or what is left of that; 0: none.

        Its bits are its own: one must not go on with what another has fed, or an answer would tell what was in the cache.
        """
        ...

    def scores(self, index: int) -> Scores:
        """Log probabilities of the token that the present or last `generate` yielded as number `index`, if its sampling asked for them."""
        ...

    def logits(self, tokens: Sequence[int], start: int, slot: int = 0) -> np.ndarray:
        """Teacher-forced logits, float32 [len(tokens), vocab_size]."""
        ...

    def read_bandwidth(self) -> float:
        """What a plain read of memory reaches on this device now, in GB/s: the ceiling to compare with."""
        ...

    def close(self) -> None:
        """Free everything; safe to call twice."""
        ...
