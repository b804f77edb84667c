"""Ada (L4, L40S, RTX 40)."""

from dataclasses import replace

from .sm_86 import TARGET as SM_86

TARGET = replace(
    SM_86,
    name="sm_89",
    arch="sm_89",
    description="NVIDIA Ada (L40S, RTX 40)",
    workers=142,
    bandwidth_gb_s=820.0,
)
