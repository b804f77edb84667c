"""Turns for a kernel of one column: each goes through it alone, and they take turns after a few tokens."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Generator, Sequence
from contextlib import AbstractContextManager, closing
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from ...errors import DeviceError, ScoreError
from .. import Made, Runner, Turn
from ..sampling import Sampling
from ..sequence import check_slots

QUANTUM = 16  # tokens that a turn makes while others wait
PIECE = 256  # `OneColumn.piece` of a kernel that feeds few tokens a pass


class OneColumn(Runner, Protocol):
    """What `run_turns` needs of a runner."""

    @property
    def piece(self) -> int:
        """Tokens of a prompt that it is fed at a time: what a cancelled turn may have to compute again."""
        ...

    def feed(self, tokens: Sequence[int], start: int, slot: int, prompt: int) -> None:
        """Compute what the KV cache of a slot holds of `tokens` at positions start..., of a prompt of so many tokens."""
        ...

    def resumes(self, prompt: int) -> bool:
        """Whether `feed` takes all of a prompt of so many tokens, and a launch goes on with its last token in the last layer."""
        ...

    def interrupt(self) -> None:
        """End the present launch with its present token; from any thread."""
        ...

    def in_slot(self, slot: int, resumes: bool = False) -> AbstractContextManager[None]:
        """Launch in a slot other than 0 for a while; whether the first token goes on where `feed` has left it, as the last one of its."""
        ...


@dataclass(eq=False)
class _Sequence:
    """How far a turn is."""

    number: int
    turn: Turn
    made: list[int]
    sampling: Sampling
    fed: int = 0  # tokens

    def take(self, token: int) -> None:
        """A token was made: penalties know it from now on."""
        self.made.append(token)
        if self.sampling.seen is not None:
            self.sampling.seen[token] += 1


def run_turns(runner: OneColumn, turns: Sequence[Turn]) -> Generator[Made, None, None]:
    """`Runner.run` by way of `generate`: QUANTUM tokens of each turn after the other, all of them where it is alone.

    A prompt is fed in pieces. Raises DeviceError for slots that are not there or not different, and for drafts, which need columns.
    """
    check_slots(turns, runner.slots)
    if any(turn.drafts for turn in turns):
        raise DeviceError("this kernel has one column, which no draft can share")
    began = time.perf_counter()
    waiting = deque(_Sequence(i, turn, [], _own(turn.sampling)) for i, turn in enumerate(turns))
    while waiting:
        one = waiting.popleft()
        if one.turn.cancelled:
            continue
        if (yield from _some(runner, one, began, QUANTUM if waiting else one.turn.count)):
            waiting.append(one)


def _own(sampling: Sampling) -> Sampling:
    """With counts that may be changed."""
    return sampling if sampling.seen is None else replace(sampling, seen=np.array(sampling.seen))


def _some(runner: OneColumn, one: _Sequence, began: float, most: int) -> Generator[Made, None, bool]:
    """A launch of one turn; whether it goes on."""
    turn, length = one.turn, len(one.turn.tokens)
    prompt = turn.start + length
    # NOTE: a kernel for prompts feeds all tokens, or all but the last, however few they are, so that no bit depends on who else there is.
    own = 0 if runner.resumes(prompt) and not turn.again else 1  # tokens that are left to the launch
    if length - one.fed > (own if runner.feeder(prompt) else runner.piece):
        piece = turn.tokens[one.fed : min(one.fed + runner.piece, length - own)]
        runner.feed(piece, turn.start + one.fed, turn.slot, prompt)
        one.fed += len(piece)
        turn.fed = min(one.fed, length - 1)  # the last token has the answer: without one it is still to be fed
        return True
    before = len(one.made)
    tokens = one.made[-1:] or turn.tokens[min(one.fed, length - 1) :]
    start, count = prompt + before - len(tokens), min(most, turn.count - before)
    with runner.in_slot(turn.slot, resumes=before == 0 and one.fed == length):
        turn.on_cancel = runner.interrupt
        try:
            with closing(runner.generate(tokens, start, count, turn.stop, one.sampling)) as generated:
                for token in generated:
                    index = len(one.made) - before
                    scores = runner.scores(index) if turn.sampling.logprobs is not None else None
                    one.take(token)
                    yield Made(one.number, token, time.perf_counter() - began, scores)
                    if token in turn.stop or turn.cancelled:
                        return False
        except ScoreError as error:
            yield Made(one.number, -1, time.perf_counter() - began, error=error)
            return False
        finally:
            turn.on_cancel = None
            if len(one.made) > before:
                turn.fed = one.fed = length + len(one.made) - 1
    return len(one.made) < turn.count
