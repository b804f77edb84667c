"""Ampere (A100): the same plan with cp.async in place of bulk copies."""

from dataclasses import replace

from .sm_90 import TARGET as SM_90

TARGET = replace(
    SM_90,
    name="sm_80",
    arch="sm_80",
    description="NVIDIA Ampere (A100)",
    workers=108,
    bandwidth_gb_s=1900.0,
    columns=(1, 2, 4, 8),
    usual_prompt_columns=0,
    many_groups=0,
    shared_bytes=166912,
    panel_bytes=64 << 10,
    bulk_copy=False,
    prefetch_chunks=0,
    prefetch_cycles=1900,
)
