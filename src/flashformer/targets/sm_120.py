"""Blackwell for workstations (RTX 50, RTX PRO): bulk copies, but less shared memory a block."""

from dataclasses import replace

from .sm_90 import TARGET as SM_90

TARGET = replace(
    SM_90,
    name="sm_120",
    arch="sm_120a",
    description="NVIDIA Blackwell (RTX 50, RTX PRO)",
    workers=170,
    bandwidth_gb_s=1700.0,
    columns=(1, 2, 4),
    usual_prompt_columns=0,
    many_groups=0,
    shared_bytes=101376,
    panel_bytes=24 << 10,
    prefetch_cycles=3000,
)
