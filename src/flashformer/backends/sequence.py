"""A sequence's part of a launch, as kernels of several columns are told of it: what both backends have alike."""

from __future__ import annotations

import ctypes

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
