"""Many generations on one runner: who has which slot, what each launch does, and where its tokens go.

A thread drives the runner while there is something to do. Requests are admitted in their order as slots become free. A launch goes on
as long as nothing changes; whoever comes or leaves ends it with its present token, and the next one has the others as they are.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from queue import SimpleQueue
from typing import TYPE_CHECKING, Literal

import numpy as np

from .backends import Made, Runner, RunStats, Turn
from .backends.sampling import Sampling
from .errors import DeviceError, InputError
from .plan import Plan
from .sampling import SamplingParams, StopMatcher

if TYPE_CHECKING:
    from .speculate import Speculation
    from .tokenizer import StreamDecoder

WORTH_COPYING = 16  # positions that another slot has in common with a prompt, beyond those that its own has


@dataclass(frozen=True)
class Result:
    """One token of a generation and the text that it completes (often none, in the middle of a character).

    finish: None while the text goes on; "stop" with the last token if the model or a stop ended it, "length" if a limit did.
    logprob, top_logprobs: where `SamplingParams.logprobs` asks for them, the token's log probability, and (token id, log probability)
    of the most likely ones, best first; else None. error: of a list of prompts, why this one ended, with "error" as its finish and -1
    as its token.
    """

    token: int
    text: str
    finish: Literal["stop", "length", "error"] | None = None
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] | None = None
    error: Exception | None = None


@dataclass(frozen=True)
class End:
    """Nothing more comes of a request; error: why, if that is not as it should be."""

    error: BaseException | None = None


class Request:
    """A generation: what is asked, how far it is, and its results, which `tell` hands on from the scheduler's thread."""

    def __init__(
        self, ids: list[int], params: SamplingParams, sampling: Sampling, stop: frozenset[int], count: int, decoder: StreamDecoder | None,
        speculation: Speculation | None = None,
    ) -> None:  # fmt: skip
        """`count` tokens at most; `decoder` makes them text, None where there is no tokenizer."""
        self.tokens = list(ids)  # prompt and answer
        self.prompt = len(ids)  # tokens of it
        self.sampling, self.stop, self.count = sampling, stop, count
        self.speculation = speculation
        self.stats = RunStats(prompt_tokens=len(ids))
        self.results: SimpleQueue[Result | End] = SimpleQueue()
        self.tell: Callable[[Result | End], None] = self.results.put
        self.slot = -1
        self.position = 0  # tokens whose KV entries are certain
        self.over = False  # no more results come
        self.failed = False  # by its scores
        self.cancelled = False
        self.ended = threading.Event()  # it has no slot any more
        self._made = 0
        self._decoder, self._matcher = decoder, StopMatcher(params.stop_texts)
        self._began = time.perf_counter()

    def admit(self, slot: int, start: int) -> None:
        """It has a slot whose first `start` positions are its own."""
        self.slot, self.position = slot, start
        self.stats.reused_tokens, self.stats.prompt_tokens = start, len(self.tokens) - start
        self._began = time.perf_counter()

    @property
    def left(self) -> int:
        """Tokens that it may still make."""
        return self.count - self._made

    def turn(self, drafts: Sequence[int], passes: int | None) -> Turn:
        """Its part of the next launch: so many passes, None for as many as there are to do."""
        fed = [*self.tokens[self.position :], *drafts]
        count = self.left if passes is None else min(self.left, len(drafts) + passes)
        return Turn(self.slot, fed, self.position, count, self.stop, self.sampling, len(drafts), again=self._made > 0)

    def take(self, made: Made, drafted: bool, again: bool, nbytes: int) -> None:
        """A token that it has made becomes a result.

        drafted: its pass had drafts. again: one before it came of the same launch. nbytes: read by a pass for it.
        """
        if made.error:
            self.failed = True
            self.end(made.error)
            return
        now, token, stats = time.perf_counter() - self._began, made.token, self.stats
        self._made += 1
        if self._made == 1:
            stats.prompt_seconds = now
        elif not (drafted and again):
            stats.bytes_read += nbytes
        stats.accepted += drafted and again
        stats.generated_tokens, stats.generate_seconds = self._made, now - stats.prompt_seconds
        self.tokens.append(token)
        if self.sampling.seen is not None:
            self.sampling.seen[token] += 1
        self.tell(self._result(made))

    def end(self, error: BaseException | None = None) -> None:
        """Nothing more comes."""
        if not self.over:
            self.over = True
            self.tell(End(error))

    def _result(self, made: Made) -> Result:
        token, decoder, matcher = made.token, self._decoder, self._matcher
        last = token in self.stop or self._made == self.count
        text = ""
        if decoder is not None and token not in self.stop:
            text = matcher.push(decoder.push(token))
        if decoder is not None and last:
            text += matcher.push(decoder.finish()) + matcher.finish()
        logprobs = (made.scores.logprob, made.scores.top) if made.scores else (None, None)
        self.over = last or matcher.stopped
        finish: Literal["stop", "length"] = "stop" if matcher.stopped or token in self.stop else "length"
        return Result(token, text, finish if self.over else None, *logprobs)


class LogitsRequest:
    """Teacher-forced logits of a whole text; `outcome` gets them, or what went wrong."""

    def __init__(self, ids: list[int]) -> None:
        self.ids = ids
        self.outcome: SimpleQueue[np.ndarray | BaseException] = SimpleQueue()


class Scheduler:
    """Serves requests on a runner, up to its number of slots at a time. Methods may be called from any thread."""

    def __init__(self, plan: Plan, runner: Runner) -> None:
        self.plan, self.runner = plan, runner
        self.stats = RunStats()  # of the request that ended last
        self.cached: list[list[int]] = [[] for _ in range(runner.slots)]  # tokens of each slot whose KV entries are certain
        self._fed_by = [0] * runner.slots  # `Runner.feeder` of these
        # Of all that follows. NOTE: whoever holds it may meet a forgotten generation, which the garbage collector ends.
        self._lock = threading.RLock()
        self._free = list(range(runner.slots))  # the one that was used least recently first
        self._waiting: deque[Request | LogitsRequest] = deque()
        self._active: list[Request] = []
        self._turns: list[Turn] = []  # of the present launch
        self._changed = False  # something has, since requests were admitted
        self._weight_bytes = plan.weight_bytes()
        self._thread: threading.Thread | None = None
        self._closed = False

    def submit(self, *requests: Request | LogitsRequest) -> None:
        """Serve requests when their time comes. Raises InputError after `close`."""
        with self._lock:
            if self._closed:
                raise InputError("this engine has been closed")
            self._waiting += requests
            if self._thread is None:
                self._thread = threading.Thread(target=self._drive, name="flashformer", daemon=True)
                self._thread.start()
            elif self._free or any(active.over for active in self._active):
                self._interrupt()

    def cancel(self, request: Request) -> None:
        """End a request, wherever it is, and wait until it has let go of its slot: for the present token at most."""
        with self._lock:
            request.cancelled = True
            if request in self._waiting:
                self._waiting.remove(request)
                _leave(request)
            elif request in self._active:
                self._interrupt()
            else:  # it was never submitted, or has ended
                return
        if threading.current_thread() is not self._thread:
            request.ended.wait()

    def close(self) -> None:
        """End every request and wait until nothing runs; safe to call twice."""
        with self._lock:
            self._closed = True
            while self._waiting:
                _leave(self._waiting.popleft(), InputError("this engine has been closed"))
            for request in self._active:
                request.cancelled = True
            self._interrupt()
            thread = self._thread
        if thread is not None:
            thread.join()

    def _interrupt(self) -> None:
        """End the present launch with the tokens that are being made."""
        self._changed = True
        for turn in self._turns:
            turn.cancel()

    def _drive(self) -> None:
        """The thread: one launch after another, until there is nothing to do."""
        while True:
            with self._lock:
                self._settle([request for request in self._active if request.cancelled], [], None)  # between two launches
                self._changed = False
                scored = self._admit()
                active = list(self._active)
                if not scored and not active:
                    self._thread = None
                    return
            turns: list[Turn] = []
            error: BaseException | None = None
            try:
                for slot, request in scored:
                    self._score(slot, request)
                if active and not scored:
                    turns = self._lay_turns(active)
                    with self._lock:
                        self._turns = turns
                        if self._changed:
                            self._interrupt()
                    self._launch(active, turns)
            except BaseException as failure:  # NOTE: whatever it is, those who wait for results must hear of it
                error = failure
            with self._lock:
                self._turns = []
                self._free += [slot for slot, _ in scored]
                self._settle(active, turns, error)

    def _admit(self) -> list[tuple[int, LogitsRequest]]:
        """Give free slots to those who wait, in their order; returns whose logits are to be computed, and where."""
        scored = []
        while self._waiting and self._free:
            request = self._waiting.popleft()
            if isinstance(request, LogitsRequest):
                scored.append((self._free.pop(0), request))
                continue
            try:
                request.admit(*self._place(request.tokens))
            except Exception as error:
                _leave(request, error)
            else:
                self._active.append(request)
        return scored

    def _place(self, ids: list[int]) -> tuple[int, int]:
        """Take the free slot whose cache begins most like `ids`, or to which most can be copied: it, and how many positions are right.

        What another kernel has fed is not right.
        """
        feeder = self.runner.feeder(len(ids))
        common = [  # the last token has the answer
            min(common_length(cached, ids), len(ids) - 1) if by == feeder else 0
            for cached, by in zip(self.cached, self._fed_by, strict=True)
        ]
        slot = max(self._free, key=lambda free: common[free])
        donor = max(range(len(common)), key=lambda other: common[other])
        start = common[slot]
        if common[donor] >= start + WORTH_COPYING:
            self.cached[slot] = []
            start = common[donor]
            self.runner.copy(donor, slot, start)
        self._free.remove(slot)
        self.cached[slot], self._fed_by[slot] = ids[:start], feeder
        return slot, start

    def _lay_turns(self, active: Sequence[Request]) -> list[Turn]:
        """The next launch: as long as nothing changes, or one pass where somebody has drafts."""
        room = self.runner.columns // len(active) - 1
        plans = [r.speculation.plan(r.slot, r.tokens, min(room, r.left - 1), r.sampling) if r.speculation else None for r in active]
        wishes = [plan.passes for plan in plans if plan]
        passes = min(wishes) if wishes else None
        return [request.turn(plan.drafts if plan else (), passes) for request, plan in zip(active, plans, strict=True)]

    def _launch(self, active: Sequence[Request], turns: Sequence[Turn]) -> None:
        """Run turns, and hand on their tokens."""
        kv, layers = self.plan.kv, self.plan.config.num_layers
        counts = [0] * len(turns)
        with closing(self.runner.run(turns)) as tokens:
            for made in tokens:
                request, turn = active[made.turn], turns[made.turn]
                if request.over or request.cancelled:
                    continue
                counts[made.turn] += 1
                self.stats = request.stats
                nbytes = self._weight_bytes + layers * kv.bytes_read(len(request.tokens) - 1)
                request.take(made, turn.drafts > 0, counts[made.turn] > 1, nbytes)
                if request.over:
                    turn.cancel()
                    with self._lock:
                        if self._waiting:
                            self._interrupt()
        if not any(counts) and not self._changed:
            raise DeviceError("the kernel has ended without a token; please report this with the model's configuration")
        for request, turn, count in zip(active, turns, counts, strict=True):
            request.stats.drafted += turn.drafts
            if request.speculation and count and not request.failed:
                request.speculation.learn(turn, count)
                request.stats.speedup = request.speculation.speedup

    def _score(self, slot: int, request: LogitsRequest) -> None:
        """Compute logits in a slot that is free."""
        self.cached[slot] = []
        try:
            scores = self.runner.logits(request.ids, 0, slot)
        except BaseException as error:
            request.outcome.put(error)
        else:
            self.cached[slot] = [] if self.plan.prompt_columns else request.ids
            request.outcome.put(scores)

    def _reusable(self, request: Request) -> int:
        """How many positions of its slot another text may begin with, and have the same bits as if it had been fed anew.

        A kernel for prompts sums in another order than the one that makes answers, and feeds all of a prompt but its last token.
        """
        return min(request.position, request.prompt - 1) if self.plan.prompt_columns else request.position

    def _settle(self, active: Sequence[Request], turns: Sequence[Turn], error: BaseException | None) -> None:
        """After a launch: what the caches hold, and who leaves."""
        for number, request in enumerate(active):
            if turns:
                request.position = turns[number].start + turns[number].fed
                # Nobody knows what a kernel that failed has written.
                self.cached[request.slot] = [] if error or request.failed else request.tokens[: self._reusable(request)]
            if error or request.cancelled or request.over:
                self._active = [other for other in self._active if other is not request]
                self._free.append(request.slot)
                _leave(request, error)


def _leave(request: Request | LogitsRequest, error: BaseException | None = None) -> None:
    """Nothing more comes of a request."""
    if isinstance(request, LogitsRequest):
        request.outcome.put(error or InputError("this engine has been closed"))
    else:
        request.end(error)
        request.ended.set()


def common_length(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens `a` and `b` begin with in common."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
