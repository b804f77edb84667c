"""A model with random weights: a checkpoint that lies nowhere. For benchmarks, and for checking the kernel that they time.

The device draws matrices by itself (`flashformer_random` in tools.cuh); what `read` returns on the host has the same bits.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import ml_dtypes
import numpy as np

from ...checkpoint import Checkpoint, TensorSpec
from ...config import ModelConfig
from ...errors import CheckpointError
from ...models import build_graph

if TYPE_CHECKING:
    from ...tokenizer import Tokenizer

BLOCK = 1 << 18  # values that are drawn together: their intermediates stay in the cache of a core
VECTOR_SCALE = np.float32(0.2)  # norm weights lie in 1 +- this, biases in 0 +- this


def draw(first: int, count: int, seed: int, scale: np.float32) -> np.ndarray:
    """Values first, first + 1, ... of the stream `seed`: bfloat16 [count], uniform in [-scale, scale).

    `flashformer_random` in tools.cuh does the same: a counter through an integer hash, so any part can be made alone.
    """
    out = np.empty(count, ml_dtypes.bfloat16)
    step = np.float32(scale) / np.float32(1 << 23)
    for at in range(0, count, BLOCK):
        n = np.arange(first + at, first + min(at + BLOCK, count), dtype=np.uint64)
        h = n.astype(np.uint32) * np.uint32(0x9E3779B1)
        h ^= (n >> np.uint64(32)).astype(np.uint32) * np.uint32(0x85EBCA77)
        h ^= np.uint32(seed)
        h ^= h >> np.uint32(16)
        h *= np.uint32(0x7FEB352D)
        h ^= h >> np.uint32(15)
        h *= np.uint32(0x846CA68B)
        h ^= h >> np.uint32(16)
        out[at : at + len(n)] = ((h >> np.uint32(8)).astype(np.int32) - np.int32(1 << 23)).astype(np.float32) * step
    return out


class RandomWeights(Checkpoint):
    """Weights of any configuration, bfloat16, uniform; matrices are scaled so that activations stay of order one."""

    def __init__(self, config: ModelConfig, seed: int = 1) -> None:
        self.path, self.config, self.seed = Path("random weights"), config, seed
        self._weights = build_graph(config).weights()

    def names(self) -> Sequence[str]:
        """See `Checkpoint.names`."""
        return list(self._weights)

    def spec(self, name: str) -> TensorSpec:
        """See `Checkpoint.spec`."""
        if name not in self._weights:
            raise CheckpointError(f"random weights: this model has no tensor {name}")
        shape = self._weights[name].shape
        return TensorSpec(name, shape, "bfloat16", 2 * int(np.prod(shape)))

    def stream(self, name: str) -> tuple[int, np.float32]:
        """(seed, scale) with which the values of a tensor are drawn."""
        shape = self.spec(name).shape
        scale = np.float32(np.sqrt(3.0 / shape[1])) if len(shape) == 2 else VECTOR_SCALE
        return zlib.crc32(name.encode()) ^ self.seed, scale

    def read(self, name: str, rows: slice | None = None) -> np.ndarray:
        """See `Checkpoint.read`; drawn anew each time."""
        shape = self.spec(name).shape
        first, last, _ = (rows or slice(None)).indices(shape[0])
        width = int(np.prod(shape[1:]))
        values = draw(first * width, max(last - first, 0) * width, *self.stream(name)).reshape(-1, *shape[1:])
        if len(shape) == 1 and not name.endswith(".bias"):
            values = (values.astype(np.float32) + np.float32(1)).astype(ml_dtypes.bfloat16)
        return values

    def tokenizer(self) -> Tokenizer:
        """Raises CheckpointError: there is none."""
        raise CheckpointError("random weights have no tokenizer")

    def close(self) -> None:
        """Nothing to let go of."""
