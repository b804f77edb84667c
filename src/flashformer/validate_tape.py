"""The last part of the proof of `validate.py`: on its tape every worker finds what its tiles need, chunk for chunk."""

from __future__ import annotations

import numpy as np

from .errors import PlanError
from .geometry import Geometry, ceil_div, round_up
from .plan import Plan, Stage
from .tape import Tape

STRIDE = 1 << 18  # chunks that are compared at a time, so that they stay in the cache of a core


def validate_tape(plan: Plan, tape: Tape) -> None:
    """Prove the tapes of a plan: each worker's chunks hold its tiles, in order, none over another, all inside the arena."""
    _chunks_hold_the_tiles(plan, tape)
    _chunks_apart(plan, tape)


def where(stage: Stage) -> str:
    """A stage for a message."""
    return stage.name if stage.layer < 0 else f"layer {stage.layer} {stage.name}"


def chunk_bytes(g: Geometry, tiles: int) -> list[int]:
    """What the chunks of so many tiles must hold: of each batch of groups of tiles, part after part, and what pads them."""

    def scales(part: int, fragments: int) -> int:
        """Of one row of a tile: a scale of each group of columns, and what comes last: one of the whole row, and its divisor."""
        last = (part == g.parts - 1) * (g.format.divisor_bytes + (g.format.group_bytes if g.format.group == 0 else 0))
        groups = ceil_div(fragments * g.fragment_columns, g.format.group) if g.format.group else 0
        return last + g.warps_columns * groups * g.format.group_bytes

    groups = [min(g.chunk_tiles, tiles - first) for first in range(0, tiles, g.chunk_tiles)]
    batches = [groups[first : first + g.together] for first in range(0, len(groups), g.together)]
    sizes = [
        (g.warps_columns * fragments - (part == g.parts - 1) * g.short_warps) * g.fragment_bytes + g.tile_rows * scales(part, fragments)
        for part, fragments in enumerate(g.part_sizes())
    ]
    return [round_up(in_group * size, g.chunk_unit) for batch in batches for size in sizes for in_group in batch]


def _chunks_hold_the_tiles(plan: Plan, tape: Tape) -> None:
    """Every worker's tape is, chunk for chunk, what its tiles need, and each stage begins where `starts` says."""
    known: dict[tuple[int, int], np.ndarray] = {}  # (geometry, tiles) -> bytes of the chunks
    geometries: dict[Geometry, int] = {}
    mark = [np.zeros(n, np.int32) for n in (0, 1)]  # attention leaves a chunk without bytes, other stages leave none
    runs: list[list[np.ndarray]] = []  # [stages][workers]
    for s in plan.stages:
        if s.geometry is None:
            runs.append([mark[s.kind == "attention"]] * plan.target.workers)
            continue
        number = geometries.setdefault(s.geometry, len(geometries))
        for tiles in set(s.count):
            if (number, tiles) not in known:
                known[number, tiles] = np.array(chunk_bytes(s.geometry, tiles), np.int32)
        runs.append([known[number, tiles] for tiles in s.count])
    chunks = np.cumsum([[len(run) for run in row] for row in runs], axis=0)
    if tape.starts.shape != (len(runs) + 1, plan.target.workers) or tape.starts[0].any():
        raise PlanError(f"the tapes begin {len(tape.starts) - 1} stages; the plan has {len(runs)}")
    if (tape.starts[1:] != chunks).any():
        at, w = np.argwhere(tape.starts[1:] != chunks)[0]
        raise PlanError(f"the tape of worker {w} ends {where(plan.stages[at])} at chunk {tape.starts[at + 1, w]}, not {chunks[at, w]}")
    if tape.size.shape != tape.offset.shape or tape.size.shape != (chunks[-1].max(), plan.target.workers):
        raise PlanError(f"the tapes are truncated: they have {len(tape.size)} chunks, not {chunks[-1].max()}")
    for w in range(plan.target.workers):
        expected = np.concatenate([*(row[w] for row in runs), np.zeros(len(tape.size) - chunks[-1, w], np.int32)])
        if (tape.size[:, w] != expected).any():
            at = int((tape.size[:, w] != expected).argmax())
            raise PlanError(f"the tape of worker {w}: chunk {at} has {tape.size[at, w]} bytes, not {expected[at]}")


def _in_order(first: np.ndarray, units: np.ndarray) -> bool:
    """Whether each chunk ends before the next one begins."""
    for at in range(0, len(first) - 1, STRIDE):
        piece = first[at : at + STRIDE + 1]
        if (np.diff(piece) < units[at : at + len(piece) - 1]).any():
            return False
    return True


def _chunks_apart(plan: Plan, tape: Tape) -> None:
    """No two chunks overlap, and all lie inside the arena, whose units 32 bits can count."""
    unit = plan.target.chunk_unit
    if tape.unit != unit:
        raise PlanError(f"the tapes count units of {tape.unit} bytes; those of {plan.target.name} have {unit}")
    by_worker = plan.target.kind == "cpu"  # in memory, chunks are expected in the order of a worker, else chunk i of all workers
    first = (tape.offset.T if by_worker else tape.offset).reshape(-1)
    units = (tape.size.T if by_worker else tape.size).reshape(-1) // unit
    if not _in_order(first, units):
        place = np.flatnonzero(units)
        place = place[np.argsort(first[place], kind="stable")]
        first, units = first[place], units[place]
        overlap = first[1:] < first[:-1] + units[:-1]
        if overlap.any():
            at = int(place[1 + overlap.argmax()])
            chunk, w = divmod(at, len(tape.size))[::-1] if by_worker else divmod(at, plan.target.workers)
            raise PlanError(f"the tape of worker {w}: chunk {chunk} overlaps another one")
    end = int(first[-1] + units[-1]) * unit
    if first[0] < 0 or end > tape.nbytes or tape.nbytes > unit << 32:
        raise PlanError(f"the tapes take bytes {int(first[0]) * unit} to {end} of an arena of {tape.nbytes}, at most {unit << 32}")
