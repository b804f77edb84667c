"""A backend turns a plan and a checkpoint into a `Runner`: one call is one launch of the whole-model kernel."""

from __future__ import annotations

from collections.abc import Callable, Collection, Generator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from .sampling import Sampling, Scores

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


class Runner(Protocol):
    """A model in memory, ready to run. Positions before `start` must have been computed by earlier calls on this runner."""

    stats: RunStats

    def generate(
        self, tokens: Sequence[int], start: int, count: int, stop: Collection[int], sampling: Sampling = GREEDY
    ) -> Generator[int, None, None]:
        """Feed `tokens` (at least one) at positions start, start + 1, ...; then yield up to `count` tokens as they are made,
        chosen as `sampling` says. A token of `stop` is yielded too and ends the launch. Closing the iterator early stops the kernel.

        Raises DeviceError where logits are not finite or no token is allowed, naming the position."""
        ...

    def scores(self, index: int) -> Scores:
        """Log probabilities of the token that the present or last `generate` yielded as number `index`, if its sampling asked for them."""
        ...

    def logits(self, tokens: Sequence[int], start: int) -> np.ndarray:
        """Teacher-forced logits, float32 [len(tokens), vocab_size]."""
        ...

    def read_bandwidth(self) -> float:
        """What a plain read of memory reaches on this device now, in GB/s: the ceiling to compare with."""
        ...

    def close(self) -> None:
        """Free everything; safe to call twice."""
        ...
