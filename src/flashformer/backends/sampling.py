"""How a launch chooses its tokens: what both backends are told for one sequence, and what they tell of a token's log probability."""

from __future__ import annotations

import ctypes
import enum
import math
import time
from dataclasses import dataclass

import numpy as np

from ..errors import DeviceError, ScoreError
from .source import Field, ctypes_fields

MAX_LOGPROBS = 20  # alternatives of a token at most, kMostReported in sampling.hpp
REPORT_WORDS = 2 + MAX_LOGPROBS  # of 8 bytes, kReportWords
MASS_BITS = 36  # a probability mass of 1 relative to the likeliest token is 2^36, kMassBits
REPORT_SECONDS = 3.0  # that log probabilities may arrive after their token
NOTHING = 0xFFFFFFFFFFFFFFFF  # a word of a report that is not there yet, kNothing
NOT_FINITE, NONE_ALLOWED = 0xFFFFFFFF, 0xFFFFFFFE  # in the place of a token, as in sampling.hpp
PROMPT_BIT = 1 << 31  # of a word of `Sampling.seen`, kPromptBit

# What a sequence's tokens are chosen by. The order of the fields leaves no padding.
SAMPLING: tuple[Field, ...] = (
    ("bias", "const float*", ctypes.c_uint64, "[vocab] added to the logits (kBiased)"),
    ("seen", "u32*", ctypes.c_uint64, "[vocab] kPromptBit | how often it was generated (kPenalised)"),
    ("raw", "float*", ctypes.c_uint64, "[vocab] logits as the model gives them (kReported)"),
    ("scores", "float*", ctypes.c_uint64, "[vocab] logits after bias and penalties; GPU: [vocab] (logit, score) (kSelected)"),
    ("report", "u64*", ctypes.c_uint64, "host: [tokens][kReportWords] (kReported)"),
    ("seed", "u64", ctypes.c_uint64, ""),
    ("flags", "u32", ctypes.c_uint32, "of SamplingFlag"),
    ("top_k", "u32", ctypes.c_uint32, ""),
    ("top_p", "u32", ctypes.c_uint32, "in units of 2^-32"),
    ("reported", "u32", ctypes.c_uint32, "alternatives of each token whose log probability is wanted"),
    ("inverse_temperature", "float", ctypes.c_float, ""),
    ("mass_scale", "float", ctypes.c_float, "log2(e) / temperature"),
    ("min_p_margin", "float", ctypes.c_float, "temperature * ln(min_p): what may be missing to the largest logit"),
    ("repetition", "float", ctypes.c_float, ""),
    ("presence", "float", ctypes.c_float, ""),
    ("frequency", "float", ctypes.c_float, ""),
)


class SamplingStruct(ctypes.Structure):
    """`Sampling` of the generated sources."""

    _fields_ = ctypes_fields(SAMPLING)


class Flag(enum.IntFlag):
    """What is used, `SamplingFlag` in sampling.hpp: what is not costs nothing."""

    BIASED = 1
    PENALISED = 2
    SAMPLED = 4
    TOP_K = 8
    TOP_P = 16
    MIN_P = 32
    REPORTED = 64


@dataclass(frozen=True)
class Sampling:
    """What `SamplingParams` come to for one prompt and one vocabulary. The default is greedy."""

    temperature: float = 0.0
    top_k: int = 0  # 0: not used
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int = 0
    bias: np.ndarray | None = None  # float32 [vocab]
    seen: np.ndarray | None = None  # uint32 [vocab]: PROMPT_BIT, and how often each token was generated; None without penalties
    logprobs: int | None = None  # alternatives to report for each token; None: nothing is reported

    @property
    def flags(self) -> Flag:
        """What of it a launch uses: at temperature 0 the most likely token is in every selection."""
        used = [
            (Flag.BIASED, self.bias is not None),
            (Flag.PENALISED, self.seen is not None),
            (Flag.SAMPLED, self.temperature > 0),
            (Flag.TOP_K, self.temperature > 0 and self.top_k > 0),
            (Flag.TOP_P, self.temperature > 0 and self.top_p < 1),
            (Flag.MIN_P, self.temperature > 0 and self.min_p > 0),
            (Flag.REPORTED, self.logprobs is not None),
        ]
        return Flag(sum(flag for flag, on in used if on))

    def struct(self, **pointers: int) -> SamplingStruct:
        """The numbers as the kernels take them, with the addresses of bias, seen, raw, scores and report."""
        return SamplingStruct(
            **pointers,
            seed=self.seed, flags=self.flags, top_k=self.top_k, top_p=min(round(self.top_p * 2**32), 2**32 - 1),
            reported=self.logprobs or 0,
            inverse_temperature=1 / self.temperature if self.temperature else 0.0,
            mass_scale=math.log2(math.e) / self.temperature if self.temperature else 0.0,
            min_p_margin=self.temperature * math.log(self.min_p) if self.min_p else 0.0,
            repetition=self.repetition_penalty, presence=self.presence_penalty, frequency=self.frequency_penalty,
        )  # fmt: skip


@dataclass(frozen=True)
class Scores:
    """Log probabilities, of the softmax of the logits as the model gives them: before bias, penalties, temperature and selection."""

    logprob: float  # of the token that was chosen
    top: tuple[tuple[int, float], ...]  # (token, log probability) of the most likely ones, best first, of equal ones the lower id


def read_report(words: np.ndarray, alternatives: int) -> Scores:
    """What the uint64 [REPORT_WORDS] of one token say (see kReportWords in sampling.hpp)."""
    largest, chosen = (float(x) for x in words[1:2].view(np.float32)[::-1])
    scale = largest + math.log(int(words[0])) - MASS_BITS * math.log(2)
    ranked = words[2 : 2 + alternatives]
    order = (ranked >> np.uint64(32)).astype(np.uint32)
    bits = np.where(order & np.uint32(1 << 31), order, order ^ np.uint32(0x7FFFFFFF)).astype(np.uint32)
    tokens = (ranked & np.uint64(0xFFFFFFFF)).tolist()
    return Scores(chosen - scale, tuple((token, float(x) - scale) for token, x in zip(tokens, bits.view(np.float32), strict=True)))


def await_report(words: np.ndarray, alternatives: int, index: int) -> Scores:
    """`read_report` of token number `index`, which has been made, once all of it has arrived. Raises DeviceError if it does not."""
    deadline = time.perf_counter() + REPORT_SECONDS
    while (words[: 2 + alternatives] == NOTHING).any():  # they are on their way
        if time.perf_counter() > deadline:
            raise DeviceError(f"the log probabilities of token {index} did not come within {REPORT_SECONDS:g} s")
    return read_report(words, alternatives)


def checked_token(token: int, position: int) -> int:
    """The token that was made at `position`. Raises ScoreError for what stands in its place where none could be chosen."""
    if error := token_error(token, position):
        raise error
    return token


def token_error(token: int, position: int) -> ScoreError | None:
    """What is wrong where no token could be chosen at `position`; None if it is a token."""
    if token == NOT_FINITE:
        return ScoreError(
            f"the model's scores for position {position} are not finite (NaN or infinite), so there is no token to choose: "
            "its weights are damaged, or its values exceed the range of their type"
        )
    if token == NONE_ALLOWED:
        return ScoreError(f"at position {position} no token is allowed: all have the score minus infinity; see logit_bias")
    return None
