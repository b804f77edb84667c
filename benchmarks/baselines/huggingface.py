"""Our configuration as Hugging Face's `config.json`: what transformers and vLLM build a model from."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from flashformer.config import ModelConfig

MODEL_TYPES = {"LlamaForCausalLM": "llama", "MistralForCausalLM": "mistral", "Qwen2ForCausalLM": "qwen2", "Qwen3ForCausalLM": "qwen3"}


def config_json(config: ModelConfig) -> dict[str, Any]:
    """The content of a `config.json` that describes the same model."""
    c = config
    scaling: dict[str, Any] | None = None
    if c.rope_scaling is not None:
        s = asdict(c.rope_scaling)
        scaling = {"rope_type": s["kind"], "factor": s["factor"]}
        if s["kind"] == "llama3":
            scaling |= {"low_freq_factor": s["low_freq_factor"], "high_freq_factor": s["high_freq_factor"]}
            scaling["original_max_position_embeddings"] = s["original_max_positions"]
    content: dict[str, Any] = {
        "architectures": [c.architecture],
        "model_type": MODEL_TYPES[c.architecture],
        "hidden_size": c.hidden_size,
        "num_hidden_layers": c.num_layers,
        "num_attention_heads": c.num_heads,
        "num_key_value_heads": c.num_kv_heads,
        "head_dim": c.head_dim,
        "intermediate_size": c.ffn_size,
        "vocab_size": c.vocab_size,
        "rms_norm_eps": c.norm_eps,
        "rope_theta": c.rope_theta,
        "rope_scaling": scaling,
        "max_position_embeddings": c.max_positions,
        "tie_word_embeddings": c.tied_embeddings,
        "hidden_act": "silu",
        "torch_dtype": c.dtype,
    }
    if c.architecture == "LlamaForCausalLM":
        content |= {"attention_bias": c.output_bias, "mlp_bias": c.mlp_bias}
    elif c.architecture == "Qwen3ForCausalLM":
        content |= {"attention_bias": c.output_bias}
    elif c.architecture == "MistralForCausalLM":
        content |= {"sliding_window": None}
    return content
