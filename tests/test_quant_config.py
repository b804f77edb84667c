"""`quantization_config`: what real models say is understood; whatever would change the mathematics is refused."""

from __future__ import annotations

import copy
import json
import random
import time
from typing import Any

import pytest

from flashformer.errors import ConfigError
from flashformer.quant import read_quantization
from flashformer.quant.scheme import Scheme
from quant_folders import compressed

AWQ = {"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemm", "zero_point": True, "modules_to_not_convert": None}
GPTQ = {
    **{
        "quant_method": "gptq",
        "bits": 4,
        "group_size": 128,
        "sym": True,
        "desc_act": False,
        "damp_percent": 0.1,
        "checkpoint_format": "gptq",
    },
    **{"true_sequential": True, "lm_head": False, "meta": {"quantizer": "gptqmodel:1.0"}, "static_groups": False},
}
FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3", "weight_block_size": [128, 128]}
BNB = {
    **{"quant_method": "bitsandbytes", "_load_in_4bit": True, "_load_in_8bit": False, "load_in_4bit": True, "load_in_8bit": False},
    **{"bnb_4bit_compute_dtype": "bfloat16", "bnb_4bit_quant_storage": "uint8", "bnb_4bit_quant_type": "nf4"},
    **{"bnb_4bit_use_double_quant": True, "llm_int8_skip_modules": None, "llm_int8_threshold": 6.0},
}
INT4 = {
    **{"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 128, "dynamic": False, "actorder": None},
    **{"block_structure": None, "observer": "minmax", "observer_kwargs": {}},
}
FLOAT8 = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "channel", "dynamic": False, "group_size": None}
NVFP4 = {"num_bits": 4, "type": "float", "symmetric": True, "strategy": "tensor_group", "group_size": 16}
MXFP4 = {"num_bits": 4, "type": "float", "symmetric": True, "strategy": "group", "group_size": 32, "scale_dtype": "torch.uint8"}
PACKED = compressed("pack-quantized", INT4)

UNDERSTOOD: list[tuple[dict[str, Any], Scheme]] = [
    (AWQ, Scheme("gemm", 4, "group", 128, symmetric=False)),
    ({**AWQ, "group_size": -1}, Scheme("gemm", 4, "channel", symmetric=False)),
    (GPTQ, Scheme("gptq", 4, "group", 128)),
    ({**GPTQ, "checkpoint_format": "gptq_v2", "bits": 8, "sym": False}, Scheme("gptq_v2", 8, "group", 128, symmetric=False)),
    ({"quant_method": "gptq", "bits": 4, "group_size": -1, "desc_act": True}, Scheme("gptq", 4, "channel")),
    (FP8, Scheme("float", 8, "block", block=(128, 128), floating=True)),
    ({**FP8, "scale_fmt": "ue8m0"}, Scheme("ue8m0", 8, "block", block=(128, 128), floating=True)),
    ({"quant_method": "fp8", "activation_scheme": "static"}, Scheme("float", 8, "tensor", floating=True)),
    (BNB, Scheme("nf4", 4, "group", floating=True)),
    (PACKED, Scheme("pack-quantized", 4, "group", 128)),
    (
        compressed("pack-quantized", {"num_bits": 8, "strategy": "channel", "symmetric": False}),
        Scheme("pack-quantized", 8, "channel", symmetric=False),
    ),
    (compressed("pack-quantized", {"num_bits": 4, "group_size": -1}), Scheme("pack-quantized", 4, "channel")),
    (compressed("pack-quantized", {**INT4, "actorder": "static"}), Scheme("pack-quantized", 4, "group", 128)),
    (compressed("pack-quantized", {**INT4, "actorder": "group"}), Scheme("pack-quantized", 4, "group", 128, indexed=True)),
    (compressed("float-quantized", FLOAT8), Scheme("float-quantized", 8, "channel", floating=True)),
    (compressed("naive-quantized", {**FLOAT8, "strategy": "tensor"}), Scheme("float-quantized", 8, "tensor", floating=True)),
    (
        compressed("float-quantized", {**FLOAT8, "strategy": "block", "block_structure": [128, 128]}),
        Scheme("float-quantized", 8, "block", block=(128, 128), floating=True),
    ),
    (compressed("int-quantized", {"num_bits": 8, "strategy": "channel"}), Scheme("int-quantized", 8, "channel")),
    (compressed("nvfp4-pack-quantized", NVFP4), Scheme("nvfp4-pack-quantized", 4, "group", 16, floating=True)),
    (compressed("mxfp4-pack-quantized", MXFP4), Scheme("mxfp4-pack-quantized", 4, "group", 32, floating=True)),
]


@pytest.mark.parametrize(("config", "scheme"), UNDERSTOOD)
def test_understood(config: dict[str, Any], scheme: Scheme) -> None:
    found = read_quantization(config)
    assert found.method == config["quant_method"]
    assert found.scheme_of("model.layers.0.mlp.up_proj") == scheme


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({}, "quant_method"),
    ({"quant_method": "hqq"}, "quant_method"),
    ({"quant_method": ["awq"]}, "quant_method"),
    ({**AWQ, "version": "gemv"}, "version"),
    ({**AWQ, "bits": 3}, "bits"),
    ({**AWQ, "group_size": 0}, "group_size"),
    ({**AWQ, "zero_point": False}, "zero_point"),
    ({**AWQ, "rotate": True}, "rotate"),
    ({**GPTQ, "bits": 3}, "bits"),
    ({**GPTQ, "bits": 6}, "bits"),
    ({**GPTQ, "checkpoint_format": "marlin"}, "checkpoint_format"),
    ({**GPTQ, "format": "gptq_v2"}, "contradicts"),
    ({**GPTQ, "dynamic": {"+:x": {"bits": 8}}}, "dynamic"),
    ({**GPTQ, "group_size": "128"}, "group_size"),
    ({**FP8, "fmt": "e5m2"}, "fmt"),
    ({**FP8, "weight_block_size": [128]}, "weight_block_size"),
    ({**FP8, "weight_block_size": [128, 0]}, "weight_block_size"),
    ({**FP8, "scale_fmt": "log"}, "scale_fmt"),
    ({**BNB, "bnb_4bit_quant_type": "fp4"}, "bnb_4bit_quant_type"),
    ({**BNB, "load_in_8bit": True}, "load_in_8bit"),
    ({**BNB, "bnb_4bit_quant_storage": "bfloat16"}, "bnb_4bit_quant_storage"),
    (compressed("pack-quantised", INT4), "format"),
    (compressed("marlin-24", INT4), "format"),
    (compressed("mixed-precision", INT4), "format"),
    (compressed("pack-quantized", INT4, kv_cache_scheme={"num_bits": 8}), "kv_cache_scheme"),
    (compressed("pack-quantized", INT4, sparsity_config={"format": "sparse-24-bitmask"}), "sparsity_config"),
    (compressed("pack-quantized", INT4, transform_config={"config_groups": {"R1": {}}}), "transform_config"),
    (compressed("pack-quantized", INT4, config_groups={}), "config_groups"),
    (compressed("pack-quantized", INT4, config_groups={"g": {"weights": INT4}}), "targets"),
    (compressed("pack-quantized", INT4, config_groups={"g": {"targets": ["Linear"]}}), "weights"),
    (compressed("pack-quantized", {**INT4, "num_bits": 3}), "num_bits"),
    (compressed("pack-quantized", {**INT4, "type": "float"}), "num_bits"),
    (compressed("pack-quantized", {**INT4, "strategy": "tensor"}), "strategy"),
    (compressed("pack-quantized", {**INT4, "group_size": -1}), "group_size"),
    (compressed("pack-quantized", {**INT4, "dynamic": True}), "dynamic"),
    (compressed("pack-quantized", {**INT4, "block_structure": [16, 16]}), "block_structure"),
    (compressed("pack-quantized", {**INT4, "actorder": "random"}), "actorder"),
    (compressed("pack-quantized", {**INT4, "rounding": "up"}), "rounding"),
    (compressed("float-quantized", {**FLOAT8, "symmetric": False}), "symmetric"),
    (compressed("float-quantized", {**FLOAT8, "strategy": "block"}), "block_structure"),
    (compressed("float-quantized", {**FLOAT8, "group_size": 64}), "group_size"),
    (compressed("nvfp4-pack-quantized", {**NVFP4, "group_size": 32}), "strategy"),
]


@pytest.mark.parametrize(("config", "says"), REFUSED)
def test_refused(config: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        read_quantization(config)


def test_targets_and_ignored_modules() -> None:
    groups = {
        "a": {"targets": ["Linear"], "weights": INT4, "format": "pack-quantized"},
        "b": {
            "targets": ["re:.*down_proj$", "lm_head"],
            "weights": FLOAT8,
            "format": "float-quantized",
            "input_activations": {"num_bits": 8},
        },
    }
    config = compressed("mixed-precision", {}, config_groups=groups, ignore=[r"re:model\.layers\.0\..*", "model.layers.3.mlp.up_proj"])
    found = read_quantization(config)
    formats = {name: scheme.format if (scheme := found.scheme_of(name)) else None for name in (
        "model.layers.1.mlp.up_proj", "model.layers.1.mlp.down_proj", "lm_head", "model.layers.0.mlp.up_proj", "model.layers.3.mlp.up_proj",
    )}  # fmt: skip
    assert list(formats.values()) == ["pack-quantized", "float-quantized", "float-quantized", None, None]
    assert found.scheme_of("model.embed_tokens", "Embedding") is None
    assert len(found.notes) == 1 and "activations" in found.notes[0]


@pytest.mark.parametrize(
    "expression", ["re:(a*)*b", "re:(a+)+$", "re:.*.*.*.*x", "re:(?=a)", "re:[z-a]", "re:(", "re:" + "[0-9]" * 40 + "!"]
)
def test_hostile_expressions_are_refused(expression: str) -> None:
    start = time.process_time()
    with pytest.raises(ConfigError, match="ignore"):
        read_quantization({**PACKED, "ignore": [expression]})
    assert time.process_time() - start < 1


def test_many_targets_are_fast_or_refused() -> None:
    """As many names and expressions as are allowed, for as many modules as a large model has."""
    found = read_quantization({**PACKED, "ignore": [f"re:.*a.*a.*{i}$" for i in range(100)] + [f"m.{i}" for i in range(9_900)]})
    start = time.process_time()
    assert all(found.scheme_of(f"model.layers.{i}.self_attn.q_proj") is not None for i in range(560))
    assert time.process_time() - start < 5
    with pytest.raises(ConfigError, match="at most 100"):
        read_quantization({**PACKED, "ignore": [f"re:a{i}" for i in range(101)]})
    with pytest.raises(ConfigError, match="32 groups"):
        read_quantization({**PACKED, "config_groups": dict.fromkeys(map(str, range(33)), PACKED["config_groups"]["group_0"])})


def test_allowed_expressions_are_fast() -> None:
    found = read_quantization({**PACKED, "ignore": ["re:.*a.*a.*b"]})
    start = time.process_time()
    assert found.scheme_of("a" * 100_000) is not None
    assert time.process_time() - start < 2


def test_anything_malformed_gives_our_error() -> None:
    """Values replaced, removed and added anywhere in the configurations."""
    rng = random.Random(0)
    values: list[Any] = [None, True, 0, -1, 2**70, 1.5, float("nan"), "", "Linear", "re:(", [], [1], {}, {"a": 1}, [["x"]], [None]]
    accepted = refused = 0
    for _ in range(4000):
        config = copy.deepcopy(rng.choice(UNDERSTOOD)[0])
        spot = config
        while (inner := [value for value in spot.values() if isinstance(value, dict) and value]) and rng.random() < 0.7:
            spot = rng.choice(inner)
        spot[rng.choice([*spot, "extra"])] = copy.deepcopy(rng.choice(values))
        try:
            read_quantization(config).scheme_of("model.layers.0.mlp.up_proj")
            accepted += 1
        except ConfigError as error:
            str(error).encode("utf-8")
            refused += 1
    for value in (None, 3, "awq", [], json.loads("[{}]")):
        with pytest.raises(ConfigError):
            read_quantization(value)
    assert accepted > 300 and refused > 1500
