"""Launches of a kernel of several columns: many sequences at a time, prompts in pieces, drafts verified."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Generator, Sequence
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from ...errors import DeviceError
from ...geometry import ceil_div, round_up
from .. import Made, Turn
from ..sampling import NOTHING, REPORT_WORDS, Flag, Scores, await_report, token_error
from ..sequence import check_turns
from .codegen import SequenceStruct
from .pace import SHORTEST

if TYPE_CHECKING:
    from .launcher import Launcher

MOST_SEQUENCES = 32  # of a launch, kMostSequences in roles.cuh
MAX_STOP = 64  # stop tokens of a sequence


class Columns:
    """How a runner's kernel of several columns is told what to do, and what it tells."""

    def __init__(self, runner: Launcher) -> None:
        """Claims what sequences are told by; raises DeviceError where that does not fit."""
        self.runner = runner
        plan, context, p = runner.plan, runner.context, runner.params
        rows = round_up(plan.config.vocab_size, plan.target.tile_rows)
        p.slot_bytes = plan.kv_bytes() // plan.slots
        p.sequences = context.allocate(MOST_SEQUENCES * ctypes.sizeof(SequenceStruct), "sequences")
        p.column_scores = context.allocate(plan.columns * rows * 8, "sampling")
        p.column_raw = context.allocate(plan.columns * rows * 4, "sampling")
        self.cancel_address, cancel = context.allocate_pinned(4 * MOST_SEQUENCES, "cancel flags", fill=0)
        self.cancel = cancel.view(np.uint32)
        self.places = [_Place(self, number) for number in range(plan.slots)]
        self.parts: list[_Part] = []  # of the latest launch

    def launch(self, turns: Sequence[Turn], logits: int = 0) -> None:
        """Start the kernel; `logits` is the address of float32 [tokens, vocab] for those of the only turn.

        Raises DeviceError for turns that do not fit.
        """
        runner = self.runner
        if runner.context.context is None:
            raise DeviceError("this model has been closed")
        check_turns(turns, runner.plan)
        for turn in turns:
            if len(turn.stop) > MAX_STOP:
                raise DeviceError(f"{len(turn.stop)} stop tokens; at most {MAX_STOP} are supported")
        context, p = runner.context, runner.params
        context.use()
        self.parts = parts = [_Part(place, turn) for place, turn in zip(self.places, turns, strict=False)]
        sequences = (SequenceStruct * len(parts))(*(part.struct(logits) for part in parts))
        self._sequences = sequences  # alive until the copy is done
        for part in parts:
            for address, values in part.inputs:
                context.copy_async(address, values.ctypes.data, values.nbytes)
        context.copy_async(p.sequences, ctypes.addressof(sequences), ctypes.sizeof(sequences))
        self.cancel[:] = 0
        p.sequence_count = len(parts)
        runner.start(sum(len(turn.tokens) - 1 + turn.count for turn in turns))

    def run(self, turns: Sequence[Turn], logits: int = 0) -> Generator[Made, None, None]:
        """One launch of turns, as `Runner.run`; see `launch`."""
        began = time.perf_counter()
        # NOTE: the kernel looks for cancellations after its first pass.
        numbers = [number for number, turn in enumerate(turns) if not turn.cancelled]
        if turns and not numbers:
            return
        self.launch([turns[number] for number in numbers], logits)
        parts, run = self.parts, self.runner.params.run
        ending, pace = self.runner.endings.next(), self.runner.pace
        pace.begin(min(ceil_div(len(part.turn.tokens), self.runner.plan.columns) for part in parts))
        for place, part in enumerate(parts):
            part.turn.on_cancel = partial(self._stop, run, place)
        try:
            while True:
                over = ending.over  # NOTE: before the look, so that no token is missed
                passes = 0  # that have made the tokens found now, at least
                for place, (number, part) in enumerate(zip(numbers, parts, strict=True)):
                    if part.turn.cancelled:  # perhaps before it could be told
                        self._stop(run, place)
                    seen = part.seen
                    while (token := part.next_token(run)) is not None:
                        yield part.take(number, token, time.perf_counter() - began)
                    passes = max(passes, part.seen - seen)
                if over:
                    break
                if passes:
                    pace.made(passes, max(part.turn.count - part.seen for part in parts))
                elif any(part.open or not part.seen for part in parts):
                    ending.wait(pace.next_look())
                else:  # it is about to end
                    ending.wait(SHORTEST)
        finally:
            for part in parts:
                part.turn.on_cancel = None
            self.cancel[: len(parts)] = 1
            self.runner.context.use()
            self.runner.finish()  # raises where the kernel gave up: then no position is in the cache for certain
            for part in parts:
                part.settle(run)

    def _stop(self, run: int, place: int) -> None:
        """End a sequence of a launch with its present token; from any thread."""
        if self.runner.params.run == run:
            self.cancel[place] = 1

    def scores(self, index: int) -> Scores:
        """Log probabilities of token number `index` of the first turn of the latest launch."""
        return self.parts[0].scores(index)


class _Place:
    """What the sequence with some number in a launch is told by, and tells by; claimed as it is first needed."""

    def __init__(self, columns: Columns, number: int) -> None:
        self.columns, self.number = columns, number
        self._device: dict[str, int] = {}
        self._pinned: dict[str, tuple[int, np.ndarray]] = {}

    def device(self, name: str, nbytes: int) -> int:
        """Address of device memory."""
        if name not in self._device:
            self._device[name] = self.columns.runner.context.allocate(nbytes, name)
        return self._device[name]

    def pinned(self, name: str, words: int) -> tuple[int, np.ndarray]:
        """Host memory that the device sees: its address, and its words of 8 bytes."""
        if name not in self._pinned:
            address, memory = self.columns.runner.context.allocate_pinned(8 * words, name, fill=0)
            self._pinned[name] = address, memory.view(np.uint64)
        return self._pinned[name]

    @property
    def cancel(self) -> int:
        """Address of its cancel flag."""
        return self.columns.cancel_address + 4 * self.number


class _Part:
    """A turn in a launch."""

    def __init__(self, place: _Place, turn: Turn) -> None:
        self.place, self.turn, self.seen = place, turn, 0
        self._ended = False
        plan, sampling = place.columns.runner.plan, turn.sampling
        vocab, positions = plan.config.vocab_size, plan.max_context + 1
        self._tokens_at, self._tokens = place.pinned("tokens", positions)
        self._alternatives = sampling.logprobs or 0
        forced, stop = np.array(turn.tokens, np.uint32), np.array(sorted(turn.stop) or [0], np.uint32)
        self.inputs = [(place.device("prompt", 4 * positions), forced), (place.device("stop tokens", 4 * MAX_STOP), stop)]
        self._pointers: dict[str, int] = {}
        for name, values in (("bias", sampling.bias), ("seen", sampling.seen)):
            if values is not None:
                self._pointers[name] = place.device(name, 4 * vocab)
                self.inputs.append((self._pointers[name], values))
        if sampling.flags & Flag.REPORTED:
            self._pointers["report"], report = place.pinned("log probabilities", positions * REPORT_WORDS)
            self._report = report.reshape(positions, REPORT_WORDS)
            self._report[: turn.count] = NOTHING

    def struct(self, logits: int) -> SequenceStruct:
        """What the kernel is told."""
        turn = self.turn
        (forced, _), (stop, _) = self.inputs[:2]
        return SequenceStruct(
            tokens=self._tokens_at, forced=forced, stop=stop, cancel=self.place.cancel, logits=logits,
            sampling=turn.sampling.struct(**self._pointers), forced_count=len(turn.tokens), drafts=turn.drafts,
            stop_count=len(turn.stop), slot=turn.slot, start=turn.start, count=turn.count,
        )  # fmt: skip

    @property
    def open(self) -> bool:
        """Whether another token is sure to come. Guesses may end it at any time."""
        return not (self._ended or self.turn.drafts or self.turn.cancelled or self.seen == self.turn.count)

    def next_token(self, run: int) -> int | None:
        """The next token that has been made, if there is one."""
        if self.seen == self.turn.count:
            return None
        word = int(self._tokens[self.seen])
        return word & 0xFFFFFFFF if word >> 32 == run else None

    def take(self, number: int, token: int, seconds: float) -> Made:
        """A token that has been made, by turn `number`."""
        turn, index = self.turn, self.seen
        self.seen += 1
        error = token_error(token, turn.start + len(turn.tokens) - turn.drafts + index)
        self._ended = error is not None or token in turn.stop
        scores = self.scores(index) if turn.sampling.logprobs is not None and not error else None
        return Made(number, token, seconds, scores, error)

    def settle(self, run: int) -> None:
        """After the launch: how many positions are in the cache for certain."""
        made = self.seen
        while made < self.turn.count and int(self._tokens[made]) >> 32 == run:  # which nobody has asked for
            made += 1
        self.turn.fed = len(self.turn.tokens) - self.turn.drafts + made - 1 if made else 0

    def scores(self, index: int) -> Scores:
        """Log probabilities of its token number `index`."""
        return await_report(self._report[index], self._alternatives, index)
