"""Kernels that read quantised weights, on a real GPU: every format against the reference on the exact dequantised weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flashformer.backends.cuda import CudaRunner, RandomWeights, probe
from flashformer.backends.cuda import load as load_runner
from flashformer.bench import check_kernel
from flashformer.check import Comparison, check_runner, compare, sample_tokens
from flashformer.checkpoint import open_checkpoint
from flashformer.formats import NAMED, PLAIN, choose
from flashformer.models import build_graph
from flashformer.reference import Reference
from flashformer.shapes import shape
from flashformer.targets import Target, get
from model_files import make_config, write_folder
from quant_models import FORMS, QuantizedCheckpoint
from running import assert_near, run_checkpoint
from test_formats import DIVIDED, ODD, STAGES, Quantise, forms_of

pytestmark = pytest.mark.gpu


@contextmanager
def running(
    folder: Path, quantise: Quantise, others: Mapping[str, Quantise | None] | None = None, target: Target | None = None, **config: Any
) -> Iterator[tuple[CudaRunner, Reference]]:
    """A small model with quantised matrices on this GPU, and its reference."""
    info = probe()
    assert info is not None and info.target is not None
    sizes: dict[str, Any] = {
        "hidden_size": 256, "head_dim": 32, "intermediate_size": 384, "vocab_size": 1291, "tie_word_embeddings": True, **config,
    }  # fmt: skip
    write_folder(folder, make_config(**sizes))
    with open_checkpoint(folder) as plain:
        checkpoint = QuantizedCheckpoint(plain, forms_of(plain, quantise, others or {}))
        formats = choose(checkpoint, build_graph(plain.config).weights())
        with run_checkpoint(checkpoint, load_runner, target or info.target, 256, info.workers, formats) as made:
            yield made


Judge = Callable[[Comparison], None]


@pytest.fixture
def judge(record_property: Callable[[str, object], None]) -> Judge:
    """Records the figures of a comparison and asserts that they are within tolerance."""

    def judged(result: Comparison) -> None:
        for name in ("positions", "kl_mean", "kl_max", "top1_agreement", "max_error", "rms_error", "rms_reference"):
            record_property(name, getattr(result, name))
        assert_near(result, 1e-2)  # three times that of 16-bit weights

    return judged


@pytest.mark.parametrize("names", [list(FORMS)[i : i + len(STAGES)] for i in range(0, len(FORMS), len(STAGES))], ids=", ".join)
def test_every_form(tmp_path: Path, names: list[str], judge: Judge) -> None:
    """Every stage in another format; those of more than 128 columns a group have theirs split."""
    chosen = {stage: FORMS[names[i % len(names)]] for i, stage in enumerate(STAGES)}
    others = {part: chosen[stage][0] for stage, parts in STAGES.items() for part in parts}
    with running(tmp_path, others["embed_tokens"], others) as (runner, reference):
        plain = [s.name for s in runner.plan.stages if s.geometry and s.geometry.format == PLAIN]
        assert not plain and runner.plan.embedding_format == PLAIN
        judge(check_runner(runner, reference, sample_tokens(runner.plan.config, 100, seed=1)))


@pytest.mark.parametrize("name", ["int4 g128 zeros", "int8 rows"])
def test_odd_shapes(tmp_path: Path, name: str, judge: Judge) -> None:
    with running(tmp_path, FORMS[name][0], **ODD) as (runner, reference):
        judge(check_runner(runner, reference, sample_tokens(runner.plan.config, 100, seed=2)))


@pytest.mark.parametrize("name", [name for name in NAMED if name != "bf16"])
@pytest.mark.parametrize("older", [None, "sm_80", "sm_86"])
def test_random_weights(name: str, older: str | None, record_property: Callable[[str, object], None]) -> None:
    """Codes drawn on the device, at the columns of real models; also on the path of older GPUs."""
    info = probe()
    assert info is not None and info.target is not None
    target = replace(get(older), arch=info.target.arch) if older else info.target
    config = replace(shape("llama-3.1-8b"), num_layers=1 if older else 2, vocab_size=4099, max_positions=1024)
    weights = RandomWeights(config, format=NAMED[name])
    with run_checkpoint(weights, load_runner, target, 1024, info.workers, weights.formats) as (runner, _):
        for key, value in check_kernel(runner, weights).items():
            record_property(key, value)


@pytest.mark.parametrize(("name", "plain_head"), [("int4", False), ("mxfp4", True), ("mxfp4", False), ("nvfp4", False)])
def test_a_head_that_is_the_embedding(name: str, plain_head: bool) -> None:
    info = probe()
    assert info is not None and info.target is not None
    config = replace(shape("llama-3.2-1b"), num_layers=2, vocab_size=4099, max_positions=1024)
    weights = RandomWeights(config, format=NAMED[name], plain_head=plain_head)
    with run_checkpoint(weights, load_runner, info.target, 1024, info.workers, weights.formats) as (runner, _):
        assert check_kernel(runner, weights)


def test_divisors_of_each_matrix(tmp_path: Path, judge: Judge) -> None:
    """Rows of padding have none. The embedding table is made of the head's codes."""
    with running(tmp_path, FORMS["NVFP4"][0], **DIVIDED) as (runner, reference):
        assert {s.geometry.format.name for s in runner.plan.stages if s.geometry} == {"table g16 e4m3"}
        judge(check_runner(runner, reference, sample_tokens(runner.plan.config, 100, seed=6)))


def test_float16_activations(tmp_path: Path, judge: Judge) -> None:
    with running(tmp_path, FORMS["int4 g128 zeros"][0], torch_dtype="float16") as (runner, reference):
        assert runner.plan.config.dtype == "float16"
        judge(check_runner(runner, reference, sample_tokens(runner.plan.config, 64, seed=3)))


def test_the_same_bits_every_time(tmp_path: Path) -> None:
    with running(tmp_path, FORMS["Q4_1"][0]) as (runner, reference):
        tokens = sample_tokens(runner.plan.config, 40, seed=4)
        first = runner.logits(tokens, 0)
        assert all(np.array_equal(runner.logits(tokens, 0), first) for _ in range(50))
        assert_near(compare(first, reference.logits(tokens)), 1e-2)


def test_values_that_are_not_finite_are_told(tmp_path: Path) -> None:
    def damaged(values: np.ndarray) -> Any:
        form = FORMS["fp8 rows"][0](values)
        form.values[5, 7] = np.nan  # type: ignore[union-attr]
        return form

    with (
        pytest.warns(UserWarning, match=r"layers\.1\.mlp\.up_proj\.weight holds values that are not finite"),
        running(tmp_path, FORMS["fp8 rows"][0], {"layers.1.mlp.up": damaged}) as (runner, _),
    ):
        assert np.isnan(runner.logits([1], 0)).all()
