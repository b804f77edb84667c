"""Each format decodes to exactly what the library that defines it computes, in whole and in rows; damaged tensors are refused by name."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from flashformer.errors import CheckpointError
from flashformer.quant import decode, methods
from flashformer.quant.forms import Affine, Form, Scaled, Table
from flashformer.quant.scheme import Scheme
from quant_files import Parts, element, load, stored

AWQ = Scheme("gemm", 4, "group", 16, symmetric=False)
BLOCK = Scheme("float", 8, "block", block=(8, 16), floating=True)
NF4 = Scheme("nf4", 4, "group", floating=True)


def packed(bits: int, group: int | None = None, symmetric: bool = True) -> Scheme:
    return Scheme("pack-quantized", bits, "channel" if group is None else "group", group, symmetric)


def values(scope: Any, floating: bool = True) -> Scheme:
    return Scheme(f"{'float' if floating else 'int'}-quantized", 8, scope, block=(8, 16) if scope == "block" else None, floating=floating)


def gptq(version: str, bits: int) -> Scheme:
    return Scheme(version, bits, "group", 16)


# (file, case) -> scheme
CASES: dict[tuple[str, str], Scheme] = {
    ("compressed_tensors", "int4-sym-g16"): packed(4, 16),
    ("compressed_tensors", "int4-sym-channel"): packed(4),
    ("compressed_tensors", "int4-asym-g16"): packed(4, 16, symmetric=False),
    ("compressed_tensors", "int4-asym-channel"): packed(4, symmetric=False),
    ("compressed_tensors", "int8-sym-channel"): packed(8),
    ("compressed_tensors", "int8-asym-g16"): packed(8, 16, symmetric=False),
    ("compressed_tensors", "int8-asym-channel"): packed(8, symmetric=False),
    ("compressed_tensors", "int4-bf16-ragged"): packed(4),
    ("compressed_tensors", "fp8-tensor"): values("tensor"),
    ("compressed_tensors", "fp8-channel"): values("channel"),
    ("compressed_tensors", "fp8-block"): values("block"),
    ("compressed_tensors", "int8-channel"): values("channel", floating=False),
    ("compressed_tensors", "nvfp4"): Scheme("nvfp4-pack-quantized", 4, "group", 16, floating=True),
    ("compressed_tensors", "mxfp4"): Scheme("mxfp4-pack-quantized", 4, "group", 32, floating=True),
    ("bitsandbytes", "nf4"): NF4,
    ("bitsandbytes", "nf4-double"): NF4,
    ("fp8", "block"): replace(BLOCK, block=(8, 16)),
    ("fp8", "ue8m0"): replace(BLOCK, format="ue8m0"),
    ("fp8", "e8m0"): replace(BLOCK, format="ue8m0"),
    ("fp8", "tensor"): Scheme("float", 8, "tensor", floating=True),
    ("awq", "g16"): AWQ,
    ("gptq", "v1-4"): gptq("gptq", 4),
    ("gptq", "v1-8"): gptq("gptq", 8),
    ("gptq", "v2-4-act-order"): gptq("gptq_v2", 4),
    ("gptq", "v2-8-act-order"): gptq("gptq_v2", 8),
}
METHODS = {"compressed_tensors": "compressed-tensors"}
each_case = pytest.mark.parametrize(("file", "case"), CASES, ids=["/".join(case) for case in CASES])


def read(file: str, case: str, parts: Parts, rows: slice = slice(None), scheme: Scheme | None = None) -> Form:
    """Decode a case, with its tensors perhaps changed."""
    return decode(METHODS.get(file, file), "m.proj", parts, shape_of(file, case), scheme or CASES[file, case], rows)


def shape_of(file: str, case: str) -> tuple[int, int]:
    n, k = load(file)[case]["expected"].shape
    return (17, k) if case == "nf4-double" else (n, k)  # of which the file holds the last rows alone


@each_case
def test_values_are_those_of_the_library(file: str, case: str) -> None:
    parts = load(file)[case]
    ours, expected = read(file, case, stored(parts)).dequantize(), parts["expected"]
    assert ours.dtype == np.float32 and ours.shape == shape_of(file, case)
    ours = ours[-len(expected) :].astype(expected.dtype)  # the library rounds to the type that it returns
    np.testing.assert_array_equal(ours.view(f"u{ours.itemsize}"), expected.view(f"u{ours.itemsize}"))
    assert len(np.unique(expected.astype(np.float32))) > 15
    if "expected_bf16" in parts:
        np.testing.assert_array_equal(ours.astype(ml_dtypes.bfloat16), parts["expected_bf16"])


@each_case
@pytest.mark.parametrize("rows", [slice(0, 1), slice(3, 7), slice(5, None), slice(8, 16), slice(0, 0), slice(1, None, 3), slice(-2, None)])
def test_rows_are_those_of_the_whole(file: str, case: str, rows: slice) -> None:
    parts = stored(load(file)[case])
    whole = read(file, case, parts)
    part = read(file, case, parts, rows)
    expected = whole.dequantize()[rows]
    for values_ in (part.dequantize(), whole.dequantize(rows), whole.take(rows).dequantize()):
        np.testing.assert_array_equal(values_.view(np.uint32), expected.view(np.uint32))


@each_case
def test_forms_keep_their_promises(file: str, case: str) -> None:
    form = read(file, case, stored(load(file)[case]))
    n, k = shape_of(file, case)
    if isinstance(form, Affine):
        assert form.q.shape == (n, k) and form.q.dtype == np.uint8 and form.q.max() < 1 << form.bits
        assert form.scale.dtype == np.float32 and form.scale.shape == (n, -(-k // form.group))
        assert form.zero is not None and form.zero.shape == form.scale.shape and form.zero.dtype == np.int16
        assert form.permuted == ("act-order" in case)
    elif isinstance(form, Table):
        assert form.codes.shape == (n, k) and form.codes.max() < 16 and form.table.shape == (16,)
        assert form.scale.shape == (n, k // form.group) and form.scale.dtype == np.float32
    else:
        assert isinstance(form, Scaled) and form.values.itemsize == 1 and form.values.shape == (n, k)
        assert form.scale.shape == (-(-n // form.block[0]), -(-k // form.block[1])) and form.scale.dtype == np.float32


def test_compressed_tensors_index_of_old_releases() -> None:
    """-1 everywhere means columns in order; anything else is the group of each column."""
    parts = stored(load("compressed_tensors")["int4-sym-g16"])
    plain = read("compressed_tensors", "int4-sym-g16", parts)
    unused = read("compressed_tensors", "int4-sym-g16", parts | {"weight_g_idx": np.full(64, -1, np.int32)})
    assert isinstance(unused, Affine) and isinstance(plain, Affine) and not unused.permuted
    index = np.random.default_rng(0).permutation(np.arange(64, dtype=np.int32) // 16)
    ordered = read("compressed_tensors", "int4-sym-g16", parts | {"weight_g_idx": index})
    assert isinstance(ordered, Affine) and ordered.permuted
    indexed = replace(CASES["compressed_tensors", "int4-sym-g16"], indexed=True)
    for missing_index in (parts, parts | {"weight_g_idx": np.full(64, -1, np.int32)}):
        with pytest.raises(CheckpointError, match="weight_g_idx"):
            read("compressed_tensors", "int4-sym-g16", missing_index, scheme=indexed)
    expected = (plain.q.astype(np.float32) - 8) * plain.scale[:, index]
    np.testing.assert_array_equal(ordered.dequantize(), expected)


def test_mx_scales_at_the_ends_of_their_range() -> None:
    parts = stored(load("compressed_tensors")["mxfp4"])
    exponents = np.array([[0, 254], [1, 253]] * 3, np.uint8)
    form = read("compressed_tensors", "mxfp4", parts | {"weight_scale": exponents})
    assert isinstance(form, Table) and form.scale[0].tolist() == [2.0**-127, 2.0**127]


# --- Refusals: (file, case, part, what to do to it, what the message says) -------------------------------------------------

Change = Callable[[np.ndarray], Any]


def state(old: bytes, new: bytes) -> Change:
    def change(tensor: np.ndarray) -> np.ndarray:
        assert old in tensor.tobytes()
        return np.frombuffer(tensor.tobytes().replace(old, new), np.uint8)

    return change


def missing(_: np.ndarray) -> None:
    return None


def shorter(tensor: np.ndarray) -> np.ndarray:
    return tensor[:-1]


def wider(tensor: np.ndarray) -> np.ndarray:
    return np.concatenate([tensor, tensor], axis=-1)


def f64(tensor: np.ndarray) -> np.ndarray:
    return tensor.astype(np.float64)


CT, BNB, STATE = "compressed_tensors", "bitsandbytes", "weight.quant_state.bitsandbytes__nf4"
REFUSALS: list[tuple[str, str, str, Change, str]] = [
    (CT, "int4-sym-g16", "weight_scale", missing, "missing"),
    (CT, "int4-sym-g16", "weight_scale", wider, "expected is"),
    (CT, "int4-sym-g16", "weight_scale", element(0), "zero"),
    (CT, "int4-sym-g16", "weight_scale", element(np.nan), "NaN"),
    (CT, "int4-sym-g16", "weight_scale", element(-np.inf), "infinite"),
    (CT, "int4-sym-g16", "weight_packed", shorter, "expected is"),
    (CT, "int4-sym-g16", "weight_packed", f64, "float64"),
    (CT, "int4-sym-g16", "weight_shape", element(65), "configuration"),
    (CT, "int4-asym-g16", "weight_zero_point", missing, "missing"),
    (CT, "int4-asym-g16", "weight_zero_point", shorter, "expected is"),
    (CT, "fp8-channel", "weight_scale", shorter, "expected is"),
    (CT, "fp8-tensor", "weight_scale", element(0), "zero"),
    (CT, "fp8-tensor", "weight", element(np.nan), "NaN"),
    (CT, "nvfp4", "weight_global_scale", missing, "missing"),
    (CT, "nvfp4", "weight_global_scale", element(0), "zero"),
    (CT, "nvfp4", "weight_scale", element(np.nan), "NaN"),
    (CT, "nvfp4", "weight_scale", element(0), "zero"),
    (CT, "nvfp4", "weight_global_scale", element(1e-40), "infinite"),
    (CT, "mxfp4", "weight_scale", element(255), "NaN"),
    (CT, "mxfp4", "weight_packed", shorter, "expected is"),
    (BNB, "nf4", "weight.absmax", missing, "missing"),
    (BNB, "nf4", "weight.absmax", shorter, "expected is"),
    (BNB, "nf4", "weight.absmax", element(np.inf), "infinite"),
    (BNB, "nf4", "weight.quant_map", element(0.99), "NF4"),
    (BNB, "nf4", STATE, missing, "missing"),
    (BNB, "nf4", STATE, shorter, "JSON"),
    (BNB, "nf4", STATE, state(b"nf4", b"fp4"), "nf4"),
    (BNB, "nf4", STATE, state(b"[6, 128]", b"[8, 128]"), "shape"),
    (BNB, "nf4", STATE, state(b'"blocksize": 64', b'"blocksize": 0'), "blocksize"),
    (BNB, "nf4", STATE, state(b'"blocksize": 64', b'"blocksize": 96'), "multiple"),
    (BNB, "nf4", STATE, state(b'"dtype"', b'"other"'), "not known"),
    (BNB, "nf4-double", "weight.nested_absmax", missing, "missing"),
    (BNB, "nf4-double", "weight.nested_absmax", element(np.nan), "NaN"),
    (BNB, "nf4-double", STATE, state(b'"nested_offset"', b'"nested_dtypes"'), "not known"),
    ("fp8", "block", "weight_scale_inv", missing, "missing"),
    ("fp8", "block", "weight_scale_inv", wider, "expected is"),
    ("fp8", "block", "weight_scale_inv", element(0), "zero"),
    ("fp8", "ue8m0", "weight_scale_inv", element(0.3), "power of two"),
    ("fp8", "e8m0", "weight_scale_inv", element(np.nan), "NaN"),
    ("awq", "g16", "scales", shorter, "expected is"),
    ("awq", "g16", "scales", element(0), "zero"),
    ("awq", "g16", "qzeros", missing, "missing"),
    ("awq", "g16", "qweight", lambda x: np.ascontiguousarray(x.T), "expected is"),
    ("gptq", "v1-4", "qzeros", element(-1), "gptq_v2"),
    ("gptq", "v1-4", "g_idx", element(2), "groups"),
    ("gptq", "v1-4", "g_idx", element(-1), "groups"),
    ("gptq", "v1-4", "g_idx", missing, "missing"),
    ("gptq", "v1-4", "g_idx", shorter, "expected is"),
    ("gptq", "v2-4-act-order", "scales", element(np.nan), "NaN"),
]


@pytest.mark.parametrize(("file", "case", "part", "change", "says"), REFUSALS)
def test_damaged_tensors_are_refused_by_name(file: str, case: str, part: str, change: Change, says: str) -> None:
    parts = stored(load(file)[case])
    changed = change(parts.pop(part))
    if changed is not None:
        parts[part] = changed
    with pytest.raises(CheckpointError, match=says) as error:
        read(file, case, parts)
    assert f"m.proj.{part}" in str(error.value)


@each_case
def test_a_wrong_group_or_shape_is_refused(file: str, case: str) -> None:
    parts, scheme = stored(load(file)[case]), CASES[file, case]
    n, k = shape_of(file, case)
    for shape in ((n + 8, k), (n, k + 64), (k + 1, n), (n - 1, k)):
        with pytest.raises(CheckpointError, match=r"m\.proj\."):
            decode(METHODS.get(file, file), "m.proj", parts, shape, scheme)
    if file != "bitsandbytes" and scheme.group is not None:
        for group in (scheme.group * 2, scheme.group // 2, 7):
            with pytest.raises(CheckpointError, match=r"m\.proj\."):
                read(file, case, parts, scheme=replace(scheme, group=group))


@each_case
def test_tensors_that_do_not_belong_are_refused(file: str, case: str) -> None:
    parts = stored(load(file)[case])
    read(file, case, parts | {"bias": np.zeros(8, np.float16)})
    with pytest.raises(CheckpointError, match=r"m\.proj\.surprise"):
        read(file, case, parts | {"surprise": np.zeros(8, np.float16)})


@each_case
def test_anything_malformed_gives_our_error(file: str, case: str) -> None:
    """Types, shapes, bytes and presence changed at random: finite values or a CheckpointError, nothing else."""
    rng = random.Random(f"{file}/{case}")
    original = stored(load(file)[case])
    types = ["uint8", "int8", "int32", "int64", "float16", "float32", "float64", ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn]
    accepted = refused = 0
    for _ in range(200):
        parts = dict(original)
        part = rng.choice(list(parts))
        tensor = parts[part]
        kind = rng.randrange(6)
        if kind == 0:
            del parts[part]
        elif kind == 1 and tensor.nbytes % 8 == 0:
            parts[part] = tensor.reshape(-1).view(rng.choice(types))
        elif kind == 2:
            parts[part] = tensor.reshape(-1)[: rng.randrange(tensor.size + 1)]
        elif kind == 3:
            parts[part] = tensor.reshape(rng.choice([(1, *tensor.shape), (*tensor.shape, 1), tensor.shape[::-1], (-1,)]))
        else:
            damaged = bytearray(tensor.tobytes())
            for _ in range(rng.choice((1, 2, 8))):
                damaged[rng.randrange(len(damaged))] = rng.choice((0, 0x7F, 0x80, 0xFF, rng.randrange(256)))
            parts[part] = np.frombuffer(bytes(damaged), tensor.dtype).reshape(tensor.shape)
        try:
            with np.errstate(over="ignore"):
                assert not np.isnan(read(file, case, parts).dequantize()).any()
            accepted += 1
        except CheckpointError as error:
            str(error).encode("utf-8")
            refused += 1
    assert accepted > 5 and refused > 20


def test_every_method_is_found() -> None:
    assert set(methods()) == {"awq", "bitsandbytes", "compressed-tensors", "fp8", "gptq"}
