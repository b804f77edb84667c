"""What a plan must know about a machine: one file an architecture, each with one `TARGET`; a new one needs no edit elsewhere."""

from __future__ import annotations

import importlib
import math
import pkgutil
from dataclasses import dataclass, replace
from typing import Literal

from ..errors import PlanError
from ..formats import PLAIN, Format


@dataclass(frozen=True)
class Target:
    """The numbers of one architecture. A worker is an SM's thread block on a GPU, a core on a CPU."""

    name: str  # as given to --target: "sm_90", "cpu"
    kind: Literal["cuda", "cpu"]
    arch: str  # the compiler's name for it: "sm_90a", "native"
    description: str
    workers: int  # of a typical device; the real count replaces it where a device is present
    bandwidth_gb_s: float  # of a typical device; used for predictions only
    exchange_us: float  # the part of one exchange that a stage's stream does not hide; predictions only
    # How a weight matrix is cut: a tile is `tile_rows` rows, a fragment is tile_rows x `fragment_columns` values.
    tile_rows: int
    fragment_columns: int
    warps: int  # that share a worker's tiles: each tile's columns are split over 1..warps of them
    part_fragments: int  # most fragments of one warp in one chunk of the tape
    max_fragments: int  # most fragments of one tile that a warp's registers can hold x for
    kernels: tuple[tuple[str, int], ...] = (("float", 16),)  # kinds and bits of the formats that there are kernels for
    code_columns: int = 0  # of a fragment of 8- or 4-bit codes; 0: as many as take the bytes of a 16-bit fragment
    largest_group: int = 0  # columns of a group of codes, at most; larger ones are split; 0: any number
    plain_table: bool = False  # whether the embedding table has 16-bit values whatever the head has
    mixed_layers: bool = False  # whether the same stage of two layers may have different formats
    chunk_unit: int = 128  # bytes: chunks of a tape begin at multiples of it
    columns: tuple[int, ...] = (1,)  # how many token positions a pass may carry: one of these
    usual_columns: int = 1  # of an engine that is not told otherwise,
    usual_prompt_columns: int = 0  # and of its second kernel, for prompts, where the first has one column; 0: there is none
    prefill: bool = False  # whether a third kernel feeds long prompts, where there is a second one
    # GPU only: shared memory, roles and pacing.
    shared_bytes: int = 0  # that one thread block may use
    finisher_warps: int = 3  # 8 consumers, 3 finishers and the producer: 168 registers each
    many_groups: int = 0  # of tiles of 16-bit values, in a layer: one finisher more is worth it, but for many columns; 0: it never is
    bulk_copy: bool = False  # cp.async.bulk and mbarrier transactions (sm_90 on); else cp.async
    # Bytes in flight per SM by the landed chunks that wait: (fewer than this many, bytes), the last for any number.
    window: tuple[tuple[int, int], ...] = ()
    calm_window: int = 0  # the same while no exchange is near, whatever waits; 0: `window` holds everywhere
    prefetch_chunks: int = 0  # how far L2 prefetches run ahead of a full ring
    prefetch_cycles: int = 0  # between two of them: an SM's fair share of the bandwidth
    first_look_cycles: int = 0  # before a vector is polled: an exchange takes no less
    short_layer_bytes: int = 0  # of weights, at most, of a layer whose exchanges take longer than they do: vectors are polled
    short_first_look_cycles: int = 0  # so soon then
    panel_bytes: int = 0  # that vectors of several columns may take of shared memory, if need be by less than a whole vector,
    plain_panel_bytes: int = 0  # and where weights are 16-bit values, which wait for the ring more than for their vectors (0: as many)
    exchange_copies: int = 1  # of a vector that every SM reads, so that not all poll the same lines
    kv_min_blocks: int = 2  # fewest blocks of the KV cache that are worth a piece of their own
    kv_slack_bytes: int = 65536  # of the KV cache that an SM may read beyond its even share, so that it meets one head only

    def fit(self, format: Format | None) -> Format | None:
        """The format in which this target runs what a format holds: the same, or with groups split; None where it has no kernel.

        Groups are 16 columns, or a multiple of 32 that divides the largest or is divided by it.
        """
        if format is None or (format.kind, format.bits) not in self.kernels:
            return None
        group = format.group
        if self.largest_group and group > self.largest_group:
            group = math.gcd(group, self.largest_group)
        if group != 16 and (group % 32 or (group and self.largest_group % group)):
            return None
        return replace(format, group=group)

    def runs(self, format: Format) -> bool:
        """Whether there is a kernel for exactly this format."""
        return self.fit(format) == format

    def panel_room(self, format: Format) -> int:
        """Bytes of shared memory that vectors of several columns may take in a stage."""
        return min(self.panel_bytes, self.plain_panel_bytes or self.panel_bytes) if format == PLAIN else self.panel_bytes

    def columns_of(self, format: Format) -> int:
        """Columns of a fragment of a format."""
        if format.bits == 16:
            return self.fragment_columns
        return self.code_columns or self.fragment_columns * 16 // format.bits


def available() -> dict[str, Target]:
    """Every target by name, discovered from the files of this folder."""
    found: dict[str, Target] = {}
    for module in pkgutil.iter_modules(__path__):
        target: Target = importlib.import_module(f"{__name__}.{module.name}").TARGET
        found[target.name] = target
    return found


def get(name: str) -> Target:
    """The target called `name`; raises PlanError naming the known ones."""
    targets = available()
    if name not in targets:
        raise PlanError(f"unknown target {name!r}; known targets: {', '.join(sorted(targets))}")
    return targets[name]
