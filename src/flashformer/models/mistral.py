"""Mistral: a Llama without biases; a sliding window limits the context (config.py)."""

from .decoder import build_decoder as build

ARCHITECTURES = ("MistralForCausalLM",)

__all__ = ["ARCHITECTURES", "build"]
