"""Blackwell for data centres (B200)."""

from dataclasses import replace

from .sm_90 import TARGET as SM_90

TARGET = replace(
    SM_90,
    name="sm_100",
    arch="sm_100a",
    description="NVIDIA Blackwell (B200)",
    workers=148,
    bandwidth_gb_s=7500.0,
    usual_prompt_columns=0,
    prefetch_cycles=620,
)
