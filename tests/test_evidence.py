"""The scripts that explain the speed: what they switch off, compare and add up, without a GPU."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ablation
import cliffs
import losses
import numpy as np
import pytest
import refresh
import table
import variants

from flashformer.backends.cuda.codegen import BEGINS, generate, headers
from flashformer.backends.cuda.launcher import chunk_table
from flashformer.errors import DeviceError
from flashformer.explain import predict
from flashformer.models import build_graph
from flashformer.plan import Plan, make_plan
from flashformer.records import Record, load_records, save
from flashformer.shapes import shape
from flashformer.tape import lay_tapes
from flashformer.targets import get
from flashformer.trace import make_trace
from test_trace import CEILING, stamp

RESULTS = Path(__file__).parent.parent / "benchmarks" / "results"

WHENCE = {"gpu": "GPU", "driver": "1", "date": "2026-01-02", "commit": "abc"}


def plan_of(name: str) -> Plan:
    config = shape(name)
    return make_plan(config, build_graph(config), get("sm_90"), 1200)


# --- Ablation --------------------------------------------------------------------------------------------------------------


def test_every_technique_is_there_to_be_switched_off() -> None:
    """Each variant differs from the base in its source, its headers, its tape, its owners or its launches, and is a valid plan."""
    plan = plan_of("llama-3.2-1b")
    texts = {Path(name).name: text for name, text in headers().items()}
    assert len({(t.name, t.instead) for t in ablation.TECHNIQUES}) == len(ablation.TECHNIQUES)
    for technique in ablation.TECHNIQUES:
        changed = ablation.without(plan, technique)
        assert all(texts[header].count(old) == 1 for header, old, _ in technique.patches), technique.instead
        differs = generate(changed).text != generate(plan).text or changed.stages != plan.stages
        assert differs or technique.patches or technique.table or technique.launches, technique.instead


@pytest.mark.parametrize("path", sorted(Path(variants.__file__).parent.glob("*.json")), ids=lambda path: path.stem)
def test_variants_can_be_made(path: Path) -> None:
    """Each has something of its own: patched headers, or another source."""
    plan = plan_of("llama-3.1-8b")
    made = [(variants.patched(v.get("patch", [])), generate(variants.changed(plan, v)).text) for v in json.loads(path.read_text()).values()]
    base = (variants.patched([]), generate(plan).text)
    assert base not in made


def test_what_is_patched_compiles_without_spills() -> None:
    pytest.importorskip("cuda.bindings.nvrtc", reason="NVRTC is not installed")
    with ThreadPoolExecutor(2) as pool:
        for future in ablation.build_all(plan_of("qwen3-0.6b"), pool, [t for t in ablation.TECHNIQUES if t.patches]):
            technique, _, kernel = future.result()
            assert kernel.spills == 0, technique.instead


def test_a_blocks_chunks_one_after_another_are_the_same_chunks() -> None:
    plan = plan_of("llama-3.2-1b")
    tape = lay_tapes(plan)
    usual, other = chunk_table(plan, tape), ablation.contiguous(plan, tape)
    assert np.array_equal(usual[:, :, 1], other[:, :, 1])
    real = usual[:, :, 1] > BEGINS
    assert np.array_equal(usual[:, :, 0][~real], other[:, :, 0][~real])  # markers of attention
    offset, size = other[:, :, 0].astype(np.int64)[real], other[:, :, 1][real] // tape.unit
    assert offset[0] == 0 and np.array_equal(offset[1:], offset[:-1] + size[:-1]) and offset[-1] + size[-1] == tape.nbytes // tape.unit


def test_each_stage_begins_with_a_mark() -> None:
    plan = plan_of("qwen3-0.6b")
    tape = lay_tapes(plan)
    sizes = chunk_table(plan, tape)[:, :, 1]
    assert np.array_equal(sizes & ~np.uint32(BEGINS), tape.size.T)
    for worker in (0, 7, plan.target.workers - 1):
        own = [s.count[worker] > 0 if s.geometry else s.kind == "attention" for s in plan.stages]
        assert np.flatnonzero(sizes[worker] & BEGINS).tolist() == tape.starts[:-1, worker][own].tolist()


class FakeRunner:
    """A launch takes 1 ms a token and 20 us for each launch, twice that with one copy, and each is a little slower than the last."""

    arena_bytes = 10**12

    def __init__(self, plan: Plan) -> None:
        self.plan, self.now, self.launches = plan, 0.0, 0
        self.info = SimpleNamespace(name="NVIDIA Test")
        self.params = SimpleNamespace(table=1, table_stride=2, table_length=3, head_start=4, last_start=6, tiles=5)
        self.context = self
        self.tokens = np.zeros(16, np.uint64)

    def upload(self, array: np.ndarray, what: str) -> int:
        return 1000 + array.size

    def ready(self, kernel: Any, plan: Plan) -> Plan:
        return plan

    @contextmanager
    def instead(self, function: Plan, plan: Plan) -> Iterator[None]:
        usual, self.plan = self.plan, plan
        try:
            yield
        finally:
            self.plan = usual

    def use(self) -> None:
        pass

    def event(self) -> float:
        return self.now

    def elapsed(self, first: float, last: float) -> float:
        return last - first

    def launch(self, tokens: list[int], start: int, count: int) -> None:
        if self.plan.target.finisher_warps == 2:
            raise DeviceError("the kernel waited too long")
        self.launches += 1
        self.now += (count * 1e-3 + 20e-6) * (2 if self.plan.target.exchange_copies == 1 else 1) * (1 + self.launches * 1e-6)
        self.tokens[:count] = [start + i + (self.plan.target.prefetch_chunks == 0) for i in range(count)]

    def finish(self) -> None:
        pass

    def time_generate(self, start: int, count: int) -> float:
        first = self.event()
        self.launch([1], start, count)
        return self.elapsed(first, self.event())


def test_a_variant_is_timed_beside_the_base(capsys: pytest.CaptureFixture[str]) -> None:
    plan = plan_of("qwen3-0.6b")
    runner = FakeRunner(plan)
    spills = {"4 where there are 3, 3 where there are 4": 8}
    built = [(t, ablation.without(plan, t), SimpleNamespace(spills=spills.get(t.instead, 0), registers=90)) for t in ablation.TECHNIQUES]
    options = argparse.Namespace(context=64, tokens=10, repeats=3, commit="abc")
    found = {(r.technique, r.instead): r for r in ablation.ablate(runner, "qwen3-0.6b", built, options)}  # type: ignore[arg-type]
    passed = capsys.readouterr().out
    assert "3 where there are 4: passed over, its kernel spills 8 bytes" in passed
    assert "finishers: 2: passed over, the kernel waited" in passed
    assert len(found) == len(ablation.TECHNIQUES) - 2
    one = found["copies of exchanged vectors", "1"]
    assert one.ratio == pytest.approx(2, rel=1e-4) and one.base_ms == pytest.approx(1.002, rel=1e-3) and one.same_tokens is True
    many = next(r for r in found.values() if r.technique.startswith("one launch"))
    assert many.ratio == pytest.approx(1.02 / 1.002, rel=1e-3) and many.same_tokens is True
    assert found["L2 prefetch behind a full ring", "none"].same_tokens is False  # it makes others here
    assert next(r for r in found.values() if r.technique.startswith("chunks of all")).same_tokens is None
    assert vars(runner.params) == {"table": 1, "table_stride": 2, "table_length": 3, "head_start": 4, "last_start": 6, "tiles": 5}
    assert runner.plan is plan
    assert all((r.commit, r.repeats, r.tokens_timed, r.gpu) == ("abc", 3, 10, "NVIDIA Test") for r in found.values())


# --- Cliffs ----------------------------------------------------------------------------------------------------------------


def test_the_sizes_that_are_asked_about_have_neighbours() -> None:
    asked = {
        "hidden_size": (2560, 3072, 5120), "ffn_size": (6912, 9728, 25600), "head_dim": (64, 80, 96, 128, 256),
        "vocab_size": (32000, 128256, 151936, 262144),
    }  # fmt: skip
    for axis in cliffs.AXES:
        for group in axis.groups:
            assert len(group) > 2 and all(a < b for a, b in pairwise(group))
        assert set(asked[axis.name]) <= {value for group in axis.groups for value in group}
        for _, number, config in axis.models():
            base = axis.bases[number]
            assert replace(config, **{axis.name: getattr(base, axis.name)}) == base  # nothing else differs
            plan = make_plan(config, build_graph(config), get("sm_90"), 1100)
            assert 3e9 <= plan.token_bytes(1024) <= 8e9


def test_steps_are_those_to_either_side() -> None:
    assert cliffs.largest_steps([0.9, 0.8, 0.83]) == pytest.approx([0.1, 0.1, 0.03])
    assert cliffs.largest_steps([0.9]) == [0.0]


@pytest.mark.parametrize("workers", [128, 127])
def test_the_bound_is_the_heaviest_blocks(workers: int) -> None:
    """128 tiles of hidden rows: one for each of 128 blocks, but two for one of 127."""
    config = replace(cliffs.BASE, hidden_size=1024, ffn_size=4096, vocab_size=8192, num_layers=2)
    plan = make_plan(config, build_graph(config), get("sm_90"), 64, workers=workers)
    own = lay_tapes(plan).size.sum(axis=0, dtype=np.int64)
    assert cliffs.bound(plan) == pytest.approx(own.mean() / own.max())  # these tapes have no padding
    assert (cliffs.bound(plan) == 1.0) == (workers == 128)


def test_records_of_cliffs(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    models = [*cliffs.AXES[0].models()]
    both = [cliffs.promised(config, axis.name, 1024, 64) for axis, _, config in models]
    plans, measured = [plan for plan, _ in both], [replace(r, read_ceiling_gb_s=4600.0 + i) for i, (_, r) in enumerate(both)]
    records = cliffs.make_records(models, plans, measured)
    assert [r.value for r in records] == [value for group in cliffs.AXES[0].groups for value in group]
    assert {r.read_ceiling_gb_s for r in records} == {4600.0 + len(models) - 1}
    for record, plan in zip(records, plans, strict=True):
        assert record.fraction_of_ceiling == pytest.approx(record.bytes_per_token / record.ms / 1e6 / record.read_ceiling_gb_s)
        assert record.predicted == predict(plan, 1024).fraction <= record.at_most <= 1
    first, second, third = (r.fraction_of_ceiling for r in records[:3])
    assert records[1].largest_step == pytest.approx(max(abs(first - second), abs(second - third)))
    save(records, tmp_path / "cliffs.json")
    assert load_records(tmp_path / "cliffs.json", cliffs.Cliff) == records
    monkeypatch.setattr(sys, "argv", ["cliffs.py", "--predict", "--axes", "hidden_size"])
    cliffs.main()
    assert "2,560" in (shown := capsys.readouterr().out) and "at most" in shown
    monkeypatch.setattr(sys, "argv", ["cliffs.py", "--axes", "depth"])
    with pytest.raises(SystemExit, match="there is no axis 'depth'; known are hidden_size"):
        cliffs.main()


# --- Losses ----------------------------------------------------------------------------------------------------------------


def test_losses_add_up_to_the_token() -> None:
    plan = plan_of("qwen3-0.6b")
    names = generate(plan).stage_names
    trace = make_trace("qwen3-0.6b", plan, names, stamp(plan, names), 1000, CEILING)
    ms = trace.duration / 1e3 + 0.005
    record = Record(
        "qwen3-0.6b", "bf16", 1, 1000, 128, 5, {"min": ms, "median": ms, "max": ms}, 0.0, 10**9, CEILING, 0.5, None, "all",
        **{**WHENCE, "gpu": "NVIDIA Test"},
    )  # fmt: skip
    found = losses.make_losses(trace, record)
    assert found.floor + sum(found.stages.values()) + found.other + found.choice == pytest.approx(found.token)
    assert found.choice == pytest.approx(5.0) and found.stages["gate_up"] > 0
    assert set(found.exchange) <= set(found.stages) and all(value >= 0 for value in found.exchange.values())
    assert all(value == value for value in found.stages.values())


# --- Tables ----------------------------------------------------------------------------------------------------------------


def ablated(model: str, technique: str, ratio: float, base: float) -> ablation.Ablation:
    """A record that might have been measured."""
    return ablation.Ablation(model, technique, "none", 1024, 128, 5, base * ratio, base, ratio, 90, True, **WHENCE)


def test_the_tables() -> None:
    records = [ablated("large", "prefetch", 1.01, 3.0), ablated("small", "prefetch", 1.025, 0.5), ablated("small", "copies", 0.98, 0.6)]
    lines = table.sections(table.ablation_lines, records).splitlines()
    assert lines[0].startswith("GPU, 1,024 positions, 2026-01-02, commit abc: time of a token")
    assert "| technique | in its place | small | large |" in lines and "| the whole kernel | | 0.5500 ms | 3.0000 ms |" in lines
    assert "| prefetch | none | +2.5% | +1.0% |" in lines and "| copies | none | -2.0% |  |" in lines

    lost = losses.Losses("small", 1024, 500.0, 400.0, {"qkv": 60.0, "head": 20.5}, {}, 10.0, 9.5, **WHENCE)
    other = replace(lost, model="smaller", floor=300.0, stages={"qkv": 61.0})
    lines = table.sections(table.losses_lines, [lost, other]).splitlines()
    assert "| | smaller | small |" in lines and "| the bytes | 300.0 | 400.0 |" in lines and "| head |  | 20.5 |" in lines
    assert "| a token | 500.0 | 500.0 |" in lines

    cliff = cliffs.Cliff("ffn_size", 0, 6784, 1024, 64, 3, 1.0, 0.0, 10**9, 4000.0, 0.92, 0.02, 0.9, 0.95, **WHENCE)
    lines = table.sections(table.cliffs_lines, [cliff, replace(cliff, value=6912, fraction_of_ceiling=0.94)]).splitlines()
    assert "| ffn_size | 6,784 / 6,912 | 92.0% / 94.0% | 2.0% |" in lines
    assert "The largest step between neighbours is 2.0% (ffn_size 6,784); we allow 3%." in lines


def test_a_table_without_records_says_so() -> None:
    text = "before\n<!-- x: begin (written by benchmarks/table.py) -->\nold\n<!-- x: end -->\nafter\n"
    assert table.filled(text, "x", "y", "new\n") == text.replace("old", "new")
    assert "Not measured yet: run `python benchmarks/y.py`" in table.filled(text, "x", "y", "")


@pytest.mark.parametrize("path", sorted(RESULTS.glob("ablation-*.json")), ids=lambda path: path.stem)
def test_records_of_the_ablation_are_complete(path: Path) -> None:
    for record in load_records(path, ablation.Ablation):
        assert record.tokens_timed >= 64 and record.repeats >= 3 and record.same_tokens is not False
        assert record.ratio == pytest.approx(record.ms / record.base_ms, rel=0.05)


@pytest.mark.parametrize("path", sorted(RESULTS.glob("cliffs-*.json")), ids=lambda path: path.stem)
def test_records_of_cliffs_are_consistent(path: Path) -> None:
    for record in load_records(path, cliffs.Cliff):
        reached = record.bytes_per_token / record.ms / 1e6 / record.read_ceiling_gb_s
        assert record.fraction_of_ceiling == pytest.approx(reached) and reached < record.at_most + 0.01


@pytest.mark.parametrize("path", sorted(RESULTS.glob("losses-*.json")), ids=lambda path: path.stem)
def test_records_of_losses_add_up(path: Path) -> None:
    for record in load_records(path, losses.Losses):
        assert record.floor + sum(record.stages.values()) + record.other + record.choice == pytest.approx(record.token)


# --- What is missing -------------------------------------------------------------------------------------------------------


def test_what_is_missing_is_measured_as_long_as_there_is_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One that is there is passed over, one that fails or takes too long is not the end."""
    ran: list[str] = []

    def run(command: list[str], timeout: float, **_: Any) -> SimpleNamespace:
        script, model = Path(command[1]).stem, command[command.index("--models") + 1]
        ran.append(model)
        if model == "slow":
            raise refresh.subprocess.TimeoutExpired(command, timeout)
        if model != "broken":
            path = tmp_path / f"{script}-gpu.json"
            kept = json.loads(path.read_text()) if path.exists() else []
            commit, contexts = command[command.index("--commit") + 1], command[command.index("--contexts") + 1].split(",")
            made = [{"model": model, "weights": "bf16", "context": int(c), "commit": commit, "baselines": {}} for c in contexts]
            path.write_text(json.dumps([*kept, *made]))
        return SimpleNamespace(returncode=int(model == "broken"))

    def measurements() -> Iterator[refresh.Measurement]:
        yield refresh.decode("slow", "bf16", 5)
        yield refresh.decode("broken", "bf16", 5)
        yield refresh.decode("large", "bf16", 1000)
        yield refresh.decode("small", "bf16", 5, (128, 1024))
        yield refresh.decode("small", "bf16", 5, (131072,))
        yield refresh.decode("compared", "bf16", 5, beside="other")

    monkeypatch.setattr(refresh.subprocess, "run", run)
    monkeypatch.setattr(refresh, "measurements", measurements)

    def call(*options: str) -> str:
        monkeypatch.setattr(sys, "argv", ["refresh.py", "--seconds", "60", "--commit", "abc", "--results", str(tmp_path), *options])
        refresh.main()
        return capsys.readouterr().out

    told = call()
    assert ran == ["slow", "broken", "small", "small", "compared"]
    assert [line.split(": ")[1].split(",")[0] for line in told.splitlines()][:3] == ["cut short", "failed with status 1", "some 1000 s"]
    ran.clear()
    assert "small" not in call("--list") and not ran
    call()
    assert ran == ["slow", "broken", "compared"]  # which is there, but beside nothing


def test_measurements_are_known_runs_of_scripts() -> None:
    for one in refresh.measurements():
        assert (refresh.HERE / f"{one.script}.py").exists() and one.seconds > 0
        if "--models" in one.options:
            for name in one.options[one.options.index("--models") + 1].split(","):
                shape(name)
