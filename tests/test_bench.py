"""The benchmark, on a GPU that is played by the reference: what is drawn, checked, measured, kept, and said."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from click.testing import CliRunner

from flashformer import bench
from flashformer.backends import Made, Turn
from flashformer.backends.cuda import DeviceInfo, RandomWeights
from flashformer.backends.cuda.codegen import HEADERS, generate, place_vectors
from flashformer.backends.cuda.pack import gather_vectors
from flashformer.backends.cuda.random_weights import VECTOR_SCALE, draw
from flashformer.bench import Bench, layers_to_check, open_subject, starts
from flashformer.checkpoint import check_tensors
from flashformer.cli import main
from flashformer.config import ModelConfig, RopeScaling
from flashformer.errors import CheckpointError, DeviceError, InputError
from flashformer.formats import NAMED
from flashformer.models import build_graph
from flashformer.plan import Plan, make_plan
from flashformer.records import Record, load_records, results_file, save, table
from flashformer.reference import Reference
from flashformer.shapes import SHAPES
from flashformer.targets import get
from test_trace import stamp

CEILING = 4000.0
SMALL = ModelConfig("Qwen3ForCausalLM", 128, 3, 4, 2, 32, 96, 200, 1e-6, 1e4, 640, RopeScaling("llama3", 8.0, 1.0, 4.0, 64), qk_norm=True)
BIASED = replace(SMALL, architecture="Qwen2ForCausalLM", qk_norm=False, qkv_bias=True, rope_scaling=None)


# --- Random weights --------------------------------------------------------------------------------------------------------


def test_the_host_draws_what_the_device_draws(tmp_path: Path) -> None:
    """The expression of tools.cuh itself, compiled here: the same bits."""
    compiler = shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    text = (HEADERS / "tools.cuh").read_text()
    bits = re.search(r"FF_DEVICE (u32 random_bits\(u64 n, u32 seed\) \{\n.*?\n\})", text, re.S)
    body = re.search(r"auto draw = \[&\]\(u64 n\) \{ (.*?) \};", text)
    assert bits is not None and body is not None
    counters = [*range(64), 2**24 + 3, 2**31 - 1, 2**32 - 1, 2**32, 2**32 + 7, 5 * 2**33 + 11]
    source = f"""
        #include <cstdint>
        #include <cstdio>
        #include <cstring>
        #include <initializer_list>
        using u32 = uint32_t; using u64 = uint64_t;
        {bits[1]}
        float draw(u64 n, u32 seed, float scale) {{ {body[1]} }}
        int main() {{
          for (u64 n : {{{", ".join(f"{c}ull" for c in counters)}}})
            for (u32 seed : {{1u, 0xdeadbeefu}}) {{
              float x = draw(n, seed, 0.0270632931f); u32 bits; memcpy(&bits, &x, 4); printf("%u\\n", bits);
            }}
        }}"""
    (tmp_path / "draw.cpp").write_text(source)
    subprocess.run([compiler, "-O1", "-ffp-contract=off", "-o", tmp_path / "draw", tmp_path / "draw.cpp"], check=True)
    lines = subprocess.run([tmp_path / "draw"], capture_output=True, text=True, check=True).stdout.split()
    theirs = np.array(lines, np.uint32).view(np.float32).astype(ml_dtypes.bfloat16)  # the device rounds to nearest even, too
    ours = np.concatenate([draw(n, 1, seed, np.float32(0.0270632931)) for n in counters for seed in (1, 0xDEADBEEF)])
    assert np.array_equal(ours.view(np.uint16), theirs.view(np.uint16))


def test_any_part_can_be_drawn_alone() -> None:
    scale = np.float32(0.5)
    whole = draw(0, 700_000, 7, scale)  # more than one block
    assert np.array_equal(draw(300_001, 5_000, 7, scale), whole[300_001:305_001])
    values = whole.astype(np.float64)
    assert abs(values.mean()) < 1e-3 and abs(values.std() - 0.5 / np.sqrt(3)) < 1e-3 and np.abs(values).max() <= 0.5
    assert not np.array_equal(draw(0, 100, 8, scale), whole[:100])


@pytest.mark.parametrize("config", [SMALL, BIASED], ids=["qwen3", "qwen2"])
def test_random_weights_are_a_checkpoint(config: ModelConfig) -> None:
    with RandomWeights(config) as weights:
        check_tensors(weights, build_graph(config).weights())
        for name in weights.names():
            whole = weights.read(name)
            assert whole.shape == weights.spec(name).shape and whole.dtype == ml_dtypes.bfloat16
            assert np.array_equal(weights.read(name, slice(3, 9)), whole[3:9])
            values = whole.astype(np.float64)
            if whole.ndim == 2:
                assert values.std() == pytest.approx(whole.shape[1] ** -0.5, rel=0.05)
            else:
                assert np.abs(values - (0 if name.endswith(".bias") else 1)).max() <= float(VECTOR_SCALE) + 2**-8
        assert not np.array_equal(weights.read(name), RandomWeights(config, seed=2).read(name))
        with pytest.raises(CheckpointError, match=r"no tensor nothing\.weight"):
            weights.read("nothing.weight")
        with pytest.raises(CheckpointError, match="no tokenizer"):
            weights.tokenizer()
        logits = Reference(build_graph(config), weights).logits(range(20))
        assert 0.3 < logits.std() < 3  # activations stay of order one


@pytest.mark.parametrize("name", ["bf16", "int4"])
def test_values_do_not_depend_on_how_threads_share_them(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    weights, matrix = RandomWeights(SMALL, format=NAMED[name]), "model.layers.0.mlp.down_proj.weight"
    form = weights.form(matrix)
    expected = weights.read(matrix) if form is None else form.dequantize()
    monkeypatch.setattr("flashformer.backends.cuda.random_weights.BLOCK", 5 * expected.shape[1])
    for rows in (slice(None), slice(3, 24)):
        values = weights.values(matrix, rows)
        assert values.dtype == expected.dtype and np.array_equal(values, expected[rows])


def test_the_kernel_gets_the_vectors_that_the_reference_reads() -> None:
    weights = RandomWeights(BIASED)
    plan = make_plan(BIASED, build_graph(BIASED), get("sm_90"))
    vectors = place_vectors(plan)
    found, strange = gather_vectors(plan, vectors, weights)
    assert not strange
    at = 1 * vectors.layer_size + vectors.gamma["attention_output"]
    assert np.array_equal(found[at : at + 128], weights.read("model.layers.1.post_attention_layernorm.weight").astype(np.float32))
    at = 2 * vectors.layer_size + vectors.bias["qkv"]
    assert np.array_equal(found[at : at + 128], weights.read("model.layers.2.self_attn.q_proj.bias").astype(np.float32))


# --- A GPU for want of one -------------------------------------------------------------------------------------------------


@dataclass
class Desk:
    """What happened on the GPU that is none."""

    runners: list[FakeRunner]
    error: float = 0.0  # of logits, relative to their size
    wrong_token: bool = False  # the third greedy token of each generation is another


class FakeRunner:
    """Computes with the reference; a token takes 1 ms and 1 us for each earlier position, give or take."""

    def __init__(self, desk: Desk, plan: Plan, weights: Any) -> None:
        self.desk, self.plan, self.closed, self.filled, self.launches = desk, plan, False, False, 0
        self.prompts: list[int] = []  # lengths
        self.info = DeviceInfo(0, "NVIDIA Test 9000", (9, 0), 132, 232448, 10**11, get("sm_90"))
        self.source = generate(plan)
        self.reference = Reference(build_graph(plan.config), weights, kv_type=plan.kv.type)

    def generate(self, tokens: Sequence[int], start: int, count: int, stop: Sequence[int]) -> Iterator[int]:
        assert start + len(tokens) - 1 + count <= self.plan.max_context
        for i, token in enumerate(self.reference.generate(tokens, count)):
            yield (token + 1) % 200 if self.desk.wrong_token and i == 2 else token

    def logits(self, tokens: Sequence[int], start: int) -> np.ndarray:
        exact = self.reference.logits(tokens, start)
        return exact + self.desk.error * np.random.default_rng(0).standard_normal(exact.shape).astype(np.float32)

    def fill_kv(self) -> None:
        self.filled = True

    def read_bandwidth(self) -> float:
        return CEILING

    def time_generate(self, start: int, count: int) -> float:
        assert self.filled and not self.closed and start + count <= self.plan.max_context
        self.launches += 1
        return count * (1e-3 + start * 1e-6) * (1 + 0.001 * (self.launches % 3))

    def run(self, turns: Sequence[Turn]) -> Iterator[Made]:
        (turn,) = turns
        assert turn.start == 0 and turn.count == 1 and not self.closed
        self.prompts.append(len(turn.tokens))
        time.sleep(len(turn.tokens) * 1e-4)
        yield Made(0, 1, 0.0)

    def trace(self, start: int, count: int) -> np.ndarray:
        return stamp(self.plan, self.source.stage_names)

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def desk(monkeypatch: pytest.MonkeyPatch) -> Desk:
    """A machine with a GPU on which the shape `small` is known."""
    made = Desk([])

    def load(plan: Plan, weights: Any, progress: Any) -> FakeRunner:
        made.runners.append(FakeRunner(made, plan, weights))
        return made.runners[-1]

    info = DeviceInfo(0, "NVIDIA Test 9000", (9, 0), 132, 232448, 10**11, get("sm_90"))
    monkeypatch.setattr("flashformer.backends.cuda.load", load)
    monkeypatch.setattr("flashformer.backends.cuda.probe", lambda: info)
    monkeypatch.setitem(SHAPES, "small", SMALL)
    return made


def test_many_contexts_are_measured_with_weights_that_were_packed_once(desk: Desk) -> None:
    with open_subject("small") as subject, Bench(subject, [500, 0, 128], tokens=64) as ready:
        assert ready.contexts == [0, 128, 500]
        records = [ready.measure(context, repeats=5) for context in ready.contexts]
    (runner,) = desk.runners
    assert runner.closed and runner.launches == 3 * 6  # one of each six warms up
    for record, context in zip(records, (0, 128, 500), strict=True):
        ms = record.ms_per_token
        assert 0 < ms["min"] <= ms["median"] <= ms["max"] and record.ms == pytest.approx(1 + context / 1e3, rel=0.002)
        assert record.spread == pytest.approx((ms["max"] - ms["min"]) / ms["median"]) and record.spread > 0
        assert record.bytes_per_token == runner.plan.token_bytes(context + 32)
        assert record.fraction_of_ceiling == pytest.approx(record.bytes_per_token / record.ms / 1e6 / CEILING)
        assert (record.model, record.weights, record.batch, record.context) == ("small", "bf16", 1, context)
        assert (record.tokens_timed, record.repeats, record.gpu) == (64, 5, "NVIDIA Test 9000")
        assert record.checked is not None and record.checked["layers"] == 3 and record.checked["positions"] == 32
        assert record.checked["top1"] == 1 and 0 <= record.checked["kl_mean"] <= record.checked["kl_max"] < 1e-9


def test_prompts_are_timed_until_their_first_token(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    with open_subject("small") as subject, Bench(subject, [0, 100, 500], tokens=16, prompts=True) as ready:
        records = [ready.measure(context, repeats=2) for context in ready.contexts]
    (runner,) = desk.runners
    assert runner.plan.prompt_columns == get("sm_90").usual_prompt_columns > 0
    assert runner.prompts == [100] * 3 + [500] * 3  # the first of each warms up
    none, short, long = (record.first_token_ms for record in records)
    assert none is None and short is not None and long is not None and 10 <= short < long and long >= 50
    columns = ["first token" in [column.header for column in table(shown).columns] for shown in (records, records[:1])]
    assert columns == [True, False]
    monkeypatch.setattr(bench, "LONGEST_PROMPTS", 0.0)
    with open_subject("small") as subject, Bench(subject, [100], tokens=16, prompts=True) as ready:
        ready.measure(100, repeats=9)
    assert desk.runners[-1].prompts == [100] * 2  # not once more than it takes


def test_large_models_are_checked_as_their_first_layers(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "CHECK_PARAMETERS", 1.0)
    with open_subject("small") as subject, Bench(subject, [64], tokens=16) as ready:
        assert ready.checked is not None and ready.checked["layers"] == 2
    cut, whole = desk.runners
    assert cut.plan.config.num_layers == 2 and whole.plan.config.num_layers == 3 and cut.closed and whole.closed


def test_a_cache_of_8_bits_is_read_and_named(desk: Desk) -> None:
    with open_subject("small") as subject, Bench(subject, [500], tokens=16, kv="fp8") as ready:
        record = ready.measure(500, repeats=1)
    plan = make_plan(SMALL, build_graph(SMALL), get("sm_90"))
    kv = SMALL.num_layers * plan.kv.bytes_read(508)
    assert record.bytes_per_token == plan.token_bytes(508) - kv + kv * (SMALL.head_dim + 2) // (2 * SMALL.head_dim)
    assert record.weights == "bf16, KV cache in fp8" and record.checked is not None


def test_how_many_layers_the_reference_can_afford() -> None:
    checked = {name: layers_to_check(config) for name, config in SHAPES.items()}
    assert checked["llama-3.2-1b"] == 16 and checked["qwen3-0.6b"] == 28
    assert 2 <= checked["llama-3.1-8b"] <= 6
    assert checked["qwen3-32b"] == checked["llama-3.1-70b"] == 2
    assert layers_to_check(replace(SMALL, num_layers=1)) == 1


def test_a_wrong_kernel_is_not_measured(desk: Desk) -> None:
    desk.error = 0.3
    with open_subject("small") as subject, pytest.raises(DeviceError, match=r"(?s)not measured.*mean KL .* exceeds"):
        Bench(subject, [64], tokens=16)
    assert all(r.closed for r in desk.runners)
    desk.error, desk.wrong_token = 0.0, True
    with open_subject("small") as subject, pytest.raises(DeviceError, match=r"(?s)not measured.*greedy token 2 is not the largest"):
        Bench(subject, [64], tokens=16)
    with open_subject("small") as subject, Bench(subject, [64], tokens=16, checked=False) as ready:
        assert ready.measure(64).checked is None


def test_contexts_end_where_the_model_ends() -> None:
    assert starts(SMALL, [0, 128, 640, 639], 128) == [0, 128, 512]
    for contexts, tokens, message in (([641], 128, "0 to 640 positions"), ([0], 641, "641 tokens do not fit"), ([], 8, "none")):
        with pytest.raises(InputError, match=message):
            starts(SMALL, contexts, tokens)


def test_no_gpu_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flashformer.backends.cuda.probe", lambda: None)
    with open_subject("llama-3.2-1b") as subject, pytest.raises(DeviceError, match="needs a CUDA GPU; none was found"):
        Bench(subject, [64])
    old = DeviceInfo(0, "Old GPU", (7, 0), 80, 98304, 10**10, None)
    monkeypatch.setattr("flashformer.backends.cuda.probe", lambda: old)
    with pytest.raises(DeviceError, match=r"Old GPU \(sm_70\) is not supported"):
        bench.gpu_target()


def test_a_checkpoint_is_measured_by_its_name(desk: Desk, tmp_path: Path) -> None:
    from model_files import make_config, write_folder

    folder = write_folder(tmp_path / "some-model", make_config(vocab_size=300))
    with open_subject(str(folder)) as subject, Bench(subject, [64], tokens=16) as ready:
        record = ready.measure(64)
    assert record.model == "some-model" and record.checked is not None and record.checked["layers"] == 2


# --- Records ---------------------------------------------------------------------------------------------------------------


def record(context: int = 1024, ms: float = 2.0, model: str = "llama-3.2-1b") -> Record:
    """One that might have been measured."""
    return Record(
        model, "bf16", 1, context, 128, 5, {"min": ms * 0.99, "median": ms, "max": ms * 1.01}, 0.02, 10**9, 4000.0, 10**9 / ms / 1e6 / 4000,
        None, bench.TIMED_REGION, gpu="NVIDIA Test 9000", driver="1.2", date="2026-01-02", commit="abcdef",
    )  # fmt: skip


def test_new_records_take_the_place_of_old_ones(tmp_path: Path) -> None:
    path = results_file(tmp_path / "results", "NVIDIA H200 (141 GB)")
    assert path.name == "decode-nvidia-h200-141-gb.json"
    save([record(128), record(1024)], path)
    save([record(1024, ms=1.5), record(1024, model="other")], path)
    found = load_records(path, Record)
    assert [(r.model, r.context, r.ms) for r in found] == [("llama-3.2-1b", 128, 2.0), ("llama-3.2-1b", 1024, 1.5), ("other", 1024, 2.0)]
    assert found[0] == record(128)
    assert [p.name for p in path.parent.iterdir()] == [path.name]  # nothing half written beside it


def test_files_that_are_no_records_are_left_alone(tmp_path: Path) -> None:
    for content in ("{", "[1]", '[{"model": "x"}]', "null"):
        (tmp_path / "x.json").write_text(content)
        with pytest.raises(InputError, match="not a file of benchmark records"):
            save([record()], tmp_path / "x.json")
        assert (tmp_path / "x.json").read_text() == content
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        save([record()], tmp_path / "file" / "y.json")


# --- The command -----------------------------------------------------------------------------------------------------------


def run(*arguments: object) -> tuple[int, str]:
    """Exit status and both streams of `flashformer bench`."""
    result = CliRunner().invoke(main, ["bench", *(str(a) for a in arguments)])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.output


def test_the_command(desk: Desk, tmp_path: Path) -> None:
    records, trace = tmp_path / "records.json", tmp_path / "trace.json"
    status, output = run("small", "--context", "128,640,0", "--tokens", 32, "--json", records, "--trace", trace)
    assert status == 0, output
    assert "note: context 640 is measured at 608: the last 32 of 640 positions" in output
    for text in ("ms/token", "of ceiling", "4,000 GB/s", "3 layers checked at 32 positions", "loss/token", "attention_output"):
        assert text in output
    assert [r.context for r in load_records(records, Record)] == [0, 128, 608]
    assert json.loads(trace.read_text())["otherData"]["position"] == 15  # the last of sixteen tokens at the shortest context
    assert len(desk.runners) == 1 and desk.runners[0].closed


def test_the_plot_of_the_command(desk: Desk, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed (extra: plots)")
    status, output = run("small", "--tokens", 32, "--context", 64, "--plot", tmp_path / "trace.png")
    assert status == 0, output
    assert (tmp_path / "trace.png").read_bytes().startswith(b"\x89PNG")


def test_mistakes_end_with_one_line(desk: Desk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for arguments, message in (
        (("small", "--context", "1,x"), "--context is '1,x'"),
        (("small", "--context", "-1"), "this model has 0 to 640 positions"),
        (("small", "--context", "641"), "this model has 0 to 640 positions"),
        (("small", "--tokens", "700"), "700 tokens do not fit"),
        (("small", "--device", "cpu"), "bench measures a GPU"),
        (("small", "--baselines", "other"), "unknown baseline 'other'"),
        (("small", "--json", tmp_path / "no" / "x.json"), "there is no folder"),
        (("small", "--plot", tmp_path / "x.pdf"), "a plot is a"),
        ((tmp_path / "nothing",), "no such model"),
    ):
        status, output = run(*arguments)
        assert status == 2 and message in output and output.startswith("error: ") and "Traceback" not in output
    monkeypatch.setattr("flashformer.backends.cuda.probe", lambda: None)
    assert "needs a CUDA GPU" in run("small")[1]
