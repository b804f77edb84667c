"""Any CPU with a C++ compiler; the vector width comes from the machine that compiles."""

from . import Target

TARGET = Target(
    name="cpu",
    kind="cpu",
    arch="native",
    description="CPU, compiled for the machine it runs on",
    workers=2,
    bandwidth_gb_s=20.0,
    exchange_us=1.0,
    tile_rows=4,
    fragment_columns=64,
    warps=1,
    part_fragments=1 << 20,
    max_fragments=1 << 20,
    kernels=(("float", 16), ("int", 8), ("int", 4), ("table", 4), ("fp8", 8)),
    code_columns=32,
    mixed_layers=True,
    chunk_unit=64,  # a cache line
    columns=(1, 2, 4, 8, 16),
    usual_columns=16,
)
