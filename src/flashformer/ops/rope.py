"""Rotary position embeddings (arXiv 2104.09864), in the half-split form of Hugging Face: value i turns with i + head_dim / 2."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..config import ModelConfig
from ..graph import Operator
from . import State

BLOCK = 8192  # positions whose angles are computed at a time


def rope_frequencies(config: ModelConfig) -> np.ndarray:
    """Radians a position of each pair, float64 [head_dim / 2], with the model's scaling.

    `linear` divides by the factor. `llama3` is the rule of Llama 3.1: wavelengths longer than the original context over
    low_freq_factor are divided, those shorter than it over high_freq_factor stay, those between are interpolated.
    """
    frequencies = config.rope_theta ** (-np.arange(0, config.head_dim, 2, dtype=np.float64) / config.head_dim)
    scaling = config.rope_scaling
    if scaling is None:
        return frequencies
    if scaling.kind == "linear":
        return frequencies / scaling.factor
    turns = scaling.original_max_positions * frequencies / (2 * np.pi)  # over the original context
    smooth = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    smooth = np.clip(smooth, 0.0, 1.0)
    return frequencies * (smooth + (1 - smooth) / scaling.factor)


def rope_table(config: ModelConfig, positions: int) -> np.ndarray:
    """(cos, sin) of every angle, float32 [positions, head_dim / 2, 2]; the angles are computed in float64."""
    frequencies = rope_frequencies(config)
    table = np.empty((positions, len(frequencies), 2), np.float32)
    for first in range(0, positions, BLOCK):
        angles = np.arange(first, min(first + BLOCK, positions), dtype=np.float64)[:, None] * frequencies
        table[first : first + BLOCK, :, 0] = np.cos(angles)
        table[first : first + BLOCK, :, 1] = np.sin(angles)
    return table


def reference(op: Operator, inputs: Sequence[np.ndarray], weights: Sequence[np.ndarray], state: State) -> np.ndarray:
    """Turn each head of each position by its angles."""
    x = inputs[0]
    heads = x.reshape(len(x), -1, op.attributes["head_dim"])
    angles = np.arange(state.start, state.start + len(x), dtype=np.float64)[:, None] * rope_frequencies(state.config)
    cos, sin = np.cos(angles).astype(x.dtype)[:, None], np.sin(angles).astype(x.dtype)[:, None]
    low, high = np.split(heads, 2, axis=-1)
    return np.concatenate((low * cos - high * sin, high * cos + low * sin), axis=-1).reshape(x.shape)
