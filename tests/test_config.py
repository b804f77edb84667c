"""Reading `config.json`: real files, both spellings of transformers, and refusal of all that is not understood."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from flashformer.config import LIMITS, ModelConfig, RopeScaling, parse_config, parse_json, read_config
from flashformer.errors import CheckpointError, ConfigError
from flashformer.shapes import SHAPES
from model_files import MODEL_TYPES, make_config

# fmt: off
# What these models' config.json hold, without the keys that all of them have in common (COMMON).
COMMON: dict[str, Any] = {
    "attention_dropout": 0.0, "hidden_act": "silu", "initializer_range": 0.02, "torch_dtype": "bfloat16",
    "transformers_version": "4.43.0", "use_cache": True,
}
LLAMA3 = {
    "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}
REAL: dict[str, dict[str, Any]] = {
    "llama-3.1-8b": {
        "architectures": ["LlamaForCausalLM"], "attention_bias": False, "bos_token_id": 128000, "eos_token_id": 128001,
        "hidden_size": 4096, "intermediate_size": 14336, "max_position_embeddings": 131072, "mlp_bias": False,
        "model_type": "llama", "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8,
        "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_scaling": LLAMA3, "rope_theta": 500000.0,
        "tie_word_embeddings": False, "vocab_size": 128256,
    },
    "llama-3.2-1b": {
        "architectures": ["LlamaForCausalLM"], "attention_bias": False, "bos_token_id": 128000,
        "eos_token_id": [128001, 128008, 128009], "head_dim": 64, "hidden_size": 2048, "intermediate_size": 8192,
        "max_position_embeddings": 131072, "mlp_bias": False, "model_type": "llama", "num_attention_heads": 32,
        "num_hidden_layers": 16, "num_key_value_heads": 8, "pretraining_tp": 1, "rms_norm_eps": 1e-05,
        "rope_scaling": {**LLAMA3, "factor": 32.0}, "rope_theta": 500000.0, "tie_word_embeddings": True, "vocab_size": 128256,
    },
    "mistral-7b-v0.3": {
        "architectures": ["MistralForCausalLM"], "bos_token_id": 1, "eos_token_id": 2, "hidden_size": 4096,
        "intermediate_size": 14336, "max_position_embeddings": 32768, "model_type": "mistral", "num_attention_heads": 32,
        "num_hidden_layers": 32, "num_key_value_heads": 8, "rms_norm_eps": 1e-05, "rope_theta": 1000000.0,
        "sliding_window": None, "tie_word_embeddings": False, "vocab_size": 32768,
    },
    "qwen2.5-7b": {
        "architectures": ["Qwen2ForCausalLM"], "bos_token_id": 151643, "eos_token_id": 151643, "hidden_size": 3584,
        "intermediate_size": 18944, "max_position_embeddings": 131072, "max_window_layers": 28, "model_type": "qwen2",
        "num_attention_heads": 28, "num_hidden_layers": 28, "num_key_value_heads": 4, "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0, "sliding_window": 131072, "tie_word_embeddings": False, "use_mrope": False,
        "use_sliding_window": False, "vocab_size": 152064,
    },
    "qwen3-0.6b": {
        "architectures": ["Qwen3ForCausalLM"], "attention_bias": False, "bos_token_id": 151643, "eos_token_id": 151645,
        "head_dim": 128, "hidden_size": 1024, "intermediate_size": 3072, "max_position_embeddings": 40960,
        "max_window_layers": 28, "model_type": "qwen3", "num_attention_heads": 16, "num_hidden_layers": 28,
        "num_key_value_heads": 8, "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 1000000, "sliding_window": None,
        "tie_word_embeddings": True, "use_sliding_window": False, "vocab_size": 151936,
    },
    "smollm2-135m": {
        "architectures": ["LlamaForCausalLM"], "attention_bias": False, "bos_token_id": 1, "eos_token_id": 2,
        "hidden_size": 576, "intermediate_size": 1536, "is_llama_config": True, "max_position_embeddings": 8192,
        "mlp_bias": False, "model_type": "llama", "num_attention_heads": 9, "num_hidden_layers": 30, "num_key_value_heads": 3,
        "pad_token_id": 2, "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_interleaved": False, "rope_scaling": None,
        "rope_theta": 100000, "tie_word_embeddings": True, "vocab_size": 49152,
        "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16", "fp16": "float16"}},
    },
}
# fmt: on
EXPECTED = {
    "llama-3.1-8b": replace(SHAPES["llama-3.1-8b"], bos_token_id=128000, eos_token_ids=(128001,)),
    "llama-3.2-1b": replace(SHAPES["llama-3.2-1b"], bos_token_id=128000, eos_token_ids=(128001, 128008, 128009)),
    "mistral-7b-v0.3": ModelConfig(
        "MistralForCausalLM", 4096, 32, 32, 8, 128, 14336, 32768, 1e-5, 1e6, 32768, bos_token_id=1, eos_token_ids=(2,)
    ),
    "qwen2.5-7b": ModelConfig(
        *("Qwen2ForCausalLM", 3584, 28, 28, 4, 128, 18944, 152064, 1e-6, 1e6, 131072),  # type: ignore[arg-type]
        qkv_bias=True,
        bos_token_id=151643,
        eos_token_ids=(151643,),
    ),
    "qwen3-0.6b": replace(SHAPES["qwen3-0.6b"], bos_token_id=151643, eos_token_ids=(151645,)),
    "smollm2-135m": replace(SHAPES["smollm2-135m"], bos_token_id=1, eos_token_ids=(2,)),
}


def newer_spelling(config: dict[str, Any]) -> dict[str, Any]:
    """The same configuration as transformers 5 writes it."""
    new = {key: value for key, value in config.items() if key not in ("torch_dtype", "rope_theta", "rope_scaling")}
    new["dtype"] = config["torch_dtype"]
    new["rope_parameters"] = {"rope_type": "default", "rope_theta": config["rope_theta"], **(config.get("rope_scaling") or {})}
    if "max_window_layers" in new:
        new["layer_types"] = ["full_attention"] * new["num_hidden_layers"]
    return new


@pytest.mark.parametrize("name", REAL)
def test_real_configurations_are_read_in_both_spellings(name: str) -> None:
    content = {**COMMON, **REAL[name]}
    assert parse_config(content) == EXPECTED[name]
    assert parse_config(newer_spelling(content)) == EXPECTED[name]


@pytest.mark.parametrize("family", MODEL_TYPES)
def test_what_transformers_writes_is_read(family: str) -> None:
    """With a configuration class's defaults and with values of our own, in the spelling of the installed version."""
    transformers = pytest.importorskip("transformers")
    small = make_config(family, torch_dtype=None, tie_word_embeddings=True, rope_theta=None)
    del small["architectures"], small["model_type"]
    for values in ({}, small, {**small, "rope_parameters": {"rope_theta": 5e5, **LLAMA3}}):
        written = getattr(transformers, family.replace("ForCausalLM", "Config"))(**values)
        written.architectures = [family]
        config = parse_config(json.loads(written.to_json_string()))
        assert (config.hidden_size, config.num_layers, config.num_heads, config.num_kv_heads, config.ffn_size) == (
            *(written.hidden_size, written.num_hidden_layers, written.num_attention_heads, written.num_key_value_heads),
            written.intermediate_size,
        )
        assert config.head_dim == (getattr(written, "head_dim", None) or written.hidden_size // written.num_attention_heads)
        assert config.norm_eps == written.rms_norm_eps and config.tied_embeddings == written.tie_word_embeddings
        assert (config.rope_scaling is not None) == ("rope_parameters" in values)


def test_families_differ_where_they_should() -> None:
    llama, mistral, qwen2, qwen3 = (parse_config(make_config(family)) for family in MODEL_TYPES)
    assert [c.qkv_bias for c in (llama, mistral, qwen2, qwen3)] == [False, False, True, False]
    assert [c.qk_norm for c in (llama, mistral, qwen2, qwen3)] == [False, False, False, True]
    assert not any(c.output_bias or c.mlp_bias for c in (llama, mistral, qwen2, qwen3))
    biased = parse_config(make_config(attention_bias=True, mlp_bias=True))
    assert biased.qkv_bias and biased.output_bias and biased.mlp_bias
    assert parse_config(make_config("Qwen3ForCausalLM", head_dim=None)).head_dim == 128  # not hidden / heads
    assert parse_config(make_config(head_dim=None)).head_dim == 16
    assert parse_config(make_config(num_key_value_heads=None)).num_kv_heads == 4
    assert parse_config(make_config(architectures=None)) == llama  # model_type alone names the family


@pytest.mark.parametrize(
    ("rope", "scaling"),
    [
        ({"type": "linear", "factor": 4.0}, RopeScaling("linear", 4.0)),
        ({"rope_type": "linear", "factor": 2}, RopeScaling("linear", 2.0)),
        ({"rope_type": "default"}, None),
        ({**LLAMA3, "type": "llama3"}, RopeScaling("llama3", 8.0, 1.0, 4.0, 8192)),
        (None, None),
    ],
)
def test_rope_scaling(rope: dict[str, Any] | None, scaling: RopeScaling | None) -> None:
    config = parse_config(make_config(rope_scaling=rope))
    assert config.rope_scaling == scaling and config.rope_theta == 10_000.0
    if rope is not None:
        newer = make_config(rope_theta=None, rope_parameters={**rope, "rope_theta": 7.0})
        assert parse_config(newer) == replace(config, rope_theta=7.0)


@pytest.mark.parametrize(
    ("family", "keys", "positions"),
    [
        ("MistralForCausalLM", {"sliding_window": 100}, 100),
        ("MistralForCausalLM", {"sliding_window": 256}, 256),
        ("MistralForCausalLM", {"sliding_window": 10_000}, 256),
        ("Qwen2ForCausalLM", {"sliding_window": 100}, 256),  # the switch is off by default
        ("Qwen2ForCausalLM", {"sliding_window": 100, "use_sliding_window": True, "max_window_layers": 2}, 256),  # no layer left
        ("Qwen2ForCausalLM", {"sliding_window": 100, "use_sliding_window": True, "max_window_layers": 1}, 100),
        (
            "Qwen3ForCausalLM",
            {"sliding_window": 100, "use_sliding_window": True, "layer_types": ["full_attention", "sliding_attention"]},
            100,
        ),
        ("Qwen3ForCausalLM", {"sliding_window": 100, "use_sliding_window": True, "layer_types": ["full_attention"] * 2}, 256),
    ],
)
def test_sliding_window_limits_the_context(family: str, keys: dict[str, Any], positions: int) -> None:
    config = parse_config(make_config(family, **keys))
    assert config.max_positions == positions
    assert bool(config.notes) == (positions < 256)  # the user is told


@pytest.mark.parametrize(
    ("family", "keys", "message"),
    [
        ("LlamaForCausalLM", {"architectures": ["GPT2LMHeadModel"]}, "GPT2LMHeadModel.*supported are LlamaForCausalLM"),
        ("LlamaForCausalLM", {"architectures": ["LlamaForCausalLM"] * 2}, "not supported"),
        ("LlamaForCausalLM", {"architectures": "LlamaForCausalLM"}, "not supported"),
        ("LlamaForCausalLM", {"architectures": [["LlamaForCausalLM"]]}, "not supported"),
        ("LlamaForCausalLM", {"architectures": None, "model_type": "gemma"}, "architectures: the key is required"),
        ("LlamaForCausalLM", {"model_type": "qwen2"}, "model_type = 'qwen2': contradicts"),
        ("LlamaForCausalLM", {"logit_scale": 2.0}, r"logit_scale = 2\.0: this key is not known"),
        ("LlamaForCausalLM", {"hidden_act": "gelu"}, "hidden_act = 'gelu': is supported only as 'silu'"),
        ("LlamaForCausalLM", {"sliding_window": 5}, "sliding_window = 5"),
        ("LlamaForCausalLM", {"partial_rotary_factor": 0.5}, r"partial_rotary_factor = 0\.5"),
        ("LlamaForCausalLM", {"auto_map": {"AutoModel": "x.y"}}, "auto_map"),
        ("MistralForCausalLM", {"attention_bias": True}, "attention_bias = True"),
        ("MistralForCausalLM", {"num_key_value_heads": None}, "num_key_value_heads: the key is required"),
        ("Qwen2ForCausalLM", {"mlp_bias": True}, "mlp_bias = True"),
        ("Qwen2ForCausalLM", {"use_mrope": True}, "use_mrope = True"),
        ("LlamaForCausalLM", {"quantization_config": {"quant_method": "hqq"}}, "quantization_config: quant_method = 'hqq'"),
        ("LlamaForCausalLM", {"quantization_config": {"quant_method": "awq"}}, "bits: the key is required"),
        ("LlamaForCausalLM", {"quantization_config": "x"}, "quantization_config"),
        ("LlamaForCausalLM", {"torch_dtype": "float8_e4m3fn"}, "torch_dtype = 'float8_e4m3fn'"),
        ("LlamaForCausalLM", {"dtype": "float16"}, "dtype"),  # contradicts torch_dtype
        ("LlamaForCausalLM", {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_type = 'yarn': is not supported"),
        ("LlamaForCausalLM", {"rope_scaling": {"type": "dynamic", "factor": 4.0}}, "type = 'dynamic'"),
        ("LlamaForCausalLM", {"rope_scaling": {"type": "linear", "rope_type": "llama3", "factor": 4.0}}, "contradicts"),
        ("LlamaForCausalLM", {"rope_scaling": {"type": "linear"}}, "factor: the key is required"),
        ("LlamaForCausalLM", {"rope_scaling": {"type": "linear", "factor": 0.5}}, r"factor = 0\.5"),
        ("LlamaForCausalLM", {"rope_scaling": {**LLAMA3, "beta_fast": 1}}, "beta_fast = 1: this key is not known"),
        ("LlamaForCausalLM", {"rope_scaling": {**LLAMA3, "high_freq_factor": 1.0}}, "high_freq_factor"),
        ("LlamaForCausalLM", {"rope_scaling": [1]}, "must be an object"),
        ("LlamaForCausalLM", {"rope_parameters": {"rope_theta": 5.0}}, "rope_theta.*contradicts"),
        ("LlamaForCausalLM", {"rope_parameters": {"full_attention": {"rope_theta": 5.0}}}, "full_attention"),
        ("Qwen3ForCausalLM", {"layer_types": ["full_attention"]}, "each of 2 layers"),
        ("Qwen3ForCausalLM", {"layer_types": ["full_attention", "linear_attention"]}, "layer_types"),
        ("Qwen3ForCausalLM", {"layer_types": ["sliding_attention"] * 2}, "no sliding_window is in use"),
        ("LlamaForCausalLM", {"num_attention_heads": 3, "num_key_value_heads": 3, "head_dim": None}, "not a multiple"),
        ("LlamaForCausalLM", {"num_key_value_heads": 3}, "not a multiple of 3 key/value heads"),
        ("LlamaForCausalLM", {"head_dim": 15}, "odd"),
        ("LlamaForCausalLM", {"rms_norm_eps": "1e-5"}, "rms_norm_eps"),
        ("LlamaForCausalLM", {"rms_norm_eps": float("nan")}, "rms_norm_eps"),
        ("LlamaForCausalLM", {"rope_theta": float("inf")}, "rope_theta"),
        ("LlamaForCausalLM", {"rope_theta": 10**400}, "rope_theta"),
        ("LlamaForCausalLM", {"tie_word_embeddings": 1}, "tie_word_embeddings = 1: must be true or false"),
        ("LlamaForCausalLM", {"bos_token_id": 288}, "bos_token_id = 288"),
        ("LlamaForCausalLM", {"eos_token_id": [2, -1]}, r"eos_token_id = \[2, -1\]"),
        ("LlamaForCausalLM", {"eos_token_id": [[2]]}, "eos_token_id"),
    ],
)
def test_refused_with_key_and_value(family: str, keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_config(make_config(family, **keys))


SIZE_KEYS = {
    "hidden_size": "hidden_size",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "num_key_value_heads": "num_kv_heads",
    "head_dim": "head_dim",
    "intermediate_size": "ffn_size",
    "vocab_size": "vocab_size",
    "max_position_embeddings": "max_positions",
}


@pytest.mark.parametrize("key", SIZE_KEYS)
def test_sizes_have_ranges(key: str) -> None:
    low, high = LIMITS[SIZE_KEYS[key]]
    for value in (low - 1, high + 1, -1, 2**64, 64.0, "64", True, [64]):
        with pytest.raises(ConfigError, match=f"{key} = .*: must be an integer from {low} to {high}"):
            parse_config(make_config(**{key: value}))


def test_large_and_odd_shapes_are_accepted() -> None:
    for keys in (
        {"hidden_size": 8192, "num_hidden_layers": 80, "intermediate_size": 28672, "vocab_size": 262_144},
        {"intermediate_size": 341, "vocab_size": 1021, "hidden_size": 100, "head_dim": 8},
        {"head_dim": 256, "num_attention_heads": 5, "num_key_value_heads": 1},
    ):
        config = parse_config(make_config(**keys))
        assert all(getattr(config, SIZE_KEYS[key]) == value for key, value in keys.items())


def test_dtype() -> None:
    assert parse_config(make_config(torch_dtype="float16")).dtype == "float16"
    assert parse_config(make_config(torch_dtype="torch.bfloat16")).dtype == "bfloat16"
    assert parse_config(make_config(torch_dtype=None)).dtype == "bfloat16"
    rounded = parse_config(make_config(torch_dtype="float32"))
    assert rounded.dtype == "bfloat16" and "rounded" in rounded.notes[0]


def test_generation_config_adds_ends_of_text(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(make_config()))
    assert read_config(tmp_path).eos_token_ids == (2,)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [5, 2, 7], "temperature": 0.6}))
    assert read_config(tmp_path).eos_token_ids == (2, 5, 7)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": 999}))
    with pytest.raises(ConfigError, match=r"generation_config\.json: eos_token_id = 999"):
        read_config(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not valid JSON"),
        (b"[1]", "must hold a JSON object"),
        (b'{"a": 1, "a": 2}', "a key occurs twice"),
        (b"[" * 100_000, "not valid JSON"),
        (b'{"a": ' + b"9" * 10_000 + b"}", "not valid JSON"),
        (b'{"a": "\xff"}', "not valid JSON"),
    ],
)
def test_malformed_json_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        parse_json(content, "x")
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"config\.json: .*{message}"):
        read_config(tmp_path)


def test_a_huge_file_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "config.json").open("wb") as file:
        file.truncate(1 << 40)  # no such bytes on the disk
    with pytest.raises(CheckpointError, match="larger than 64 MB"):
        read_config(tmp_path)


def test_messages_can_be_printed() -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config(make_config(**{"\ud800\n" + "k" * 500: "\udfff" * 500}))
    assert str(caught.value).isprintable() and len(str(caught.value)) < 500
