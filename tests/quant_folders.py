"""Writes tiny random models in every quantised format, packed code by code as the formats say, with the values they stand for."""

from __future__ import annotations

import copy
import json
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from flashformer.config import parse_config
from flashformer.quant.bitsandbytes import NF4
from model_files import make_config, random_tensors, write_tokenizer
from quant_files import Parts

# --- Writers: random codes and scales of a matrix [N, K] -> its stored tensors and the values that they stand for ----------

Packed = tuple[Parts, np.ndarray]
Writer = Callable[[np.random.Generator, int, int], Packed]

E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def words(codes: np.ndarray, bits: int, order: tuple[int, ...] | None = None) -> np.ndarray:
    """Codes [R, C] -> int32 [R, ceil(C / codes of a word)]: code `order[i]` (by default i) of each run is at bit i * bits."""
    per_word = 32 // bits
    padded = np.pad(codes.astype(np.uint64), ((0, 0), (0, -codes.shape[1] % per_word))).reshape(len(codes), -1, per_word)
    packed = np.zeros(padded.shape[:2], np.uint64)
    for i in range(per_word):
        packed |= padded[:, :, order[i] if order else i] << np.uint64(i * bits)
    return packed.astype(np.uint32).view(np.int32)


def nibbles(codes: np.ndarray, high_first: bool = False) -> np.ndarray:
    """Codes [R, C] -> uint8 [R, C / 2]."""
    even, odd = codes[:, 0::2].astype(np.uint8), codes[:, 1::2].astype(np.uint8)
    return even << 4 | odd if high_first else odd << 4 | even


def scales(rng: np.random.Generator, *shape: int) -> np.ndarray:
    """Scales that keep values near 1 / 8 for codes of 4 bits; exact in float16."""
    return (rng.uniform(0.5, 1.5, shape) * 2.0**-6).astype(np.float16).astype(np.float32)


def repeated(grouped: np.ndarray, group: int) -> np.ndarray:
    """[R, groups] -> [R, groups * group]."""
    return np.repeat(grouped, group, axis=1)


def awq(group: int) -> Writer:
    """AWQ, gemm version."""

    def write(rng: np.random.Generator, n: int, k: int) -> Packed:
        q, z, s = rng.integers(0, 16, (n, k)), rng.integers(0, 16, (n, k // group)), scales(rng, n, k // group)
        parts = {"qweight": words(q.T, 4, AWQ_ORDER), "qzeros": words(z.T, 4, AWQ_ORDER), "scales": s.T.astype(np.float16)}
        return parts, (q - repeated(z, group)).astype(np.float32) * repeated(s, group)

    return write


def gptq(group: int, bits: int = 4, version: int = 1, act_order: bool = False) -> Writer:
    """GPTQ v1 or v2; with act-order, columns are in groups at random."""

    def write(rng: np.random.Generator, n: int, k: int) -> Packed:
        groups = -(-k // group)
        index = np.arange(k) // group
        if act_order:
            index = rng.permutation(index)
        q, z = rng.integers(0, 1 << bits, (n, k)), rng.integers(1, 1 << bits, (n, groups))
        s = (scales(rng, n, groups) / (1 << bits - 4)).astype(np.float16)
        parts = {
            "qweight": np.ascontiguousarray(words(q, bits).T),
            "qzeros": words((z - (version == 1)).T, bits),
            "scales": s.T,
            "g_idx": index.astype(np.int32),
        }
        return parts, (q - z[:, index]).astype(np.float32) * s.astype(np.float32)[:, index]

    return write


def packed_integers(group: int | None, bits: int = 4, symmetric: bool = True) -> Writer:
    """pack-quantized, with groups or (None) a scale per row."""

    def write(rng: np.random.Generator, n: int, k: int) -> Packed:
        columns = group or k
        q, s = rng.integers(0, 1 << bits, (n, k)), (scales(rng, n, k // columns) / (1 << bits - 4)).astype(ml_dtypes.bfloat16)
        z = np.full(s.shape, 1 << bits - 1) if symmetric else rng.integers(0, 1 << bits, s.shape)
        parts = {"weight_packed": words(q, bits), "weight_scale": s, "weight_shape": np.array([n, k])}
        if not symmetric:
            parts["weight_zero_point"] = np.ascontiguousarray(words(z.T, bits).T)
        return parts, (q - repeated(z, columns)).astype(np.float32) * repeated(s.astype(np.float32), columns)

    return write


def eight_bits(grid: Callable[[int, int], tuple[int, int]], kind: Any = ml_dtypes.float8_e4m3fn, suffix: str = "_scale") -> Writer:
    """Values with a scale per rectangle of grid(N, K) rows and columns."""

    def write(rng: np.random.Generator, n: int, k: int) -> Packed:
        rows, columns = grid(n, k)
        values = np.clip(rng.standard_normal((n, k), np.float32) * 40, -127, 127).astype(kind)
        s = scales(rng, -(-n // rows), -(-k // columns)) / 16
        spread = np.repeat(np.repeat(s, rows, axis=0), columns, axis=1)[:n, :k]
        return {"weight": values, f"weight{suffix}": s}, values.astype(np.float32) * spread

    return write


def powers_of_two(rng: np.random.Generator, n: int, k: int) -> Packed:
    """FP8 blocks of 16 x 32 whose scales are e8m0."""
    weight = eight_bits(lambda n, k: (16, 32))(rng, n, k)[0]["weight"]
    exponents = rng.integers(117, 120, (-(-n // 16), -(-k // 32))).astype(np.uint8)
    spread = np.repeat(np.repeat(2.0 ** (exponents.astype(np.float32) - 127), 16, axis=0), 32, axis=1)[:n, :k]
    return {"weight": weight, "weight_scale_inv": exponents.view(ml_dtypes.float8_e8m0fnu)}, weight.astype(np.float32) * spread


def nvfp4(rng: np.random.Generator, n: int, k: int) -> Packed:
    """nvfp4-pack-quantized."""
    codes, divisor = rng.integers(0, 16, (n, k)), np.array([700.0], np.float32)
    s = rng.uniform(8, 40, (n, k // 16)).astype(ml_dtypes.float8_e4m3fn)
    parts = {"weight_packed": nibbles(codes), "weight_scale": s, "weight_global_scale": divisor}
    return parts, E2M1[codes] * repeated(s.astype(np.float32) / divisor, 16)


def mxfp4(rng: np.random.Generator, n: int, k: int) -> Packed:
    """mxfp4-pack-quantized."""
    codes, s = rng.integers(0, 16, (n, k)), rng.integers(120, 124, (n, k // 32)).astype(np.uint8)
    return {"weight_packed": nibbles(codes), "weight_scale": s}, E2M1[codes] * repeated(2.0 ** (s.astype(np.float32) - 127), 32)


_STATE = "weight.quant_state.bitsandbytes__nf4"


def nf4(rng: np.random.Generator, n: int, k: int) -> Packed:
    """NF4 in blocks of 64 values, which go across rows where K is not a multiple of that."""
    codes, s = rng.integers(0, 16, (n, k)), scales(rng, n * k // 64) * 16
    state = {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [n, k]}
    parts = {
        "weight": nibbles(codes, high_first=True).reshape(-1, 1),
        "weight.absmax": s,
        "weight.quant_map": NF4,
        _STATE: np.frombuffer(json.dumps(state).encode(), np.uint8),
    }
    return parts, NF4[codes] * np.repeat(s, 64).reshape(n, k)


def nf4_double(rng: np.random.Generator, n: int, k: int) -> Packed:
    """NF4 with scales that are quantised themselves, in blocks of 256."""
    parts, _ = nf4(rng, n, k)
    count, offset, table = n * k // 64, 0.2, np.linspace(-1, 1, 256, dtype=np.float32)
    codes, outer = rng.integers(0, 256, count), rng.uniform(0.05, 0.1, -(-count // 256)).astype(np.float32)
    state = json.loads(parts[_STATE].tobytes()) | {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": offset}
    s = table[codes] * outer[np.arange(count) // 256] + np.float32(offset)
    packed = parts["weight"].reshape(n, k // 2)
    values = NF4[np.stack([packed >> 4, packed & 15], axis=2).reshape(n, k)] * np.repeat(s, 64).reshape(n, k)
    parts |= {"weight.absmax": codes.astype(np.uint8), "weight.nested_absmax": outer, "weight.nested_quant_map": table}
    return parts | {_STATE: np.frombuffer(json.dumps(state).encode(), np.uint8)}, values


# --- Whole models ----------------------------------------------------------------------------------------------------------


def compressed(layout: str, weights: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """A `quantization_config` of compressed-tensors with one group, as llm-compressor writes it."""
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}
    top = {"quant_method": "compressed-tensors", "format": layout, "config_groups": {"group_0": group}, "ignore": ["lm_head"]}
    more = {"kv_cache_scheme": None, "quantization_status": "compressed", "global_compression_ratio": 1.5, "sparsity_config": {}}
    return {**top, **more, **changes}


@dataclass(frozen=True)
class Case:
    """A format: its `quantization_config`, what `TensorSpec.dtype` says, and the writer of a matrix."""

    config: dict[str, Any]
    dtype: str
    write: Writer


def _packed_case(dtype: str, write: Writer, **weights: Any) -> Case:
    return Case(compressed("pack-quantized", weights), f"compressed-tensors {dtype}", write)


def _float_case(layout: str, dtype: str, write: Writer, **weights: Any) -> Case:
    return Case(compressed(layout, {"type": "float", "symmetric": True, **weights}), f"compressed-tensors {dtype}", write)


_INT4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32}
_AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm", "zero_point": True, "modules_to_not_convert": None}
_GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": False, "desc_act": False, "checkpoint_format": "gptq"}
_GPTQ2 = {**_GPTQ, "bits": 8, "desc_act": True, "checkpoint_format": "gptq_v2"}
_INT8 = compressed("int-quantized", {"num_bits": 8, "strategy": "channel"})
_FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic"}
_NF4 = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_quant_storage": "uint8"}
_NVFP4 = {"num_bits": 4, "strategy": "tensor_group", "group_size": 16}
CASES = {
    "awq": Case(_AWQ, "awq int4 g32", awq(32)),
    "gptq v1": Case(_GPTQ, "gptq int4 g32", gptq(32)),
    "gptq v2 act-order": Case(_GPTQ2, "gptq int8 g32", gptq(32, 8, 2, act_order=True)),
    "int4": _packed_case("int4 g32", packed_integers(32), **_INT4),
    "int4 asymmetric": _packed_case("int4 g32", packed_integers(32, symmetric=False), **_INT4, symmetric=False),
    "int8 packed": _packed_case("int8 per channel", packed_integers(None, 8), num_bits=8, strategy="channel"),
    "int8": Case(_INT8, "compressed-tensors int8 per channel", eight_bits(lambda n, k: (1, k), np.int8)),
    "fp8 tensor": _float_case("float-quantized", "fp8 per tensor", eight_bits(lambda n, k: (n, k)), num_bits=8, strategy="tensor"),
    "fp8 channel": _float_case("float-quantized", "fp8 per channel", eight_bits(lambda n, k: (1, k)), num_bits=8, strategy="channel"),
    "nvfp4": _float_case("nvfp4-pack-quantized", "nvfp4 g16", nvfp4, **_NVFP4),
    "mxfp4": _float_case("mxfp4-pack-quantized", "mxfp4 g32", mxfp4, num_bits=4, strategy="group", group_size=32),
    "fp8 blocks": Case({**_FP8, "weight_block_size": [48, 40]}, "fp8 48x40", eight_bits(lambda n, k: (48, 40), suffix="_scale_inv")),
    "fp8 powers of two": Case({**_FP8, "weight_block_size": [16, 32], "scale_fmt": "ue8m0"}, "fp8 16x32", powers_of_two),
    "nf4": Case(_NF4, "bitsandbytes nf4", nf4),
    "nf4 double": Case({**_NF4, "bnb_4bit_use_double_quant": True}, "bitsandbytes nf4", nf4_double),
}


@dataclass
class Model:
    """A model to be written: its `config.json`, its stored tensors, and the values that its weights stand for."""

    config: dict[str, Any]
    tensors: Parts
    values: Parts
    quantized: list[str] = field(default_factory=list)  # names of the weights that are quantised

    def write(self, path: Path) -> Path:
        """Write a Hugging Face folder; returns `path`."""
        path.mkdir(parents=True, exist_ok=True)
        (path / "config.json").write_text(json.dumps(self.config))
        write_tokenizer(path, self.config["vocab_size"])
        write_safetensors(path / "model.safetensors", self.tensors)
        return path

    def write_plain(self, path: Path) -> Path:
        """Write the values as a float32 folder; returns `path`."""
        plain = {key: value for key, value in self.config.items() if key != "quantization_config"}
        return Model(plain, self.values, self.values).write(path)


def quantized_model(case: Case, seed: int = 0, also: tuple[str, ...] = (), **changes: Any) -> Model:
    """A tiny random model whose linear layers, but for the head, are stored as a case says; `also` names further modules."""
    config = make_config(quantization_config=copy.deepcopy(case.config), **{"intermediate_size": 192, **changes})
    model, rng = Model(config, {}, {}), np.random.default_rng(seed)
    for name, values in random_tensors(parse_config(config), seed).items():
        module = name.removesuffix(".weight")
        if module.endswith("_proj") or module in also:
            parts, model.values[name] = case.write(rng, *values.shape)
            model.tensors |= {f"{module}.{part}": tensor for part, tensor in parts.items()}
            model.quantized.append(name)
        else:
            model.tensors[name], model.values[name] = values.astype(ml_dtypes.bfloat16), values
    return model


def write_safetensors(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Write a safetensors file with tensors of any type that checkpoints use."""
    kinds = {"bfloat16": "BF16", "float8_e4m3fn": "F8_E4M3", "float8_e8m0fnu": "F8_E8M0"}
    header, data = {}, bytearray()
    for name, tensor in tensors.items():
        kind = kinds.get(tensor.dtype.name) or f"{'F' if tensor.dtype.kind == 'f' else tensor.dtype.kind.upper()}{8 * tensor.itemsize}"
        header[name] = {"dtype": kind, "shape": list(tensor.shape), "data_offsets": [len(data), len(data) + tensor.nbytes]}
        data += tensor.tobytes()
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
