"""Plan -> the source of one kernel: shapes as `constexpr` structs, then the story of a token as calls into the headers.

Strings instantiate, headers compute. What the host and the kernel must agree on (parameters, stage numbers, places in the
exchange memory and in the vector memory) is decided here once.
"""

from __future__ import annotations

import ctypes
import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ...errors import PlanError
from ...formats import PLAIN, Format
from ...geometry import PART_BUFFERS, SLICE_BUFFERS, WIDE, Geometry, ceil_div, round_up
from ...plan import COLUMN_HEADS, Buffer, Plan, Stage
from ...targets import Target
from ..sampling import MAX_LOGPROBS, SAMPLING, SamplingStruct
from ..sequence import SEQUENCE
from ..source import Field, cache_facts, camel, constants, ctypes_fields, struct

HEADERS = Path(__file__).parent
OPERATORS = HEADERS.parent.parent / "ops"
SLOT_BYTES = 16384  # of the ring where all weights are plain: the largest chunk, and one KV block of 256 dims
LARGEST_SLOT_BYTES = 27648  # where there are codes: see `choose_share`; and their scales need room
MAX_SLOTS = 32  # a lane each
FLAG_ALIGNMENT = 16  # words: vectors in the exchange memory begin on a 128-byte line
STREAM = "weight stream"  # where a waiting producer stands
PART_WORDS = 10  # of what a block tells in a round within a token: see rounds.cuh
ROUND_TAGS = 32  # of a token: later rounds begin anew
LIST_WORDS = 2 * MAX_LOGPROBS * MAX_LOGPROBS  # of the tokens that may be among the most likely ones: see report.cuh
SHORTLIST = 128  # tokens that a block lists of a kind, at most: see shortlist.cuh
SHORTLIST_WORDS = 2 * 4 * SHORTLIST  # of a block, both kinds
PREFILL_THREADS, PREFILL_TOKENS = 384, 128  # of a block, and that it multiplies at a time: see prefill.cuh
PREFILL_TILES = 16  # that it has at least: kLeastTiles there
OCTET = 8  # columns: see prefill.cuh
MOST_SPLITS, LEAST_SPLIT = 8, 128  # of the columns of a stage; columns of a split
CELL = 32  # values of all columns that are multiplied at a time: see panel.cuh
FEW_COLUMNS = 2  # where no more than a tile of a vector follow each other: see `run`
SECTOR = 32  # bytes: what the L2 cache keeps as one
VERSIONS = 4  # places of a vector, if it needs no flags
PIECE_BLOCKS = 24  # of the KV cache that are one part of a head's at most, for several columns: see units.cuh
KV_PIECES = 32  # most parts of a head's cache whose results a column sums: see units.cuh
EVEN = 0.9  # of the blocks at work while the last ones have a part of attention
TILE_BITS = 12  # a tile range is packed as first << TILE_BITS | count
BEGINS = 1  # in the bytes of a chunk's entry in the table: a stage begins with it

# The kernel's parameters.
PARAMETERS: tuple[Field, ...] = (
    ("tape", "const u8*", ctypes.c_uint64, "all blocks' weights"),
    ("table", "const uint2*", ctypes.c_uint64, "[workers][table_stride] (offset in units, bytes | kBegins); bytes 0: (layer, KV cache)"),
    ("table_length", "const u32*", ctypes.c_uint64, "[workers]"),
    ("head_start", "const u32*", ctypes.c_uint64, "[workers] first entry of the head"),
    ("last_start", "const u32*", ctypes.c_uint64, "[workers] first entry of the last layer"),
    ("tiles", "const u32*", ctypes.c_uint64, "[tile words][workers] first << 12 | count"),
    ("vectors", "const float*", ctypes.c_uint64, "norm weights and biases"),
    ("embedding", "const u16*", ctypes.c_uint64, "[vocab][hidden]"),
    ("rope", "const float2*", ctypes.c_uint64, "[positions][head_dim / 2] (cos, sin)"),
    ("kv", "u8*", ctypes.c_uint64, "[layers][kv heads][kv_blocks] blocks"),
    ("exchange", "u64*", ctypes.c_uint64, "words of all buffers"),
    ("logits", "float*", ctypes.c_uint64, "[steps][vocab], or null"),
    ("forced", "const u32*", ctypes.c_uint64, "[forced_count] the prompt"),
    ("stop", "const u32*", ctypes.c_uint64, "[stop_count] tokens that end the launch"),
    ("tokens", "u64*", ctypes.c_uint64, "host: (token, run) as they are made"),
    ("cancel", "const u32*", ctypes.c_uint64, "host: nonzero ends the launch after the present token"),
    ("status", "u32*", ctypes.c_uint64, "[2] where a wait gave up, and its block"),
    ("resumed", "const float*", ctypes.c_uint64, "[hidden] residual of the first token in front of the last layer, or null (roles.cuh)"),
    ("trace", "u64*", ctypes.c_uint64, "timestamps, or null"),
    ("sampling", "Sampling", SamplingStruct, "how tokens are chosen"),
    ("table_stride", "u32", ctypes.c_uint32, ""),
    ("kv_blocks", "u32", ctypes.c_uint32, "per layer and head"),
    ("start", "u32", ctypes.c_uint32, "position of the first token"),
    ("forced_count", "u32", ctypes.c_uint32, ""),
    ("stop_count", "u32", ctypes.c_uint32, ""),
    ("steps", "u32", ctypes.c_uint32, "tokens of this launch, at most"),
    ("epoch", "u32", ctypes.c_uint32, "tokens ever made, plus one"),
    ("run", "u32", ctypes.c_uint32, "number of this launch: marks its tokens"),
    # Of several columns, in the place of forced, stop, tokens, cancel, logits, sampling, start and the counts.
    ("sequence_count", "u64", ctypes.c_uint64, ""),
    ("sequences", "const Sequence*", ctypes.c_uint64, "[sequence_count]"),
    ("column_raw", "float*", ctypes.c_uint64, "[columns][rows of the head] logits as the model gives them (kReported)"),
    ("column_scores", "float*", ctypes.c_uint64, "[columns][rows of the head] (logit after bias and penalties, score) (kSelected)"),
    ("slot_bytes", "u64", ctypes.c_uint64, "of the KV cache of a slot"),
)

# A sequence's part of a launch: `forced` tokens at positions start.., then the model's own. See columns.cuh.
OWN_SEQUENCE: tuple[Field, ...] = (("tokens", "u64*", ctypes.c_uint64, "host: (token, run) as they are made"), *SEQUENCE)


class Params(ctypes.Structure):
    """The kernel's one argument, laid out as the generated struct."""

    _fields_ = ctypes_fields(PARAMETERS)


# The same of the kernel for long prompts: see prefill.cuh.
PREFILL_PARAMETERS: tuple[Field, ...] = (
    ("model", "Params", Params, "tape, vectors, embedding, rope, kv (of the slot), kv_blocks, forced (the tokens), start, status"),
    ("places", "const u64*", ctypes.c_uint64, "[layers][stages][fragments, scales][tiles][parts] bytes from the beginning of the tape"),
    ("residual", "float*", ctypes.c_uint64, "[tokens][hidden]"),
    ("qkv", "float*", ctypes.c_uint64, "[tokens][qkv]"),
    ("queries", "u16*", ctypes.c_uint64, "[tokens][heads][head_pad]"),
    ("hidden", "u32*", ctypes.c_uint64, "octets of what qkv and gate_up multiply"),
    ("attended", "u32*", ctypes.c_uint64, "octets of attention's results"),
    ("inner", "u32*", ctypes.c_uint64, "octets of what down multiplies"),
    ("moments", "float*", ctypes.c_uint64, "[parts][tokens] sums of squares"),
    ("arrived", "u64*", ctypes.c_uint64, "how often blocks have come to meet the others"),
    ("shared", "u64*", ctypes.c_uint64, "[layers][stages][pieces] how many of the blocks that share a piece of a stage have come"),
    ("splits", "float*", ctypes.c_uint64, "[pieces][splits][octets of tokens][threads][4] sums"),
    ("room", "u32", ctypes.c_uint32, "tokens that there is room for"),
    ("count", "u32", ctypes.c_uint32, "tokens"),
)


class SequenceStruct(ctypes.Structure):
    """`Sequence` of the generated source."""

    _fields_ = ctypes_fields(OWN_SEQUENCE)


class PrefillParams(ctypes.Structure):
    """The argument of the kernel for long prompts, laid out as the generated struct."""

    _fields_ = ctypes_fields(PREFILL_PARAMETERS)


@dataclass(frozen=True)
class Vectors:
    """Where norm weights and biases lie in the vector memory, in floats. Layer l's begin at l * layer_size."""

    layer_size: int
    bias: dict[str, int]  # stage name -> offset in its layer
    gamma: dict[str, int]  # stage name -> offset in its layer of the weight that its output is multiplied by
    query_norm: int
    key_norm: int
    embed_gamma: int  # absolute
    size: int


@dataclass(frozen=True)
class Source:
    """A generated kernel and what the host needs to run it."""

    text: str
    stage_names: tuple[str, ...]  # by the number that a stuck kernel reports
    vectors: Vectors
    exchange_words: int
    plain_words: int  # of these, which come first: vectors, which are without tags


def threads(plan: Plan) -> int:
    """Threads of a block: consumers, finishers and the producer."""
    return 32 * (plan.target.warps + plan.target.finisher_warps + 1)


def pieces(plan: Plan) -> int:
    """Most heads of which one block holds a part in attention."""
    return ceil_div(plan.kv.virtual_heads, plan.target.workers) + 1


def piece_words(plan: Plan) -> int:
    """Words of one partial result: [8 heads][head_pad] outputs, then [8 heads] (maximum, sum)."""
    return COLUMN_HEADS * (plan.kv.head_pad + 2)


def slot_bytes(plan: Plan) -> int:
    """Bytes of a slot of the ring: the largest chunk of weights, and a block of the KV cache."""
    geometries = [s.geometry for s in plan.stages if s.geometry]
    if all(g.format == PLAIN for g in geometries):
        return SLOT_BYTES
    largest = max(g.chunk_bytes(g.chunk_tiles, part) for g in set(geometries) for part in range(g.parts))
    return round_up(max(largest, plan.kv.block_bytes, SLOT_BYTES // 4), 128)


# How codes lie on the tape and are multiplied: the structs of codes.cuh and integers.cuh, by the numbers that packing kernels know them by.
LAYOUTS = {
    "integer4": 0, "integer8": 1, "float8": 2, "table": 3, "signed_table": 3, "half_byte": 4, "byte": 5, "byte_table": 6, "digit_table": 6,
}  # fmt: skip
DIGIT = 128  # base of the integers that tables are made of
TABLE_ERROR = 2.0**-11  # most that a value of a table may be off, of itself: as fp16 rounds

SCALES = {
    "exponent": "ExponentScale", "e4m3": "E4m3Scale", "bfloat16": "BfloatScale", "float16": "HalfScale", "float32": "FloatScale",
}  # codes.cuh  # fmt: skip


def code_layout(format: Format) -> str:
    """Which of LAYOUTS a format has. Integer instructions sum 32 columns at once, so that groups of 16 need the others."""
    wide = format.group != 16
    if format.kind == "fp8":
        return "float8"
    if format.kind == "int":
        return {4: "half_byte", 8: "byte"}[format.bits] if wide else f"integer{format.bits}"
    values = np.array(format.table, np.float32)
    if wide and all(abs(np.sign(half).sum()) == np.count_nonzero(half) for half in (values[:8], values[8:])) and values.any():
        multiples = values / least_step(values)
        if np.array_equal(multiples, np.round(multiples)) and np.abs(multiples).max() < DIGIT // 2:
            return "byte_table"
        step = digit_step(values)
        if (np.abs(np.round(values / step) * step - values) <= TABLE_ERROR * np.abs(values)).all():
            return "digit_table"
    halves = values.astype(np.float16)
    signed = np.array_equal(np.abs(values[:8]), values[:8]) and np.array_equal(-values[:8], values[8:])
    return "signed_table" if signed and np.array_equal(halves, values) and not (halves.view(np.uint16) & 0xFF).any() else "table"


def least_step(values: np.ndarray) -> np.float32:
    """The smallest magnitude but zero."""
    return np.float32(np.abs(values[values != 0]).min())


def digit_step(values: np.ndarray) -> np.float32:
    """What the largest of some values is the most multiples of that two digits can say."""
    return np.float32(np.abs(values).max() / (DIGIT**2 - 1))


def describe_format(format: Format) -> list[str]:
    """A format of codes as the struct that codes.cuh is instantiated with."""
    layout = code_layout(format)
    tables = {name: f"{camel(name)}<Values>" for name in ("byte_table", "digit_table", "signed_table")} | {"table": "FullTable<Values>"}
    code = tables.get(layout, camel(layout))
    lines = ["  struct Format {"]
    if format.kind == "table":
        values = np.array(format.table, np.float32)
        halves = values.astype(np.float16).view(np.uint16)
        high, low = (halves >> 8).astype(np.uint8), (halves & 0xFF).astype(np.uint8)
        parts = {"kHigh": high, "kLow": low}
        lines.append("    struct Values {")
        if layout == "signed_table":
            parts = {"kHigh": high[:8]}
        elif layout in ("byte_table", "digit_table"):
            step = (digit_step if layout == "digit_table" else least_step)(values)
            multiples = np.round(np.abs(values) / step).astype(np.int32).reshape(2, 1, 8)
            digits = multiples if layout == "byte_table" else np.concatenate([multiples // DIGIT, multiples % DIGIT], axis=1)
            parts = {**(parts if layout == "digit_table" else {}), **dict(zip(("kLower", "kUpper"), digits.astype(np.uint8), strict=True))}
            lines.append(f"      static constexpr float kFactor = {float(step)!r}f;")
            signs = [-1 if (half < 0).any() else 1 for half in (values[:8], values[8:])]
            lines.append(f"      static constexpr int kBase = {DIGIT}, kLowerSign = {signs[0]}, kUpperSign = {signs[1]};")
        for name, part in parts.items():
            words = np.ascontiguousarray(part).view(np.uint32)
            size, values_of = "".join(f"[{n}]" for n in words.shape), ", ".join(f"{word:#010x}u" for word in words.reshape(-1).tolist())
            lines.append(f"      static constexpr u32 {name}{size} = {{{values_of}}};")
        lines.append("    };")
    lines += [
        f"    using Code = {code};",
        f"    using Scale = {SCALES[format.scale]};",
        f"    static constexpr int kGroup = {format.group};",
        f"    static constexpr Offset kOffset = Offset::k{format.offset.capitalize()};",
        "  };",
    ]
    return lines


@dataclass(frozen=True)
class Panel:
    """How a linear stage has x of several columns in shared memory: see panel.cuh."""

    steps: tuple[int, ...]  # cells of a warp, in each column, that are copied at once
    held: int  # steps that stay; the others come anew for each batch of groups of tiles
    buffers: int  # places for these, of the largest step
    nbytes: int  # of all warps
    slices: bool  # whether what comes anew comes slice by slice of codes, not part by part of a tile


def panel(plan: Plan, g: Geometry) -> Panel:
    """The panel of a stage: as much of x as the target has room for."""
    slices = g.format != PLAIN and (g.together == 1 or plan.columns == WIDE)
    cell_bytes = CELL * 2 * plan.target.warps * plan.columns
    steps = tuple(size * g.fragment_columns // CELL for size in ((1,) * g.fragments if slices else g.part_sizes()))
    held, buffers, room = len(steps), 0, plan.target.panel_room(g.format) // cell_bytes
    if sum(steps) > room and held > 2:
        buffers = max(2, min(SLICE_BUFFERS if slices else PART_BUFFERS, room // steps[0]))
        # NOTE: none stays of what is read by several groups, or pairs of groups, before the next comes.
        held = max(0, room // steps[0] - buffers) if g.together <= (2 if slices else 1) else 0
    return Panel(steps, held, buffers, cell_bytes * (sum(steps[:held]) + buffers * steps[0]), slices and buffers > 0)


def piece_step(plan: Plan) -> int:
    """How many parts of a head's cache are one more for each block, where all columns are at work: they come in multiples of this."""

    def even(step: int) -> float:
        parts = plan.columns * plan.kv.virtual_heads * step
        return parts / round_up(parts, plan.target.workers)

    steps = range(1, KV_PIECES + 1)
    return next((step for step in steps if even(step) >= EVEN), max(steps, key=even))


def most_pieces(plan: Plan) -> int:
    """Most parts of a head's cache: see units.cuh."""
    step = piece_step(plan)
    return KV_PIECES // step * step


def most_units(plan: Plan) -> int:
    """Most parts of the KV cache that the columns of a pass have results of: see units.cuh."""
    pieces = min(most_pieces(plan), round_up(ceil_div(plan.kv.blocks, PIECE_BLOCKS), piece_step(plan)))
    return plan.columns * plan.kv.virtual_heads * pieces


@dataclass(frozen=True)
class Places:
    """Offsets in the exchange memory, in words of 8 bytes."""

    buffers: dict[str, int]
    moments: dict[str, int]  # sums of squares, of the buffers that have them
    plain: dict[str, int]  # words of a version of those vectors that have no flags, which come first: [copies][VERSIONS]
    flags: dict[str, int]  # of the others: what says that a block has handed on its part
    appended: int  # of several columns: what says that a key or a value is in the cache
    size: int


def copies(plan: Plan) -> int:
    """Of what every block polls, so that not all poll the same lines."""
    return plan.target.exchange_copies if plan.columns == 1 else 1


def shortlist_words(target: Target) -> int:
    """Words of all blocks' lists of tokens, and of what their finishers know early: see shortlist.cuh."""
    return target.workers * (SHORTLIST_WORDS + 2 * target.finisher_warps)


def newcomers(plan: Plan) -> bool:
    """Whether blocks have a tile of the head that have none of the last qkv, which reads the version before. See vectors.cuh."""
    *_, qkv, head = (s for s in plan.stages if s.name in ("qkv", "head"))
    return any(tiles and not others for tiles, others in zip(head.count, qkv.count, strict=True))


def place_buffers(plan: Plan) -> Places:
    """Lay out the exchange memory."""
    t, kv, columns = plan.target, plan.kv, plan.columns
    buffers: dict[str, int] = {}
    moments: dict[str, int] = {}
    flags: dict[str, int] = {}
    plain: dict[str, int] = {}
    total = 0

    def take(words: int) -> int:
        nonlocal total
        at = total
        total += round_up(words, FLAG_ALIGNMENT)
        return at

    def is_plain(b: Buffer) -> bool:
        """Whether all its readers have room for it: in registers, or of several columns in shared memory."""
        geometries = [s.geometry for s in plan.stages if s.geometry and s.reads[0] == b.name]
        return b.kind == "half" and (columns == 1 or all(panel(plan, g).buffers == 0 for g in geometries))

    for b in sorted(plan.buffers, key=lambda b: not is_plain(b)):
        values = round_up(b.values, t.tile_rows)
        if b.kind == "token":
            words = columns * (4 * (1 + PART_WORDS) * t.workers + LIST_WORDS) + (4 if columns > 1 else shortlist_words(t))
        elif b.name == "partials":
            words = (t.workers * pieces(plan) if columns == 1 else most_units(plan)) * piece_words(plan)
        elif b.kind == "float":
            words = columns * values
        else:  # readers' columns, padding included, and those in the place of fragments that short warps lack
            readers = [s.geometry for s in plan.stages if s.geometry and s.reads[0] == b.name]
            values = max(g.columns + g.fragment_columns * (g.short_warps > 0) for g in readers)
            words = round_up(values, CELL) * room(plan, b.name) // 4
            if is_plain(b):
                plain[b.name] = round_up(words, FLAG_ALIGNMENT)
                words = copies(plan) * VERSIONS * plain[b.name]
            else:
                flags[b.name] = take(t.exchange_copies * flag_stride(plan))
        buffers[b.name] = take(words)
    for b in plan.buffers:
        if b.moment:
            moments[b.name] = take(copies(plan) * moment_stride(plan))
    appended = take(2 * columns * kv.heads if columns > 1 else 0)
    return Places(buffers, moments, plain, flags, appended, total)


def moment_stride(plan: Plan) -> int:
    """Words from one copy of a vector's sums of squares to the next."""
    return round_up(plan.target.workers * plan.columns, FLAG_ALIGNMENT)


def flag_stride(plan: Plan) -> int:
    """Words from one copy of a buffer's flags to the next."""
    return round_up(plan.target.workers, FLAG_ALIGNMENT)


def written_rows(stage: Stage, tile_rows: int) -> int:
    """Rows of a tile of what a stage writes, as a vector."""
    return tile_rows // 2 if stage.linear and stage.linear.epilogue == "swiglu" else tile_rows


def writer_of(plan: Plan, buffer: str) -> Stage:
    """The first stage that writes a buffer."""
    return next(s for s in plan.stages if s.writes == buffer)


def run(plan: Plan) -> int:
    """Values of a column that follow each other in a vector: of few columns one tile, so that these make a sector."""
    return plan.target.tile_rows if plan.columns <= FEW_COLUMNS else CELL


def room(plan: Plan, buffer: str) -> int:
    """For how many columns a vector has room: for more than one where blocks would share sectors, since they would wait for each other.

    A tile of half the rows is one of many of a block, which may lie close together.
    """
    whole = written_rows(writer_of(plan, buffer), plan.target.tile_rows) == plan.target.tile_rows
    return SECTOR // (2 * run(plan)) if whole and plan.columns == 1 else plan.columns


def writers(plan: Plan, buffer: str) -> int:
    """Blocks that hand on a part of a buffer, in every layer alike."""
    return max(sum(count > 0 for count in s.count) for s in plan.stages if s.writes == buffer)


def place_vectors(plan: Plan) -> Vectors:
    """Lay out norm weights and biases; vectors of a stage are padded to its tiles."""
    bias: dict[str, int] = {}
    gamma: dict[str, int] = {}
    size = 0
    for stage in plan.layer_stages(0):
        if stage.linear is None:
            continue
        length = stage.tiles * plan.target.tile_rows
        if any(b.bias for b in stage.linear.blocks):
            bias[stage.name] = size
            size += length
        if stage.publish_gamma:
            gamma[stage.name] = size
            size += length
    query_norm = key_norm = size
    if plan.config.qk_norm:
        key_norm = query_norm + plan.kv.head_dim
        size = key_norm + plan.kv.head_dim
    total = size * plan.config.num_layers
    return Vectors(size, bias, gamma, query_norm, key_norm, total, total + round_up(plan.config.hidden_size, plan.target.tile_rows))


def prefill_places(plan: Plan) -> tuple[dict[str, int], int]:
    """Where what `PREFILL_PARAMETERS` calls places has each linear stage of a layer, by name, and how many words a layer takes."""
    found, total = {}, 0
    for stage in plan.layer_stages(0):
        if stage.geometry:
            found[stage.name] = total
            total += 2 * stage.tiles * stage.geometry.parts
    return found, total


def prefill_splits(plan: Plan) -> dict[str, int]:
    """In how many splits the kernel for long prompts has the columns of a layer's linear stages: as few tokens give all blocks work."""
    return {
        s.name: max(1, min(MOST_SPLITS, plan.target.workers // ceil_div(s.tiles, PREFILL_TILES), s.geometry.columns // LEAST_SPLIT))
        for s in plan.layer_stages(0)
        if s.geometry
    }


def most_shares(plan: Plan) -> int:
    """Blocks that take a split each of the pieces of a stage, at most."""
    return 2 * plan.target.workers if max(prefill_splits(plan).values()) > 1 else 0


def prefill_shares(plan: Plan) -> tuple[dict[str, int], int]:
    """Where what `PREFILL_PARAMETERS` calls shared has each linear stage of a layer, by name, and how many words a layer takes."""
    found, total, most = {}, 0, most_shares(plan)
    for name, splits in prefill_splits(plan).items():
        found[name] = total
        total += most // splits if splits > 1 else 0
    return found, total


# Which of PREFILL_PARAMETERS a stage multiplies.
PREFILL_READS = {"qkv": "hidden", "attention_output": "attended", "gate_up": "hidden", "down": "inner"}


def prefill_octets(plan: Plan) -> dict[str, int]:
    """Octets of columns, padding included, of the vectors that stages multiply."""
    found: dict[str, int] = {}
    for stage in plan.layer_stages(0):
        if stage.geometry:
            vector = PREFILL_READS[stage.name]
            found[vector] = max(found.get(vector, 0), ceil_div(stage.geometry.columns, OCTET))
    return found


def prefill_story(plan: Plan) -> list[str]:
    """What all blocks of the kernel for long prompts do, stage by stage. NOTE: of the last layer, only its keys and values are wanted."""
    text = [
        "// All tokens, as every block walks them.\nstruct Story {",
        "  template <class Block>\n  static FF_DEVICE void run(Block& block) {",
        "    const PrefillParams& p = block.p;",
        "    EmbedPrefill<Model, stage::Embed>::run(block);",
        "    if (!block.meet(stage::Embed::kWhere, 0)) return;",
        "#pragma unroll 1\n    for (u32 layer = 0; layer < Model::kLayers; layer++) {",
    ]
    meet = "      if (!block.meet(stage::{}::kWhere, layer)) return;"
    last_residual = [s.name for s in plan.layer_stages(0) if s.publish_gamma][-1]
    moments = f"layer ? PrefillParts<stage::{camel(last_residual)}> : 1"  # in how many parts the sums of squares are
    for s in plan.layer_stages(0):
        name = camel(s.name)
        if s.kind == "attention":
            last = "      if (layer + 1 == Model::kLayers) return;"
            text += ["      CachePrefill<Model>::run(block, layer);", last, meet.format(name)]
            text.append("      AttentionPrefill<Model>::run(block, layer);")
        elif s.linear:
            x = PREFILL_READS[s.name]
            text.append(f"      LinearPrefill<Model, stage::{name}>::run(block, layer, p.{x}, Model::k{camel(x)}Octets, {moments});")
            if s.linear.epilogue == "residual":
                moments = f"PrefillParts<stage::{name}>"
        else:
            continue
        text.append(meet.format(name))
    kernel = 'extern "C" __global__ void __launch_bounds__(Prefill<Model>::kThreads, 1) flashformer_prefill'
    numbers = {"kThreads": PREFILL_THREADS, "kTokens": PREFILL_TOKENS, "kLeastTiles": PREFILL_TILES}
    agreed = f"static_assert({' && '.join(f'Prefill<Model>::{name} == {value}' for name, value in numbers.items())});"
    return [*text, "    }\n  }\n};\n", agreed, f"{kernel}(const __grid_constant__ PrefillParams p) {{", "  prefill<Model, Story>(p);\n}"]


def generate(plan: Plan, trace: bool = False, prefill: bool = False) -> Source:
    """The kernel's source text; `trace` adds timestamps. prefill: that of the kernel for long prompts on a plan's weights.

    Raises PlanError where a plan exceeds what the kernel's number formats hold.
    """
    c, t, kv = plan.config, plan.target, plan.kv
    places = place_buffers(plan)
    buffers, moments = places.buffers, places.moments
    vectors = place_vectors(plan)
    embed = plan.stages[0]
    body = plan.layer_stages(0)
    head = next(s for s in plan.stages if s.name == "head")
    combine = next(s for s in body if s.kind == "combine")
    residuals = [s.name for s in body if s.publish_gamma]
    names = (STREAM, *(s.name for s in (embed, *body, head)), "token")
    words = 3 + 2 * c.num_layers
    slot, several = slot_bytes(plan), plan.columns > 1
    for stage in plan.stages:
        if stage.count and (max(stage.count) >= 1 << TILE_BITS or stage.tiles >= 1 << (32 - TILE_BITS)):
            raise PlanError(f"{stage.name}: {max(stage.count)} tiles are too many for one of {t.workers} blocks")

    model: list[tuple[str, str, object]] = [
        ("int", "kLayers", c.num_layers),
        ("int", "kHidden", c.hidden_size),
        ("u32", "kVocab", c.vocab_size),
        ("int", "kHeads", c.num_heads),
        ("int", "kKvHeads", kv.heads),
        ("int", "kHeadDim", kv.head_dim),
        ("int", "kHeadPad", kv.head_pad),
        ("int", "kGroup", kv.group),
        ("int", "kVirtualHeads", kv.virtual_heads),
        ("int", "kVirtualGroup", kv.virtual_group),
        ("int", "kVirtualSplits", kv.virtual_heads // kv.heads),
        ("bool", "kHeadNorm", c.qk_norm),
        ("float", "kHeadEps", c.norm_eps),
        ("float", "kScoreScale", math.log2(math.e) / math.sqrt(c.head_dim)),
        ("int", "kQueryNorm", vectors.query_norm),
        ("int", "kKeyNorm", vectors.key_norm),
        ("int", "kLayerVectors", vectors.layer_size),
        ("u32", "kWorkers", t.workers),
        ("int", "kOwnedTiles", max(embed.count)),
        ("u32", "kOwners", sum(c > 0 for c in embed.count)),
        ("int", "kTileWords", words),
        ("int", "kHeadTiles", words - 1),
        ("int", "kPieces", pieces(plan)),
        ("int", "kPieceWords", piece_words(plan)),
        ("u32", "kKvBlockBytes", kv.block_bytes),
        *cache_facts(kv),
        ("u32", "kKvChunkBlocks", min(slot // kv.block_bytes, 16)),
        ("u32", "kKvMinBlocks", t.kv_min_blocks),
        ("u32", "kKvSlackBlocks", max(t.kv_slack_bytes // kv.block_bytes, 1)),
        ("int", "kFinishers", t.finisher_warps),
        ("int", "kThreads", threads(plan)),
        ("bool", "kBulkCopy", t.bulk_copy),
        ("int", "kSharedBytes", t.shared_bytes),
        ("u32", "kChunkUnit", t.chunk_unit),
        ("u32", "kSlotBytes", slot),
        ("int", "kMostSlots", MAX_SLOTS // 2 if slot == SLOT_BYTES else MAX_SLOTS),
        ("u32", "kBegins", BEGINS),
        ("u32", "kCalmWindow", t.calm_window),
        ("u32", "kPrefetchChunks", t.prefetch_chunks * SLOT_BYTES // slot),
        ("int", "kPrefetchCycles", t.prefetch_cycles),
        ("u32", "kFirstLook", t.first_look_cycles),
        ("int", "kCopies", copies(plan)),
        ("int", "kMomentStride", moment_stride(plan)),
        ("u32", "kRun", run(plan)),
        ("bool", "kTrace", trace),
        ("int", "kColumns", plan.columns),
        ("int", "kColumnGroups", ceil_div(plan.columns, 4)),
        ("bool", "kWide", plan.columns == WIDE),
        ("int", "kPanelBytes", max(panel(plan, s.geometry).nbytes for s in plan.stages if s.geometry) if several else 0),
        ("u32", "kVersions", VERSIONS),
        ("int", "kFlagCopies", t.exchange_copies),
        ("int", "kFlagStride", flag_stride(plan)),
        ("int", "kQkvWords", round_up(plan.buffer("qkv").values, t.tile_rows)),
        ("int", "kAppended", places.appended),
        ("u32", "kKvPieces", most_pieces(plan)),
        ("u32", "kPieceBlocks", PIECE_BLOCKS),
        ("u32", "kPieceStep", piece_step(plan)),
        ("int", "kStages", len(names)),
        ("u32", "kStreamWhere", names.index(STREAM)),
        ("u32", "kTokenWhere", names.index("token")),
    ]
    tape_places, layer_places = prefill_places(plan)
    splits, (shares, layer_shares) = prefill_splits(plan), prefill_shares(plan)
    if prefill:
        model.append(("u32", "kLayerPlaces", layer_places))
        model += [("u32", "kLayerShares", layer_shares), ("u32", "kMostShares", most_shares(plan))]
        model += [("u32", f"k{camel(vector)}Octets", octets) for vector, octets in prefill_octets(plan).items()]
    value = "Float16" if c.dtype == "float16" else "Bfloat16"
    text = [f"// {c.architecture}: {c.num_layers} layers, {t.description}, {t.workers} blocks. Generated: the headers compute."]
    text.append('#include "prelude.cuh"\n')
    text += struct("Sampling", SAMPLING)
    text += struct("Sequence", OWN_SEQUENCE)
    text += struct("Params", PARAMETERS)
    if prefill:
        text += struct("PrefillParams", PREFILL_PARAMETERS)
    text.append('#include "attention_prefill.cuh"\n#include "linear_prefill.cuh"\n' if prefill else '#include "kernel.cuh"\n')
    text.append("struct Model {")
    text.append(f"  using Value = {value};")
    text.append(f"  using KvType = {camel(kv.type)};")
    text += constants(model)
    *steps, (_, least) = t.window
    window = "".join(f"waiting < {count * SLOT_BYTES // slot} ? {nbytes} : " for count, nbytes in steps) + str(least)
    text.append(f"  static FF_DEVICE u32 window(u32 waiting) {{ return {window}; }}  // bytes in flight")
    text.append("};\n")

    rounds = buffers["token"] + 4 * t.workers * plan.columns + (4 if several else 0)
    lists = rounds + 4 * PART_WORDS * t.workers * plan.columns
    shortlists = lists + LIST_WORDS * plan.columns

    shapes: dict[str, list[object]] = {}  # of the linear stages: all that consumers know of them but `Inputs` (panel.cuh)

    def describe(stage: Stage, tile_word: str = "0") -> None:
        text.append(f"struct {camel(stage.name)} {{")
        facts: list[tuple[str, str, object]] = [("u32", "kWhere", names.index(stage.name))]
        if stage.linear and stage.geometry:
            g = stage.geometry
            facts += [
                ("int", "kColumns", round_up(stage.linear.columns, 4)),
                ("int", "kWarpsColumns", g.warps_columns),
                ("int", "kWarpsRows", g.warps_rows),
                ("int", "kFragments", g.fragments),
                ("int", "kShortWarps", g.short_warps),
                ("int", "kFragmentColumns", g.fragment_columns),
                ("bool", "kCoded", g.format != PLAIN),
                ("int", "kParts", g.parts),
                ("u32", "kStack", g.stack),
                ("bool", "kNorm", stage.linear.eps > 0),
                ("float", "kEps", stage.linear.eps),
                ("int", "kBias", vectors.bias.get(stage.name, -1) if stage.layer >= 0 else -1),
                ("bool", "kNextLayer", stage.name == "down"),
                ("bool", "kNewcomers", stage is head and newcomers(plan)),
            ]
            if not several and stage is head:
                facts.append(("int", "kEarly", shortlists + t.workers * SHORTLIST_WORDS))
            if several:
                p = panel(plan, g)
                facts += [
                    ("int", "kTogether", g.together),
                    ("int", "kCells", sum(p.steps)),
                    ("int", "kStepCells", p.steps[0]),
                    ("int", "kHeldSteps", p.held),
                    ("int", "kHeldCells", sum(p.steps[: p.held])),
                    ("int", "kBuffers", p.buffers),
                    ("bool", "kSlices", p.slices),
                ]
            if prefill and stage.layer >= 0:
                facts += [("u32", "kTiles", stage.tiles), ("u32", "kPlaces", tape_places[stage.name])]
                facts += [("u32", "kSplits", splits[stage.name]), ("u32", "kShares", shares[stage.name])]
                if stage.publish_gamma:
                    facts.append(("int", "kGamma", vectors.gamma[stage.name]))
            if g.format != PLAIN:
                text.extend(describe_format(g.format))
            text.append(f"  static constexpr Epilogue kEpilogue = Epilogue::k{stage.linear.epilogue.capitalize()};")
        if stage.kind == "embed":
            facts.append(("int", "kGamma", vectors.embed_gamma))
            last = (c.num_layers - 2) * vectors.layer_size + vectors.gamma[residuals[-1]]  # what the layer before it multiplies by
            facts.append(("int", "kLastGamma", last if c.num_layers > 1 else vectors.embed_gamma))
        if stage.publish_gamma:
            # The norm weights that the residual stage after this one will need, in their layer.
            following = residuals[(residuals.index(stage.name) + 1 if stage.name in residuals else 0) % len(residuals)]
            facts += [("int", "kMomentOut", moments[stage.writes]), ("int", "kNextGamma", vectors.gamma[following])]
        if stage.reads[0] in moments:
            facts.append(("int", "kMomentIn", moments[stage.reads[0]]))
        if stage.reads and stage.reads[0] in buffers:
            facts.append(("int", "kInput", buffers[stage.reads[0]]))
        for end, buffer in (("In", stage.reads[0]), ("Out", stage.writes)):
            if buffer not in places.flags and buffer not in places.plain:
                continue
            facts += [
                ("int", f"k{end}Room", room(plan, buffer)),
                ("u32", f"k{end}Blocks", writers(plan, buffer)),
                ("u32", f"k{end}Writes", sum(s.writes == buffer for s in plan.stages)),  # versions of a pass
                ("int", f"k{end}Version", places.plain.get(buffer, 0)),  # words
            ]
            if buffer in places.flags:
                facts.append(("int", f"kFlags{end}", places.flags[buffer]))
            if end == "In":
                writer = writer_of(plan, buffer)
                facts.append(("u32", "kInRows", writer.tiles * written_rows(writer, t.tile_rows)))
            else:
                facts.append(("u32", "kTilePairs", written_rows(stage, t.tile_rows) // 2))
                if stage.linear is None:
                    facts.append(("bool", "kNextLayer", False))
        facts.append(("int", "kOutput", buffers[stage.writes]))
        if stage.geometry:
            known = {"kNewcomers", "kInBlocks", "kInRows"}
            shapes[stage.name] = [stage.geometry, stage.reads[0] in places.plain, *(fact for fact in facts if fact[1] in known)]
        text.append(f"  static FF_DEVICE int tile_word(u32 layer) {{ return {tile_word}; }}")
        text.extend(constants(facts))
        text.append("};\n")

    text.append("namespace stage {")
    describe(embed)
    tile_words = {"combine": "1", "qkv": "2 + 2 * layer", "gate_up": "3 + 2 * layer"}
    for stage in body:
        describe(stage, tile_words.get(stage.name, "0"))
    describe(head, "Model::kHeadTiles")
    text.append("struct Token {")
    token: list[tuple[str, str, object]] = [
        ("u32", "kWhere", names.index("token")),
        ("int", "kOutput", buffers["token"]),
        ("int", "kRounds", rounds),
        ("int", "kRoundsStride", 4 * PART_WORDS * t.workers),
        ("int", "kLists", lists),
        ("int", "kListsStride", LIST_WORDS),
        ("int", "kPartWords", PART_WORDS),
        ("u32", "kRoundTags", ROUND_TAGS),
    ]
    if not several:
        token += [("int", "kShortlists", shortlists), ("u32", "kShortlist", SHORTLIST)]
    text += constants(token)
    text.append("};\n}  // namespace stage\n")
    assert combine.writes in buffers
    if prefill:
        return Source("\n".join([*text, *prefill_story(plan)]) + "\n", names, vectors, places.size, 0)

    kind = "Columns" if several else ""
    half = {b.name for b in plan.buffers if b.kind == "half"}
    calls = {name: f"{name.capitalize()}{kind}" for name in ("linear", "attention", "combine")}
    text.append("// One token, as every role walks it.\nstruct Story {")
    text.append("  template <class Role>\n  static FF_DEVICE void token(Role& role, u32 step) {")
    text.append(f"    Embed{kind}<Model, stage::Embed>::run(role, step);")
    first = "0" if several else "role.first_layer(step)"
    text.append(f"#pragma unroll 1\n    for (u32 layer = {first}; layer < Model::kLayers; layer++) {{")

    def forget(following: Stage, stages: Sequence[Stage], layer: str) -> str:
        names = ", ".join(f"stage::{camel(s.name)}" for s in (following, *stages))
        return f"Forget<Model, {names}>::run(role, step, {layer});"

    left = deque(body)
    while left:
        s = left.popleft()
        if s.name == "attention_output":
            text.append("      " + forget(s, [other for other in body if other.writes in half], "layer"))
        call = f"{calls[s.kind]}<Model, stage::{camel(s.name)}"
        if several and left and s.name in shapes and shapes[s.name] == shapes.get(left[0].name):
            call = f"TwinColumns<Model, stage::{camel(s.name)}, stage::{camel(left.popleft().name)}"
        text.append(f"      {call}>::run(role, step, layer);")
    text.append("    }")
    text.append("    " + forget(head, body[-1:], "Model::kLayers"))
    text.append(f"    if (role.wants_head(step)) Linear{kind}<Model, stage::Head>::run(role, step, Model::kLayers);")
    text.append(f"    Sample{kind}<Model, stage::Token>::run(role, step);")
    text.append("  }\n};\n")
    text.append(f'extern "C" __global__ void __launch_bounds__({threads(plan)}, 1) flashformer_decode(const __grid_constant__ Params p) {{')
    text.append("  decode<Model, Story>(p);\n}")
    plain_words = copies(plan) * VERSIONS * sum(places.plain.values())
    return Source("\n".join(text) + "\n", names, vectors, places.size, plain_words)


def include_paths() -> list[Path]:
    """Folders that the generated source includes from."""
    return [HEADERS, OPERATORS]


def headers() -> dict[str, str]:
    """Every header's text by its path in the package: all of them belong to a kernel's cache key."""
    root = HEADERS.parent.parent
    paths = (*HEADERS.glob("*.cuh"), *OPERATORS.glob("*.cuh"), *OPERATORS.glob("*.hpp"))
    return {str(p.relative_to(root)): p.read_text() for p in sorted(paths)}
