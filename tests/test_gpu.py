"""The whole-model kernel on a real GPU, against the float32 reference."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import flashformer
from flashformer import SamplingParams
from flashformer.backends.cuda import CudaRunner, probe
from flashformer.backends.cuda import load as load_runner
from flashformer.backends.cuda.codegen import ROUND_TAGS
from flashformer.check import Comparison, check_runner, compare, sample_tokens
from flashformer.checkpoint import open_checkpoint
from flashformer.errors import DeviceError
from flashformer.models import build_graph
from flashformer.reference import Reference
from flashformer.targets import Target, get
from model_files import make_config, write_folder
from running import run_checkpoint
from test_perplexity import TEXT, TOLERANCE, perplexity

pytestmark = pytest.mark.gpu

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}

MODELS: dict[str, dict[str, Any]] = {
    "llama": {"architecture": "LlamaForCausalLM"},
    "llama untied, scaled rope": {"architecture": "LlamaForCausalLM", "tie_word_embeddings": False, "rope_scaling": LLAMA3},
    "llama with biases": {"architecture": "LlamaForCausalLM", "attention_bias": True, "mlp_bias": True},
    "mistral": {"architecture": "MistralForCausalLM", "hidden_size": 256, "head_dim": 64, "num_attention_heads": 6},
    "qwen2": {"architecture": "Qwen2ForCausalLM", "hidden_size": 192, "num_attention_heads": 6, "num_key_value_heads": 2},
    "qwen3": {"architecture": "Qwen3ForCausalLM", "hidden_size": 320, "head_dim": 80, "num_attention_heads": 6},
    "one kv head": {"architecture": "LlamaForCausalLM", "num_attention_heads": 16, "num_key_value_heads": 1, "head_dim": 8},
    "wide heads": {"architecture": "Qwen3ForCausalLM", "head_dim": 256, "num_attention_heads": 4, "num_key_value_heads": 4},
    "odd sizes": {"architecture": "Qwen3ForCausalLM", "hidden_size": 200, "head_dim": 24, "intermediate_size": 341, "vocab_size": 1003},
    "one layer": {"architecture": "LlamaForCausalLM", "num_hidden_layers": 1},
    "wide": {"architecture": "LlamaForCausalLM", "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32,
             "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 32000},
}  # fmt: skip


def make(path: Path, **changes: Any) -> Path:
    """A folder with a small random model."""
    architecture = changes.pop("architecture", "LlamaForCausalLM")
    return write_folder(path, make_config(architecture, **changes))


Judge = Callable[[Comparison], None]


@pytest.fixture
def judge(record_property: Callable[[str, object], None]) -> Judge:
    """Records the figures of a comparison and asserts that they are within tolerance."""

    def judged(result: Comparison) -> None:
        for name in ("positions", "kl_mean", "kl_max", "top1_agreement", "max_error", "rms_error"):
            record_property(name, getattr(result, name))
        assert result.within, result.describe()

    return judged


@contextmanager
def running(folder: Path, max_context: int = 256, target: Target | None = None) -> Iterator[tuple[CudaRunner, Reference]]:
    """The kernel of a folder's model on this GPU, and its reference."""
    info = probe()
    assert info is not None and info.target is not None
    with (
        open_checkpoint(folder) as checkpoint,
        run_checkpoint(checkpoint, load_runner, target or info.target, max_context, info.workers) as made,
    ):
        yield made


@pytest.mark.parametrize("name", MODELS)
def test_models_agree_with_the_reference(tmp_path: Path, name: str, judge: Judge) -> None:
    with running(make(tmp_path, **MODELS[name])) as (runner, reference):
        judge(check_runner(runner, reference, sample_tokens(runner.plan.config, 100, seed=1)))


@pytest.mark.parametrize("name", ["qwen3", "odd sizes", "wide"])
def test_the_path_of_older_gpus_gives_the_same(tmp_path: Path, name: str) -> None:
    """cp.async in place of bulk copies, and the older numbers; the same sums in the same order, so the same bits."""
    folder = make(tmp_path, **MODELS[name])
    tokens: list[int] = []
    found = []
    info = probe()
    assert info is not None and info.target is not None
    for older in (None, "sm_80", "sm_86"):
        target = replace(get(older), arch=info.target.arch) if older else None
        with running(folder, target=target) as (runner, reference):
            tokens = tokens or sample_tokens(runner.plan.config, 64, seed=2)
            found.append(runner.logits(tokens, 0))
            assert compare(found[-1], reference.logits(tokens)).within
    assert all(np.array_equal(found[0], other) for other in found[1:])


def test_float16(tmp_path: Path, judge: Judge) -> None:
    config = make_config(torch_dtype="float16")
    with running(write_folder(tmp_path, config, dtype="float16")) as (runner, reference):
        assert runner.plan.config.dtype == "float16"
        judge(check_runner(runner, reference, sample_tokens(runner.plan.config, 64, seed=3)))


def test_the_same_bits_a_hundred_times(tmp_path: Path) -> None:
    with running(make(tmp_path, **MODELS["qwen3"])) as (runner, _):
        tokens = sample_tokens(runner.plan.config, 40, seed=4)
        first = runner.logits(tokens, 0)
        answer = list(runner.generate(tokens, 0, 30, ()))
        for _ in range(100):
            assert np.array_equal(runner.logits(tokens, 0), first)  # into memory that held NaN before
        for _ in range(10):
            assert list(runner.generate(tokens, 0, 30, ())) == answer


def test_logits_do_not_depend_on_how_a_text_is_cut(tmp_path: Path) -> None:
    with running(make(tmp_path, **MODELS["odd sizes"])) as (runner, _):
        tokens = sample_tokens(runner.plan.config, 150, seed=5)
        whole = runner.logits(tokens, 0)
        parts = [runner.logits(tokens[a:b], a) for a, b in ((0, 1), (1, 17), (17, 100), (100, 150))]
        assert np.array_equal(np.concatenate(parts), whole)


@pytest.mark.parametrize(("length", "compared"), [(8192, 8192), (100_352, 64)])
def test_long_positions(tmp_path: Path, length: int, compared: int, judge: Judge) -> None:
    folder = make(
        tmp_path, max_position_embeddings=length, rope_scaling={**LLAMA3, "original_max_position_embeddings": 8192}, rope_theta=5e5,
        num_hidden_layers=2 if length < 10_000 else 1, num_attention_heads=2, num_key_value_heads=1, head_dim=64,
    )  # fmt: skip
    with running(folder, length) as (runner, reference):
        tokens = sample_tokens(runner.plan.config, length, seed=6)
        at = length - compared
        if at:
            list(runner.generate(tokens[:at], 0, 1, ()))
            reference.logits(tokens[:at], last=1)
        judge(compare(runner.logits(tokens[at:], at), reference.logits(tokens[at:], at)))


def test_stops_and_early_ends(tmp_path: Path) -> None:
    with running(make(tmp_path)) as (runner, _):
        answer = list(runner.generate([5, 6], 0, 20, ()))
        assert len(answer) == 20
        stop = answer[7]
        expected = answer[: answer.index(stop) + 1]
        assert list(runner.generate([5, 6], 0, 20, {stop})) == expected
        tokens = runner.generate([5, 6], 0, 200, ())
        assert next(tokens) == answer[0]
        tokens.close()
        assert list(runner.generate([5, 6], 0, 20, ())) == answer
        assert runner.stats.generated_tokens == 20 and runner.stats.bytes_read > 0
        assert runner.stats.prompt_seconds > 0
        # NOTE: the host may find all tokens at its first look, if it is late: then there is no time between the first and the last.
        assert any(list(runner.generate([5, 6], 0, 20, ())) == answer and runner.stats.generate_seconds > 0 for _ in range(20))


def test_tags_wrap(tmp_path: Path) -> None:
    with running(make(tmp_path)) as (runner, _):
        answer = list(runner.generate([5, 6], 0, 20, ()))
        runner.params.epoch = (1 << 32) // max(runner.plan.config.num_layers + 1, ROUND_TAGS) - 30
        for _ in range(3):
            assert list(runner.generate([5, 6], 0, 20, ())) == answer
        assert runner.params.epoch < 100


def test_two_models_at_a_time(tmp_path: Path) -> None:
    with running(make(tmp_path / "a")) as (a, _), running(make(tmp_path / "b", **MODELS["qwen3"])) as (b, _):
        alone = list(a.generate([5, 6], 0, 20, ())), list(b.generate([7], 0, 20, ()))
        together = list(zip(a.generate([5, 6], 0, 20, ()), b.generate([7], 0, 20, ()), strict=True))
        assert (list(x for x, _ in together), list(y for _, y in together)) == alone


def test_a_stuck_kernel_ends_with_an_error_that_names_the_stage(tmp_path: Path) -> None:
    with running(make(tmp_path)) as (runner, _):
        answer = list(runner.generate([5, 6], 0, 20, ()))
        lengths = runner.params.table_length
        runner.params.table_length = runner.context.upload(np.ones(runner.plan.target.workers, np.uint32), "a tape cut short")
        with pytest.raises(DeviceError, match=r"gave up: stage '\w+', layer \d+, block \d+"):
            list(runner.generate([5, 6], 0, 20, ()))
        runner.params.table_length = lengths
        assert list(runner.generate([5, 6], 0, 20, ())) == answer


def test_too_little_memory_is_said_before_loading(tmp_path: Path) -> None:
    folder = make(tmp_path, max_position_embeddings=16_000_000, num_hidden_layers=80, num_key_value_heads=4, head_dim=256)
    message = r"needs .* GB on the GPU .* are free; choose a smaller --max-context"
    with pytest.raises(DeviceError, match=message), running(folder, 16_000_000):
        pass


def test_strange_weights_are_warned_of(tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    folder = write_folder(tmp_path, make_config(), dtype="float32")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = np.nan
    save_file(tensors, folder / "model.safetensors")
    with pytest.warns(UserWarning, match=r"layers\.1\.mlp\.up_proj\.weight"), running(folder):
        pass


def test_the_engine_from_folder_to_text(tmp_path: Path) -> None:
    folder = make(tmp_path, vocab_size=300)
    with flashformer.load(folder, "cuda") as engine, flashformer.load(folder, "cpu") as cpu:
        params = SamplingParams(max_tokens=24, ignore_eos=True)
        ours = [r.token for r in engine.generate("Hello there", params)]
        assert len(ours) == 24
        ids = engine.tokenizer.encode("Hello there")
        assert compare(engine.logits(ids + ours), cpu.logits(ids + ours)).within


def test_a_conversation_computes_only_what_is_new(tmp_path: Path) -> None:
    folder = make(tmp_path, vocab_size=300)
    params = SamplingParams(max_tokens=12, ignore_eos=True)
    with flashformer.load(folder, "cuda", prompt_columns=0) as engine:  # a kernel for prompts computes answers anew, too
        ids = list(range(5, 45))
        for turn in range(3):
            made = [r.token for r in engine.generate(ids, params)]
            assert engine.stats.reused_tokens == (len(ids) - 3 if turn else 0)
            with flashformer.load(folder, "cuda", prompt_columns=0) as fresh:
                assert [r.token for r in fresh.generate(ids, params)] == made
            ids += [*made[:-1], 7, 8, 9]


def test_smollm2(demo_model: Path, judge: Judge, record_property: Callable[[str, object], None]) -> None:
    with flashformer.load(demo_model, "cuda") as engine:
        prompt = engine.chat_prompt([{"role": "user", "content": "What is the capital of France?"}])
        text = "".join(r.text for r in engine.generate(prompt, SamplingParams(max_tokens=20)))
        assert text == "The capital of France is Paris."
        reference = Reference(build_graph(engine.config), engine.checkpoint)
        tokens = engine.tokenizer.encode("The quick brown fox jumps over the lazy dog. " * 8)
        judge(check_runner(engine.runner, reference, tokens))
        tokens = engine.tokenizer.encode(TEXT)[:1024]
        ours, expected = perplexity(engine.logits(tokens), tokens), perplexity(reference.logits(tokens), tokens)
        record_property("perplexity", ours)
        record_property("perplexity of the reference", expected)
        assert abs(ours / expected - 1) < TOLERANCE


def test_nothing_is_left_on_the_device(tmp_path: Path) -> None:
    folder = make(tmp_path)
    free = []
    for _ in range(4):
        with running(folder) as (runner, _):
            list(runner.generate([5], 0, 5, ()))
            runner.close()
            runner.close()
        gc.collect()
        with running(folder) as (runner, _):
            free.append(runner.context.free_bytes())
    assert len(set(free[1:])) == 1


@pytest.mark.parametrize("name", ["llama", "odd sizes"])
def test_the_tapes_do_not_depend_on_how_matrices_are_cut(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make(tmp_path, tie_word_embeddings=True, **MODELS[name])
    tapes = []
    for slot_bytes in (1 << 20, 1 << 14):  # every matrix at once, and in more pieces than there are slots
        monkeypatch.setattr("flashformer.backends.cuda.pack.SLOT_BYTES", (slot_bytes, slot_bytes))
        with running(folder) as (runner, _):
            whole = runner.context.download(runner.arena, np.zeros(runner.arena_bytes, np.uint8), "weights")
            tapes.append((whole, runner.logits([1, 2, 3], 0)))
            assert sum(runner.context.pinned.values()) < 1 << 16  # the slots are given back
    assert tapes[0][0].any() and all(np.array_equal(a, b) for a, b in zip(*tapes, strict=True))


def test_strange_norms_are_warned_of(tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    folder = write_folder(tmp_path, make_config(), dtype="float32")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.input_layernorm.weight"][3] = np.inf
    save_file(tensors, folder / "model.safetensors")
    with pytest.warns(UserWarning, match=r"layers\.1\.input_layernorm\.weight holds values that are not finite"), running(folder):
        pass
