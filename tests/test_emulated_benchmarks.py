"""The scripts that measure on a GPU, on an emulated one: figures mean nothing there, but no minute of a real one is lost to a mistake."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import ablation
import columns
import pytest
import sampling
import soak
import variants

from emulated_gpu import compile_source, emulated_gpu
from flashformer.backends.cuda import CudaRunner
from flashformer.backends.cuda.codegen import generate
from flashformer.config import ModelConfig
from flashformer.plan import Plan
from flashformer.records import load_records

MODEL = ModelConfig(
    architecture="LlamaForCausalLM", hidden_size=64, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=32, ffn_size=2048,
    vocab_size=300, norm_eps=1e-5, rope_theta=1e4, max_positions=512,
)  # fmt: skip


@pytest.fixture(autouse=True)
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    emulated_gpu(monkeypatch, workers=3)
    monkeypatch.setattr(CudaRunner, "read_bandwidth", lambda runner: 1000.0)
    for script in (ablation, columns, sampling, soak, variants):
        monkeypatch.setattr(script, "shape", lambda name: MODEL)
    for script, short, long in ((columns, 2, 6), (sampling, 1, 2)):
        monkeypatch.setattr(script, "SHORT", short)
        monkeypatch.setattr(script, "LONG", long)


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """A script's `main` with arguments."""

    def call(main: Callable[[], None], *arguments: str) -> None:
        monkeypatch.setattr(sys, "argv", ["script.py", *arguments])
        main()

    return call


def test_columns(called: Callable[..., None], tmp_path: Path) -> None:
    for widths in ("1,2", "2"):
        called(columns.main, *f"--models x --columns {widths} --context 8 --repeats 1 --commit abc --results {tmp_path}".split())
    (file,) = tmp_path.iterdir()
    found = load_records(file, columns.Pass)
    assert [(r.columns, r.load) for r in found] == [(1, "1 sequences"), (2, "1 sequences"), (2, "2 sequences"), (2, "prompt")]
    assert all(r.checked and r.ms["min"] <= r.ms["median"] and (r.host_us is None) == (r.load != "1 sequences") for r in found)
    assert [r.ratio for r in found[:2]] == [1.0, 1.0]  # the second one was measured anew, without the others


def test_soak(called: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sequences that come and go, with numbers that wrap; and memory that is lost is an error, but not what slots claim at first."""
    for name, value in {"ANSWERS": 3, "MOST_TOKENS": 5, "MOST_PROMPT": 6, "WRAP_EVERY": 8}.items():
        monkeypatch.setattr(soak, name, value)
    arguments = f"--model x --columns 2 --slots 2 --operations 24 --tokens 20 --commit abc --results {tmp_path}"
    free = iter([2000, 1000, 1000, 2000, 1000, 999])
    monkeypatch.setattr(soak.Soak, "free_bytes", lambda self: next(free))
    called(soak.main, *arguments.split())
    (file,) = tmp_path.iterdir()
    found = json.loads(file.read_text())
    assert found["operations"] >= 24 and found["tokens"] >= 20 and found["wraps"] >= 2 and found["finished"] > 0
    assert found["all_slots_free"] and found["bytes_lost"] == 0 and found["commit"] == "abc"
    with pytest.raises(SystemExit, match="1 bytes of the GPU's memory were lost"):
        called(soak.main, *arguments.split())


def build(plan: Plan, patches: list[list[str]]) -> object:
    """A kernel for the emulated GPU in the place of one from patched headers."""
    return compile_source(generate(plan).text, plan.target)


def test_variants(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(variants, "build", build)
    monkeypatch.setattr(variants, "ProcessPoolExecutor", lambda: ThreadPoolExecutor(1))
    variants.measure("x", {"base": {}, "one copy": {"target": {"exchange_copies": 1}}}, 8, 4, 1)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["x", "base", "one"]
    assert [line.strip().endswith("same tokens") for line in lines] == [False, True, True]


def test_ablation(called: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where tiles have other owners than those of the model in memory."""
    placed: list[list[str]] = []
    usual = ablation.place

    def place(*arguments: Any) -> dict[str, int]:
        given = usual(*arguments)
        placed.append(sorted(given))
        return given

    monkeypatch.setattr(ablation, "build", build)
    monkeypatch.setattr(ablation, "place", place)
    for only in ("tiles even out", "copies of"):
        called(ablation.main, *f"--models x --context 8 --tokens 4 --repeats 1 --commit abc --results {tmp_path} --only".split(), only)
    (file,) = tmp_path.iterdir()
    found = load_records(file, ablation.Ablation)
    assert placed == [["head_start", "last_start", "table", "table_length", "table_stride", "tiles"], []]
    assert sorted(r.technique for r in found) == ["copies of exchanged vectors", "tiles even out the bytes of a token"]
    assert {r.same_tokens for r in found} == {None, True}


def test_sampling(called: Callable[..., None], tmp_path: Path) -> None:
    called(sampling.main, *f"--context 8 --repeats 1 --commit abc --results {tmp_path}".split())
    assert len(list(tmp_path.iterdir())) == 1
