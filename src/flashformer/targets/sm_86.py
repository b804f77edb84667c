"""Ampere without a large L2 (A10, RTX 30): less shared memory a block."""

from dataclasses import replace

from .sm_80 import TARGET as SM_80

TARGET = replace(
    SM_80,
    name="sm_86",
    arch="sm_86",
    description="NVIDIA Ampere (A10, RTX 30)",
    workers=84,
    bandwidth_gb_s=880.0,
    columns=(1, 2, 4),
    shared_bytes=101376,
    panel_bytes=24 << 10,
)
