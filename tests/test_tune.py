"""The search for a target's numbers, on a GPU that is a formula, and what becomes of its outcome."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from flashformer import bench
from flashformer.backends.cuda import DeviceInfo
from flashformer.backends.cuda.codegen import generate
from flashformer.cli import main
from flashformer.config import ModelConfig
from flashformer.env import cache_dir
from flashformer.errors import BuildError, DeviceError
from flashformer.models import build_graph
from flashformer.plan import Plan, make_plan
from flashformer.shapes import SHAPES
from flashformer.targets import Target, get
from flashformer.tune import MARGIN, ROUNDS, TOKENS, choices, differences, forget, keep, place, reset, search, tuned

GPU = "NVIDIA Test 9000"
SMALL = ModelConfig("Qwen3ForCausalLM", 128, 2, 4, 2, 32, 96, 200, 1e-6, 1e4, 640, qk_norm=True)


@pytest.fixture
def plan() -> Plan:
    return make_plan(SMALL, build_graph(SMALL), get("sm_90"), 256)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What one test keeps, no other finds."""
    monkeypatch.setenv("FF_CACHE_DIR", str(tmp_path / "cache"))


class FakeGpu:
    """A token takes 1 ms, and more the farther a target is from `best`; every round is slower than the one before, for all alike."""

    def __init__(self, best: Target, step: float = 0.01, seconds: float = 1.0) -> None:
        self.best, self.step, self.seconds, self.now, self.asked = best, step, seconds, 0.0, 0

    def of(self, target: Target) -> float:
        wrong = sum(getattr(target, name) != getattr(self.best, name) for name in choices(get("sm_90")))
        return 1e-3 * (1 + self.step * wrong)

    def measure(self, targets: Sequence[Target]) -> list[list[float]]:
        self.now += self.seconds
        self.asked += len(targets)
        return [[] if t.finisher_warps == 4 else [self.of(t) * (1 + i) for i in range(ROUNDS)] for t in targets]

    def clock(self) -> float:
        return self.now


def elsewhere(target: Target) -> Target:
    """A target of which every number is another of its choices."""
    return replace(target, **{name: next(v for v in values if v != getattr(target, name)) for name, values in choices(target).items()})


@pytest.mark.parametrize("name", ["sm_80", "sm_90", "sm_100", "sm_120"])
def test_the_defaults_are_among_the_choices(name: str) -> None:
    target = get(name)
    for number, values in choices(target).items():
        assert getattr(target, number) in values and len(set(values)) == len(values) > 2
    assert ("prefetch_chunks" in choices(target)) == target.bulk_copy


def test_every_choice_compiles_without_spills(plan: Plan) -> None:
    """With all of the least, and with all of the most."""
    pytest.importorskip("cuda.bindings.nvrtc", reason="NVRTC is not installed")
    from flashformer.backends.cuda.compile import compile_source

    for pick in (min, max):
        target = replace(plan.target, **{name: pick(values) for name, values in choices(plan.target).items()})
        kernel = compile_source(generate(replace(plan, target=target)).text, target)
        assert kernel.spills == 0


def test_it_finds_what_is_fastest_and_tells_the_way() -> None:
    start = get("sm_90")
    gpu, told, seen = FakeGpu(elsewhere(start)), [], []
    found = search(start, gpu.measure, 100, lambda *progress: seen.append(progress), told.append, gpu.clock)
    assert found.target == gpu.best and found.complete
    assert found.before / found.after == pytest.approx(1 + 0.01 * len(choices(start)))
    assert len(told) == len(choices(start)) and told[0].startswith("exchange_copies 4 -> 1: ")
    assert seen[0] == ("tuning", 0, len(told)) and seen[-1] == ("tuning", len(told), len(told))
    assert gpu.asked == sum(len(v) for v in choices(start).values()) + 2  # each value once, and the last comparison


def test_noise_is_no_gain() -> None:
    start = get("sm_90")
    gpu = FakeGpu(elsewhere(start), step=MARGIN / 2)
    found = search(start, gpu.measure, 100, clock=gpu.clock)
    assert found.target == start and found.before == found.after


def test_the_winner_must_beat_the_defaults_in_the_end() -> None:
    """What seemed better in the first comparison, and is not in the last, is dropped."""
    start, calls = get("sm_90"), []

    def measure(targets: Sequence[Target]) -> list[list[float]]:
        calls.append(targets)
        return [[1.0 if target == start or len(calls) > 1 else 0.9] * ROUNDS for target in targets]

    assert search(start, measure, 100).target == start
    assert calls[-1][0] == start and calls[-1][1] != start


@pytest.mark.parametrize("seconds", [1, 25, 45])
def test_it_ends_in_time(seconds: int) -> None:
    start = get("sm_90")
    gpu = FakeGpu(elsewhere(start), seconds=10.0)
    found = search(start, gpu.measure, seconds, clock=gpu.clock)
    assert not found.complete and gpu.now <= max(seconds, 20)  # one step and the last comparison at least
    changed = differences(start, found.target)
    assert 1 <= len(changed) < len(choices(start)) and all(v == getattr(gpu.best, name) for name, v in changed.items())


def test_what_is_kept_is_found_again(plan: Plan) -> None:
    assert tuned(plan, GPU) == plan and not forget(plan, GPU)
    winner = elsewhere(plan.target)
    path = keep(plan, GPU, winner, {"ms": 1.5})
    assert json.loads(path.read_text())["ms"] == 1.5 and [p.name for p in path.parent.iterdir()] == [path.name]
    assert tuned(plan, GPU).target == winner and differences(plan.target, winner).keys() == choices(plan.target).keys()
    longer = make_plan(SMALL, build_graph(SMALL), get("sm_90"), 640)
    assert tuned(longer, GPU).target == winner  # the length of the KV cache is no part of a kernel
    assert tuned(plan, "another GPU") == plan
    assert tuned(make_plan(SMALL, build_graph(SMALL), get("sm_90"), 256, workers=100), GPU).target.exchange_copies == 4
    other = replace(SMALL, hidden_size=256)
    assert tuned(make_plan(other, build_graph(other), get("sm_90"), 256), GPU).target == plan.target
    assert forget(plan, GPU) and tuned(plan, GPU) == plan


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "{}", '{"target": 3}', '{"target": {"shared_bytes": 1}}', '{"target": {"exchange_copies": 3}}',
     '{"target": {"window": [[1]]}}', '{"target": {"exchange_copies": 1, "first_look_cycles": "0"}}'],
)  # fmt: skip
def test_a_file_that_holds_something_else_is_passed_over(plan: Plan, content: str) -> None:
    path = keep(plan, GPU, elsewhere(plan.target), {})
    path.write_text(content)
    assert tuned(plan, GPU) == plan


def test_a_cache_that_cannot_be_written_is_said(plan: Plan) -> None:
    cache_dir().write_text("not a folder")
    with pytest.raises(BuildError, match="FF_CACHE_DIR"):
        keep(plan, GPU, plan.target, {})


# --- The command, on a GPU for want of one ---------------------------------------------------------------------------------


class FakeRunner:
    """Every launch takes what FakeGpu says of the target that it runs."""

    def __init__(self, gpu: FakeGpu, plan: Plan) -> None:
        self.gpu, self.plan, self.loaded = gpu, plan, plan
        self.columns, self.slots = plan.columns, plan.slots
        self.closed = self.filled = False

    def ready(self, kernel: Any, plan: Plan) -> Plan:
        return plan

    def instead(self, function: Plan, plan: Plan) -> Any:
        from contextlib import contextmanager

        @contextmanager
        def other() -> Any:
            assert function is plan and plan.target.exchange_copies <= self.loaded.target.exchange_copies
            self.plan = plan
            yield
            self.plan = self.loaded

        return other()

    def fill_kv(self) -> None:
        self.filled = True

    def time_generate(self, start: int, count: int) -> float:
        assert self.filled and not self.closed and start + count <= self.plan.max_context and count == TOKENS
        return self.gpu.of(self.plan.target) * count

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> FakeGpu:
    """A machine with a GPU on which the shape `small` is known; kernels are not really built."""
    import types

    made = FakeGpu(replace(get("sm_90"), first_look_cycles=0, finisher_warps=2))
    info = DeviceInfo(0, GPU, (9, 0), 132, 232448, 10**11, get("sm_90"))
    kernel = types.SimpleNamespace(spills=0)
    monkeypatch.setattr("flashformer.backends.cuda.load", lambda plan, weights, progress: FakeRunner(made, plan))
    monkeypatch.setattr("flashformer.backends.cuda.probe", lambda: info)
    monkeypatch.setattr("flashformer.backends.cuda.compile.compile_source", lambda source, target: kernel)
    monkeypatch.setitem(SHAPES, "small", SMALL)
    return made


def run(*arguments: str) -> tuple[int, str]:
    """Exit status and both streams of `flashformer tune`."""
    result = CliRunner().invoke(main, ["tune", *arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.output


def test_the_command(gpu: FakeGpu) -> None:
    status, output = run("small", "--context", "512")
    assert status == 0, output
    assert "first_look_cycles 1250 -> 0: 0.98% less time" in output and "finisher_warps 3 -> 2" in output
    assert "1.0000 ms/token in place of 1.0200" in output
    usual = bench.plan_for_gpu(SMALL)
    assert tuned(usual, GPU).target == gpu.best
    kept = json.loads(place(usual, GPU).read_text())
    assert kept["model"] == "small" and kept["context"] == 512 and kept["target"] == {"first_look_cycles": 0, "finisher_warps": 2}
    status, output = run("small", "--reset")
    assert status == 0 and "forgotten" in output and tuned(usual, GPU) == usual
    assert "nothing was kept" in run("small", "--reset")[1]


def test_a_search_that_finds_nothing_forgets_what_was_kept(gpu: FakeGpu) -> None:
    usual = bench.plan_for_gpu(SMALL)
    keep(usual, GPU, elsewhere(usual.target), {})
    gpu.best = usual.target
    assert "nothing is faster than the defaults" in run("small", "--context", "0")[1]
    assert tuned(usual, GPU) == usual


def test_benchmarks_use_it_and_say_so(gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeRunner, "read_bandwidth", lambda self: 4000.0, raising=False)
    monkeypatch.setattr(FakeRunner, "info", DeviceInfo(0, GPU, (9, 0), 132, 232448, 10**11, get("sm_90")), raising=False)
    keep(bench.plan_for_gpu(SMALL), GPU, gpu.best, {})
    with bench.open_subject("small") as subject, bench.Bench(subject, [64], TOKENS, checked=False) as ready:
        record = ready.measure(64)
    assert record.tuned == {"first_look_cycles": 0, "finisher_warps": 2} and record.ms == pytest.approx(1.0)
    assert ready.runner.plan.target == gpu.best


def test_without_a_gpu_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flashformer.backends.cuda.probe", lambda: None)
    for arguments in (("llama-3.2-1b",), ("llama-3.2-1b", "--reset")):
        status, output = run(*arguments)
        assert status == 2 and output.startswith("error: ") and "needs a CUDA GPU" in output
    with pytest.raises(DeviceError):
        reset("llama-3.2-1b")


def test_a_context_that_the_model_does_not_have_is_refused(gpu: FakeGpu) -> None:
    status, output = run("small", "--context", "641")
    assert status == 2 and "0 to 640 positions" in output


def test_loading_uses_it(plan: Plan, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from flashformer import engine
    from flashformer.config import read_config
    from model_files import make_config, write_folder

    folder = write_folder(tmp_path / "model", make_config(vocab_size=300))
    config = read_config(folder)
    usual = make_plan(config, build_graph(config), get("sm_90"), 64)
    keep(usual, GPU, replace(usual.target, exchange_copies=8), {})
    loaded: list[Plan] = []

    def load(plan: Plan, *_: object) -> Any:
        loaded.append(plan)
        return FakeRunner(FakeGpu(plan.target), plan)

    monkeypatch.setattr("flashformer.backends.cuda.load", load)
    monkeypatch.setattr(engine, "find_device", lambda device: engine.Device("cuda", GPU, get("sm_90"), 10**11))
    with engine.load(folder, "cuda", 64) as ready:
        assert ready.plan == loaded[0]
    assert loaded[0].target.exchange_copies == 8
    assert np.array_equal(loaded[0].stages[0].count, usual.stages[0].count)
