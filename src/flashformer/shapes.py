"""Well-known models by name: their shapes, for plans and benchmarks that need no checkpoint."""

from __future__ import annotations

from .config import ModelConfig, RopeScaling
from .errors import ConfigError

_LLAMA, _QWEN3 = "LlamaForCausalLM", "Qwen3ForCausalLM"
_LLAMA31_ROPE = RopeScaling("llama3", 8.0, 1.0, 4.0, 8192)
_LLAMA32_ROPE = RopeScaling("llama3", 32.0, 1.0, 4.0, 8192)

# hidden, layers, heads, kv heads, head dim, ffn, vocabulary, eps, rope theta, positions
SHAPES: dict[str, ModelConfig] = {
    "smollm2-135m": ModelConfig(_LLAMA, 576, 30, 9, 3, 64, 1536, 49152, 1e-5, 1e5, 8192, tied_embeddings=True),
    "qwen3-0.6b": ModelConfig(_QWEN3, 1024, 28, 16, 8, 128, 3072, 151936, 1e-6, 1e6, 40960, tied_embeddings=True, qk_norm=True),
    "qwen3-1.7b": ModelConfig(_QWEN3, 2048, 28, 16, 8, 128, 6144, 151936, 1e-6, 1e6, 40960, tied_embeddings=True, qk_norm=True),
    "qwen3-14b": ModelConfig(_QWEN3, 5120, 40, 40, 8, 128, 17408, 151936, 1e-6, 1e6, 40960, qk_norm=True),
    "qwen3-32b": ModelConfig(_QWEN3, 5120, 64, 64, 8, 128, 25600, 151936, 1e-6, 1e6, 40960, qk_norm=True),
    "llama-3.2-1b": ModelConfig(_LLAMA, 2048, 16, 32, 8, 64, 8192, 128256, 1e-5, 5e5, 131072, _LLAMA32_ROPE, tied_embeddings=True),
    "llama-3.2-3b": ModelConfig(_LLAMA, 3072, 28, 24, 8, 128, 8192, 128256, 1e-5, 5e5, 131072, _LLAMA32_ROPE, tied_embeddings=True),
    "llama-3.1-8b": ModelConfig(_LLAMA, 4096, 32, 32, 8, 128, 14336, 128256, 1e-5, 5e5, 131072, _LLAMA31_ROPE),
    "llama-3.1-70b": ModelConfig(_LLAMA, 8192, 80, 64, 8, 128, 28672, 128256, 1e-5, 5e5, 131072, _LLAMA31_ROPE),
}


def shape(name: str) -> ModelConfig:
    """The configuration called `name`; raises ConfigError naming the known ones."""
    if name not in SHAPES:
        raise ConfigError(f"unknown shape {name!r}; known shapes: {', '.join(SHAPES)}")
    return SHAPES[name]
