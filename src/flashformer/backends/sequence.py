"""A sequence's part of a launch: what both backends tell their kernels of it, and which turns they refuse."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

from ..errors import DeviceError
from ..plan import Plan
from . import Turn
from .sampling import SamplingStruct
from .source import Field

# A backend puts its own fields, all of 8 bytes, in front.
SEQUENCE: tuple[Field, ...] = (
    ("forced", "const u32*", ctypes.c_uint64, "[forced_count] tokens to be fed"),
    ("stop", "const u32*", ctypes.c_uint64, "[stop_count] tokens that end it"),
    ("cancel", "const u32*", ctypes.c_uint64, "the host writes 1 to end it"),
    ("logits", "float*", ctypes.c_uint64, "[forced_count][vocab], or null"),
    ("sampling", "Sampling", SamplingStruct, "how tokens are chosen"),
    ("forced_count", "u32", ctypes.c_uint32, ""),
    ("drafts", "u32", ctypes.c_uint32, "of the forced tokens, the last ones"),
    ("stop_count", "u32", ctypes.c_uint32, ""),
    ("slot", "u32", ctypes.c_uint32, "of the KV cache"),
    ("start", "u32", ctypes.c_uint32, "position of the first token"),
    ("count", "u32", ctypes.c_uint32, "tokens to make"),
)


def check_slots(turns: Sequence[Turn], slots: int) -> None:
    """Raise DeviceError for slots that are not there or not different."""
    theirs = [turn.slot for turn in turns]
    if not turns or len(set(theirs)) < len(theirs) or not 0 <= min(theirs) <= max(theirs) < slots:
        raise DeviceError(f"turns need slots of their own out of {slots}, not {theirs}")


def check_turns(turns: Sequence[Turn], plan: Plan) -> None:
    """Raise DeviceError for turns that a kernel of `plan` could not take."""
    room, vocab = plan.max_context, plan.config.vocab_size
    if not turns:
        raise DeviceError("a launch needs at least one turn")
    check_slots(turns, plan.slots)
    for turn in turns:
        tokens, start, count = turn.tokens, turn.start, turn.count
        # A draft that is right is one of the tokens to make.
        steps = len(tokens) - 1 + max(count - turn.drafts, 1)
        if not tokens or count < 1 or start < 0 or start + steps > room or not 0 <= turn.drafts < len(tokens):
            raise DeviceError(f"{len(tokens)} tokens at position {start} and {count} more do not fit into {room} positions")
        if not 0 <= min(tokens) <= max(tokens) < vocab:
            raise DeviceError(f"token ids from {min(tokens)} to {max(tokens)} are outside the vocabulary of {vocab}")
