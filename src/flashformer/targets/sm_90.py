"""Hopper (H100, H200): bulk copies into shared memory."""

from . import Target

TARGET = Target(
    name="sm_90",
    kind="cuda",
    arch="sm_90a",
    description="NVIDIA Hopper (H100, H200)",
    workers=132,
    bandwidth_gb_s=4700.0,
    exchange_us=0.35,
    tile_rows=8,
    fragment_columns=32,
    warps=8,
    part_fragments=4,
    max_fragments=128,
    shared_bytes=232448,
    bulk_copy=True,
    window_low=3 * 16384,
    window_high=5 * 16384,
    window_threshold=2,
    prefetch_chunks=12,
    prefetch_cycles=900,
    repoll_cycles=2000,
    combine_repoll_cycles=400,
)
