"""Writes tiny random models as files: Hugging Face folders and GGUF files, of any supported family and shape."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from flashformer.config import ModelConfig, parse_config
from flashformer.models.decoder import build_decoder

MODEL_TYPES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
}
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|start|>' + message['role'] + '\n' + message['content'] + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant\n' }}{% endif %}"
)
SPECIAL_TOKENS = ("<|endoftext|>", "<|start|>", "<|end|>")  # ids 0, 1, 2; then the 256 bytes, then merges
MERGES = ("h e", "Ġ t", "Ġt he", "i n", "e r", "a n", "Ġ a", "o n")


def make_config(architecture: str = "LlamaForCausalLM", **overrides: Any) -> dict[str, Any]:
    """The content of a small model's `config.json`; `overrides` are keys of that file (None removes one)."""
    config: dict[str, Any] = {
        "architectures": [architecture],
        "model_type": MODEL_TYPES[architecture],
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "intermediate_size": 160,
        "vocab_size": 288,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "max_position_embeddings": 256,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": 2,
        "torch_dtype": "bfloat16",
    }
    config.update(overrides)
    return {key: value for key, value in config.items() if value is not None}


def random_tensors(config: ModelConfig, seed: int = 0, scale: float = 1.0) -> dict[str, np.ndarray]:
    """Float32 tensors by Hugging Face name, whose values are exact in bfloat16 and in float16.

    Matrices are scaled by `scale` / sqrt(columns), so that the sizes of activations stay near one; norms lie around one.
    """
    generator = np.random.default_rng(seed)
    tensors = {}
    for name, weight in build_decoder(config).weights().items():
        values = generator.standard_normal(weight.shape, dtype=np.float32)
        if len(weight.shape) == 2:
            values *= np.float32(scale if name == "model.embed_tokens.weight" else scale / np.sqrt(weight.shape[1]))
        elif name.endswith(".bias"):
            values *= np.float32(0.1)
        else:
            values = np.float32(1.0) + np.float32(0.1) * values
        values = values.astype(ml_dtypes.bfloat16).astype(np.float32)
        values[np.abs(values) < 2.0**-14] = 0.0  # no subnormals of float16
        tensors[name] = values
    return tensors


def byte_alphabet() -> list[str]:
    """The 256 characters that stand for bytes in byte-level BPE vocabularies, sorted."""
    from tokenizers.pre_tokenizers import ByteLevel

    return sorted(ByteLevel.alphabet())


def vocabulary(size: int) -> tuple[list[str], list[str]]:
    """`size` tokens by id (special tokens, the bytes, the results of `MERGES`, then unused ones) and the merges among them."""
    tokens = [*SPECIAL_TOKENS, *byte_alphabet(), *(merge.replace(" ", "") for merge in MERGES)]
    tokens = [*tokens, *(f"<|unused{i}|>" for i in range(len(tokens), size))][:size]
    known = set(tokens)
    merges = [merge for merge in MERGES if {*merge.split(" "), merge.replace(" ", "")} <= known]
    return tokens, merges


def write_tokenizer(folder: Path, vocab_size: int) -> None:
    """Write `tokenizer.json` (byte-level BPE) and `tokenizer_config.json` (with a chat template)."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokens, merge_lines = vocabulary(vocab_size)
    merges: list[Any] = [tuple(merge.split(" ")) for merge in merge_lines]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL_TOKENS])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"bos_token": "<|endoftext|>", "eos_token": "<|end|>", "chat_template": CHAT_TEMPLATE, "add_bos_token": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def write_folder(
    path: Path, config_dict: dict[str, Any], seed: int = 0, dtype: str = "bfloat16", shards: int = 1, scale: float = 1.0
) -> Path:
    """Write a Hugging Face folder with random weights of `dtype` ("bfloat16", "float16", "float32"); returns `path`."""
    from safetensors.numpy import save_file

    path.mkdir(parents=True, exist_ok=True)
    config = parse_config(config_dict)
    numpy_type = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16, "float32": np.float32}[dtype]
    tensors = {name: value.astype(numpy_type) for name, value in random_tensors(config, seed, scale).items()}
    (path / "config.json").write_text(json.dumps(config_dict, indent=2))
    write_tokenizer(path, config.vocab_size)
    if shards == 1:
        save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
        return path
    names, weight_map = sorted(tensors), {}
    for i in range(shards):
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: tensors[name] for name in names[i::shards]}
        save_file(part, path / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(part, file))
    total = sum(value.nbytes for value in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    return path


def gguf_name(name: str) -> str:
    """The GGUF name of a tensor, from its Hugging Face name."""
    fixed = {
        "model.embed_tokens": "token_embd",
        "model.norm": "output_norm",
        "lm_head": "output",
    }
    parts = {
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "self_attn.q_norm": "attn_q_norm",
        "self_attn.k_norm": "attn_k_norm",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
    }
    stem, _, suffix = name.rpartition(".")
    if stem in fixed:
        return f"{fixed[stem]}.{suffix}"
    layer, _, part = stem.removeprefix("model.layers.").partition(".")
    return f"blk.{layer}.{parts[part]}.{suffix}"


def permute_rotary(values: np.ndarray, heads: int) -> np.ndarray:
    """Rows of a q or k projection from split rotary halves (Hugging Face) to adjacent pairs (GGUF's llama architecture)."""
    half = values.shape[0] // heads // 2
    return values.reshape(heads, 2, half, *values.shape[1:]).swapaxes(1, 2).reshape(values.shape)


def write_gguf(path: Path, config_dict: dict[str, Any], seed: int = 0, quant: str = "F32", scale: float = 1.0) -> Path:
    """Write a GGUF file with the tensors that `write_folder` writes; returns `path`.

    `quant` is the type of the matrices: F32, F16, BF16, Q8_0, Q4_0, Q4_1 or Q5_0 (a matrix whose columns are not a multiple of 32
    stays F32, as in llama.cpp). Vectors are F32.
    """
    import gguf

    config = parse_config(config_dict)
    arch = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}[MODEL_TYPES[config.architecture]]
    writer = gguf.GGUFWriter(path, arch)
    writer.add_name("tiny")
    writer.add_block_count(config.num_layers)
    writer.add_context_length(config.max_positions)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.ffn_size)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    tokens, merges = vocabulary(config.vocab_size)
    control, unused, normal = gguf.TokenType.CONTROL, gguf.TokenType.UNUSED, gguf.TokenType.NORMAL
    writer.add_token_list(tokens)
    writer.add_token_types([control if t in SPECIAL_TOKENS else unused if t.startswith("<|unused") else normal for t in tokens])
    writer.add_token_merges(merges)
    writer.add_bos_token_id(config.bos_token_id or 0)
    writer.add_eos_token_id(config.eos_token_ids[0] if config.eos_token_ids else 2)
    writer.add_chat_template(CHAT_TEMPLATE)
    kind = getattr(gguf.GGMLQuantizationType, quant)
    for name, values in random_tensors(config, seed, scale).items():
        heads = {"q_proj": config.num_heads, "k_proj": config.num_kv_heads}.get(name.split(".")[-2])
        if arch == "llama" and heads is not None:
            values = permute_rotary(values, heads)
        quantised = values.ndim == 2 and kind != gguf.GGMLQuantizationType.F32
        if quantised and (quant in ("F16", "BF16") or values.shape[1] % 32 == 0):
            writer.add_tensor(gguf_name(name), gguf.quants.quantize(values, kind), raw_dtype=kind)
        else:
            writer.add_tensor(gguf_name(name), np.ascontiguousarray(values))
    if config.rope_scaling is not None:
        if config.rope_scaling.kind == "linear":
            writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
            writer.add_rope_scaling_factor(config.rope_scaling.factor)
        else:
            writer.add_tensor("rope_freqs.weight", llama3_factors(config))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def llama3_factors(config: ModelConfig) -> np.ndarray:
    """Divisors of the rotary frequencies, float32 [head_dim / 2], as llama.cpp stores them for llama3 scaling."""
    scaling = config.rope_scaling
    assert scaling is not None and scaling.kind == "llama3"
    factors = []
    for i in range(0, config.head_dim, 2):
        wavelength = 2 * np.pi * config.rope_theta ** (i / config.head_dim)
        turns = scaling.original_max_positions / wavelength
        smooth = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
        smooth = min(max(smooth, 0.0), 1.0)
        factors.append(1.0 / ((1.0 - smooth) / scaling.factor + smooth))
    return np.array(factors, np.float32)
