"""Llama 2, 3, 3.1, 3.2 and what shares their form, such as SmolLM2."""

from .decoder import build_decoder as build

ARCHITECTURES = ("LlamaForCausalLM",)

__all__ = ["ARCHITECTURES", "build"]
