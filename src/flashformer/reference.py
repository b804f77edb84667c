"""What is right: a plain executor of a model's graph in float32 or float64."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from .checkpoint import Checkpoint
from .graph import Graph, Operator, Weight
from .ops import State, reference_of
from .plan import KvType

BLOCK = 512  # positions that go through a layer together
CACHE_BYTES = 2 << 30  # models whose converted weights fit into this are converted once


class Reference:
    """Runs a graph on the weights of a checkpoint, operator by operator. One sequence; positions in order."""

    def __init__(self, graph: Graph, checkpoint: Checkpoint, dtype: Any = np.float32, kv_type: KvType = "native") -> None:
        """`dtype` is np.float32 or np.float64. Weights are converted as they are used, and kept only if they are few.

        kv_type: keys and values are rounded as a cache of that type rounds them; "native" keeps them as they are.
        """
        self.graph, self.checkpoint, self.dtype = graph, checkpoint, np.dtype(dtype)
        self.state = State(checkpoint.config, kv_type)
        total = sum(int(np.prod(w.shape)) for w in graph.weights().values()) * self.dtype.itemsize
        self._kept: dict[str, np.ndarray] | None = {} if total <= CACHE_BYTES else None
        self._last_use = {value: i for i, op in enumerate(graph.operators) for value in op.inputs}
        self._last_attention = max(i for i, op in enumerate(graph.operators) if op.kind == "attention")

    def logits(self, tokens: Sequence[int], start: int = 0, last: int | None = None) -> np.ndarray:
        """Scores of the token after each of `tokens`, [len(tokens), vocab], or after the `last` of them.

        `tokens` are at positions start, start + 1, ...; earlier ones must have been given by earlier calls.
        """
        wanted = len(tokens) if last is None else last
        out = np.empty((wanted, self.checkpoint.config.vocab_size), self.dtype)
        for first in range(0, len(tokens), BLOCK):
            part = np.asarray(tokens[first : first + BLOCK])
            skipped = min(max(len(tokens) - wanted - first, 0), len(part))  # positions of the block whose logits are not wanted
            at = first + skipped - (len(tokens) - wanted)
            self._run(part, start + first, out[at : at + len(part) - skipped])
        return out

    def generate(self, tokens: Sequence[int], count: int) -> list[int]:
        """`count` greedy tokens after a prompt."""
        out = [int(self.logits(tokens, last=1)[0].argmax())]
        while len(out) < count:
            out.append(int(self.logits(out[-1:], len(tokens) + len(out) - 1)[0].argmax()))
        return out

    def _run(self, tokens: np.ndarray, start: int, out: np.ndarray) -> None:
        """One block of positions; the logits of its last len(out) positions go to `out`."""
        self.state.start = start
        values: dict[str, np.ndarray] = {"token": tokens}
        *body, head, _ = self.graph.operators
        for index, op in enumerate(body):
            if index == self._last_attention:  # of the other positions nothing but keys and values is needed from here on
                values = {name: x if name in op.inputs[1:] else x[len(tokens) - len(out) :] for name, x in values.items()}
            inputs = [values[name] for name in op.inputs]
            values[op.output] = reference_of(op.kind)(op, inputs, self._weights(op), self.state)
            for name in op.inputs:
                if self._last_use[name] == index:
                    values.pop(name, None)
            if index == self._last_attention and not len(out):
                return
        out[:] = reference_of(head.kind)(head, [values[head.inputs[0]]], self._weights(head), self.state)

    def _weights(self, op: Operator) -> list[np.ndarray]:
        """An operator's weights, converted."""
        return [self._weight(weight) for weight in op.weights]

    def _weight(self, weight: Weight) -> np.ndarray:
        """One tensor in `dtype`."""
        if self._kept is None:
            return self.checkpoint.values(weight.name).astype(self.dtype)
        if weight.name not in self._kept:
            self._kept[weight.name] = self.checkpoint.values(weight.name).astype(self.dtype)
        return self._kept[weight.name]
