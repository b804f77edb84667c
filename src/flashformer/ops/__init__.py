"""Operators: one stem each, with its reference (`.py`), its CUDA code (`.cuh`) and its CPU code (`.h`).

A reference works on a block of consecutive positions at a time: values are arrays [positions, size] of one floating-point type.
`attention` alone looks back: it keeps keys and values of earlier positions in `State`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache

import numpy as np

from ..config import ModelConfig
from ..graph import Operator
from ..plan import KvType


@dataclass
class State:
    """What a sequence leaves behind for its later positions, and where it is."""

    config: ModelConfig
    kv_type: KvType = "native"  # what the cache keeps of keys and values
    start: int = 0  # position of the first row of the block
    keys: dict[int, np.ndarray] = field(default_factory=dict)  # by layer: [positions, kv_heads, head_dim]
    values: dict[int, np.ndarray] = field(default_factory=dict)


# (operator, its inputs, its weights, state) -> its output
ReferenceFunction = Callable[[Operator, Sequence[np.ndarray], Sequence[np.ndarray], State], np.ndarray]


@cache
def reference_of(kind: str) -> ReferenceFunction:
    """The reference of an operator by its kind: `reference` in the file of that name."""
    function: ReferenceFunction = importlib.import_module(f"{__name__}.{kind}").reference
    return function
