"""Hopper (H100, H200): bulk copies into shared memory."""

from . import Target

CHUNK = 16384  # bytes

TARGET = Target(
    name="sm_90",
    kind="cuda",
    arch="sm_90a",
    description="NVIDIA Hopper (H100, H200)",
    workers=132,
    bandwidth_gb_s=4700.0,
    exchange_us=0.5,
    tile_rows=8,
    fragment_columns=32,
    warps=8,
    part_fragments=4,
    max_fragments=128,
    kernels=(("float", 16), ("int", 8), ("int", 4), ("table", 4), ("fp8", 8)),
    code_columns=128,
    largest_group=128,
    plain_table=True,
    columns=(1, 2, 4, 8, 16),
    usual_prompt_columns=16,
    prefill=True,
    shared_bytes=232448,
    panel_bytes=132 << 10,
    plain_panel_bytes=64 << 10,
    many_groups=36,  # 8B in bf16 has 42, and 0.4 % less time a token with four; 3B 27, and 0.4 % more; 0.6B 12, and 2.9 % more
    bulk_copy=True,
    window=((1, 5 * CHUNK), (2, 4 * CHUNK), (8, 3 * CHUNK), (99, 2 * CHUNK)),
    calm_window=8 * CHUNK,  # 8B in bf16 0.7 % less time a token than with none, 1 % at short contexts; the whole ring: 2 % more
    prefetch_chunks=12,
    prefetch_cycles=900,
    first_look_cycles=1500,
    short_layer_bytes=64 << 20,  # 1B in int4 has 32 MB, and 2.1 % less time a token with the sooner look; 8B in int4 116, and more time
    short_first_look_cycles=1250,
    exchange_copies=4,
)
