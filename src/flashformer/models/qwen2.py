"""Qwen2 and Qwen2.5: a Llama whose q, k and v projections have biases."""

from .decoder import build_decoder as build

ARCHITECTURES = ("Qwen2ForCausalLM",)

__all__ = ["ARCHITECTURES", "build"]
