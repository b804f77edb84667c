"""How a weight matrix is cut: tiles of rows, fragments of columns, and the chunks of a tape that they are read in."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from .errors import PlanError
from .formats import PLAIN, Format
from .fuse import StageSpec
from .targets import Target

# Most of a tape of codes that may be zero columns, where the shape allows it. NOTE: half as many warps on a tile cost 3 to 4 % of a token.
PADDING = 0.02
SHARES = (1, 3 / 4, 1 / 2)  # of the largest chunk: see `choose_share`
LARGE_SHARE = 3 / 2  # where chunks fill the slots better by at least FILLS_BETTER than with any other, and a ring has LEAST_SLOTS of them
FILLS_BETTER = 0.1
LEAST_SLOTS = 8
MORE_CHUNKS = 1.25  # than if all were as large as they can be; each has its cost
WIDE = 16  # columns that are rows of matrix instructions
PART_BUFFERS, SLICE_BUFFERS = 3, 4  # steps of x of several columns that are there or on their way: of parts of a tile, of slices of codes
MOST_BATCH = 8  # groups of tiles that are read part by part
MOST_SUMS = 16  # of a batch, that a lane keeps
SCALE_ROOM = 1 / 8  # of a chunk: so much larger it may be where weights have scales


def ceil_div(a: int, b: int) -> int:
    """a / b rounded up."""
    return -(-a // b)


def round_up(a: int, b: int) -> int:
    """a rounded up to a multiple of b."""
    return ceil_div(a, b) * b


@dataclass(frozen=True)
class Geometry:
    """How the tiles of a linear stage are cut into fragments and shared by a worker's warps.

    `warps_rows` tiles form a group and go through the worker together; within a tile, each of `warps_columns` warps owns `fragments` that
    follow each other, read in `parts` nearly equal parts: one chunk each. The last `short_warps` have one fragment fewer: the last one of
    their last part. Where there is one part, `stack` groups share a chunk. Where x of several columns is too large to stay with a worker,
    groups are read in batches of `together`, all of them part by part, so that x comes once for a batch.
    Behind its fragments a chunk holds their scales: tile after tile, warp after warp, group after group, those of a tile's rows. Behind
    those of a tile are the divisors of its rows, where there are any.
    """

    tile_rows: int
    fragment_columns: int
    warps_rows: int
    warps_columns: int
    fragments: int
    parts: int
    format: Format = PLAIN
    chunk_unit: int = 128  # bytes that chunks are padded to
    stack: int = 1
    together: int = 1
    short_warps: int = 0  # only of 16-bit values on a GPU

    @property
    def columns(self) -> int:
        """Columns including the zero padding."""
        return (self.warps_columns * self.fragments - self.short_warps) * self.fragment_columns

    @property
    def fragment_bytes(self) -> int:
        """Bytes of one fragment."""
        return self.tile_rows * self.fragment_columns * self.format.bits // 8

    @property
    def tile_bytes(self) -> int:
        """Bytes of a tile alone on the tape."""
        return self.bytes_of(1)

    def bytes_of(self, tiles: int) -> int:
        """Bytes with which one worker reads so many tiles."""
        chunks, rest = divmod(tiles, self.chunk_tiles)
        return sum(chunks * self.chunk_bytes(self.chunk_tiles, part) + self.chunk_bytes(rest, part) for part in range(self.parts))

    @property
    def chunk_tiles(self) -> int:
        """Tiles of a whole chunk."""
        return self.warps_rows * self.stack

    def chunk_bytes(self, tiles: int, part: int) -> int:
        """Bytes of the chunk with one part of so many tiles."""
        return round_up(tiles * (self.part_bytes(part) + self.scale_bytes(part)), self.chunk_unit)

    def part_bytes(self, part: int) -> int:
        """Bytes of the fragments of one tile in a part, of all warps."""
        missing = self.short_warps if part == self.parts - 1 else 0
        return (self.warps_columns * self.part_sizes()[part] - missing) * self.fragment_bytes

    def scale_bytes(self, part: int) -> int:
        """Bytes of the scales of one tile in a part; what whole rows have comes with the last part."""
        last = int(part == self.parts - 1)
        groups = self.warps_columns * self.format.groups(self.part_sizes()[part] * self.fragment_columns) if self.format.group else last
        return self.tile_rows * (groups * self.format.group_bytes + last * self.format.divisor_bytes)

    def part_sizes(self) -> tuple[int, ...]:
        """Fragments per warp in each part, of those that are not short; the device computes the same in `part_size` (operand.cuh)."""
        return self._part_sizes

    @cached_property
    def _part_sizes(self) -> tuple[int, ...]:
        return tuple(self.fragments // self.parts + (i < self.fragments % self.parts) for i in range(self.parts))


def choose_geometry(target: Target, columns: int, format: Format = PLAIN, share: float = 1) -> Geometry:
    """The widest split of the columns over warps; of codes one whose padding stays under PADDING, else the one with the least.

    More warps on a tile means fewer values of x per warp and a shorter first result. share: how much of the largest chunk may be used.
    """
    fragment_columns = target.columns_of(format)
    most = target.max_fragments * target.fragment_columns // fragment_columns
    room = share * target.part_fragments * target.fragment_columns * 2  # bytes of a row
    per_warp, stacked = max(int(room) // (target.fragment_columns * 2), 1), False
    if format != PLAIN:  # as many bytes as of 16-bit values, and some more for scales
        scales = format.divisor_bytes + (fragment_columns * format.group_bytes // format.group if format.group else 0)
        per_warp = max(int(room * (1 + SCALE_ROOM)) // (fragment_columns * format.bits // 8 + scales), 1)
        stacked = target.kind == "cuda"
    needed = ceil_div(columns, fragment_columns)
    if ceil_div(needed, target.warps) > most:
        raise PlanError(f"a matrix with {columns} columns is too wide for {target.name}")
    splits = [target.warps >> i for i in range(target.warps.bit_length())]
    padding = {split: ceil_div(needed, split) * split - needed for split in splits if ceil_div(needed, split) <= most}  # fragments
    if format == PLAIN:
        split = next(split for split in splits if split <= needed)
    else:
        split = next((s for s in padding if padding[s] <= PADDING * needed), min(padding, key=lambda s: (padding[s], s)))
    fragments = ceil_div(needed, split)
    return Geometry(
        target.tile_rows, fragment_columns, target.warps // split, split, fragments, ceil_div(fragments, per_warp), format,
        target.chunk_unit, max(per_warp // fragments, 1) if stacked else 1, short_warps=padding[split] if format == PLAIN else 0,
    )  # fmt: skip


def choose_batch(target: Target, g: Geometry, columns: int, groups: int) -> int:
    """`together` of a stage of a kernel of so many columns, of which a worker has at most so many groups."""
    x_bytes, room = columns * 2 * target.warps * g.fragment_columns, target.panel_room(g.format)  # of a fragment of all warps
    if columns == WIDE and g.format != PLAIN and target.kind == "cuda":  # pairs, and two of them where all of a part's x stays for both
        part = g.part_sizes()[0]
        two = part <= SLICE_BUFFERS and part * x_bytes <= room < g.fragments * x_bytes
        return 1 if g.parts == 1 else max(1, min(groups, 4 if two else 2))
    if columns == 1 or g.fragments * x_bytes <= room or 2 * g.part_sizes()[0] * x_bytes > room:
        return 1
    return max(1, min(groups, MOST_SUMS // ceil_div(columns, 4), MOST_BATCH))


def choose_share(specs: Sequence[StageSpec], target: Target, formats: Sequence[Format], columns: int) -> float:
    """How much of the largest chunk all chunks may have, so that they fill the slots of the ring best, which have one size.

    Where all is 16-bit values chunks are as large as they may be. columns: of the kernel, which share shared memory with the ring.
    """
    linear = [(spec.linear, format) for spec, format in zip(specs, formats, strict=True) if spec.linear]
    if target.kind == "cpu" or all(format == PLAIN for _, format in linear):
        return 1
    kinds = Counter((spec.columns, spec.rows, format) for spec, format in linear)

    def chunks(share: float) -> tuple[float, float, float]:
        """How many there are, how well they fill the largest, and its bytes."""
        nbytes = count = largest = 0.0
        for (columns, rows, format), stages in kinds.items():
            g = choose_geometry(target, columns, format, share)
            sizes = [g.chunk_bytes(g.chunk_tiles, part) for part in range(g.parts)]
            times = rows / g.chunk_tiles * stages
            nbytes, count, largest = nbytes + sum(sizes) * times, count + g.parts * times, max(largest, *sizes)
        return count, nbytes / (largest * count), largest

    found = {share: chunks(share) for share in (*SHARES, LARGE_SHARE)}
    able = [share for share in SHARES if found[share][0] <= found[1][0] * MORE_CHUNKS]
    best = max(able, key=lambda share: (round(found[share][1], 2), share))
    _, fill, largest = found[LARGE_SHARE]
    room = target.shared_bytes - (target.panel_bytes if columns > 1 else 0)
    large = fill >= found[best][1] + FILLS_BETTER and LEAST_SLOTS * largest <= room
    return LARGE_SHARE if large else best
