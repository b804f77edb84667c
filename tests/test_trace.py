"""Timestamps as spans, losses and pictures: on a token whose every wait is known."""

from __future__ import annotations

import io
import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from flashformer.backends.cuda.codegen import generate
from flashformer.config import ModelConfig
from flashformer.errors import DeviceError, InputError
from flashformer.models import build_graph
from flashformer.plan import Plan, make_plan
from flashformer.plots import draw_trace, require
from flashformer.shapes import shape
from flashformer.targets import get
from flashformer.trace import CONSUMER, FINISHER, Trace, chrome_events, make_trace, summarize, table, utilisation, write_chrome

CEILING, POSITION = 4000.0, 1000  # GB/s, earlier positions
EXCHANGE, FINISH, SPEED = 1.5, 0.75, 0.9  # us, us, of the ceiling


def plan_of(config: ModelConfig) -> Plan:
    return make_plan(config, build_graph(config), get("sm_90"))


def stamp(plan: Plan, names: tuple[str, ...], jitter: float = 0.0) -> np.ndarray:
    """What a kernel would write whose exchanges take EXCHANGE, whose SMs stream at SPEED, and whose finishers need FINISH.

    Every `jitter` us more or less in the stream, at random.
    """
    random = np.random.default_rng(0)
    workers = plan.target.workers
    stamps = np.zeros((2, workers, plan.config.num_layers + 1, len(names), 2), np.uint64)
    origin = 1_790_000_000_000_000_000  # the timer counts since 1970
    complete = 2.0
    free = np.full(workers, 0.5)  # when consumers come to a stage
    free_finisher = np.full(workers, 0.25)

    def put(role: int, mask: np.ndarray, layer: int, name: str, event: int, us: np.ndarray) -> None:
        stamps[role, mask, layer, names.index(name), event] = (np.round(us[mask] * 1e3)).astype(np.uint64) + np.uint64(origin)

    for stage in plan.stages:
        layer = stage.layer if stage.layer >= 0 else plan.config.num_layers
        everyone = np.ones(workers, bool)
        if stage.kind in ("embed", "token"):
            continue
        if stage.kind == "combine":
            done = np.full(workers, complete + FINISH)
            put(FINISHER, everyone, layer, stage.name, 0, free_finisher)
            put(FINISHER, everyone, layer, stage.name, 1, done)
            complete, free_finisher = float(done.max()), done
            continue
        if stage.linear:
            nbytes = stage.linear.rows_used * stage.linear.columns_used * 2 * np.array(stage.count) / stage.tiles
        else:
            nbytes = np.full(workers, plan.kv.bytes_read(POSITION) / workers)
        works = nbytes > 0
        ready = np.full(workers, complete + EXCHANGE)
        end = ready + nbytes * workers / (CEILING * SPEED * 1e3) + random.uniform(-jitter, jitter, workers)
        done = end + FINISH
        put(CONSUMER, works, layer, stage.name, 0, free)
        put(CONSUMER, works, layer, stage.name, 1, ready)
        put(FINISHER, works, layer, stage.name, 1, done)
        if stage.linear:
            put(FINISHER, works, layer, stage.name, 0, free_finisher)
            free_finisher = np.where(works, done, free_finisher)
        free, complete = np.where(works, end, free), float(done[works].max())
    return stamps


def trace_of(name: str, jitter: float = 0.0) -> tuple[Trace, Plan]:
    plan = plan_of(shape(name))
    names = generate(plan, trace=True).stage_names
    return make_trace(name, plan, names, stamp(plan, names, jitter), POSITION, CEILING), plan


@pytest.fixture(scope="module")
def small() -> tuple[Trace, Plan]:
    return trace_of("llama-3.2-1b")


def test_waits_streams_and_finishes_are_what_they_were_made_of(small: tuple[Trace, Plan]) -> None:
    trace, plan = small
    assert trace.names == ("qkv", "attention", "combine", "attention_output", "gate_up", "down", "head")
    stages = {s.name: s for s in summarize(trace)}
    for name, s in stages.items():
        assert s.times == (1 if name == "head" else plan.config.num_layers)
        if name == "combine":
            assert np.isnan(s.wait_mean) and np.isnan(s.work_mean)
            assert s.floor == s.loss == 0
        else:
            assert s.work_mean <= s.work_max and s.wait_mean <= s.wait_max
            bare = s.floor / SPEED + (FINISH if name == "head" else 0)  # nothing follows the head: its work ends with its finish
            assert s.work_mean == pytest.approx(bare, abs=0.01)
        if name not in ("combine", "head"):
            assert s.finish_mean == pytest.approx(FINISH, abs=0.002) and s.finish_max == pytest.approx(FINISH, abs=0.002)
            assert s.exchange == pytest.approx(EXCHANGE, abs=0.002)
    assert stages["combine"].finish_mean == pytest.approx(FINISH, abs=0.002)


def test_floors_are_the_bytes_of_the_plan(small: tuple[Trace, Plan]) -> None:
    trace, plan = small
    floors = sum(s.floor * s.times for s in summarize(trace))
    assert floors == pytest.approx(plan.token_bytes(POSITION) / (CEILING * 1e3))
    assert sum(float(v.nbytes.sum()) for v in trace.visits) == pytest.approx(plan.token_bytes(POSITION))


def test_losses_and_floors_add_up_to_the_token() -> None:
    trace, _ = trace_of("llama-3.2-1b", jitter=0.4)
    stages = summarize(trace)
    told = sum(s.floor * s.times + s.loss for s in stages)
    assert told <= trace.duration
    assert trace.duration - told < 3.0  # skew of the last stage and the start of the first
    assert max(s.wait_max - s.wait_mean for s in stages if s.name != "combine") > 0.3  # the jitter shows as skew


def test_utilisation_holds_every_byte(small: tuple[Trace, Plan]) -> None:
    trace, plan = small
    edges = np.linspace(0.0, trace.duration, 301)
    rates = utilisation(trace, edges)
    total = sum(float((rate * np.diff(edges)).sum()) for rate in rates.values()) * 1e3
    assert total == pytest.approx(plan.token_bytes(POSITION), rel=1e-9)
    head = rates["head"][-40:-5]
    assert head.mean() == pytest.approx(CEILING * SPEED, rel=0.02)
    assert not rates["combine"].any()
    first_layer = utilisation(trace, edges, 0, 6)
    assert not first_layer["head"].any() and first_layer["qkv"].sum() < rates["qkv"].sum()


def test_visits_shorter_than_the_timer_keep_their_bytes() -> None:
    plan = plan_of(shape("llama-3.2-1b"))
    names = generate(plan, trace=True).stage_names
    stamps = stamp(plan, names) // np.uint64(1024) * np.uint64(1024)  # a timer that ticks once in 1.024 us
    trace = make_trace("coarse", plan, names, stamps, POSITION, CEILING)
    edges = np.linspace(-1.0, trace.duration + 1.0, 200)
    total = sum(float((rate * np.diff(edges)).sum()) for rate in utilisation(trace, edges).values()) * 1e3
    assert total == pytest.approx(plan.token_bytes(POSITION), rel=1e-9)


def test_sms_without_work_leave_no_holes() -> None:
    config = ModelConfig("LlamaForCausalLM", 256, 2, 4, 2, 64, 512, 1000, 1e-5, 1e4, 2048)  # 32 tiles for 132 SMs
    plan = plan_of(config)
    names = generate(plan, trace=True).stage_names
    trace = make_trace("tiny", plan, names, stamp(plan, names), POSITION, CEILING)
    assert any(np.isnan(v.begin).any() for v in trace.visits)
    assert all(np.isfinite(s.loss) and np.isfinite(s.floor) for s in summarize(trace))
    assert all(e["dur"] >= 0 for e in chrome(trace) if e["ph"] == "X")


def test_no_timestamps_are_an_error() -> None:
    plan = plan_of(shape("llama-3.2-1b"))
    names = generate(plan, trace=True).stage_names
    with pytest.raises(DeviceError, match="no timestamps"):
        make_trace("none", plan, names, np.zeros((2, 132, 17, len(names), 2), np.uint64), 1, CEILING)


def chrome(trace: Trace) -> list[dict[str, Any]]:
    return list(chrome_events(trace))


def test_the_chrome_trace_is_what_perfetto_reads(small: tuple[Trace, Plan], tmp_path: Path) -> None:
    trace, plan = small
    write_chrome(trace, tmp_path / "trace.json")
    content = json.loads((tmp_path / "trace.json").read_text())
    assert content["otherData"] == {"model": "llama-3.2-1b", "position": POSITION, "read_ceiling_gb_s": CEILING}
    events = content["traceEvents"]
    spans = [e for e in events if e["ph"] == "X"]
    workers, layers = plan.target.workers, plan.config.num_layers
    named = [e for e in spans if e["tid"] == CONSUMER and e["name"] not in ("wait", "stream")]
    assert len(named) == workers * (5 * layers + 1) == len([e for e in spans if e["name"] == "wait"])
    assert {e["name"] for e in spans if e["tid"] == FINISHER} == {*trace.names} - {"attention"} | {"finish"}
    assert {e["pid"] for e in spans} == set(range(workers))
    assert {e["args"]["name"] for e in events if e["name"] == "thread_name"} == {"consumers", "finisher"}
    begin, length = np.array([(e["ts"], e["dur"]) for e in spans]).T
    assert begin.min() >= 0 and length.min() >= 0 and (begin + length).max() <= trace.duration + 0.01
    of_one = sorted((e for e in named if e["pid"] == 5), key=lambda e: e["ts"])
    assert [e["name"] for e in of_one[:5]] == ["qkv", "attention", "attention_output", "gate_up", "down"]
    assert all(a["ts"] + a["dur"] <= b["ts"] + 0.01 for a, b in pairwise(of_one))  # one after another
    counters = [e for e in events if e["ph"] == "C"]
    assert counters and all(set(e["args"]) == set(trace.names) for e in counters)


def test_the_table_accounts_for_the_whole_token(small: tuple[Trace, Plan]) -> None:
    trace, _ = small
    out = io.StringIO()
    Console(file=out, width=200).print(table(trace, trace.duration + 7.0))
    text = out.getvalue()
    assert "llama-3.2-1b, one token after 1,000 positions" in text and "attention_output" in text
    rows = {line.split("│")[1].strip(): line.split("│")[-2].strip() for line in text.splitlines() if line.startswith("│")}
    assert rows["choice of token"] == "+7.0"
    parts = sum(float(loss) for name, loss in rows.items() if name != "token")
    assert float(rows["token"]) == pytest.approx(parts, abs=0.5)


def test_a_traced_kernel_compiles_without_spills() -> None:
    pytest.importorskip("cuda.bindings.nvrtc", reason="NVRTC is not installed")
    from flashformer.backends.cuda.compile import compile_source

    plan = plan_of(shape("llama-3.2-1b"))
    traced, plain = generate(plan, trace=True).text, generate(plan).text
    assert "kTrace = true" in traced and "kTrace = false" in plain
    assert compile_source(traced, plan.target).spills == 0


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_the_plot(small: tuple[Trace, Plan], tmp_path: Path, suffix: str) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed (extra: plots)")
    paths = [tmp_path / f"{name}.{suffix}" for name in "ab"]
    for path in paths:
        draw_trace(path, small[0], small[0].duration + 7.0)
    first, second = (path.read_bytes() for path in paths)
    assert first == second and first.startswith(b"\x89PNG" if suffix == "png" else b"<?xml")
    if suffix == "svg":
        assert "us lost of" in first.decode() and "of the read ceiling" in first.decode()


def test_plots_that_cannot_be_are_refused_before_anything_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match=r"a plot is a \.png or \.svg file"):
        require(tmp_path / "plot.pdf")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r'pip install "flashformer\[plots\]"'):
        require(tmp_path / "plot.png")
