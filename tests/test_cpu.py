"""The CPU backend against the float32 reference: every family and shape, any number of workers, and how it behaves when used."""

from __future__ import annotations

import gc
import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flashformer.backends.cpu import CpuRunner, codegen, compile
from flashformer.backends.cpu import load as load_runner
from flashformer.check import check_runner, compare, sample_tokens
from flashformer.checkpoint import open_checkpoint
from flashformer.errors import BuildError, DeviceError
from flashformer.plan import Plan
from flashformer.reference import Reference
from flashformer.targets import get
from model_files import make_config, write_folder
from running import run_checkpoint

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}

# A model, and the workers that run it.
MODELS: dict[str, tuple[int, dict[str, Any]]] = {
    "llama": (2, {}),
    "llama tied, scaled rope": (3, {"tie_word_embeddings": True, "rope_scaling": LLAMA3, "vocab_size": 1003}),
    "llama with biases": (2, {"attention_bias": True, "mlp_bias": True}),
    "mistral": (3, {"architecture": "MistralForCausalLM", "hidden_size": 256, "head_dim": 64, "num_attention_heads": 6}),
    "qwen2": (2, {"architecture": "Qwen2ForCausalLM", "hidden_size": 192, "num_attention_heads": 6, "num_key_value_heads": 2}),
    "qwen2 odd": (5, {"architecture": "Qwen2ForCausalLM", "hidden_size": 100, "head_dim": 10, "num_attention_heads": 9,
                      "num_key_value_heads": 3, "intermediate_size": 37}),
    "one kv head": (5, {"num_attention_heads": 16, "num_key_value_heads": 1, "head_dim": 8}),
    "groups of eleven": (2, {"num_attention_heads": 11, "num_key_value_heads": 1, "num_hidden_layers": 1}),
    "wide heads": (2, {"architecture": "Qwen3ForCausalLM", "head_dim": 256, "num_attention_heads": 4, "num_key_value_heads": 4}),
}  # fmt: skip
ODD: dict[str, Any] = {"architecture": "Qwen3ForCausalLM", "hidden_size": 200, "head_dim": 24, "intermediate_size": 341, "vocab_size": 1003}


def make(path: Path, dtype: str = "bfloat16", **changes: Any) -> Path:
    """A folder with a small random model."""
    architecture = changes.pop("architecture", "LlamaForCausalLM")
    return write_folder(path, make_config(architecture, torch_dtype=dtype, **changes), dtype=dtype)


@contextmanager
def running(folder: Path, workers: int = 2, max_context: int = 256) -> Iterator[tuple[CpuRunner, Reference]]:
    """A folder's model on the CPU, and its reference."""
    with open_checkpoint(folder) as checkpoint, run_checkpoint(checkpoint, load_runner, get("cpu"), max_context, workers) as made:
        yield made


def assert_right(runner: CpuRunner, reference: Reference, positions: int = 100) -> None:
    """Compare logits and greedy tokens."""
    result = check_runner(runner, reference, sample_tokens(runner.plan.config, positions, seed=1))
    assert result.within, result.describe()


# --- right -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_models_agree_with_the_reference(tmp_path: Path, name: str) -> None:
    workers, changes = MODELS[name]
    with running(make(tmp_path, **changes), workers) as (runner, reference):
        assert_right(runner, reference)


@pytest.mark.parametrize("workers", [1, 2, 3, 5, 7])
def test_any_number_of_workers(tmp_path: Path, workers: int) -> None:
    with running(make(tmp_path, **ODD), workers) as (runner, reference):
        assert_right(runner, reference)


def test_more_workers_than_work(tmp_path: Path) -> None:
    folder = make(tmp_path, hidden_size=8, num_attention_heads=1, num_key_value_heads=1, intermediate_size=6)
    with running(folder, 7) as (runner, reference):
        assert min(count for stage in runner.plan.stages for count in stage.count) == 0
        assert_right(runner, reference)


def test_float16(tmp_path: Path) -> None:
    with running(make(tmp_path, "float16")) as (runner, reference):
        assert runner.plan.config.dtype == "float16"
        assert_right(runner, reference)


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="the options are those of x86-64")
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("level", ["x86-64", "x86-64-v3"])
def test_narrower_vectors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, level: str, dtype: str) -> None:
    """The paths of processors without AVX-512, and without AVX."""
    monkeypatch.setattr(compile, "NATIVE", (f"-march={level}",))
    compile.examine.cache_clear()
    try:
        if level == "x86-64-v3" and "avx2" not in Path("/proc/cpuinfo").read_text():
            pytest.skip("this processor has no AVX2")
        with running(make(tmp_path, dtype, **ODD)) as (runner, reference):
            assert f"-march={level}" in compile.find_compiler().options
            assert_right(runner, reference)
    finally:
        compile.examine.cache_clear()


def test_long_positions(tmp_path: Path) -> None:
    length = 8192
    folder = make(
        tmp_path, max_position_embeddings=length, rope_scaling={**LLAMA3, "original_max_position_embeddings": 2048}, rope_theta=5e5,
        num_attention_heads=2, num_key_value_heads=1, head_dim=64, tie_word_embeddings=True,
    )  # fmt: skip
    with running(folder, max_context=length) as (runner, reference):
        tokens = sample_tokens(runner.plan.config, length, seed=6)
        result = compare(runner.logits(tokens, 0), reference.logits(tokens))
        assert result.within, result.describe()


def test_the_same_bits_a_hundred_times(tmp_path: Path) -> None:
    with running(make(tmp_path, **ODD), 3) as (runner, _):
        tokens = sample_tokens(runner.plan.config, 40, seed=4)
        first = runner.logits(tokens, 0)
        answer = list(runner.generate(tokens, 0, 30, ()))
        for _ in range(100):
            assert np.array_equal(runner.logits(tokens, 0), first)  # into memory that held NaN before
        for _ in range(10):
            assert list(runner.generate(tokens, 0, 30, ())) == answer


def test_logits_do_not_depend_on_how_a_text_is_cut(tmp_path: Path) -> None:
    with running(make(tmp_path, **ODD)) as (runner, _):
        tokens = sample_tokens(runner.plan.config, 150, seed=5)
        whole = runner.logits(tokens, 0)
        parts = [runner.logits(tokens[a:b], a) for a, b in ((0, 1), (1, 17), (17, 100), (100, 150))]
        assert np.array_equal(np.concatenate(parts), whole)


def test_what_a_text_of_nan_leaves_behind_harms_no_later_one(tmp_path: Path) -> None:
    """One token's embedding is NaN; the cache and every buffer that its text fills are used again."""
    from safetensors.numpy import load_file, save_file

    folder = make(tmp_path, "float16", **ODD)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.embed_tokens.weight"][7] = np.nan
    save_file(tensors, folder / "model.safetensors")
    with pytest.warns(UserWarning, match=r"model\.embed_tokens\.weight holds values that are not finite"), running(folder) as (runner, _):
        tokens = [t if t != 7 else 8 for t in sample_tokens(runner.plan.config, 40, seed=8)]
        clean = runner.logits(tokens, 0)
        assert np.isnan(runner.logits([7] * 50, 0)).all()
        assert np.array_equal(runner.logits(tokens, 0), clean) and np.isfinite(clean).all()


# --- used ------------------------------------------------------------------------------------------------------------------


def test_stops_and_early_ends(tmp_path: Path) -> None:
    with running(make(tmp_path)) as (runner, _):
        answer = list(runner.generate([5, 6], 0, 20, ()))
        assert len(answer) == 20
        stop = answer[7]
        expected = answer[: answer.index(stop) + 1]
        assert list(runner.generate([5, 6], 0, 20, {stop, 100_000})) == expected
        tokens = runner.generate([5, 6], 0, 200, ())
        assert next(tokens) == answer[0]
        tokens.close()
        assert list(runner.generate([5, 6], 0, 20, ())) == answer
        stats = runner.stats
        assert (stats.prompt_tokens, stats.generated_tokens) == (2, 20)
        assert stats.bytes_read == sum(runner.plan.token_bytes(2 + i) for i in range(19))
        assert 0 < stats.prompt_seconds < 60 and 0 < stats.generate_seconds < 60


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    with running(make(tmp_path), max_context=32) as (runner, _):
        assert len(list(runner.generate([1] * 32, 0, 1, ()))) == 1
        for tokens, start, count in (([1] * 33, 0, 1), ([1], 0, 33), ([1], 32, 1), ([1], -1, 1), ([], 0, 1), ([1], 0, 0)):
            with pytest.raises(DeviceError, match="do not fit into 32 positions"):
                list(runner.generate(tokens, start, count, ()))
        for token in (-1, 288):
            with pytest.raises(DeviceError, match="outside the vocabulary of 288"):
                runner.logits([1, token], 0)


def test_two_models_at_a_time(tmp_path: Path) -> None:
    with running(make(tmp_path / "a")) as (a, _), running(make(tmp_path / "b", **ODD), 3) as (b, _):
        alone = list(a.generate([5, 6], 0, 20, ())), list(b.generate([7], 0, 20, ()))
        together = list(zip(a.generate([5, 6], 0, 20, ()), b.generate([7], 0, 20, ()), strict=True))
        assert ([x for x, _ in together], [y for _, y in together]) == alone


def test_closing_frees_everything_and_may_be_repeated(tmp_path: Path) -> None:
    folder = make(tmp_path)

    def held() -> tuple[int, int]:
        """Threads of this process, and its mappings of packed weights."""
        gc.collect()
        return len(os.listdir("/proc/self/task")), Path("/proc/self/maps").read_text().count("/cpu-weights/")

    before = held()
    with running(folder) as (runner, _):
        list(runner.generate([5], 0, 5, ()))
        unfinished = runner.generate([5], 0, 200, ())
        next(unfinished)
        assert held()[0] >= before[0] + 2 and held()[1] == before[1] + 1
        runner.close()
        runner.close()
        while held() != before:  # the system lists a thread for a moment after it has been joined
            time.sleep(1e-3)
        again = runner.generate([5], 0, 5, ())
        for use in (lambda: next(unfinished), lambda: next(again), lambda: runner.logits([5], 0), runner.read_bandwidth):
            with pytest.raises(DeviceError, match="has been closed"):
                use()


# --- slow, stuck, interrupted ----------------------------------------------------------------------------------------------


class Gate:
    """Where the second worker waits before layer 1's attention, at position 9 and from 102 on, until it may go on or others give up."""

    def __init__(self, folder: Path) -> None:
        self.reached, self.opened = folder / "reached", folder / "opened"

    def code(self) -> str:
        """What the worker does there."""
        here = "const u32 at = worker.pass().columns[0].position; worker.index == 1 && layer == 1 && (at == 9 || at >= 102)"
        shut = f'!worker.given_up() && access("{self.opened}", F_OK)'
        return f'if ({here}) for (; {shut}; usleep(1000)) close(creat("{self.reached}", 0600));'

    def await_worker(self) -> None:
        """Return once it waits."""
        while not self.reached.exists():
            time.sleep(1e-3)

    def open(self) -> None:
        """It may go on, now and whenever it comes again."""
        self.opened.touch()


@pytest.fixture
def gate(tmp_path: Path) -> Gate:
    return Gate(tmp_path)


@pytest.fixture
def slow(tmp_path: Path, gate: Gate, monkeypatch: pytest.MonkeyPatch) -> Iterator[CpuRunner]:
    """A runner with a gate, which opens as a launch is told to end."""

    def generate(plan: Plan) -> codegen.Source:
        source = codegen.generate(plan)
        call = "worker.run<Attention<Model, stage::Attention>>(layer);"
        assert source.text.count(call) == 1
        return replace(source, text="#include <fcntl.h>\n#include <unistd.h>\n" + source.text.replace(call, f"{gate.code()} {call}"))

    monkeypatch.setattr("flashformer.backends.cpu.runner.generate", generate)
    with running(make(tmp_path)) as (runner, _):
        cancel = runner._library.flashformer_cancel
        monkeypatch.setattr(runner._library, "flashformer_cancel", lambda engine: (cancel(engine), gate.open()))
        yield runner


def test_a_stuck_worker_ends_with_an_error_that_names_the_stage(slow: CpuRunner, gate: Gate, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(gate, "open", lambda: None)
        answer = list(slow.generate([5] * 9, 0, 1, ()))
        slow.limit = 0.5
        with pytest.raises(DeviceError, match=r"waited 0\.5 s for the others and gave up: stage 'attention', layer 1"):
            list(slow.generate([5], 9, 20, ()))
        with pytest.raises(DeviceError, match="gave up"):
            slow.logits([5] * 20, 0)
        assert list(slow.generate([5] * 9, 0, 1, ())) == answer
        gate.reached.unlink()
    slow.limit = 30.0
    with ThreadPoolExecutor(1) as pool:
        made = pool.submit(lambda: list(slow.generate([5], 9, 20, ())))
        gate.await_worker()
        gate.open()
        assert len(made.result()) == 20


def test_tokens_come_as_they_are_made_and_closing_stops_the_rest(slow: CpuRunner) -> None:
    tokens = slow.generate([5], 100, 150, ())
    next(tokens)
    next(tokens)  # the third cannot have been made
    with pytest.raises(DeviceError, match="generating already"):
        slow.logits([5], 0)
    tokens.close()
    assert slow.stats.generated_tokens == 2 and np.count_nonzero(slow._parts[0]._arrays["seconds"]) <= 3


def test_other_threads_go_on(slow: CpuRunner, gate: Gate) -> None:
    with ThreadPoolExecutor(1) as pool:
        scores = pool.submit(slow.logits, [5] * 50, 100)
        gate.await_worker()
        gate.open()  # else the other worker would give up
        assert np.isfinite(scores.result()).all()


def test_an_interrupt_is_heard(slow: CpuRunner, gate: Gate) -> None:
    def interrupt() -> None:
        gate.await_worker()
        os.kill(os.getpid(), signal.SIGINT)

    heard = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with ThreadPoolExecutor(1) as pool, pytest.raises(KeyboardInterrupt):
            pool.submit(interrupt)
            slow.logits([5] * 150, 100)
    finally:
        signal.signal(signal.SIGINT, heard)
    assert len(list(slow.generate([5], 0, 5, ()))) == 5


# --- refused ---------------------------------------------------------------------------------------------------------------


def test_too_little_memory_is_said_before_loading(tmp_path: Path) -> None:
    folder = make(tmp_path, max_position_embeddings=16_000_000, num_key_value_heads=4, head_dim=256)
    message = r"needs .* GB .* this machine has .*; choose a smaller --max-context"
    with pytest.raises(DeviceError, match=message), running(folder, 2, 16_000_000):
        pass


def test_no_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(BuildError, match=r"no C\+\+ compiler was found .*apt install g\+\+"):
        compile.compile_source("")


def test_a_source_that_does_not_compile_shows_the_log() -> None:
    with pytest.raises(BuildError, match=r"(?s)does not compile .*error.*nonsense"):
        compile.compile_source("nonsense;\n")


def test_a_compiler_that_knows_less(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Options for this machine that the compiler does not know are left out; one that does not run at all is an error."""
    real = compile.find_compiler().path
    script = tmp_path / "c++"
    script.write_text(f'#!/bin/sh\ncase "$*" in *=native*) echo unknown option >&2; exit 1;; esac\nexec {real} "$@"\n')
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    compiler = compile.find_compiler()
    assert compiler.path == str(script) and compiler.options == compile.OPTIONS and "__VERSION__" in compiler.identity
    broken = tmp_path / "broken" / "c++"
    broken.parent.mkdir()
    broken.write_text("#!/bin/sh\necho it is broken >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("PATH", f"{broken.parent}:{os.environ['PATH']}")
    with pytest.raises(BuildError, match=r"(?s)does not work.*it is broken"):
        compile.find_compiler()
