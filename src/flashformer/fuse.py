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

    def has_empty_tiles(self, tile_rows: int) -> bool:
        """Whether the padding between groups fills whole tiles."""
        return any(b.stride - b.group >= tile_rows for b in self.blocks)


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
    head_norms: tuple[str, ...] = ()


NAMES = {"attention": "qkv", "swiglu": "gate_up", "sample": "head"}  # a linear stage by the operator that it flows into
THROUGH = ("headnorm", "rope")  # operators that attention applies to its inputs as it reads them
FOLDED = ("rmsnorm", "swiglu", *THROUGH)  # operators without a stage of their own


def fuse(graph: Graph, head_pad: int) -> list[StageSpec]:
    """The stages of one token, in order; `head_pad` is the padded size of an attention head. Raises PlanError on a pattern
    that no kernel of ours computes."""
    return _Fusion(graph, head_pad).stages


class _Fusion:
    """Walks through a graph once and collects its stages."""

    def __init__(self, graph: Graph, head_pad: int) -> None:
        self.head_pad = head_pad
        self.source = {op.output: op for op in graph.operators}
        self.users: dict[str, list[Operator]] = defaultdict(list)
        for op in graph.operators:
            for value in op.inputs:
                self.users[value].append(op)
        self.stages: list[StageSpec] = []
        self.residual = ""  # the value that residual additions go on from
        done: set[str] = set()  # linears that are part of a stage
        for op in graph.operators:
            if op.kind == "embed":
                self.residual = op.output
                norm = self.norm_of(op.output)
                self.stages.append(StageSpec("embed", "embed", -1, ("token",), self.buffer_for(norm), op.size, None, norm.weights[0].name))
            elif op.kind == "linear":
                if op.output not in done:
                    group = self.group(op)
                    done.update(u.output for u in group)
                    self.stages.append(self.linear(op, group))
            elif op.kind == "attention":
                padded = op.size // _head_dim(op) * head_pad
                norms = self.projections(op)[1]
                self.stages.append(StageSpec("attention", "attention", op.layer, ("qkv",), "partials", padded, head_norms=norms))
                self.stages.append(StageSpec("combine", "combine", op.layer, ("partials",), "attended", padded))
            elif op.kind == "residual":
                self.residual = op.output
            elif op.kind == "sample":
                self.stages.append(StageSpec("token", "token", op.layer, ("token",), "", 0))
            elif op.kind not in FOLDED:
                raise PlanError(f"no stage computes the operator {op.kind}")

    def sink(self, value: str) -> Operator:
        """The operator that a linear's output flows into, looking through those that are applied while reading."""
        users = self.users[value]
        if len(users) != 1:
            raise PlanError(f"value {value} of the graph is used {len(users)} times; a stage hands on to one")
        return self.sink(users[0].output) if users[0].kind in THROUGH else users[0]

    def norm_of(self, value: str) -> Operator:
        """The RMSNorm that reads a residual value."""
        found = [op for op in self.users[value] if op.kind == "rmsnorm"]
        if len(found) != 1:
            raise PlanError(f"the residual {value} must be read by one rmsnorm, not {len(found)}")
        return found[0]

    def buffer_for(self, norm: Operator) -> str:
        """Residual vectors alternate between two buffers, one for each kind of reader."""
        return "mlp_input" if self.sink(self.users[norm.output][0].output).kind == "swiglu" else "attention_input"

    def projections(self, attention: Operator) -> tuple[list[Operator], tuple[str, ...]]:
        """The linears behind q, k and v, and the weights of the norms on each head of q and k (none, or both)."""
        linears, norms = [], []
        for role, value in zip("qkv", attention.inputs, strict=True):
            op = self.source[value]
            if role != "v":
                if op.kind != "rope":
                    raise PlanError(f"attention needs a rope on {role}, not {op.kind}")
                op = self.source[op.inputs[0]]
                if op.kind == "headnorm":
                    norms.append(op.weights[0].name)
                    op = self.source[op.inputs[0]]
            if op.kind != "linear":
                raise PlanError(f"no stage computes {op.kind} between a linear and attention's {role}")
            linears.append(op)
        if len(norms) == 1 or any(op.inputs != linears[0].inputs for op in linears):
            raise PlanError("attention needs q, k and v from one value, and a norm on the heads of both q and k or of neither")
        return linears, tuple(norms)

    def group(self, op: Operator) -> list[Operator]:
        """The linears that form a stage with `op`, in the order in which they are read."""
        end = self.sink(op.output)
        if end.kind == "attention":
            return self.projections(end)[0]
        group = [u for u in self.users[op.inputs[0]] if u.kind == "linear" and self.sink(u.output) is end]
        if end.kind == "swiglu" and (len({u.size for u in group}) != 1 or end.inputs != tuple(u.output for u in group)):
            raise PlanError("swiglu needs a gate and an up projection of one size")
        return group

    def linear(self, op: Operator, group: list[Operator]) -> StageSpec:
        """The stage of a group of linears, with what is folded into it from before and after."""
        before, end = self.source[op.inputs[0]], self.sink(op.output)
        rows = []
        for u in group:
            row_group, row_stride = (_head_dim(end), self.head_pad) if end.kind == "attention" else (u.size, u.size)
            rows.append(Rows(u.weights[0].name, u.weights[1].name if u.weights[1:] else "", u.size, row_group, row_stride))
        columns = op.weights[0].shape[1]
        column_group, column_stride, eps = columns, columns, 0.0
        if before.kind == "rmsnorm":
            if before.inputs != (self.residual,):
                raise PlanError(f"the norm {before.weights[0].name} reads something else than the residual as it is then")
            reads, eps = self.buffer_for(before), before.attributes["eps"]
        elif before.kind == "attention":
            reads, column_group, column_stride = "attended", _head_dim(before), self.head_pad
        elif before.kind == "swiglu":
            reads = "mlp_hidden"
        else:
            raise PlanError(f"no stage computes a linear after {before.kind}")
        name = NAMES.get(end.kind, "down" if before.kind == "swiglu" else "attention_output")
        epilogue: Epilogue
        gamma, values = "", sum(r.padded for r in rows)
        if end.kind == "residual":
            if end.inputs != (self.residual, op.output):
                raise PlanError(f"{op.weights[0].name} is added to something else than the residual as it is then")
            norm = self.norm_of(end.output)
            writes, epilogue, gamma = self.buffer_for(norm), "residual", norm.weights[0].name
        elif end.kind == "swiglu":
            writes, epilogue, values = "mlp_hidden", "swiglu", op.size
        elif end.kind == "sample":
            writes, epilogue = "token", "logits"
        elif end.kind == "attention":
            writes, epilogue = "qkv", "store"
        else:
            raise PlanError(f"no stage computes a linear before {end.kind}")
        spec = LinearSpec(tuple(rows), columns, column_group, column_stride, epilogue, end.kind == "swiglu", eps)
        return StageSpec(name, "linear", op.layer, (reads,), writes, values, spec, gamma)


def _head_dim(attention: Operator) -> int:
    """Head size of an attention operator."""
    return int(attention.attributes["head_dim"])
