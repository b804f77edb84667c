"""What is measured beside ours: who is asked, what becomes of those who fail, and whether each computes the model that it should."""

from __future__ import annotations

import importlib
import json
import sys
import threading
import types
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flashformer import bench
from flashformer.backends.cuda import RandomWeights
from flashformer.bench import choose_baselines, compare_with
from flashformer.config import ModelConfig, parse_config
from flashformer.errors import InputError
from flashformer.models import build_graph
from flashformer.reference import Reference
from flashformer.shapes import SHAPES, shape
from test_bench import BIASED, SMALL, record


@dataclass
class FakeBaseline:
    """Takes `ms`, or fails."""

    name: str
    ms: float
    installed: str | None = "1.0"
    weights: str = "bf16"

    def version(self) -> str | None:
        return self.installed

    def measure(self, config: ModelConfig, contexts: Sequence[int], tokens: int, repeats: int) -> Iterator[tuple[int, float]]:
        assert (tokens, repeats) == (128, 5) and list(contexts) == sorted(contexts)
        for context in contexts:
            if self.ms < 0 and context > 500:
                raise RuntimeError("out of memory\nand more")
            yield context, abs(self.ms)


def test_baselines_are_noted_skipped_or_told_of() -> None:
    records, said = [record(1024), record(128)], []
    compare_with([FakeBaseline("fast", 3.0), FakeBaseline("frail", -4.0), FakeBaseline("absent", 1.0, None)], SMALL, records, said.append)
    assert records[0].baselines == {"fast": 3.0} and records[0].baseline_versions == {"fast": "1.0"}
    assert records[1].baselines == {"fast": 3.0, "frail": 4.0}
    assert "absent: not installed, skipped" in said and "frail failed: RuntimeError: out of memory" in said
    assert any("ours is 1.50x as fast" in text for text in said)


def test_baselines_are_set_beside_their_own_weights_alone() -> None:
    chosen = [FakeBaseline("plain", 3.0), FakeBaseline("four", 1.0, weights="int4")]
    for weights, theirs, skipped in (
        ("bf16", {"plain": 3.0}, "four: for int4 weights, not for bf16; skipped"),
        ("int4", {"four": 1.0}, "plain: for bf16 weights, not for int4; skipped"),
        ("int4, 16-bit head", {}, "four: for int4 weights, not for int4, 16-bit head; skipped"),
        ("bf16, KV cache in fp8", {}, "plain: for bf16 weights, not for bf16, KV cache in fp8; skipped"),
    ):
        ours, said = replace(record(), weights=weights), []
        compare_with(chosen, SMALL, [ours], said.append)
        assert ours.baselines == theirs and skipped in said


def test_debugging_shows_where_a_baseline_failed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for level, shown in (("", False), ("1", True)):
        monkeypatch.setenv("FF_DEBUG", level)
        said: list[str] = []
        compare_with([FakeBaseline("frail", -4.0)], SMALL, [record()], said.append)
        assert said == ["frail failed: RuntimeError: out of memory"]
        told = capsys.readouterr().err
        assert ("Traceback" in told and "in measure" in told and "and more" in told) == shown


def test_the_baselines_of_the_repository() -> None:
    assert [b.name for b in choose_baselines(["all"])] == ["torch.compile", "tinygemm", "transformers", "llama.cpp", "vllm"]
    assert [b.name for b in choose_baselines(["all"]) if b.weights != "bf16"] == ["tinygemm"]
    assert [b.name for b in choose_baselines(["vllm", "torch.compile"])] == ["vllm", "torch.compile"]
    assert choose_baselines([]) == []
    with pytest.raises(InputError, match=r"unknown baseline 'tourch'; known are torch\.compile, tinygemm, transformers"):
        choose_baselines(["tourch"])


def part(name: str = "") -> Any:
    """A file of benchmarks/baselines; without a name the package itself."""
    choose_baselines(["all"])
    return importlib.import_module(f"{bench.PACKAGE}.{name}".rstrip("."))


def test_a_baseline_says_where_it_failed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def deep(left: int) -> None:
        if left:
            deep(left - 1)
        raise ValueError("expected ident but found ')' here:\nf(Tensor x, )")

    def measure(*_: Any) -> Iterator[tuple[int, float]]:
        yield 128, 1.0
        try:
            deep(20)
        except ValueError as error:
            raise RuntimeError("it does not compile") from error

    monkeypatch.setitem(sys.modules, f"{bench.PACKAGE}.broken", types.SimpleNamespace(measure=measure))  # type: ignore[arg-type]
    found = part().Baseline("broken", "broken", ("numpy",)).measure(SMALL, [128, 1024], 128, 5)
    assert next(found) == (128, 1.0)
    with pytest.raises(RuntimeError, match="does not compile"):
        next(found)
    told = capsys.readouterr().err
    assert "broken failed:" in told and "f(Tensor x, )" in told and "RuntimeError: it does not compile" in told
    assert f'{__file__}", line' in told and "in measure" in told and told.count("deep(left - 1)") < 20


def test_what_takes_long_says_where_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    package, said, told = part(), [], threading.Event()
    monkeypatch.setattr(package, "EVERY", 1e-3)
    monkeypatch.setattr(package, "say", lambda text: (said.append(text), told.set() if " in wait " in text else None))
    with package.telling("compiling"):
        assert told.wait(60)
    assert said[0] == "compiling ..." and "threading.py:" in "".join(said[1:-1]) and said[-1].startswith("compiling: done in ")


def test_the_faster_attention_is_measured_whole(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Both on the first layers; what fails, there or whole, is told of and gives way to the other."""
    pytest.importorskip("torch", reason="torch is not installed (extra: oracle)")
    compiled, layers = part("torch_compile"), SMALL.num_layers
    tried = compiled.TRIED_LAYERS
    assert tried < layers
    for broken, expected, calls in (
        (set(), 7.0, [("sdpa", tried), ("flex", tried), ("flex", layers)]),
        ({("flex", tried)}, 9.0, [("sdpa", tried), ("flex", tried), ("sdpa", layers)]),
        ({("flex", layers)}, 9.0, [("sdpa", tried), ("flex", tried), ("flex", layers), ("sdpa", layers)]),
        ({("flex", tried), ("sdpa", tried)}, None, [("sdpa", tried), ("flex", tried)]),
    ):
        seen: list[tuple[str, int]] = []

        def measure(*given: Any, broken: Any = broken, seen: Any = seen) -> float:
            seen.append(given[-2:])
            if given[-2:] in broken:
                raise RuntimeError(f"no kernel for {given[-2]}")
            return 9.0 if given[-2] == "sdpa" else 7.0

        monkeypatch.setattr(compiled, "_measure", measure)
        found = compiled.measure(SMALL, [128], 16, 3, lambda config: types.SimpleNamespace(config=config))
        if expected is None:
            with pytest.raises(RuntimeError, match="no kernel for sdpa"):
                next(found)
        else:
            assert list(found) == [(128, expected)]
        told = capsys.readouterr().err
        assert seen == calls and [f"{attention} attention failed" in told for attention in ("sdpa", "flex")] == [
            any(attention == failing for failing, _ in broken) for attention in ("sdpa", "flex")
        ]


@pytest.mark.filterwarnings("ignore:flex_attention called without")
@pytest.mark.parametrize("attention", ["sdpa", "flex"])
def test_the_step_is_one_graph(attention: str) -> None:
    """What PyTorch traces of it, with the first layers alone: nothing falls back to Python, and the result is the same."""
    torch = pytest.importorskip("torch", reason="torch is not installed (extra: oracle)")
    weights = RandomWeights(SMALL)
    decoder = part("torch_compile").Decoder(SMALL, lambda weight: torch.from_numpy(weights.read(weight.name).astype(np.float32)))
    cut = RandomWeights(replace(SMALL, num_layers=1))
    shorter = part("torch_compile").Decoder(cut.config, lambda weight: torch.from_numpy(cut.read(weight.name).astype(np.float32)))
    for one in (decoder, shorter):
        torch.manual_seed(0)
        one.allocate(16)
    token, position = torch.tensor([3]), torch.tensor([0])
    with torch.no_grad():
        compiled = torch.compile(lambda t, p: decoder.step(t, p, attention, 1), backend="aot_eager", fullgraph=True, dynamic=False)
        assert (compiled(token, position) - shorter.step(token, position, attention)).abs().max() < 1e-4


def test_several_sequences_are_computed_as_one_is() -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed (extra: oracle)")
    weights = RandomWeights(SMALL)
    decoder = part("torch_compile").Decoder(SMALL, lambda weight: torch.from_numpy(weights.read(weight.name).astype(np.float32)))
    with torch.no_grad():
        decoder.allocate(16, 3)
        caches = [[torch.clone(part) for part in layer] for layer in decoder.cache]
        together = decoder.step(torch.tensor([3, 4, 5]), torch.tensor([9]), "sdpa")
        for i, token in enumerate((3, 4, 5)):
            decoder.cache = [[part[i : i + 1].clone() for part in layer] for layer in caches]
            assert (decoder.step(torch.tensor([token]), torch.tensor([9]), "sdpa") - together[i]).abs().max() < 1e-4


@pytest.mark.parametrize("name", SHAPES)
def test_their_configuration_is_ours(name: str) -> None:
    assert parse_config(part("huggingface").config_json(shape(name))) == shape(name)


@pytest.mark.filterwarnings("ignore:flex_attention called without")  # that is for tests
@pytest.mark.parametrize("attention", ["sdpa", "flex"])
@pytest.mark.parametrize("config", [SMALL, BIASED, replace(BIASED, tied_embeddings=True)], ids=["qwen3", "qwen2", "tied"])
def test_the_torch_baseline_computes_the_same_model(config: ModelConfig, attention: str) -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed (extra: oracle)")
    weights = RandomWeights(config)
    decoder = part("torch_compile").Decoder(config, lambda weight: torch.from_numpy(weights.read(weight.name).astype(np.float32)))
    decoder.allocate(64)
    tokens = [int(t) for t in np.random.default_rng(0).integers(0, config.vocab_size, 40)]
    with torch.no_grad():
        theirs = [decoder.step(torch.tensor([t]), torch.tensor([i]), attention) for i, t in enumerate(tokens)]
    expected = Reference(build_graph(config), weights).logits(tokens)
    assert np.abs(torch.cat(theirs).numpy() - expected).max() < 1e-4


def test_the_int4_baseline_computes_the_model_of_its_codes() -> None:
    """With the product that PyTorch has for CPUs, against the decoder with the values that the codes stand for."""
    torch = pytest.importorskip("torch", reason="torch is not installed (extra: oracle)")
    int4 = part("torch_int4")
    ops = torch.ops.aten

    class OnCpu(int4.Int4Decoder):  # type: ignore[misc,name-defined]
        def pack(self, codes: Any) -> Any:
            return ops._convert_weight_to_int4pack_for_cpu(codes, 1)

        def multiply(self, x: Any, packed: Any, scales: Any) -> Any:
            return ops._weight_int4pack_mm_for_cpu(x, packed, int4.GROUP, scales.to(x.dtype))

    def values(weight: Any) -> Any:
        codes, scales = int4.quantise(weight)
        assert codes.min() == 0 and codes.max() == 15
        scale, zero = (scales[..., i].float().T.repeat_interleave(int4.GROUP, 1) for i in (0, 1))
        exact = (codes - 8) * scale + zero
        assert ((exact - weight).abs() <= 0.6 * scale).all()  # half a step, and what bf16 loses of the scale and the zero
        return exact

    config = replace(BIASED, ffn_size=128, vocab_size=208, num_layers=2)
    weights = RandomWeights(config)

    def make(weight: Any) -> Any:
        return torch.from_numpy(weights.read(weight.name).astype(np.float32))

    class Plain(part("torch_compile").Decoder):  # type: ignore[misc]
        def prepare(self, weight: Any, bias: Any) -> Any:
            return values(weight), bias

    decoders = [OnCpu(config, make), Plain(config, make)]
    for decoder in decoders:
        decoder.allocate(16)
    with torch.no_grad():
        both = [[d.step(torch.tensor([t]), torch.tensor([i]), "sdpa") for i, t in enumerate((3, 70, 9))] for d in decoders]
    ours, exact = (torch.cat(logits) for logits in both)
    assert (ours - exact).abs().max() < 1e-3 * exact.abs().max()
    with pytest.raises(ValueError, match="96 columns has no whole groups of 128"):
        int4.quantise(torch.zeros(8, 96))


def test_the_transformers_baseline_decodes_as_transformers_does() -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed (extra: oracle)")
    pytest.importorskip("transformers", reason="transformers is not installed (extra: oracle)")
    static = part("transformers_static")
    model = static.make_model(replace(SMALL, num_layers=2), "cpu", torch.float32)
    text = [3]
    with torch.no_grad():
        for _ in range(6):
            text.append(int(model(torch.tensor([text])).logits[0, -1].argmax()))
        decoder = static.Decoder(model, 32, compiled=False)
        for _ in range(2):  # the second time over what the first has left
            decoder.reset(0)
            decoder.token.fill_(text[0])
            made = [text[0]]
            for _ in range(6):
                decoder.step()
                made.append(int(decoder.token))
            assert made == text


def test_the_llama_cpp_baseline_runs() -> None:
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    found = dict(part("llama_cpp_graph").measure(SMALL, [16, 600], 4, 2, needs_gpu=False))
    assert set(found) == {16, 600} and all(ms > 0 for ms in found.values())


def test_the_vllm_baseline_takes_the_prompt_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a vLLM that only knows the time: 50 ms for a prompt, 2 ms for each token."""
    pytest.importorskip("torch", reason="torch is not installed (extra: oracle)")
    clock = [0.0]

    class LLM:
        def __init__(self, **options: Any) -> None:
            content = json.loads((Path(options["model"]) / "config.json").read_text())
            assert parse_config(content) == SMALL and options["load_format"] == "dummy" and options["max_model_len"] == 144 + 8

        def generate(self, prompts: list[dict[str, list[int]]], params: Any, use_tqdm: bool) -> Any:
            clock[0] += 0.050 + 0.002 * params.max_tokens
            assert len(prompts[0]["prompt_token_ids"]) == 128 and params.ignore_eos and params.temperature == 0
            return [types.SimpleNamespace(outputs=[types.SimpleNamespace(token_ids=[0] * params.max_tokens)])]

    fake = types.SimpleNamespace(LLM=LLM, SamplingParams=lambda **options: types.SimpleNamespace(**options))
    monkeypatch.setitem(sys.modules, "vllm", fake)  # type: ignore[arg-type]
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")  # restored afterwards
    vllm = part("vllm_offline")
    monkeypatch.setattr(vllm.time, "perf_counter", lambda: clock[0])
    assert dict(vllm.measure(SMALL, [128], 8, 3)) == {128: pytest.approx(2.0)}
