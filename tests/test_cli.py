"""The command line, end to end on the CPU with a small model, and what it says when something is wrong."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from safetensors.numpy import load_file, save_file

import flashformer
from flashformer import SamplingParams, __version__
from flashformer.cli import main
from flashformer.terminal import describe_stats
from model_files import make_config, write_folder


def run(*arguments: str, input: str | None = None) -> Result:
    """One command; output holds both streams."""
    return CliRunner().invoke(main, [str(a) for a in arguments], input=input)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("model"), make_config(vocab_size=300))


def failed(result: Result) -> str:
    """The message of a command that ended as it should for a user's mistake: one line, no traceback."""
    assert result.exit_code == 2, result.output
    assert result.exception is None or isinstance(result.exception, SystemExit)
    assert "Traceback" not in result.output
    return result.output


def test_version() -> None:
    assert __version__ in run("--version").output


def test_generate(folder: Path) -> None:
    result = run("generate", folder, "-p", "Hello", "--device", "cpu", "--max-tokens", "12", "--stats")
    assert result.exit_code == 0, result.output
    assert "tokens/s" in result.output and "a plain read reaches" in result.output
    again = run("generate", folder, "-p", "-", "--device", "cpu", "--max-tokens", "12", input="Hello")
    assert again.exit_code == 0 and again.stdout == result.stdout
    raw = run("generate", folder, "-p", "Hello", "--device", "cpu", "--max-tokens", "12", "--raw")
    assert raw.exit_code == 0


def test_no_speed_of_an_answer_that_was_there_at_the_first_look(folder: Path) -> None:
    with flashformer.load(folder, "cpu") as engine:
        list(engine.generate("Hello", SamplingParams(max_tokens=3, ignore_eos=True)))
        engine.stats.generated_tokens, engine.stats.generate_seconds = 3, 0.0
        assert "too few tokens" in describe_stats(engine)


def test_generate_samples(folder: Path) -> None:
    plain = ("generate", folder, "-p", "Hello", "--device", "cpu", "--max-tokens", "12")
    command = (*plain, "--temperature", "0.9", "--top-p", "0.95")
    made = [run(*command, "--seed", seed, "--logprobs", "1").stdout for seed in ("1", "1", "2")]
    assert made[0] == made[1] != made[2]
    result = run(*command, "--seed", "1", "--logprobs", "1")
    lines = result.stderr.splitlines()
    assert len(lines) == 12 and all(float(part.rsplit(" ", 1)[1]) < 0 for line in lines for part in line.split(" | "))
    greedy = run(*plain)
    assert greedy.exit_code == 0 and greedy.stdout == run(*plain, "--top-k", "1", "--temperature", "1").stdout != made[0]
    assert "temperature is -1.0; it must be 0 (greedy) or a number from 0.001" in failed(run(*plain, "--temperature", "-1"))


def test_check(folder: Path) -> None:
    result = run("check", folder, "--device", "cpu", "--tokens", "20")
    assert result.exit_code == 0, result.output
    assert "KL" in result.output


def test_check_fails_where_the_kernel_is_wrong(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from flashformer.reference import Reference

    honest = Reference.logits

    def shifted(self: Reference, *args: object, **kwargs: object) -> np.ndarray:
        return np.roll(honest(self, *args, **kwargs), 1, axis=-1)  # type: ignore[arg-type]

    monkeypatch.setattr(Reference, "logits", shifted)
    assert run("check", folder, "--device", "cpu", "--tokens", "20").exit_code == 1


@pytest.mark.parametrize("target", ["sm_90", "sm_80", "sm_120", "cpu"])
def test_explain_needs_only_the_configuration(tmp_path: Path, target: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(make_config(num_hidden_layers=3)))
    for name in (tmp_path, tmp_path / "config.json"):
        result = run("explain", name, "--target", target)
        assert result.exit_code == 0, result.output
        for word in ("qkv", "attention", "gate_up", "down", "head", "ms per token"):
            assert word in result.output


def test_explain_predicts_what_was_measured() -> None:
    """The prediction is a simple model; on the shapes it was fitted to it is within a tenth."""
    output = run("explain", "llama-3.1-8b", "--target", "sm_90").output
    predicted = float(output.split(" ms per token")[0].split()[-1])
    assert 3.2 < predicted < 3.8
    assert "8.030 B parameters" in output


def test_explain_refuses_what_makes_no_sense(tmp_path: Path) -> None:
    assert "unknown target 'sm_70'" in failed(run("explain", "llama-3.1-8b", "--target", "sm_70"))
    assert "no such model" in failed(run("explain", tmp_path / "nothing"))
    assert "--context is 200000" in failed(run("explain", "llama-3.1-8b", "--target", "cpu", "--context", "200000"))
    (tmp_path / "config.json").write_text(json.dumps(make_config(attn_logit_softcapping=50.0)))
    assert "attn_logit_softcapping" in failed(run("explain", tmp_path))


def test_mistakes_end_with_one_line(folder: Path, tmp_path: Path) -> None:
    assert "the prompt is empty" in failed(run("generate", folder, "-p", "", "--device", "cpu"))
    assert "no such model" in failed(run("generate", "no/such/model", "-p", "x"))
    short = ("--device", "cpu", "--max-context", "4", "--raw")
    assert "the context holds 4" in failed(run("generate", folder, "-p", "Hello there, you", *short))
    assert "supports 1 to" in failed(run("generate", folder, "-p", "x", "--device", "cpu", "--max-context", "100000000"))
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "config.json" in failed(run("generate", empty, "-p", "x"))


def test_no_gpu(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flashformer.backends.cuda.probe", lambda: None)
    assert "no CUDA GPU was found; use --device cpu" in failed(run("generate", folder, "-p", "x", "--device", "cuda"))


def test_no_compiler(folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FF_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    message = failed(run("generate", folder, "-p", "x", "--device", "cpu"))
    assert "C++ compiler" in message and "g++" in message


def test_an_unusable_cache_folder_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FF_CACHE_DIR", str(tmp_path / "file"))
    assert "FF_CACHE_DIR" in failed(run("generate", folder, "-p", "x", "--device", "cpu"))


def test_a_truncated_file_is_refused(folder: Path, tmp_path: Path) -> None:
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    whole = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    assert "model.safetensors" in failed(run("generate", tmp_path, "-p", "x", "--device", "cpu"))


def test_tensors_that_do_not_fit_are_named(folder: Path, tmp_path: Path) -> None:
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.norm.weight"]
    tensors["lm_head.weight"] = tensors["lm_head.weight"][:-1].copy()
    tensors["model.layers.0.mlp.experts"] = np.zeros((2, 2), np.float32)
    save_file(tensors, tmp_path / "model.safetensors")
    message = failed(run("generate", tmp_path, "-p", "x", "--device", "cpu"))
    for part in ("missing: model.norm.weight", "misshapen: lm_head.weight is [299, 64]", "unexpected: 'model.layers.0.mlp.experts'"):
        assert part in message


def test_debug_shows_the_traceback_and_the_plan(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FF_DEBUG", "3")
    result = run("generate", folder, "-p", "x", "--device", "cpu", "--max-tokens", "2")
    assert result.exit_code == 0 and "gate_up" in result.output and "GB of weights" in result.output
    assert "Traceback" in run("generate", folder, "-p", "", "--device", "cpu").output
    monkeypatch.setenv("FF_DEBUG", "9")
    assert "FF_DEBUG='9'" in failed(run("generate", folder, "-p", "x", "--device", "cpu"))


def test_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, folder: Path) -> None:
    monkeypatch.setenv("FF_CACHE_DIR", str(tmp_path))
    assert "0 entries" in run("cache").output
    assert run("generate", folder, "-p", "x", "--device", "cpu", "--max-tokens", "2").exit_code == 0
    assert "0 entries" not in run("cache").output
    assert "freed" in run("cache", "--clear").output
    assert "0 entries" in run("cache").output


def test_module_and_closed_pipe(folder: Path) -> None:
    """`python -m flashformer` works, and ends quietly when the reader of its output has gone."""
    command = [sys.executable, "-m", "flashformer", "explain", str(folder), "--target", "cpu"]
    assert "gate_up" in subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ}).stdout
    closed = subprocess.run(f"{' '.join(command)} | head -1", shell=True, capture_output=True, text=True, check=False)
    assert closed.returncode == 0 and "Traceback" not in closed.stderr and "Exception" not in closed.stderr
