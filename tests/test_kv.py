"""A KV cache of 8 bits: what it keeps, what it loses, and the CPU's kernels against a reference that rounds in the same way."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from click.testing import CliRunner

import flashformer
from flashformer import SamplingParams
from flashformer.backends.cpu import CpuRunner, compile
from flashformer.backends.cpu import load as load_runner
from flashformer.check import check_runner, compare, sample_tokens
from flashformer.checkpoint import open_checkpoint
from flashformer.cli import main
from flashformer.engine import Device, default_context
from flashformer.errors import InputError
from flashformer.explain import describe
from flashformer.models import build_graph
from flashformer.ops.attention import CODES, encode, mix, round_trip
from flashformer.plan import LEAST_SCALE, KvType, make_kv_layout, make_plan
from flashformer.reference import Reference
from flashformer.shapes import shape
from flashformer.targets import get
from kv_models import OUTLIERS, share_of_the_effect, write_outliers
from running import run_checkpoint
from test_cpu import MODELS, ODD, make
from test_perplexity import TEXT, perplexity

EIGHT: tuple[KvType, ...] = ("int8", "fp8")
SHAPES: dict[str, tuple[int, dict[str, Any]]] = {
    **{name: MODELS[name] for name in ("qwen2 odd", "one kv head", "groups of eleven", "wide heads")},
    "odd": (3, ODD),
    "steps in odd number": (2, {"hidden_size": 320, "head_dim": 80, "num_attention_heads": 4, "num_key_value_heads": 2}),
}
LOST: dict[KvType, float] = {"int8": 0.005, "fp8": 0.02}  # most of the perplexity of SmolLM2


@contextmanager
def running(folder: Path, kv_type: KvType, workers: int = 2, max_context: int = 256) -> Iterator[tuple[CpuRunner, Reference]]:
    """A folder's model on the CPU with a cache of some type, and its reference."""
    with (
        open_checkpoint(folder) as checkpoint,
        run_checkpoint(checkpoint, load_runner, get("cpu"), max_context, workers, kv_type=kv_type) as made,
    ):
        yield made


def native(reference: Reference, tokens: list[int]) -> np.ndarray:
    """The logits of the same model with a native cache."""
    return Reference(reference.graph, reference.checkpoint).logits(tokens)


# --- what it keeps ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kv_type", EIGHT)
def test_the_largest_value_has_a_large_code(kv_type: KvType) -> None:
    sizes = np.float32(10) ** np.arange(-12, 13)
    x = np.random.default_rng(1).normal(size=(25, 3, 24)).astype(np.float32) * sizes[:, None, None]
    codes, scale = encode(x, kv_type)
    assert codes.shape == x.shape and codes.dtype == CODES[kv_type][0] and scale.dtype == ml_dtypes.bfloat16
    largest = np.abs(codes.astype(np.float32)).max(axis=-1)
    assert set(largest.reshape(-1).tolist()) == set(CODES[kv_type][1])
    step = 1 / 254 if kv_type == "int8" else 1 / 28
    assert (np.abs(round_trip(x, kv_type) - x) <= 1.01 * step * np.abs(x).max(axis=-1, keepdims=True)).all()


@pytest.mark.parametrize("head_dim", [64, 128])
def test_the_best_of_some_codes_loses_less(monkeypatch: pytest.MonkeyPatch, head_dim: int) -> None:
    x = np.random.default_rng(3).normal(size=(500, 2, head_dim)).astype(np.float32)
    lost = ((round_trip(x, "fp8") - x) ** 2).sum(axis=-1)
    dtype, codes = CODES["fp8"]
    each = []
    for code in codes:
        monkeypatch.setitem(CODES, "fp8", (dtype, (code,)))
        each.append(((round_trip(x, "fp8") - x) ** 2).sum(axis=-1))
    assert np.allclose(lost, np.min(each, axis=0)) and lost.mean() < 0.87 * each[0].mean()


@pytest.mark.parametrize("kv_type", EIGHT)
def test_vectors_of_zeros_and_of_nan(kv_type: KvType) -> None:
    x = np.ones((4, 1, 16), np.float32)
    x[0], x[1, 0, 3], x[2, 0, 5] = 0, np.nan, np.inf
    assert (encode(x[:1], kv_type)[1] == ml_dtypes.bfloat16(LEAST_SCALE)).all()
    back = round_trip(x, kv_type)
    assert not back[0].any() and np.isnan(back[1:3]).all() and np.allclose(back[3], 1, rtol=0.01)


@pytest.mark.parametrize("head_dim", [2, 8, 10, 24, 64, 80, 256])
def test_mixing_changes_no_score(head_dim: int) -> None:
    q, k = np.random.default_rng(2).normal(size=(2, 5, head_dim))
    mixed = make_kv_layout(shape_with(head_dim), 16).mixed
    assert np.allclose((mix(q) * mix(k)).sum(-1), mixed * (q * k).sum(-1)) and np.allclose(mix(mix(q)), mixed * q)
    one = np.eye(head_dim)[0]
    assert np.count_nonzero(mix(one)) == mixed and head_dim % mixed == 0


def shape_with(head_dim: int) -> Any:
    """A configuration with heads of that size."""
    from dataclasses import replace

    return replace(shape("llama-3.2-1b"), head_dim=head_dim)


def test_half_the_bytes() -> None:
    kv, eight = (make_kv_layout(shape("llama-3.1-8b"), 1000, t) for t in ("native", "fp8"))
    assert eight.block_bytes == 2 * 16 * (128 + 2) and eight.block_bytes % 64 == 0
    assert eight.bytes_read(1000) == 2 * 8 * (128 + 2) * 1000 < 0.51 * kv.bytes_read(1000)
    assert make_kv_layout(shape("llama-3.1-8b"), 1000, "int8").layer_bytes == eight.layer_bytes < 0.51 * kv.layer_bytes
    config = shape("llama-3.1-8b")
    device = Device("cuda", "a GPU", get("sm_90"), 24 << 30)
    graph = build_graph(config)
    assert 1.9 < default_context(config, graph, device, kv="fp8") / default_context(config, graph, device) < 2


# --- what it loses ---------------------------------------------------------------------------------------------------------


def test_int8_loses_less_than_fp8(tmp_path: Path) -> None:
    with open_checkpoint(make(tmp_path, **ODD)) as checkpoint:
        tokens = sample_tokens(checkpoint.config, 60, seed=1)
        plain, int8, fp8 = (Reference(build_graph(checkpoint.config), checkpoint, kv_type=t).logits(tokens) for t in ("native", *EIGHT))
    assert 0 < 4 * compare(int8, plain).kl_mean < compare(fp8, plain).kl_mean < 1e-3


def test_smollm2_loses_little(demo_model: Path) -> None:
    with open_checkpoint(demo_model) as checkpoint:
        tokens = checkpoint.tokenizer().encode(TEXT)[:512]
        graph = build_graph(checkpoint.config)
        found = {t: perplexity(Reference(graph, checkpoint, kv_type=t).logits(tokens), tokens) for t in ("native", *EIGHT)}
    for kv_type, most in LOST.items():
        assert 0 < abs(found[kv_type] / found["native"] - 1) < most, (kv_type, found)


# --- the CPU's kernels -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kv_type", EIGHT)
@pytest.mark.parametrize("name", SHAPES)
def test_models_agree_with_the_reference(tmp_path: Path, name: str, kv_type: KvType) -> None:
    """Much nearer to the reference that rounds alike than that is to a native cache."""
    workers, changes = SHAPES[name]
    with running(make(tmp_path, **changes), kv_type, workers) as (runner, reference):
        tokens = sample_tokens(runner.plan.config, 100, seed=1)
        result = check_runner(runner, reference, tokens)
        assert result.within, result.describe()
        own = Reference(reference.graph, reference.checkpoint, kv_type=kv_type).logits(tokens)
        assert result.kl_mean < 0.05 * compare(own, native(reference, tokens)).kl_mean


@pytest.mark.parametrize("kv_type", EIGHT)
def test_values_that_have_few_codes(tmp_path: Path, kv_type: KvType) -> None:
    with running(write_outliers(tmp_path, OUTLIERS[kv_type]), kv_type) as (runner, reference):
        tokens = sample_tokens(runner.plan.config, 100, seed=2)
        ours, own, plain = runner.logits(tokens, 0), reference.logits(tokens), native(reference, tokens)
        assert compare(own, plain).kl_mean > 1e-3
        assert abs(share_of_the_effect(ours, own, plain)) < 0.1


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="the options are those of x86-64")
@pytest.mark.parametrize("kv_type", EIGHT)
@pytest.mark.parametrize("level", ["x86-64", "x86-64-v3"])
def test_narrower_vectors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, level: str, kv_type: KvType) -> None:
    monkeypatch.setattr(compile, "NATIVE", (f"-march={level}",))
    compile.examine.cache_clear()
    try:
        if level == "x86-64-v3" and "avx2" not in Path("/proc/cpuinfo").read_text():
            pytest.skip("this processor has no AVX2")
        with running(make(tmp_path, **ODD), kv_type) as (runner, reference):
            tokens = sample_tokens(runner.plan.config, 60, seed=3)
            own = reference.logits(tokens)
            assert compare(runner.logits(tokens, 0), own).kl_mean < 0.05 * compare(own, native(reference, tokens)).kl_mean
    finally:
        compile.examine.cache_clear()


def test_long_positions(tmp_path: Path) -> None:
    length = 2048
    folder = make(tmp_path, max_position_embeddings=length, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, head_dim=64)
    with running(folder, "int8", max_context=length) as (runner, reference):
        tokens = sample_tokens(runner.plan.config, length, seed=6)
        result = compare(runner.logits(tokens, 0), reference.logits(tokens))
        assert result.within and result.kl_mean < 1e-6, result.describe()


@pytest.mark.parametrize("kv_type", EIGHT)
def test_the_same_bits_however_a_text_is_cut(tmp_path: Path, kv_type: KvType) -> None:
    with running(make(tmp_path, **ODD), kv_type, 3) as (runner, _):
        tokens = sample_tokens(runner.plan.config, 150, seed=5)
        whole = runner.logits(tokens, 0)
        for _ in range(5):
            assert np.array_equal(runner.logits(tokens, 0), whole)
        parts = [runner.logits(tokens[a:b], a) for a, b in ((0, 1), (1, 17), (17, 100), (100, 150))]
        assert np.array_equal(np.concatenate(parts), whole)


@pytest.mark.parametrize("kv_type", EIGHT)
def test_what_a_text_of_nan_leaves_behind_harms_no_later_one(tmp_path: Path, kv_type: KvType) -> None:
    from safetensors.numpy import load_file, save_file

    folder = make(tmp_path, **ODD)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.embed_tokens.weight"][7] = np.nan
    save_file(tensors, folder / "model.safetensors")
    with pytest.warns(UserWarning, match="not finite"), running(folder, kv_type, 3) as (runner, _):
        tokens = [t if t != 7 else 8 for t in sample_tokens(runner.plan.config, 40, seed=8)]
        clean = runner.logits(tokens, 0)
        assert np.isnan(runner.logits([7] * 50, 0)).all()
        assert np.array_equal(runner.logits(tokens, 0), clean) and np.isfinite(clean).all()


# --- used ------------------------------------------------------------------------------------------------------------------


def test_the_engine_reuses_what_the_cache_holds(tmp_path: Path) -> None:
    folder = make(tmp_path, vocab_size=300)
    params = SamplingParams(max_tokens=12, ignore_eos=True)
    with flashformer.load(folder, "cpu", kv="int8") as engine:
        ids = list(range(5, 45))
        made = [r.token for r in engine.generate(ids, params)]
        ids += [*made[:-1], 7, 8, 9]
        again = [r.token for r in engine.generate(ids, params)]
        assert engine.stats.reused_tokens == len(ids) - 3
        steps = len(again) - 1
        assert engine.stats.bytes_read == sum(engine.plan.token_bytes(len(ids) + i) for i in range(steps))
    with flashformer.load(folder, "cpu", kv="int8") as fresh:
        assert [r.token for r in fresh.generate(ids, params)] == again


def test_unknown_types_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="kv is 'fp4'; it must be one of native, int8, fp8"):
        flashformer.load(tmp_path, "cpu", kv="fp4")  # type: ignore[arg-type]


def test_the_command_line(tmp_path: Path) -> None:
    folder = str(make(tmp_path, vocab_size=300))
    result = CliRunner().invoke(main, ["check", folder, "--device", "cpu", "--kv", "fp8", "--tokens", "20"])
    assert result.exit_code == 0 and "within tolerance" in result.output
    result = CliRunner().invoke(main, ["explain", folder, "--target", "sm_90", "--kv", "int8"])
    assert result.exit_code == 0 and "positions in int8" in result.output
    text = tmp_path / "text"
    text.write_text("To be, or not to be, that is the question. " * 3)
    command = ["quality", folder, "--against", folder, "--text", str(text), "--device", "cpu", "--tokens", "100", "--window", "50"]
    same, rounded = (CliRunner().invoke(main, [*command, "--kv", kind]) for kind in ("native", "fp8"))
    assert "0.000e+00 nats" in same.output and rounded.exit_code == 0 and "0.000e+00 nats" not in rounded.output
    config = shape("llama-3.1-8b")
    assert "positions in" not in describe(make_plan(config, build_graph(config), get("sm_90")))
