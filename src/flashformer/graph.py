"""A model as operators of the field: the definition that the reference executes and the plan cuts into stages.

A `Graph` is a list of operators in execution order over named values (single assignment). It describes one token position:
values are vectors, and `attention` is the only operator that looks at earlier positions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Weight:
    """A tensor of the checkpoint, by its Hugging Face name: a matrix [rows, columns] or a vector [rows]."""

    name: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Operator:
    """One operator: `kind` names the stem in `ops/` that defines it, `layer` is -1 outside the decoder layers."""

    kind: str
    layer: int
    inputs: tuple[str, ...]
    output: str
    size: int  # values in the output vector
    weights: tuple[Weight, ...] = ()
    attributes: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Graph:
    """The operators of one token, in execution order; the last one yields the greedy token."""

    operators: tuple[Operator, ...]

    def weights(self) -> dict[str, Weight]:
        """Every weight the model reads, by name; a weight used twice (tied embeddings) appears once."""
        return {w.name: w for op in self.operators for w in op.weights}


class GraphBuilder:
    """Collects operators; each method appends one and returns the name of its output value."""

    def __init__(self) -> None:
        self.operators: list[Operator] = []
        self.layer = -1

    def add(self, kind: str, *inputs: str, size: int, weights: tuple[Weight, ...] = (), **attributes: Any) -> str:
        """Append an operator of `kind`; returns the name of the value that it defines."""
        output = f"{kind}.{len(self.operators)}"
        self.operators.append(Operator(kind, self.layer, inputs, output, size, weights, attributes))
        return output

    def build(self) -> Graph:
        """The finished graph."""
        return Graph(tuple(self.operators))
