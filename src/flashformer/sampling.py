"""What a caller asks of a generation: how tokens are chosen and when the text ends."""

from __future__ import annotations

import math
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from .backends.sampling import MAX_LOGPROBS, PROMPT_BIT, Sampling
from .errors import InputError

# Beyond these, sums and quotients of logits would leave the range in which float32 tells likely tokens apart.
LEAST_TEMPERATURE = 1e-3  # besides 0
LARGEST_REPETITION = 1e3  # and the least is its inverse
LARGEST_ADDEND = 1e6
SEEDS = 1 << 64


@dataclass(frozen=True)
class SamplingParams:
    """What a caller asks of one generation. By default tokens are chosen greedily. Raises InputError for a value that makes no sense.

    max_tokens: most tokens to make. stop: texts that end the generation (they are not part of the result) or token ids that
    do. ignore_eos: go on after the model's own end-of-text tokens.

    A token is chosen in this order; all of it happens in the kernel, and it is exact:

    - logit_bias: {token id: what is added to its logit}. -inf bans a token; where some have inf, only those are allowed.
    - repetition_penalty (1: none) divides the positive logits of all tokens in prompt or answer by it, and multiplies the negative
      ones; frequency_penalty is subtracted as often as the answer has the token, presence_penalty once if it has it.
    - temperature divides the logits. 0 chooses the largest at once (the lowest id of equal ones), without the steps below.
    - top_k (0: all) keeps the k largest; top_p (1: all) the fewest of those whose probabilities reach p of their sum; min_p (0: all)
      those at least that likely relative to the most likely one. Tokens that tie with the last one kept are kept, too; top_p=0
      keeps the most likely.

    seed: the same seed and prompt give the same tokens from the same kernel, however they are cut into launches; None draws one.
    logprobs: report the log probability of each token and of this many of the most likely ones (at most 20), by the softmax of
    the logits as the model gives them, before all of the above.
    """

    max_tokens: int = 128
    stop: Sequence[str | int] = ()
    ignore_eos: bool = False
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None
    logprobs: int | None = None

    def __post_init__(self) -> None:
        if not _is_whole(self.max_tokens, 1):
            raise InputError(f"max_tokens is {self.max_tokens!r}; it must be a whole number, at least 1")
        if isinstance(self.stop, str):
            raise InputError(f"stop is the text {self.stop!r}; give a list of texts or token ids, such as [{self.stop!r}]")
        for stop in self.stop:
            if isinstance(stop, bool) or not isinstance(stop, str | int):
                raise InputError(f"stop holds {stop!r}, which is neither a text nor a token id")
            if stop == "":
                raise InputError("stop holds an empty text, which would end every generation before it begins")
        t = self.temperature
        if not _is_number(t) or t < 0 or 0 < t < LEAST_TEMPERATURE:
            raise InputError(f"temperature is {t!r}; it must be 0 (greedy) or a number from {LEAST_TEMPERATURE} on")
        if not _is_whole(self.top_k, 0):
            raise InputError(f"top_k is {self.top_k!r}; it must be a whole number, at least 1, or 0 for all")
        for name in ("top_p", "min_p"):
            value = getattr(self, name)
            if not _is_number(value) or not 0 <= value <= 1:
                raise InputError(f"{name} is {value!r}; it must be a number from 0 to 1")
        repetition, least = self.repetition_penalty, 1 / LARGEST_REPETITION
        if not _is_number(repetition) or not least <= repetition <= LARGEST_REPETITION:
            raise InputError(f"repetition_penalty is {repetition!r}; it must be a number from {least} to {LARGEST_REPETITION:g} (1: none)")
        for name in ("presence_penalty", "frequency_penalty"):
            value = getattr(self, name)
            if not _is_number(value) or abs(value) > LARGEST_ADDEND:
                raise InputError(f"{name} is {value!r}; it must be a number, at most {LARGEST_ADDEND:g} either way (0: none)")
        if not isinstance(self.logit_bias, Mapping):
            raise InputError(f"logit_bias is {self.logit_bias!r}; it must be a dictionary from token ids to numbers")
        for token, bias in self.logit_bias.items():
            fits = bias in (math.inf, -math.inf) or (_is_number(bias) and abs(bias) <= LARGEST_ADDEND)
            if not _is_whole(token, 0) or not fits:
                raise InputError(
                    f"logit_bias holds {token!r}: {bias!r}; it must be from token ids to numbers, at most {LARGEST_ADDEND:g} either way, "
                    "-inf to ban a token, or inf to allow only such tokens"
                )
        if self.seed is not None and (not _is_whole(self.seed, 0) or self.seed >= SEEDS):
            raise InputError(f"seed is {self.seed!r}; it must be a whole number from 0 to 2^64 - 1, or None")
        if self.logprobs is not None and (not _is_whole(self.logprobs, 0) or self.logprobs > MAX_LOGPROBS):
            raise InputError(f"logprobs is {self.logprobs!r}; it must be a whole number from 0 to {MAX_LOGPROBS}, or None")

    @property
    def stop_texts(self) -> tuple[str, ...]:
        """The texts of `stop`."""
        return tuple(s for s in self.stop if isinstance(s, str))

    @property
    def stop_ids(self) -> frozenset[int]:
        """The token ids of `stop`."""
        return frozenset(s for s in self.stop if isinstance(s, int))

    def lower(self, vocab_size: int, prompt: Sequence[int], generated: Sequence[int] = ()) -> Sampling:
        """What a runner is told for a prompt (token ids) and the answer so far, if a launch goes on with one.

        Raises InputError if logit_bias names a token outside the vocabulary, or allows none.
        """
        seen = None
        if self.repetition_penalty != 1 or self.presence_penalty or self.frequency_penalty:
            seen = np.bincount(np.asarray(generated, np.int64), minlength=vocab_size).astype(np.uint32)
            seen[np.asarray(prompt, np.int64)] |= np.uint32(PROMPT_BIT)
        return Sampling(
            temperature=self.temperature, top_k=self.top_k, top_p=self.top_p, min_p=self.min_p,
            repetition_penalty=self.repetition_penalty, presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty, seed=secrets.randbelow(SEEDS) if self.seed is None else self.seed,
            bias=self._bias(vocab_size) if self.logit_bias else None, seen=seen,
            logprobs=None if self.logprobs is None else min(self.logprobs, vocab_size),
        )  # fmt: skip

    def _bias(self, vocab_size: int) -> np.ndarray:
        """`logit_bias` for every token, float32 [vocab_size], without plus infinities."""
        if max(self.logit_bias) >= vocab_size:
            raise InputError(f"logit_bias names token {max(self.logit_bias)}; the vocabulary has {vocab_size}")
        only = [token for token, value in self.logit_bias.items() if value == math.inf]
        bias = np.full(vocab_size, -np.inf if only else 0, np.float32)
        for token, value in self.logit_bias.items():
            if value == math.inf or not only:
                bias[token] = 0 if only else value
        if np.isneginf(bias).all():
            raise InputError("logit_bias bans every token of the vocabulary; at least one must be allowed")
        return bias


def _is_number(value: object) -> bool:
    """A finite number."""
    return not isinstance(value, bool) and isinstance(value, int | float) and math.isfinite(value)


def _is_whole(value: object, least: int) -> bool:
    """An integer, not below `least`."""
    return not isinstance(value, bool) and isinstance(value, int) and value >= least


class StopMatcher:
    """Passes text on until one of `texts` appears, which may begin in one piece and end in another.

    Text that could be the beginning of a stop is held back until it is known not to be one.
    """

    def __init__(self, texts: Sequence[str]) -> None:
        self._texts = tuple(texts)
        self._held = ""
        self.stopped = False

    def push(self, piece: str) -> str:
        """Take a piece; returns what may be shown. Sets `stopped` once a stop is complete; what follows is dropped."""
        if self.stopped:
            return ""
        text = self._held + piece
        found = [at for at in (text.find(s) for s in self._texts) if at >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        keep = max((self._overlap(text, s) for s in self._texts), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def finish(self) -> str:
        """What is still held back when the generation ends."""
        held, self._held = self._held, ""
        return held

    @staticmethod
    def _overlap(text: str, stop: str) -> int:
        """Length of the longest end of `text` that `stop` begins with."""
        return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if stop.startswith(text[-n:])), 0)
