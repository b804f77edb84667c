"""Activations of a calibration text, carried through the model operator by operator as its weights are quantised.

So every matrix sees the inputs that it will see in the quantised model. Only values that are still needed are kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ..config import ModelConfig
from ..errors import InputError
from ..graph import Graph, Operator
from ..ops import State, reference_of
from ..tokenizer import Tokenizer

WINDOW = 512  # tokens that see each other
WINDOWS = 32
_CHARACTERS = 8  # of the text for each token: more than a token of ordinary text has


def read_text(path: Path) -> str:
    """A text file. Raises InputError if it cannot be read, is not UTF-8, or is empty."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read as text ({error})") from error
    if not text.strip():
        raise InputError(f"{path}: holds no text")
    return text


def sample_windows(text: str, tokenizer: Tokenizer, config: ModelConfig) -> list[np.ndarray]:
    """Token ids of windows spread evenly over a text, each int64 [at most WINDOW]. Raises InputError for foreign token ids."""
    length = min(WINDOW, config.max_positions)
    span = length * _CHARACTERS
    count = min(WINDOWS, -(-len(text) // span))
    starts = [i * (len(text) - span) // max(count - 1, 1) for i in range(count)] if count > 1 else [0]
    windows = [np.array(tokenizer.encode(text[start : start + span])[:length]) for start in starts]
    if max(int(window.max()) for window in windows) >= config.vocab_size:
        raise InputError("the tokenizer gives ids outside the model's vocabulary; calibration is not possible")
    return windows


class Activations:
    """The live values of a graph for each window, float32 [tokens, size]; operators must be run in the graph's order."""

    def __init__(self, graph: Graph, config: ModelConfig, windows: Sequence[np.ndarray]) -> None:
        self._states = [State(config) for _ in windows]
        self._values: dict[str, list[np.ndarray]] = {"token": list(windows)}
        self._last_use = {name: op.output for op in graph.operators for name in op.inputs}

    def moments(self, name: str) -> np.ndarray:
        """Sum of x x^T over all tokens of a live value x, float32 [size, size]."""
        first, *others = self._values[name]
        total = first.T @ first
        for x in others:
            total += x.T @ x
        return total

    def run(self, op: Operator, weights: Sequence[np.ndarray]) -> None:
        """Compute one operator; values that nothing reads afterwards are dropped."""
        outputs = []
        for i, state in enumerate(self._states):
            inputs = [self._values[name][i] for name in op.inputs]
            outputs.append(reference_of(op.kind)(op, inputs, weights, state).astype(np.float32, copy=False))
            for name in op.inputs:
                if self._last_use[name] == op.output:
                    self._values[name][i] = outputs[-1][:0]
            state.keys.clear()  # a window is run in one go
            state.values.clear()
        self._values[op.output] = outputs
