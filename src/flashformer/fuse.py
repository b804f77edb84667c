"""Graph -> stages: which operators run between two exchanges.

Linears that read the same value and flow into the same operator become one linear stage; norms, rotations, activations and
residual additions are folded into the stage before or after them.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Literal

from .errors import PlanError
from .graph import Graph, Operator

Epilogue = Literal["store", "swiglu", "residual", "logits"]


@dataclass(frozen=True)
class Rows:
    """Consecutive output rows of a stage that come from one weight; every `group` rows are padded to `stride`."""

    weight: str
    bias: str  # empty: none
    rows: int  # of the weight
    group: int
    stride: int

    @property
    def padded(self) -> int:
        """Rows on the tape."""
        return self.rows // self.group * self.stride


@dataclass(frozen=True)
class LinearSpec:
    """A matrix-vector product: blocks of rows, one input. Columns are padded in groups as rows are."""

    blocks: tuple[Rows, ...]
    columns_used: int  # of the weights
    column_group: int
    column_stride: int
    epilogue: Epilogue
    interleave: bool = False  # tiles hold half gate rows, half up rows
    eps: float = 0.0  # of the RMSNorm whose scale multiplies the result; 0: none

    @property
    def rows(self) -> int:
        """Output rows including padding between groups."""
        return sum(b.padded for b in self.blocks)

    @property
    def rows_used(self) -> int:
        """Output rows of the model."""
        return sum(b.rows for b in self.blocks)

    @property
    def columns(self) -> int:
        """Input columns including padding between groups."""
        return self.columns_used // self.column_group * self.column_stride


@dataclass(frozen=True)
class StageSpec:
    """A stage before its work is given to workers; `values` is the length of the vector that it hands on."""

    name: str
    kind: Literal["embed", "linear", "attention", "combine", "token"]
    layer: int
    reads: tuple[str, ...]
    writes: str
    values: int
    linear: LinearSpec | None = None
    publish_gamma: str = ""


NAMES = {"attention": "qkv", "swiglu": "gate_up", "argmax": "head"}  # a linear stage by the operator that it flows into
THROUGH = ("headnorm", "rope")  # operators that attention applies to its inputs as it reads them


def fuse(graph: Graph, head_pad: int) -> list[StageSpec]:
    """The stages of one token, in order; `head_pad` is the padded size of an attention head. Raises PlanError on a pattern
    that no kernel of ours computes."""
    users: dict[str, list[Operator]] = defaultdict(list)
    for op in graph.operators:
        for value in op.inputs:
            users[value].append(op)
    source = {op.output: op for op in graph.operators}

    def sink(value: str) -> Operator:
        """The operator that a linear's output flows into, looking through those that are applied while reading."""
        if len(users[value]) != 1:
            raise PlanError(f"value {value} of the graph is used {len(users[value])} times; a stage hands on to one")
        op = users[value][0]
        return sink(op.output) if op.kind in THROUGH else op

    def norm_of(value: str) -> Operator:
        """The RMSNorm that reads a residual value."""
        found = [op for op in users[value] if op.kind == "rmsnorm"]
        if len(found) != 1:
            raise PlanError(f"the residual {value} must be read by one rmsnorm, not {len(found)}")
        return found[0]

    def reader_buffer(norm: Operator) -> str:
        """Residual vectors alternate between two buffers, one for each kind of reader."""
        return "mlp_input" if sink(users[norm.output][0].output).kind == "swiglu" else "attention_input"

    stages: list[StageSpec] = []
    done: set[str] = set()
    for op in graph.operators:
        if op.kind == "embed":
            norm = norm_of(op.output)
            stages.append(StageSpec("embed", "embed", -1, ("token",), reader_buffer(norm), op.size, None, norm.weights[0].name))
        elif op.kind == "linear" and op.output not in done:
            end = sink(op.output)
            group = [u for u in users[op.inputs[0]] if u.kind == "linear" and sink(u.output) is end]
            done.update(u.output for u in group)
            before = source[op.inputs[0]]
            head_dim = _head_dim(end) if end.kind == "attention" else 0
            blocks = tuple(
                Rows(
                    u.weights[0].name,
                    u.weights[1].name if len(u.weights) > 1 else "",
                    u.size,
                    head_dim or u.size,
                    head_pad if head_dim else u.size,
                )
                for u in group
            )
            columns = op.weights[0].shape[1]
            column_group, column_stride = columns, columns
            if before.kind == "attention":
                column_group, column_stride = _head_dim(before), head_pad
            gamma, norm_eps, reads, epilogue = "", 0.0, before.kind, "store"
            if before.kind == "rmsnorm":
                norm_eps, reads = before.attributes["eps"], reader_buffer(before)
            elif before.kind == "attention":
                reads = "attended"
            elif before.kind == "swiglu":
                reads = "mlp_hidden"
            else:
                raise PlanError(f"no stage computes a linear after {before.kind}")
            name, values = NAMES.get(end.kind, "down" if before.kind == "swiglu" else "attention_output"), sum(b.padded for b in blocks)
            writes = "qkv"
            if end.kind == "residual":
                norm = norm_of(end.output)
                gamma, writes, epilogue = norm.weights[0].name, reader_buffer(norm), "residual"
            elif end.kind == "swiglu":
                if len(group) != 2 or group[0].size != group[1].size or end.inputs != tuple(u.output for u in group):
                    raise PlanError("swiglu needs a gate and an up projection of one size")
                writes, epilogue, values = "mlp_hidden", "swiglu", group[0].size
            elif end.kind == "argmax":
                writes, epilogue = "token", "logits"
            elif end.kind != "attention":
                raise PlanError(f"no stage computes a linear before {end.kind}")
            spec = LinearSpec(blocks, columns, column_group, column_stride, epilogue, end.kind == "swiglu", norm_eps)  # type: ignore[arg-type]
            stages.append(StageSpec(name, "linear", op.layer, (reads,), writes, values, spec, gamma))
        elif op.kind == "attention":
            padded = op.size // _head_dim(op) * head_pad
            stages.append(StageSpec("attention", "attention", op.layer, ("qkv",), "partials", padded))
            stages.append(StageSpec("combine", "combine", op.layer, ("partials",), "attended", padded))
        elif op.kind == "argmax":
            stages.append(StageSpec("token", "token", op.layer, ("token",), "", 0))
        elif op.kind not in ("rmsnorm", "headnorm", "rope", "swiglu", "residual", "linear"):
            raise PlanError(f"no stage computes the operator {op.kind}")
    return stages


def _head_dim(attention: Operator) -> int:
    """Head size of an attention operator."""
    return int(attention.attributes["head_dim"])
