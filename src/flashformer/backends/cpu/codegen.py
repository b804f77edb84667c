"""Plan -> the source of one library: shapes as `constexpr` structs, then the story of a token as calls into the headers.

Strings instantiate, headers compute. What the host and the library must agree on (structs, stage numbers, places in the
memory of values and of vectors) is decided here once.
"""

from __future__ import annotations

import ctypes
import math
from dataclasses import dataclass
from pathlib import Path

from ...formats import Format
from ...geometry import Geometry, ceil_div, choose_geometry, round_up
from ...plan import Plan, Stage
from ..sampling import SAMPLING
from ..sequence import SEQUENCE
from ..source import Field, cache_facts, camel, constants, ctypes_fields, literal, struct

HEADERS = Path(__file__).parent
OPERATORS = HEADERS.parent.parent / "ops"
LINE = 32  # values in a cache line of 16-bit values, kLine in prelude.h
ALIGNMENT = 16  # floats in a cache line
SCALES = {
    "exponent": "ExponentScale", "e4m3": "E4m3Scale", "bfloat16": "BfloatScale", "float16": "HalfScale", "float32": "FloatScale",
}  # formats.h  # fmt: skip
OPERATIONS = {"linear": "Linear", "attention": "Attention", "combine": "Combine"}
QUAD = 4  # sums of x that a group with an offset needs, kPlane in formats.h
LAYER_RANGES = 2  # number of the first tile range that a layer has of its own: after those of embed and combine

# A model in memory.
PARAMETERS: tuple[Field, ...] = (
    ("tape", "const u8*", ctypes.c_void_p, "all workers' weights, then an embedding table that is no head"),
    ("tape_start", "const u64*", ctypes.c_void_p, "[workers] bytes"),
    ("ranges", "const Range*", ctypes.c_void_p, "[workers][kRanges]"),
    ("vectors", "const float*", ctypes.c_void_p, "[layers + 1][kLayerVectors] norm weights and biases; the last are the head's"),
    ("rope", "const float*", ctypes.c_void_p, "[positions][head_dim / 2] (cos, sin)"),
    ("embedding", "const Segment*", ctypes.c_void_p, "where the rows of the table lie, ascending"),
)

# A sequence's part of a launch: `forced` tokens at positions start.., then the model's own. See columns.h.
OWN_SEQUENCE: tuple[Field, ...] = (
    ("tokens", "u32*", ctypes.c_void_p, "[count] as they are made"),
    ("seconds", "double*", ctypes.c_void_p, "[count] from the start of the launch to each"),
    *SEQUENCE,
)

# One launch.
LAUNCH: tuple[Field, ...] = (
    ("sequences", "const Sequence*", ctypes.c_void_p, "[count]"),
    ("limit", "double", ctypes.c_double, "seconds that a worker waits for the others"),
    ("count", "u32", ctypes.c_uint32, ""),
)

# How far a sequence is.
PROGRESS: tuple[Field, ...] = (
    ("made", "u32", ctypes.c_uint32, "tokens"),
    ("fed", "u32", ctypes.c_uint32, "tokens whose keys and values are in the cache for certain"),
)

# How far a launch is.
STATUS: tuple[Field, ...] = (
    ("news", "u32", ctypes.c_uint32, "tokens of all sequences"),
    ("running", "u32", ctypes.c_uint32, "0: it has ended"),
    ("given_up", "u32", ctypes.c_uint32, "1 + (stage << 16 | layer) of a wait that took too long"),
)


class Params(ctypes.Structure):
    """`Params` of the generated source."""

    _fields_ = ctypes_fields(PARAMETERS)


class SequenceStruct(ctypes.Structure):
    """`Sequence` of the generated source."""

    _fields_ = ctypes_fields(OWN_SEQUENCE)


class Progress(ctypes.Structure):
    """`Progress` of the generated source."""

    _fields_ = ctypes_fields(PROGRESS)


class Launch(ctypes.Structure):
    """`Launch` of the generated source."""

    _fields_ = ctypes_fields(LAUNCH)


class Status(ctypes.Structure):
    """`Status` of the generated source."""

    _fields_ = ctypes_fields(STATUS)


@dataclass(frozen=True)
class Vectors:
    """Where norm weights and biases lie in the memory of vectors, in floats. Layer l's begin at l * layer_size."""

    layer_size: int
    bias: dict[str, int]  # stage name -> offset in its layer
    gamma: dict[str, int]  # name of the stage that norms its input -> offset in its layer; the head is layer num_layers
    query_norm: int
    key_norm: int


@dataclass(frozen=True)
class Source:
    """A generated library and what the host needs to run it."""

    text: str
    stage_names: tuple[str, ...]  # by the number that a stuck worker reports
    vectors: Vectors
    ranges: int  # tile ranges of one worker


def linear_stages(plan: Plan, layer: int) -> tuple[Stage, ...]:
    """The linear stages of a layer; of layer num_layers: the head."""
    return tuple(s for s in plan.layer_stages(layer if layer < plan.config.num_layers else -1) if s.linear)


def columns(stage: Stage) -> int:
    """Columns of a linear stage, including the zero padding."""
    assert stage.geometry is not None
    return stage.geometry.columns


def table_geometry(plan: Plan) -> Geometry:
    """How the embedding table is laid: as a head with its format would be."""
    return choose_geometry(plan.target, plan.config.hidden_size, plan.embedding_format)


def variants(plan: Plan) -> dict[str, list[Stage]]:
    """The linear stages of the layers that differ in their format: of each name the first with each geometry."""
    found: dict[str, list[Stage]] = {}
    for stage in plan.stages:
        if stage.linear and stage.layer >= 0:
            same = found.setdefault(stage.name, [])
            if all(stage.geometry != other.geometry for other in same):
                same.append(stage)
    return found


def variant(plan: Plan, stage: Stage) -> int:
    """The number of a stage of the layers among its variants."""
    return [other.geometry for other in variants(plan)[stage.name]].index(stage.geometry)


def struct_name(plan: Plan, stage: Stage) -> str:
    """The struct of a stage; those of further variants are numbered."""
    number = variant(plan, stage) if stage.linear and stage.layer >= 0 else 0
    return camel(stage.name) + (str(number) if number else "")


def format_table(stage: Stage) -> str:
    """The array with the variant of each layer."""
    return f"k{camel(stage.name)}Formats"


def linear_scratch(stage: Stage) -> int:
    """Floats that a worker needs for a linear stage: x, then sums of x for each group of columns that has an offset."""
    assert stage.geometry is not None
    format = stage.geometry.format
    return columns(stage) + (QUAD * format.groups(columns(stage)) if format.offset != "none" else 0)


def place_buffers(plan: Plan) -> tuple[dict[str, int], int]:
    """Offsets of the buffers in the memory of values, and its size, in floats.

    The residual vector has one place: barriers part those who read it from those who add to it.
    """
    residual = {s.writes for s in plan.stages if s.kind == "embed" or (s.linear and s.linear.epilogue == "residual")}
    places: dict[str, int] = {}
    size = 0
    for b in plan.buffers:
        if b.kind == "token":
            continue
        known = [places[name] for name in residual & places.keys()] if b.name in residual else []
        places[b.name] = known[0] if known else size
        if b.name == "partials":
            size += plan.target.workers * pieces(plan) * plan.kv.virtual_heads // plan.kv.heads * plan.kv.virtual_group * partial_size(plan)
        elif not known:
            size += round_up(b.values, plan.target.fragment_columns)
    return places, size


def pieces(plan: Plan) -> int:
    """Most kv heads of which one worker holds a part in attention."""
    return ceil_div(plan.kv.heads, plan.target.workers) + 1


def partial_size(plan: Plan) -> int:
    """Floats of one query head's partial result: its outputs, then maximum and sum."""
    return round_up(plan.kv.head_pad + 2, ALIGNMENT)


def place_vectors(plan: Plan) -> Vectors:
    """Lay out norm weights and biases: biases are padded to the rows of their stage's tiles, norm weights to its columns."""
    bias: dict[str, int] = {}
    gamma: dict[str, int] = {}
    size = 0

    def take(floats: int) -> int:
        nonlocal size
        at = size
        size += round_up(floats, ALIGNMENT)
        return at

    for name, stages in variants(plan).items():
        stage = stages[0]
        assert stage.linear is not None
        if any(b.bias for b in stage.linear.blocks):
            bias[name] = take(stage.tiles * plan.target.tile_rows)
        if stage.linear.eps:
            gamma[name] = take(max(map(columns, stages)))
    query_norm = key_norm = 0
    if plan.config.qk_norm:
        query_norm, key_norm = take(plan.kv.head_dim), take(plan.kv.head_dim)
    (head,) = linear_stages(plan, plan.config.num_layers)
    return Vectors(size, bias, {**gamma, head.name: 0}, query_norm, key_norm)


class _Formats:
    """The types of formats.h that a plan needs, and the tables that they name."""

    def __init__(self, dtype: str) -> None:
        self._dtype = dtype
        self._tables: dict[tuple[float, ...], str] = {}

    def type_of(self, format: Format) -> str:
        """The C++ type of a format."""
        if format.kind == "float":
            return f"Plain<{camel(self._dtype)}>"
        if format.bits == 4:
            values = "Signed4" if format.offset == "none" else "Unsigned4"
            if format.kind == "table":
                values = self._tables.setdefault(format.table, f"Table{len(self._tables)}")
            code = f"Nibbles<{values}>"
        else:
            code = f"Octets<{'E4m3' if format.kind == 'fp8' else 'Integer'}>"
        return f"Codes<{code}, {format.group}, Offset::k{camel(format.offset)}, {SCALES[format.scale]}>"

    def tables(self) -> list[str]:
        """The structs of the tables that `type_of` has named."""
        return [
            f"struct {name} {{ static constexpr bool kConsecutive = false; static constexpr float kValues[] = {{{values}}}; }};"
            for name, values in ((name, ", ".join(map(literal, table))) for table, name in self._tables.items())
        ]


def generate(plan: Plan) -> Source:
    """The library's source text."""
    c, t, kv = plan.config, plan.target, plan.kv
    buffers, values = place_buffers(plan)
    vectors = place_vectors(plan)
    embed, body = plan.stages[0], plan.layer_stages(0)
    linears = linear_stages(plan, 0)
    (head,) = linear_stages(plan, c.num_layers)
    names = (*(s.name for s in (embed, *body, head)), "token")
    ranges = LAYER_RANGES + len(linears) * c.num_layers + 1
    splits = kv.virtual_heads // kv.heads
    table = table_geometry(plan)
    types = _Formats(c.dtype)
    table_type = types.type_of(table.format)
    every = [s for same in variants(plan).values() for s in same] + [head]
    scratch = max(*map(linear_scratch, every), splits * kv.virtual_group * kv.head_pad)

    model: list[tuple[str, str, object]] = [
        ("u32", "kWorkers", t.workers),
        ("u32", "kColumns", plan.columns),
        ("u64", "kSlots", plan.slots),
        ("u32", "kLayers", c.num_layers),
        ("u32", "kVocab", c.vocab_size),
        ("int", "kHeads", c.num_heads),
        ("int", "kKvHeads", kv.heads),
        ("int", "kHeadDim", kv.head_dim),
        ("int", "kHeadPad", kv.head_pad),
        ("int", "kGroup", kv.group),
        ("int", "kSplits", splits),
        ("int", "kQueries", kv.virtual_group),
        ("bool", "kHeadNorm", c.qk_norm),
        ("float", "kHeadEps", c.norm_eps),
        ("float", "kScoreScale", math.log2(math.e) / math.sqrt(c.head_dim)),
        ("int", "kQueryNorm", vectors.query_norm),
        ("int", "kKeyNorm", vectors.key_norm),
        ("int", "kLayerVectors", vectors.layer_size),
        ("u32", "kHidden", c.hidden_size),
        ("int", "kTableColumns", table.columns),
        ("u64", "kKvBlocks", kv.blocks),
        ("u64", "kKvBlockBytes", kv.block_bytes),
        *cache_facts(kv),
        ("int", "kPieces", pieces(plan)),
        ("int", "kPartial", partial_size(plan)),
        ("int", "kRanges", ranges),
        ("int", "kLayerRanges", len(linears)),
        ("u64", "kValues", values),
        ("int", "kScratch", round_up(scratch, ALIGNMENT)),
    ]

    def stage(s: Stage, number: int) -> list[str]:
        """The struct of a stage; `number` is that of its tile range."""
        facts: list[tuple[str, str, object]] = [("u32", "kWhere", names.index(s.name))]
        if s.reads[0] in buffers:
            facts.append(("int", "kInput", buffers[s.reads[0]]))
        if s.writes in buffers:
            facts.append(("int", "kOutput", buffers[s.writes]))
        if s.kind != "attention":
            facts.append(("int", "kRange", number))
        lines = ["  using Source = Attention;"] if s.kind == "combine" else []
        if s.linear and s.geometry:
            lines = [
                f"  static constexpr Epilogue kEpilogue = Epilogue::k{camel(s.linear.epilogue)};",
                f"  using Format = {types.type_of(s.geometry.format)};",
            ]
            facts += [
                ("int", "kColumns", s.linear.columns_used),
                ("int", "kLines", columns(s) // LINE),
                ("bool", "kNorm", s.linear.eps > 0),
                ("float", "kEps", s.linear.eps),
                ("int", "kGamma", vectors.gamma.get(s.name, 0)),
                ("int", "kBias", -1 if s is head else vectors.bias.get(s.name, -1)),
            ]
        return [f"struct {struct_name(plan, s)} {{", *lines, *constants(facts), "};"]

    def call(s: Stage) -> str:
        """The call of a stage in every layer, by the layer's format where they differ."""
        same = variants(plan)[s.name] if s.linear else [s]
        calls = [f"worker.run<{OPERATIONS[s.kind]}<Model, stage::{struct_name(plan, v)}>>(layer)" for v in same]
        if not calls[1:]:
            return f"      {calls[0]};"
        cases = " ".join(f"case {i}: {call}; break;" for i, call in enumerate(calls))
        return f"      switch (stage::{format_table(s)}[layer]) {{ {cases} }}"

    def layers(s: Stage) -> list[str]:
        """The variants of a stage of the layers, and which layer has which."""
        if s.linear is None:
            return stage(s, numbers.get(s.name, 0))
        same = variants(plan)[s.name]
        lines = [line for v in same for line in stage(v, numbers[s.name])]
        which = ", ".join(str(variant(plan, other)) for other in plan.stages if other.name == s.name)
        return [*lines, f"constexpr u8 {format_table(s)}[] = {{{which}}};"] if same[1:] else lines

    numbers = {"embed": 0, "combine": 1, **{s.name: LAYER_RANGES + i for i, s in enumerate(linears)}, head.name: LAYER_RANGES}
    append = ["      if (worker.pass().chained) worker.run<Append<Model, stage::Attention>>(layer);"] if plan.columns > 1 else []
    stages = [*stage(embed, numbers["embed"]), *(line for s in body for line in layers(s)), *stage(head, numbers[head.name])]
    text = [
        f"// {c.architecture}: {c.num_layers} layers, {t.workers} workers. Generated; see the headers for what it does.",
        '#include "prelude.h"',
        "",
        f"constexpr int kTileRows = {t.tile_rows};",
        "",
        "struct Range;",
        "struct Segment;",
        *struct("Params", PARAMETERS),
        *struct("Sampling", SAMPLING),
        *struct("Sequence", OWN_SEQUENCE),
        *struct("Launch", LAUNCH),
        *struct("Progress", PROGRESS),
        *struct("Status", STATUS),
        '#include "engine.h"',
        "",
        *types.tables(),
        "struct Model {",
        f"  using Value = {camel(c.dtype)};",
        f"  using Table = {table_type};",
        f"  using KvType = {camel(kv.type)};",
        *constants(model),
        "};",
        "",
        "namespace stage {",
        *stages,
        f"struct Token {{ static constexpr u32 kWhere = {names.index('token')}; }};",
        "}  // namespace stage",
        "",
        "// One pass, as every worker walks it.",
        "struct Story {",
        "  using Next = NextPass<Model, stage::Token>;",
        "",
        "  static void run(Worker<Model>& worker) {",
        "    worker.run<Embed<Model, stage::Embed>>();",
        "    for (u32 layer = 0; layer < Model::kLayers; layer++) {",
        *(line for s in body for line in (append if s.kind == "attention" else []) + [call(s)]),
        "    }",
        "    if (!worker.pass().scored_count) return;",
        "    worker.run<Linear<Model, stage::Head>>(Model::kLayers);",
        "    if (worker.pass().sampled) worker.run<Draw<Model, stage::Head>>(Model::kLayers);",
        "  }",
        "};",
        "",
        '#include "entry.h"',
    ]
    return Source("\n".join(text) + "\n", names, vectors, ranges)


def include_paths() -> list[Path]:
    """Folders that the generated source includes from."""
    return [HEADERS, OPERATORS]


def headers() -> dict[str, str]:
    """Every header's text by its path in the package: all of them belong to a library's cache key."""
    root = HEADERS.parent.parent
    return {str(p.relative_to(root)): p.read_text() for folder in (HEADERS, OPERATORS) for p in sorted(folder.glob("*.h*"))}
