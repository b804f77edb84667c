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
    fragment_columns=64,  # two cache lines of 16-bit values: a fragment is one UNIT of a tape
    warps=1,
    part_fragments=1 << 20,
    max_fragments=1 << 20,
)
