"""Proof, on the plan, that a kernel made from it cannot go wrong: every weight lies on one tape, once; nothing is read before it
is written; nothing is overwritten while somebody may still read it; every wait has somebody who ends it.

Each function proves one property and raises PlanError naming the stage, buffer or worker at fault. Later ones rely on earlier
ones. Nothing here looks at how a plan was made.

Why one copy of each buffer is enough on a GPU. Whoever publishes a part of a stage has read the stage's input before. A linear
stage reads all of it, so whatever *anybody* publishes there comes after *everything* that was published into its input, and so
on back through the token: all stages before it are done. Attention and combine read some heads only: what is published there
comes after what *somebody* published in the stage before. A worker without tiles in a stage neither waits nor publishes and may
be anywhere, so nothing may depend on it: only owners of the residual publish its sums of squares. The token's words, which every
worker publishes, have two copies; as every worker waits for all of them, they also end all stages of their token.
Vectors that all read (`half`) are plain values, whole when none is absent, or of several columns when all flags are raised. Whoever
publishes a part has read all of its input, and all it needs of it: so the same holds, also where a vector is read again and again during a
stage. What becomes absent for a later version is the version before the last that the same worker has published: all have read it. See
vectors.cuh.
A worker that appends to the KV cache has a part of attention whose result is awaited, so that it has read its keys and values before
the next ones come.
On a CPU all workers meet after every stage.
"""

from __future__ import annotations

from collections import Counter

import numpy as np

from .errors import PlanError
from .formats import PLAIN
from .fuse import LinearSpec
from .geometry import LARGE_SHARE, SCALE_ROOM, Geometry, ceil_div, round_up
from .plan import BLOCK_POSITIONS, COLUMN_HEADS, COPY_UNIT, HEAD_MULTIPLE, KV_TYPES, Plan, Stage
from .tape import block_rows, lay_tapes
from .validate_tape import chunk_bytes, validate_tape, where

# The stages as the kernels walk them: (name, kind, what a linear stage does with its result).
FIRST = (("embed", "embed", ""),)
LAYER = (
    ("qkv", "linear", "store"),
    ("attention", "attention", ""),
    ("combine", "combine", ""),
    ("attention_output", "linear", "residual"),
    ("gate_up", "linear", "swiglu"),
    ("down", "linear", "residual"),
)
LAST = (("head", "linear", "logits"), ("token", "token", ""))


def validate(plan: Plan) -> None:
    """Prove a plan and its tapes. Raises PlanError for the first property that does not hold."""
    for prove in (
        _stages_in_order, _buffers_known, _tiles_owned_once, _owners_fixed, _geometry_fits, _weights_used_once, _groups_padded,
        _kv_fits, _heads_fit, _vectors_fit, _exchanges_chained, _nothing_overwritten, _versions_told_apart, _moments_handed_on,
        _padding_owned_by_awaited, _layers_alike,
    ):  # fmt: skip
        prove(plan)
    validate_tape(plan, lay_tapes(plan))


def _linear(plan: Plan) -> list[tuple[Stage, LinearSpec, Geometry]]:
    """The linear stages."""
    return [(s, s.linear, s.geometry) for s in plan.stages if s.linear and s.geometry]


def _owns_residual(stage: Stage) -> bool:
    """Whether a stage sets or adds to the residual, which stays with its worker."""
    return stage.kind == "embed" or (stage.linear is not None and stage.linear.epilogue == "residual")


def _slot_bytes(plan: Plan) -> int:
    """Bytes of a slot of the ring through which a GPU's workers read; on a CPU there is none, and no limit."""
    if plan.target.kind == "cpu":
        return 1 << 31
    from .backends.cuda.codegen import LARGEST_SLOT_BYTES, SLOT_BYTES

    return SLOT_BYTES if all(g.format == PLAIN for _, _, g in _linear(plan)) else LARGEST_SLOT_BYTES


# --- Stages and their workers ----------------------------------------------------------------------------------------------


def _stages_in_order(plan: Plan) -> None:
    """The kernels' walk: embed, the same stages in each layer, layer after layer, head, token."""
    walk = [(-1, *s) for s in FIRST] + [(layer, *s) for layer in range(plan.config.num_layers) for s in LAYER] + [(-1, *s) for s in LAST]
    for i, (layer, name, kind, epilogue) in enumerate(walk[: len(plan.stages)]):
        s = plan.stages[i]
        have = (s.layer, s.name, s.kind, s.linear.epilogue if s.linear else "")
        if have != (layer, name, kind, epilogue) or (s.linear is None) != (s.geometry is None):
            raise PlanError(f"stage {i} is {where(s)} ({s.kind}); the kernel comes to {name} ({kind}) of layer {layer} there")
    if len(plan.stages) != len(walk):
        raise PlanError(f"the plan has {len(plan.stages)} stages; the kernel walks through {len(walk)}")


def _buffers_known(plan: Plan) -> None:
    """Every stage reads one buffer and writes one (the last: none) of those that the plan has, each name once."""
    names = [b.name for b in plan.buffers]
    if len(set(names)) < len(names):
        raise PlanError(f"two buffers are called {Counter(names).most_common(1)[0][0]!r}")
    for s in plan.stages:
        used = (*s.reads, s.writes) if s.kind != "token" else s.reads
        if len(s.reads) != 1 or bool(s.writes) == (s.kind == "token"):
            raise PlanError(f"{where(s)} reads {len(s.reads)} buffers and writes {s.writes!r}; a stage reads one and writes one")
        for name in used:
            if name not in names:
                raise PlanError(f"{where(s)} uses {name!r}, which is no buffer")


def _tiles_owned_once(plan: Plan) -> None:
    """The workers' runs of tiles follow each other from the first tile to the last: none is lost, none is owned twice."""
    workers = plan.target.workers
    stages = [s for s in plan.stages if s.kind not in ("attention", "token")]
    for s in stages:
        if len(s.first) != workers or len(s.count) != workers:
            raise PlanError(f"{where(s)} gives tiles to {len(s.count)} workers, not {workers}")
        if s.tiles < 1:
            raise PlanError(f"{where(s)} has no tiles: whoever reads {s.writes} would wait forever")
    first, count, tiles = (np.array([getattr(s, field) for s in stages]) for field in ("first", "count", "tiles"))
    end = np.cumsum(count, axis=1)
    wrong = (count < 0) | (first != end - count)
    if wrong.any():
        at, w = np.argwhere(wrong)[0]
        raise PlanError(
            f"{where(stages[at])}: worker {w} owns {count[at, w]} tiles from {first[at, w]} on; those before it end at "
            f"{end[at, w] - count[at, w]}: a tile is lost or owned twice"
        )
    if (end[:, -1] != tiles).any():
        at = int((end[:, -1] != tiles).argmax())
        raise PlanError(f"{where(stages[at])}: the workers own {end[at, -1]} of {tiles[at]} tiles")


def _owners_fixed(plan: Plan) -> None:
    """The residual of a row stays with the worker that embedded it; combine has one range for all layers, too."""
    fixed: dict[bool, Stage] = {}
    for s in plan.stages:
        if not _owns_residual(s) and s.kind != "combine":
            continue
        other = fixed.setdefault(_owns_residual(s), s)
        if (s.first, s.count) != (other.first, other.count):
            w = next(w for w in range(len(s.count)) if (s.first[w], s.count[w]) != (other.first[w], other.count[w]))
            raise PlanError(f"{where(s)}: worker {w} does not own the tiles that it owns in {where(other)}: they have moved")


# --- Weights ---------------------------------------------------------------------------------------------------------------


def _geometry_fits(plan: Plan) -> None:
    """Fragments cover all columns, warps share them as the target has them, and a chunk fits a slot of the ring."""
    t, slot = plan.target, _slot_bytes(plan)
    for s, spec, g in _linear(plan):
        sizes = g.part_sizes() if 1 <= g.parts <= g.fragments else (0,)
        chunk = max(chunk_bytes(g, g.chunk_tiles), default=0)
        most = t.max_fragments * t.fragment_columns // g.fragment_columns
        largest = t.part_fragments * t.tile_rows * t.fragment_columns * 2 * (1 + SCALE_ROOM) * LARGE_SHARE
        in_chunk = max(int(largest) // g.fragment_bytes, 1)
        ends = (np.arange(g.warps_columns)[:, None] * g.fragments + np.cumsum(sizes)).reshape(-1) * g.fragment_columns
        for wrong, what in (
            (not t.runs(g.format), f"{t.name} has no kernel for {g.format.name}"),
            (
                (g.tile_rows, g.fragment_columns, g.chunk_unit) != (t.tile_rows, t.columns_of(g.format), t.chunk_unit),
                f"its fragments are not those of {t.name}",
            ),
            (g.format.group > 0 and spec.column_group != spec.column_stride, f"groups of {g.format.group} columns with padding between"),
            (g.format.group > 0 and (ends[:-1] % g.format.group != 0).any(), f"a part ends inside a group of {g.format.group} columns"),
            (g.warps_rows < 1 or g.warps_rows * g.warps_columns != t.warps, f"it does not share out {t.warps} warps"),
            (not 1 <= g.fragments <= most, f"{g.fragments} fragments a warp, which holds 1 to {most}"),
            (not 0 <= g.short_warps < g.warps_columns, f"{g.short_warps} of {g.warps_columns} warps are short"),
            (g.short_warps > 0 and (t.kind, g.format) != ("cuda", PLAIN), f"short warps of {g.format.name}, on {t.name}"),
            (g.short_warps > 0 and g.fragments == 1, "short warps have no fragments"),
            (g.stack < 1 or (g.stack > 1 and g.parts > 1), f"{g.stack} groups in a chunk of one part of {g.parts}"),
            (g.together < 1 or (g.together > 1 and g.parts == 1), f"batches of {g.together} groups of {g.parts} parts"),
            (sum(sizes) != g.fragments, f"{g.fragments} fragments cannot be read in {g.parts} parts"),
            (max(sizes) > in_chunk, f"parts of {max(sizes)} fragments; a chunk holds {in_chunk} of a warp"),
            (chunk > slot, f"chunks of {chunk} bytes; a slot of the ring holds {slot}"),
            (g.columns < spec.columns, f"{g.columns} of {spec.columns} columns are covered"),
            (g.fragment_bytes % t.chunk_unit != 0, f"fragments of {g.fragment_bytes} bytes are not aligned to {t.chunk_unit}"),
        ):
            if wrong:
                raise PlanError(f"{where(s)}: wrong geometry: {what}")


def _weights_used_once(plan: Plan) -> None:
    """Every weight of the model is used, once, in its whole shape. An embedding that is the head too is a table besides."""
    used: set[str] = set()

    def use(s: Stage, name: str, *shape: int) -> None:
        if plan.weights.get(name) != shape:
            known = f"has the shape {list(plan.weights[name])}" if name in plan.weights else "is no weight of this model"
            raise PlanError(f"{where(s)} reads {name} as {list(shape)}; it {known}")
        if name in used:
            raise PlanError(f"{where(s)} reads {name}, which another stage reads, too: a weight is used once")
        used.add(name)

    for s in plan.stages:
        if s.publish_gamma:
            use(s, s.publish_gamma, plan.config.hidden_size)
        for name in s.head_norms:
            use(s, name, plan.config.head_dim)
        for block in s.linear.blocks if s.linear else ():
            use(s, block.weight, block.rows, s.linear.columns_used if s.linear else 0)
            if block.bias:
                use(s, block.bias, block.rows)
    table = (plan.config.vocab_size, plan.config.hidden_size)
    if plan.weights.get(plan.embedding) != table:
        raise PlanError(f"the embedding table {plan.embedding!r} is no weight of the shape {list(table)}")
    tied = [g.format for _, spec, g in _linear(plan) if any(b.weight == plan.embedding for b in spec.blocks)]
    if plan.target.plain_table:
        tied = [PLAIN]
    if not plan.target.runs(plan.embedding_format) or any(format != plan.embedding_format for format in tied):
        raise PlanError(f"the rows of {plan.embedding} cannot be looked up in {plan.embedding_format.name}")
    if lost := sorted(plan.weights.keys() - used - {plan.embedding}):
        raise PlanError(f"no stage reads the weight {lost[0]}" + (f", nor {len(lost) - 1} others" if lost[1:] else ""))


def _groups_padded(plan: Plan) -> None:
    """Rows and columns lie in whole groups with room for each; gate and up go together row by row."""
    for s, spec, _ in _linear(plan):
        for what, values, group, stride in (
            ("columns", spec.columns_used, spec.column_group, spec.column_stride),
            *((f"rows of {b.weight}", b.rows, b.group, b.stride) for b in spec.blocks),
        ):
            if not 1 <= group <= stride or values < 1 or values % group:
                raise PlanError(f"{where(s)}: {values} {what} do not lie in groups of {group}, {stride} apart")
        halves = [spec.rows // 2] * 2
        if spec.interleave != (spec.epilogue == "swiglu") or (spec.interleave and [b.rows for b in spec.blocks] != halves):
            raise PlanError(f"{where(s)}: swiglu, and it alone, takes a gate and an up projection of one size, row by row")


# --- Attention -------------------------------------------------------------------------------------------------------------


def _kv_fits(plan: Plan) -> None:
    """The KV cache has the model's heads, a place for every query head of a group, and blocks for every position."""
    c, kv, slot = plan.config, plan.kv, _slot_bytes(plan)
    splits, rest = divmod(kv.virtual_heads, max(kv.heads, 1))
    held = (splits - 1) * kv.virtual_group  # by all splits but the last, which has the rest of the group
    counted = plan.target.workers * (kv.blocks + 1) * kv.virtual_heads
    for wrong, what in (
        ((kv.heads, kv.head_dim) != (c.num_kv_heads, c.head_dim), f"{kv.heads} heads of {kv.head_dim} are not the model's"),
        (kv.group * kv.heads != c.num_heads, f"{kv.heads} groups of {kv.group} query heads are not the model's {c.num_heads}"),
        (kv.head_pad != round_up(kv.head_dim, HEAD_MULTIPLE), f"heads of {kv.head_dim} values are not padded to {kv.head_pad}"),
        (rest != 0 or splits < 1, f"{kv.virtual_heads} virtual heads are no multiple of {kv.heads}"),
        (not 1 <= kv.virtual_group <= COLUMN_HEADS, f"{kv.virtual_group} query heads at a time; {COLUMN_HEADS} fit"),
        (
            not held < kv.group <= held + kv.virtual_group,
            f"a group of {kv.group} query heads does not go into {splits} splits of {kv.virtual_group}",
        ),
        (kv.max_context != plan.max_context, f"made for {kv.max_context} positions, the plan for {plan.max_context}"),
        (not 1 <= plan.max_context <= c.max_positions, f"{plan.max_context} positions; the model supports 1 to {c.max_positions}"),
        (kv.blocks * BLOCK_POSITIONS < kv.max_context, f"{kv.blocks} blocks are too few for {kv.max_context} positions"),
        (kv.type not in KV_TYPES, f"its type is {kv.type!r}; known are {', '.join(KV_TYPES)}"),
        (kv.block_bytes % COPY_UNIT != 0, f"blocks of {kv.block_bytes} bytes cannot be copied {COPY_UNIT} at once"),
        (kv.block_bytes > slot, f"heads of {kv.head_dim} are too large: a block has {kv.block_bytes} bytes, a slot of the ring {slot}"),
        (plan.target.kind == "cuda" and counted >= 1 << 32, f"{plan.max_context} positions are more than 32 bits can share out"),
    ):
        if wrong:
            raise PlanError(f"KV cache: {what}")


def _heads_fit(plan: Plan) -> None:
    """q, k and v lie in the qkv vector as attention reads them, and its result as the output projection does."""
    kv = plan.kv
    heads = (kv.heads * kv.group, kv.heads, kv.heads)
    for s, spec, _ in _linear(plan):
        rows = [(b.rows, b.group, b.stride) for b in spec.blocks]
        if s.name == "qkv" and rows != [(n * kv.head_dim, kv.head_dim, kv.head_pad) for n in heads]:
            raise PlanError(f"{where(s)} does not make {heads[0]} heads of q and {kv.heads} of k and v, {kv.head_pad} rows each")
        if s.name == "attention_output" and (spec.column_group, spec.column_stride) != (kv.head_dim, kv.head_pad):
            raise PlanError(f"{where(s)} does not read heads of {kv.head_dim} values, {kv.head_pad} apart")


# --- Exchanges -------------------------------------------------------------------------------------------------------------


def _values(plan: Plan, s: Stage) -> tuple[int, int]:
    """(values that a stage hands on, values of a tile); attention's number is decided on the device, the token stage has none."""
    rows, kv = plan.target.tile_rows, plan.kv
    if s.linear is None:
        made = {"embed": plan.config.hidden_size, "combine": kv.heads * kv.group * kv.head_pad}
        return made.get(s.kind, 0), rows
    return (s.linear.rows // 2, rows // 2) if s.linear.interleave else (s.linear.rows, rows)


def _vectors_fit(plan: Plan) -> None:
    """A buffer has the values that its writers make, in all of their tiles, and that its readers wait for."""
    buffers = {b.name: b.values for b in plan.buffers if b.kind != "token"}
    for s in plan.stages:
        made, in_tile = _values(plan, s)
        if made and (buffers.get(s.writes, made) != made or s.tiles != ceil_div(made, in_tile)):
            raise PlanError(
                f"{where(s)} makes {made} values in {s.tiles} tiles of {in_tile}; {s.writes} has {buffers.get(s.writes, made)}: "
                "some would have no writer"
            )
        if s.linear and buffers.get(s.reads[0]) != s.linear.columns:
            raise PlanError(f"{where(s)} reads {s.linear.columns} values; {s.reads[0]} has {buffers.get(s.reads[0])}")


def _exchanges_chained(plan: Plan) -> None:
    """Each stage reads what the stage before it has handed on in the same token; embed reads the token before."""
    written: set[str] = set()
    for before, s in zip((plan.stages[-2], *plan.stages), plan.stages, strict=False):
        (name,) = s.reads
        if name != before.writes:
            if name not in written:
                raise PlanError(f"{where(s)} reads {name!r} before any stage of the token has written it")
            raise PlanError(f"{where(s)} reads {name}, but {where(before)} has handed on {before.writes}: an exchange is missing")
        written.add(s.writes)


def _nothing_overwritten(plan: Plan) -> None:
    """Whoever writes a buffer anew does so after everybody has read what was in it; see the beginning of this file."""
    done = 0  # so many stages are done when any worker publishes a part of the present one
    reader: dict[str, int] = {}  # the last stage that reads a buffer
    for i, s in enumerate(plan.stages[:-1]):
        if plan.target.kind == "cpu" or s.kind not in ("attention", "combine"):
            done = i
        reader[s.reads[0]] = i
        if s.writes != "token" and reader.get(s.writes, -1) >= done:
            other = plan.stages[reader[s.writes]]
            raise PlanError(f"{where(s)} writes {s.writes} while a worker may still read it in {where(other)}: reused too early")


def _versions_told_apart(plan: Plan) -> None:
    """Readers know a version by its tag, the layer in front of which it is handed on: each of a token's has its own."""
    seen: set[tuple[str, int]] = set()
    for s in plan.stages[:-2]:
        tag = 0 if s.kind == "embed" else s.layer + (s.name == "down")
        if (s.writes, tag) in seen:
            raise PlanError(f"{where(s)} writes {s.writes} a second time in front of layer {tag}: its readers cannot tell which")
        seen.add((s.writes, tag))


def _moments_handed_on(plan: Plan) -> None:
    """The sums of squares that a norm needs come from the owners of the residual, each of whom has a place for its own."""
    moment = {b.name: b.moment for b in plan.buffers}
    for s in plan.stages[:-1]:
        if _owns_residual(s) != bool(s.publish_gamma) or moment[s.writes] != _owns_residual(s):
            raise PlanError(f"{where(s)} must hand on sums of squares with {s.writes} if it owns the residual, and only then")
        if s.linear and s.linear.eps > 0 and not moment[s.reads[0]]:
            raise PlanError(f"{where(s)} norms {s.reads[0]}, which comes without sums of squares")
    owned = plan.stages[0].count
    # Where some own nothing, an owner's place is the number of its tile.
    if min(owned) == 0 and max(owned) > 1:
        raise PlanError(f"embed: worker {owned.index(max(owned))} owns {max(owned)} tiles and worker {owned.index(0)} none")


def _padding_owned_by_awaited(plan: Plan) -> None:
    """Nobody waits for a tile of padding, so its owner must be one for whom all wait before its input is overwritten.

    An owner of the residual is: a worker walks the stages in order, and its warps meet to hand on the sums of squares.
    """
    rows = plan.target.tile_rows
    for s, spec, _ in _linear(plan):
        if plan.target.kind == "cpu" or not spec.has_empty_tiles(rows):
            continue
        real = np.zeros(s.tiles, bool)
        for number in range(len(spec.blocks)):
            real[block_rows(s, number) // rows] = True
        owner = np.repeat(np.arange(len(s.count)), s.count)
        late = owner[~real & (np.array(plan.stages[0].count)[owner] == 0)]
        if len(late):
            raise PlanError(f"{where(s)}: worker {late[0]} owns a tile of padding and no part of the residual: nobody waits for it")


def _layers_alike(plan: Plan) -> None:
    """A kernel has one body for all layers: only weights, the owners of tiles and, on some targets, formats differ."""

    def pattern(s: Stage) -> tuple[object, ...]:
        spec = s.linear
        columns = spec and (spec.columns_used, spec.column_group, spec.column_stride, spec.eps)
        blocks = spec and tuple((b.rows, b.group, b.stride, bool(b.bias)) for b in spec.blocks)
        geometry = None if plan.target.mixed_layers else s.geometry
        return s.reads, s.writes, s.tiles, geometry, columns, blocks, len(s.head_norms)

    first = [pattern(s) for s in plan.layer_stages(0)]
    for i, s in enumerate(plan.stages[len(FIRST) : -len(LAST)]):
        if pattern(s) != first[i % len(LAYER)]:
            raise PlanError(f"{where(s)} differs from the same stage of layer 0 in more than its weights")
