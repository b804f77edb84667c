"""Qwen3: q and k heads are normalised, and head_dim is a number of its own."""

from .decoder import build_decoder as build

ARCHITECTURES = ("Qwen3ForCausalLM",)

__all__ = ["ARCHITECTURES", "build"]
