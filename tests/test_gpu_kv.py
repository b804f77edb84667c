"""A KV cache of 8 bits in the whole-model kernel on a real GPU, against a reference that rounds in the same way."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

import flashformer
from flashformer import SamplingParams
from flashformer.backends.cuda import CudaRunner, RandomWeights, probe
from flashformer.backends.cuda import load as load_runner
from flashformer.bench import check_kernel
from flashformer.check import check_runner, compare, sample_tokens
from flashformer.checkpoint import open_checkpoint
from flashformer.models import build_graph
from flashformer.ops.attention import CODES
from flashformer.plan import BLOCK_POSITIONS, KvType, make_plan
from flashformer.reference import Reference
from flashformer.shapes import shape
from flashformer.targets import Target, get
from flashformer.validate import validate
from kv_models import OUTLIERS, share_of_the_effect, size_of_the_effect, write_outliers
from model_files import make_config, write_folder
from running import run_checkpoint
from test_gpu import LLAMA3, MODELS, Judge, judge, make
from test_kv import EIGHT, LOST, SHAPES, native
from test_perplexity import TEXT, perplexity

pytestmark = pytest.mark.gpu

__all__ = ["judge"]  # a fixture


@contextmanager
def running(folder: Path, kv_type: KvType, max_context: int = 256, target: Target | None = None) -> Iterator[tuple[CudaRunner, Reference]]:
    """The kernel of a folder's model on this GPU with a cache of some type, and its reference."""
    info = probe()
    assert info is not None and info.target is not None
    with (
        open_checkpoint(folder) as checkpoint,
        run_checkpoint(checkpoint, load_runner, target or info.target, max_context, info.workers, kv_type=kv_type) as made,
    ):
        yield made


@pytest.mark.parametrize("kv_type", EIGHT)
@pytest.mark.parametrize("name", [*MODELS, "steps in odd number"])
def test_models_agree_with_the_reference(
    tmp_path: Path, name: str, kv_type: KvType, judge: Judge, record_property: Callable[[str, object], None]
) -> None:
    with running(make(tmp_path, **(MODELS.get(name) or SHAPES[name][1])), kv_type) as (runner, reference):
        tokens = sample_tokens(runner.plan.config, 100, seed=1)
        judge(check_runner(runner, reference, tokens))
        if kv_type == "fp8":  # the steps of int8 are hardly larger than the rounding of activations
            share = share_of_the_effect(runner.logits(tokens, 0), reference.logits(tokens), native(reference, tokens))
            record_property("share", share)
            assert abs(share) < 0.5


@pytest.mark.parametrize("kv_type", EIGHT)
def test_values_that_have_few_codes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kv_type: KvType, record_property: Callable[[str, object], None]
) -> None:
    """The effect of the cache's rounding is far above that of activations, and all of it is there.

    With one code for the largest value: which of several loses least is decided by its last bits here, since its rounding is nearly all
    that is lost.
    """
    dtype, codes = CODES[kv_type]
    monkeypatch.setitem(CODES, kv_type, (dtype, codes[:1]))
    with running(write_outliers(tmp_path, OUTLIERS[kv_type]), kv_type) as (runner, reference):
        tokens = sample_tokens(runner.plan.config, 200, seed=2)
        ours, own, plain = runner.logits(tokens, 0), reference.logits(tokens), native(reference, tokens)
        share = share_of_the_effect(ours, own, plain)
        record_property("share", share)
        assert compare(own, plain).kl_mean > 1e-3 and abs(share) < 0.2


def test_the_best_of_several_codes(tmp_path: Path, record_property: Callable[[str, object], None]) -> None:
    """As much is lost as in the reference, though not always with the same code."""
    with running(write_outliers(tmp_path, OUTLIERS["fp8"]), "fp8") as (runner, reference):
        tokens = sample_tokens(runner.plan.config, 200, seed=2)
        ours, own, plain = runner.logits(tokens, 0), reference.logits(tokens), native(reference, tokens)
        share, size = share_of_the_effect(ours, own, plain), size_of_the_effect(ours, own, plain)
        record_property("share", share)
        record_property("size", size)
        assert compare(own, plain).kl_mean > 1e-3 and abs(share) < 0.8 and 0.8 < size < 1.25


@pytest.mark.parametrize("kv_type", EIGHT)
def test_float16(tmp_path: Path, kv_type: KvType, judge: Judge) -> None:
    folder = write_folder(tmp_path, make_config(torch_dtype="float16"), dtype="float16")
    with running(folder, kv_type) as (runner, reference):
        assert runner.plan.config.dtype == "float16"
        judge(check_runner(runner, reference, sample_tokens(runner.plan.config, 64, seed=3)))


@pytest.mark.parametrize("kv_type", EIGHT)
@pytest.mark.parametrize("name", ["qwen3", "odd sizes"])
def test_the_path_of_older_gpus_gives_the_same(tmp_path: Path, name: str, kv_type: KvType) -> None:
    folder, found = make(tmp_path, **MODELS[name]), []
    info = probe()
    assert info is not None and info.target is not None
    for older in (None, "sm_80", "sm_86"):
        target = replace(get(older), arch=info.target.arch) if older else None
        with running(folder, kv_type, target=target) as (runner, reference):
            tokens = sample_tokens(runner.plan.config, 64, seed=2)
            found.append(runner.logits(tokens, 0))
            assert compare(found[-1], reference.logits(tokens)).within
    assert all(np.array_equal(found[0], other) for other in found[1:])


@pytest.mark.parametrize("kv_type", EIGHT)
def test_the_same_bits_however_a_text_is_cut(tmp_path: Path, kv_type: KvType) -> None:
    with running(make(tmp_path, **MODELS["odd sizes"]), kv_type) as (runner, _):
        tokens = sample_tokens(runner.plan.config, 150, seed=5)
        whole = runner.logits(tokens, 0)
        for _ in range(100):
            assert np.array_equal(runner.logits(tokens, 0), whole)
        parts = [runner.logits(tokens[a:b], a) for a, b in ((0, 1), (1, 17), (17, 100), (100, 150))]
        assert np.array_equal(np.concatenate(parts), whole)


@pytest.mark.parametrize("kv_type", EIGHT)
@pytest.mark.parametrize(("length", "compared"), [(8192, 8192), (100_352, 64)])
def test_long_positions(tmp_path: Path, length: int, compared: int, kv_type: KvType, judge: Judge) -> None:
    folder = make(
        tmp_path, max_position_embeddings=length, rope_scaling={**LLAMA3, "original_max_position_embeddings": 8192}, rope_theta=5e5,
        num_hidden_layers=2 if length < 10_000 else 1, num_attention_heads=2, num_key_value_heads=1, head_dim=64,
    )  # fmt: skip
    with running(folder, kv_type, length) as (runner, reference):
        tokens = sample_tokens(runner.plan.config, length, seed=6)
        at = length - compared
        if at:
            list(runner.generate(tokens[:at], 0, 1, ()))
            reference.logits(tokens[:at], last=1)
        judge(compare(runner.logits(tokens[at:], at), reference.logits(tokens[at:], at)))


@pytest.mark.parametrize("kv_type", EIGHT)
def test_a_real_shape(kv_type: KvType, record_property: Callable[[str, object], None]) -> None:
    """Heads of 128 on random weights, and a cache filled for benchmarks: every block has codes and scales that are numbers."""
    info = probe()
    assert info is not None and info.target is not None
    config = replace(shape("llama-3.1-8b"), num_layers=2, vocab_size=4099, max_positions=4096)
    plan = make_plan(config, build_graph(config), info.target, 4096, info.workers, kv_type=kv_type)
    validate(plan)
    weights = RandomWeights(config)
    runner = load_runner(plan, weights)
    try:
        for key, value in check_kernel(runner, weights).items():
            record_property(key, value)
        runner.fill_kv()
        blocks = np.zeros((config.num_layers * plan.kv.heads * plan.kv.blocks, plan.kv.block_bytes), np.uint8)
        runner.context.wait()
        runner.context.download(runner.params.kv, blocks, "the KV cache")
        scales = 2 * BLOCK_POSITIONS * plan.kv.scale_bytes
        assert (blocks[:, -scales:].copy().view(ml_dtypes.bfloat16) == ml_dtypes.bfloat16(1 / CODES[kv_type][1][0])).all()
        codes = blocks[:, :-scales].copy().view(CODES[kv_type][0]).astype(np.float32)
        assert np.isfinite(codes).all() and len(np.unique(codes)) > 200
        assert np.isfinite(runner.logits([1, 2, 3], 4000)).all()
    finally:
        runner.close()


@pytest.mark.parametrize("kv_type", EIGHT)
def test_what_a_text_of_nan_leaves_behind_harms_no_later_one(tmp_path: Path, kv_type: KvType) -> None:
    from safetensors.numpy import load_file, save_file

    folder = write_folder(tmp_path, make_config(), dtype="float32")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.embed_tokens.weight"][7] = np.nan
    save_file(tensors, folder / "model.safetensors")
    with pytest.warns(UserWarning, match="not finite"), running(folder, kv_type) as (runner, _):
        tokens = [t if t != 7 else 8 for t in sample_tokens(runner.plan.config, 40, seed=8)]
        clean = runner.logits(tokens, 0)
        assert not np.isfinite(runner.logits([7] * 50, 0)).any()
        assert np.array_equal(runner.logits(tokens, 0), clean) and np.isfinite(clean).all()


def test_a_conversation_computes_only_what_is_new(tmp_path: Path) -> None:
    folder = make(tmp_path, vocab_size=300)
    params = SamplingParams(max_tokens=12, ignore_eos=True)
    with flashformer.load(folder, "cuda", kv="int8", prompt_columns=0) as engine:
        ids = list(range(5, 45))
        for turn in range(3):
            made = [r.token for r in engine.generate(ids, params)]
            assert engine.stats.reused_tokens == (len(ids) - 3 if turn else 0)
            with flashformer.load(folder, "cuda", kv="int8", prompt_columns=0) as fresh:
                assert [r.token for r in fresh.generate(ids, params)] == made
            ids += [*made[:-1], 7, 8, 9]


@pytest.mark.parametrize("kv_type", EIGHT)
def test_smollm2(demo_model: Path, kv_type: KvType, record_property: Callable[[str, object], None]) -> None:
    found = {}
    for kind in ("native", kv_type):
        with flashformer.load(demo_model, "cuda", kv=kind) as engine:
            tokens = engine.tokenizer.encode(TEXT)[:2048]
            found[kind] = perplexity(engine.logits(tokens), tokens)
            record_property(f"perplexity, {kind}", found[kind])
            if kind == "int8":
                reference = Reference(build_graph(engine.config), engine.checkpoint, kv_type=kind)
                result = check_runner(engine.runner, reference, tokens[:256])
                assert result.within, result.describe()
    assert abs(found[kv_type] / found["native"] - 1) < LOST[kv_type]
