"""GGUF metadata -> ModelConfig, as strictly as `config.json` is read."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from ..config import LIMITS, Keys, ModelConfig, RopeScaling, checked
from ..errors import ConfigError

_ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}

_GENERAL = ("general.architecture", "general.type", "split.count", "tokenizer.ggml.bos_token_id")
_END_KEYS = ("tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id")

# Keys of an architecture that do not change the result, or only together with rope.scaling.type, which is read.
_HARMLESS = frozenset({"rope.scaling.finetuned", "rope.scaling.original_context_length"})

# Keys that change the result, with the only values at which they do not.
_NEUTRAL: dict[str, tuple[object, ...]] = {
    "attention.causal": (True,),
    "attention.clamp_kqv": (0.0,),
    "attention.max_alibi_bias": (0.0,),
    "expert_count": (0,),
    "expert_used_count": (0,),
    "pooling_type": (0,),
    "rope.scale_linear": (1.0,),
    "rope.scaling.attn_factor": (1.0,),
    "rope.scaling.factor": (0.0, 1.0),
    "tensor_data_layout": ("Meta AI original pth",),
    "use_parallel_residual": (False,),
}

# The bands of every published llama3 scaling; a GGUF file stores only the divisors that follow from them.
_LOW_FREQ_FACTOR, _HIGH_FREQ_FACTOR, _ORIGINAL_MAX_POSITIONS = 1.0, 4.0, 8192


def config_from_gguf(
    metadata: Mapping[str, Any], tensors: Collection[str], rope_factors: np.ndarray | None = None
) -> ModelConfig:
    """The configuration of a GGUF model.

    `tensors` are the GGUF names in the file: they tell what metadata do not (tied embeddings, biases). `rope_factors` is the
    tensor rope_freqs.weight, if there is one. Raises ConfigError, naming key and value, for anything that is unsupported,
    out of range, or not known.
    """
    where = "GGUF metadata"
    general = Keys({key: _scalar(metadata[key]) for key in (*_GENERAL, *_END_KEYS) if key in metadata}, where)
    name = general.get("general.architecture")
    if not isinstance(name, str) or name not in _ARCHITECTURES:
        general.fail("general.architecture", f"this architecture is not supported; supported are {', '.join(_ARCHITECTURES)}")
    if general.get("general.type", "model") != "model":
        general.fail("general.type", "only whole models are supported")
    if general.get("split.count", 0) not in (0, 1):
        general.fail("split.count", "a model in several GGUF files is not supported; merge them with llama-gguf-split --merge")
    prefix = f"{name}."
    keys = Keys({key: _scalar(value) for key, value in metadata.items() if key.startswith(prefix)}, where, prefix)
    heads: int = keys.size("attention.head_count", "num_heads")
    hidden: int = keys.size("embedding_length", "hidden_size")
    head_dim = keys.size("attention.key_length", "head_dim", default=None)
    if head_dim is None:
        if hidden % heads:
            keys.fail("embedding_length", f"is not a multiple of {heads} heads, and attention.key_length is not given")
        head_dim = hidden // heads
    for key in ("attention.value_length", "rope.dimension_count"):
        if keys.size(key, "head_dim", default=head_dim) != head_dim:
            keys.fail(key, f"must be the head size {head_dim}; partial rotation and unequal heads are not supported")
    tokens = metadata.get("tokenizer.ggml.tokens")
    vocab: int = keys.size("vocab_size", "vocab_size", default=len(tokens) if isinstance(tokens, list) and tokens else None)
    if vocab is None:
        keys.fail("vocab_size", "the key is required where the file holds no tokenizer")
    positions: int = keys.size("context_length", "max_positions")
    window = keys.integer("attention.sliding_window", 0, LIMITS["max_positions"][1], default=0)
    notes: tuple[str, ...] = ()
    if 0 < window < positions:
        notes = (f"The context is limited to {window} tokens, the sliding window of this model, of {positions}.",)
        positions = window
    theta = keys.number("rope.freq_base", 1.0, 1e15, default=10_000.0)
    ends = [general.integer(key, 0, vocab - 1, default=None) for key in _END_KEYS]
    config = ModelConfig(
        architecture=_ARCHITECTURES[name],
        hidden_size=hidden,
        num_layers=keys.size("block_count", "num_layers"),
        num_heads=heads,
        num_kv_heads=keys.size("attention.head_count_kv", "num_kv_heads", default=heads),
        head_dim=head_dim,
        ffn_size=keys.size("feed_forward_length", "ffn_size"),
        vocab_size=vocab,
        norm_eps=keys.number("attention.layer_norm_rms_epsilon", 0.0, 1.0),
        rope_theta=theta,
        max_positions=positions,
        rope_scaling=_rope_scaling(keys, rope_factors, theta, head_dim),
        tied_embeddings="output.weight" not in tensors,
        qkv_bias="blk.0.attn_q.bias" in tensors,
        output_bias="blk.0.attn_output.bias" in tensors,
        mlp_bias="blk.0.ffn_gate.bias" in tensors,
        qk_norm=name == "qwen3",
        bos_token_id=general.integer("tokenizer.ggml.bos_token_id", 0, vocab - 1, default=None),
        eos_token_ids=tuple(dict.fromkeys(i for i in ends if i is not None)),
        notes=notes,
    )
    keys.finish(_HARMLESS, _NEUTRAL)
    return checked(config, where)


def _scalar(value: Any) -> Any:
    """A value without numpy types; one given for each layer becomes a single one if all layers agree."""
    if not isinstance(value, np.ndarray):
        return value
    return value[0].item() if value.size and (value == value[0]).all() else value.tolist()


def _rope_scaling(keys: Keys, factors: np.ndarray | None, theta: float, head_dim: int) -> RopeScaling | None:
    """The scaling from `rope.scaling.*`, or from divisors of the frequencies."""
    kind = keys.get("rope.scaling.type", "none")
    if kind not in ("none", "linear"):
        keys.fail("rope.scaling.type", "is not supported; supported are none, linear, and llama3 through rope_freqs.weight")
    scaling = None
    if kind == "linear":
        scaling = RopeScaling("linear", keys.number("rope.scaling.factor", 1.0, 1e6))
    if factors is None or (factors == 1.0).all():
        return scaling
    found = llama3_scaling(factors, theta, head_dim)
    if found is None or scaling is not None:
        raise ConfigError(
            f"{keys.where}: rope_freqs.weight does not hold the divisors of llama3 scaling with the bands of Llama 3.1 "
            f"({_LOW_FREQ_FACTOR:g}, {_HIGH_FREQ_FACTOR:g}, {_ORIGINAL_MAX_POSITIONS}); other scalings are not supported"
        )
    return found


def llama3_scaling(factors: np.ndarray, theta: float, head_dim: int) -> RopeScaling | None:
    """The llama3 scaling whose divisors of the frequencies are `factors`, float32 [head_dim / 2]; None if there is none.

    Long wavelengths are divided by the scaling's factor, short ones by 1, those between by an interpolation (Llama 3.1).
    """
    if factors.shape != (head_dim // 2,) or not np.isfinite(factors).all() or factors.min() < 0.5:
        return None
    turns = _ORIGINAL_MAX_POSITIONS * theta ** (-np.arange(0, head_dim, 2) / head_dim) / (2 * np.pi)
    smooth = np.clip((turns - _LOW_FREQ_FACTOR) / (_HIGH_FREQ_FACTOR - _LOW_FREQ_FACTOR), 0.0, 1.0)
    # The longest wavelength tells the factor: it is divided by it, or, where even that one is interpolated, almost.
    rest = 1.0 / float(factors[-1]) - smooth[-1]
    factor = float(factors[-1]) if smooth[-1] == 0.0 else float(f"{(1.0 - smooth[-1]) / rest:.5g}") if rest > 0.0 else 0.0
    if not 1.0 <= factor <= 1e6 or not np.allclose(factors, 1.0 / ((1.0 - smooth) / factor + smooth), rtol=1e-4, atol=0.0):
        return None
    return RopeScaling("llama3", factor, _LOW_FREQ_FACTOR, _HIGH_FREQ_FACTOR, _ORIGINAL_MAX_POSITIONS)
