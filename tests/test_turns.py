"""How turns share a kernel of one column: pieces, order, slots and ends. The kernel is played by a rule for the next token."""

from __future__ import annotations

from collections.abc import Collection, Generator, Iterator, Sequence
from contextlib import closing, contextmanager

import numpy as np
import pytest

from flashformer.backends import GREEDY, Turn
from flashformer.backends.cuda.turns import PIECE, QUANTUM, run_turns
from flashformer.backends.sampling import Sampling, Scores
from flashformer.errors import DeviceError, ScoreError

POISON = 13  # a text with this token has no scores


class OneColumn:
    """The next token is a hash of all before; texts live in slots, of which it has three."""

    slots = 3

    piece = PIECE

    def __init__(self, feeds_apart: bool = False, feeds_all: bool = False) -> None:
        self.feeds_apart, self.feeds_all = feeds_apart, feeds_all
        self.resuming = False
        self.texts: list[list[int]] = [[], [], []]
        self.slot = 0
        self.launches: list[tuple[int, int, int]] = []  # slot, tokens fed, tokens to make
        self.cancelled = 0
        self.seen: list[int] = []  # tokens counted as seen, at each launch
        self.failure: DeviceError | None = None

    @contextmanager
    def in_slot(self, slot: int, resumes: bool = False) -> Iterator[None]:
        self.slot, self.resuming = slot, resumes
        yield
        self.slot, self.resuming = 0, False

    def interrupt(self) -> None:
        pass  # who cancels here does so between tokens

    def generate(
        self, tokens: Sequence[int], start: int, count: int, stop: Collection[int], sampling: Sampling = GREEDY
    ) -> Generator[int, None, None]:
        text = self.texts[self.slot]
        assert len(text) >= start
        if self.resuming:  # the token that was fed last, which is all that is known of it
            assert [*text[start:]] == [*tokens] and len(tokens) == 1
        text[start:] = tokens
        self.launches.append((self.slot, 0 if self.resuming else len(tokens), count))
        self.seen.append(0 if sampling.seen is None else int(sampling.seen.sum()))
        made = 0
        try:
            while made < count:
                if POISON in text:
                    raise ScoreError("not finite")
                token = following(text)
                made += 1
                yield token
                if token in stop:
                    return
                text.append(token)
            if self.failure:
                raise self.failure
        finally:
            self.cancelled += made < count

    def feeder(self, prompt: int) -> int:
        return int(self.feeds_apart or self.feeds_all)

    def resumes(self, prompt: int) -> bool:
        return self.feeds_all

    def feed(self, tokens: Sequence[int], start: int, slot: int, prompt: int) -> None:
        assert prompt >= start + len(tokens)
        text = self.texts[slot]
        assert len(text) >= start
        text[start:] = tokens
        self.launches.append((slot, len(tokens), 0))

    def scores(self, index: int) -> Scores:
        return Scores(-float(index), ())


def following(text: Sequence[int]) -> int:
    """The token that follows a text."""
    return 20 + hash(tuple(text)) % 500


def answer(prompt: Sequence[int], count: int) -> list[int]:
    """What a prompt alone gives."""
    text = list(prompt)
    for _ in range(count):
        text.append(following(text))
    return text[len(prompt) :]


def test_each_gets_what_it_gets_alone_and_they_take_turns() -> None:
    runner = OneColumn()
    seen = np.zeros(1000, np.uint32)
    turns = [Turn(2, [1, 2], 0, 40), Turn(0, [3], 0, QUANTUM, sampling=Sampling(seen=seen, logprobs=1)), Turn(1, [4], 0, 20)]
    made = list(run_turns(runner, turns))
    for number, turn in enumerate(turns):
        assert [one.token for one in made if one.turn == number] == answer(turn.tokens, turn.count)
        assert turn.fed == len(turn.tokens) + turn.count - 1
    assert [(slot, count) for slot, _, count in runner.launches] == [(2, 16), (0, 16), (1, 16), (2, 16), (1, 4), (2, 8)]
    assert all((one.scores is not None) == (one.turn == 1) for one in made) and not seen.any()
    assert [one.seconds for one in made] == sorted(one.seconds for one in made)


def test_penalties_know_what_earlier_launches_made() -> None:
    runner = OneColumn()
    list(run_turns(runner, [Turn(0, [1], 0, 40, sampling=Sampling(seen=np.zeros(1000, np.uint32))), Turn(1, [2], 0, 40)]))
    assert [seen for seen, (slot, _, _) in zip(runner.seen, runner.launches, strict=True) if slot == 0] == [0, 16, 32]


def test_alone_it_is_one_launch() -> None:
    runner = OneColumn()
    assert [one.token for one in run_turns(runner, [Turn(1, [1], 0, 100)])] == answer([1], 100)
    assert runner.launches == [(1, 1, 100)]


def test_prompts_come_in_pieces() -> None:
    runner = OneColumn()
    prompt = [100 + i % 50 for i in range(2 * PIECE + 5)]
    turn = Turn(0, prompt, 0, 3)
    assert [one.token for one in run_turns(runner, [turn, Turn(1, [1], 0, 2)]) if one.turn == 0] == answer(prompt, 3)
    assert runner.launches == [(0, PIECE, 0), (1, 1, 2), (0, PIECE, 0), (0, 5, 3)]


def test_a_kernel_for_prompts_feeds_all_but_the_last_token() -> None:
    runner = OneColumn(feeds_apart=True)
    prompt = [100 + i % 50 for i in range(PIECE + 5)]
    turns = [Turn(0, prompt, 0, QUANTUM + 3), Turn(1, [1, 2], 0, 2)]
    made = list(run_turns(runner, turns))
    assert [one.token for one in made if one.turn == 0] == answer(prompt, QUANTUM + 3)
    assert [one.token for one in made if one.turn == 1] == answer([1, 2], 2)
    assert runner.launches == [(0, PIECE, 0), (1, 1, 0), (0, 4, 0), (1, 1, 2), (0, 1, QUANTUM + 3)]
    assert [turn.fed for turn in turns] == [PIECE + 5 + QUANTUM + 2, 3]


def test_a_kernel_for_long_prompts_feeds_all_tokens() -> None:
    """A launch goes on where it ends, whoever was fed in between; also where all tokens but one were known before."""
    runner = OneColumn(feeds_all=True)
    prompt = [100 + i % 50 for i in range(PIECE + 5)]
    runner.texts[2] = [7, 8]
    turns = [Turn(0, prompt, 0, QUANTUM + 3), Turn(1, [1, 2], 0, 2), Turn(2, [9], 2, 2)]
    made = list(run_turns(runner, turns))
    assert [one.token for one in made if one.turn == 0] == answer(prompt, QUANTUM + 3)
    assert [one.token for one in made if one.turn == 1] == answer([1, 2], 2)
    answered = [one.token for one in made if one.turn == 2]
    assert answered == answer([7, 8, 9], 2)
    fed = [(0, PIECE, 0), (1, 2, 0), (2, 1, 0), (0, 5, 0)]
    assert runner.launches == [*fed, (1, 0, 2), (2, 0, 2), (0, 0, QUANTUM + 3)]
    assert [turn.fed for turn in turns] == [PIECE + 5 + QUANTUM + 2, 3, 2]
    runner.launches.clear()
    further = Turn(2, answered[1:], 4, 1, again=True)  # which is no prompt
    assert [one.token for one in run_turns(runner, [further])] == answer([7, 8, 9], 3)[2:]
    assert runner.launches == [(2, 1, 1)]


def test_a_prompt_that_was_fed_in_vain_has_its_last_token_fed_again() -> None:
    runner = OneColumn(feeds_all=True)
    cut = Turn(1, [1, 2, 3], 0, 5)
    with closing(run_turns(runner, [Turn(0, [4], 0, 1), cut])) as made:
        next(made)
    assert runner.launches == [(0, 1, 0), (1, 3, 0), (0, 0, 1)] and cut.fed == 2
    assert [one.token for one in run_turns(runner, [Turn(1, [3], 2, 5)])] == answer([1, 2, 3], 5)
    assert runner.launches[3:] == [(1, 1, 0), (1, 0, 5)]


def test_ends() -> None:
    runner = OneColumn()
    whole = answer([1], 60)
    stopped, cancelled, never = Turn(0, [1], 0, 60, {whole[4]}), Turn(1, [1], 0, 60), Turn(2, [1], 0, 60)
    never.cancel()
    made = []
    for one in run_turns(runner, [stopped, cancelled, never]):
        made.append(one)
        if one.turn == 1 and one.token == whole[20]:
            cancelled.cancel()
    assert [one.token for one in made if one.turn == 0] == whole[:5] and stopped.fed == 5
    assert [one.token for one in made if one.turn == 1] == whole[:21] and cancelled.fed == 21
    assert never.fed == 0 and runner.cancelled > 0
    results = run_turns(runner, [Turn(0, [1], 0, 60)])
    next(results)
    before = runner.cancelled
    results.close()
    assert runner.cancelled == before + 1


def test_errors() -> None:
    runner = OneColumn()
    made = list(run_turns(runner, [Turn(0, [POISON], 0, 5), Turn(1, [1], 0, 5)]))
    assert [one.token for one in made if one.turn == 1] == answer([1], 5)
    (failed,) = [one for one in made if one.turn == 0]
    assert isinstance(failed.error, ScoreError)
    runner.failure = DeviceError("gave up")
    with pytest.raises(DeviceError, match="gave up"):
        list(run_turns(runner, [Turn(0, [1], 0, 5)]))
    for turns in ([], [Turn(0, [1], 0, 1)] * 2, [Turn(3, [1], 0, 1)]):
        with pytest.raises(DeviceError, match="slots of their own out of 3"):
            list(run_turns(runner, turns))
    with pytest.raises(DeviceError, match="one column"):
        list(run_turns(runner, [Turn(0, [1, 2], 0, 2, drafts=1)]))
