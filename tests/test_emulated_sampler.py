"""The token stage of the CUDA kernel, run without a GPU: its own code, compiled for a CPU (emulated/), against the numpy reference."""

from __future__ import annotations

import ctypes
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from flashformer import SamplingParams
from flashformer.backends.cpu.compile import find_compiler
from flashformer.backends.cuda import codegen
from flashformer.backends.sampling import NONE_ALLOWED, NOT_FINITE, NOTHING, REPORT_WORDS, SAMPLING, Sampling, read_report
from flashformer.backends.source import struct
from flashformer.geometry import round_up
from flashformer.ops import sample
from sampler_checks import random_params

EMULATED = Path(__file__).parent / "emulated"
TOKENS = 4  # of a launch

# (blocks, vocabulary, finishers): rows that end within a tile, more blocks than lanes, blocks without rows.
SHAPES = [(5, 1003, 3), (33, 300, 1), (7, 40, 4)]
FREE_BYTES = 2560  # of shared memory


class Kernel:
    """The stage for one shape."""

    def __init__(self, shape: tuple[int, int, int], folder: Path) -> None:
        self.workers, self.vocab, finishers = shape
        (folder / "parameters.h").write_text("\n".join([*struct("Sampling", SAMPLING), *struct("Params", codegen.PARAMETERS)]))
        roles = (codegen.HEADERS / "roles.cuh").read_text()
        first, last = roles.index("  static constexpr u32 kNobody"), roles.index("  FF_DEVICE u32 buffer() const")
        (folder / "candidates.h").write_text(roles[first:last])  # of the real Finisher
        values = {"WORKERS": self.workers, "VOCAB": self.vocab, "FINISHERS": finishers, "FREE_BYTES": FREE_BYTES}
        values |= {name: getattr(codegen, name) for name in ("PART_WORDS", "ROUND_TAGS", "LIST_WORDS")}
        defines = [f"-D{name}={value}" for name, value in values.items()]
        include = [f"-I{path}" for path in (EMULATED, folder, codegen.OPERATORS)]
        compiler = find_compiler()
        machine = [option for option in compiler.options if option.startswith("-m")]
        command = [compiler.path, *machine, "-std=c++17", "-O1", "-ffp-contract=fast", "-fPIC", "-shared", "-w", "-U_FORTIFY_SOURCE"]
        library = folder / "sampler.so"
        subprocess.run([*command, *defines, *include, str(EMULATED / "sampler.cpp"), "-o", str(library)], check=True)
        self.emulate = ctypes.CDLL(str(library)).emulate
        self.rounds = 0  # of the latest launch

    def __call__(self, sampling: Sampling, logits: np.ndarray, prompt: int, position: int, order: int) -> tuple[list[int], np.ndarray]:
        """Tokens that logits [tokens, vocab] give after `prompt` tokens at position.., and their reports."""
        arrays: dict[str, np.ndarray] = {
            "scores": np.full((round_up(self.vocab, 8), 2), np.nan, np.float32),
            "raw": np.full(round_up(self.vocab, 8), np.nan, np.float32),
            "report": np.full((len(logits), REPORT_WORDS), NOTHING, np.uint64),
        }
        for name, values in (("bias", sampling.bias), ("seen", sampling.seen)):
            if values is not None:
                arrays[name] = values.copy()
        numbers = sampling.struct(**{name: array.ctypes.data for name, array in arrays.items()})
        tokens = np.zeros(len(logits), np.uint64)
        data = [ctypes.c_void_p(array.ctypes.data) for array in (logits, tokens)]
        steps = prompt - 1 + len(logits)
        self.rounds = self.emulate(ctypes.byref(numbers), data[0], steps, prompt, position, data[1], order)
        assert self.rounds >= 0, "it does not end"
        return [int(t) & 0xFFFFFFFF for t in tokens if t], arrays["report"]


@pytest.fixture(scope="module", params=SHAPES, ids=str)
def kernel(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Kernel:
    return Kernel(request.param, tmp_path_factory.mktemp("emulated"))


def selecting(rng: np.random.Generator, vocab: int) -> SamplingParams:
    """What makes the longest way: both searches, and a report."""
    return SamplingParams(
        temperature=float(rng.uniform(0.5, 3)), top_k=int(rng.integers(2, vocab)), top_p=float(rng.uniform(0.1, 0.99)),
        min_p=float(rng.choice([0, 0.1, 0.4])), repetition_penalty=1.2, logprobs=5, seed=int(rng.integers(1 << 63)),
    )  # fmt: skip


def random_logits(rng: np.random.Generator, vocab: int) -> np.ndarray:
    """Logits of a launch's tokens: of any spread, some with many ties."""
    logits = rng.normal(0, rng.choice([0.1, 1, 5]), (TOKENS, vocab))
    return np.asarray(rng.choice([0, 1, 1, 1]) * (np.round(2 * logits) / 2 if rng.random() < 0.25 else logits), np.float32)


def check(kernel: Kernel, params: SamplingParams, logits: np.ndarray, prompt: list[int], position: int = 0, order: int = 1) -> None:
    """A launch makes the tokens and the reports of the reference."""
    sampling = params.lower(kernel.vocab, prompt)
    made, reports = kernel(sampling, logits, len(prompt), position, order)
    assert len(made) == len(logits)
    for i, row in enumerate(logits):
        assert made[i] == sample.choose(params.lower(kernel.vocab, prompt, made[:i]), row, position + len(prompt) + i), params
        if sampling.logprobs is not None:
            ours, expected = read_report(reports[i], sampling.logprobs), sample.scores_of(row, made[i], sampling.logprobs)
            assert [t for t, _ in ours.top] == [t for t, _ in expected.top]
            assert np.allclose([ours.logprob, *(p for _, p in ours.top)], [expected.logprob, *(p for _, p in expected.top)], atol=1e-5)


def test_every_combination_gives_the_tokens_of_the_reference(kernel: Kernel) -> None:
    rng = np.random.default_rng(kernel.vocab)
    for case in range(24):
        params = selecting(rng, kernel.vocab) if case % 3 else random_params(rng, kernel.vocab)
        prompt = [int(t) for t in rng.integers(0, kernel.vocab, rng.integers(1, 3))]
        check(kernel, params, random_logits(rng, kernel.vocab), prompt, int(rng.integers(100)), int(rng.integers(1 << 31)))


def strange_logits(vocab: int) -> dict[str, np.ndarray]:
    """float32 [vocab] by what is strange about them."""
    rng = np.random.default_rng(vocab)
    normal = rng.normal(0, 2, vocab)
    zeros = np.where(rng.random(vocab) < 0.5, 0.0, -0.0)
    return {
        "equal": np.full(vocab, -3.5),
        "zeros of both signs": zeros,
        "two values": np.where(np.arange(vocab) % 7 == 3, 2.0, 1.0),  # each in every block
        "one stands out": np.where(np.arange(vocab) == vocab - 1, 80.0, 0.0),
        "neighbours": np.nextafter(np.float32(1), np.float32(2)) * np.where(rng.random(vocab) < 0.2, 1, np.float32(1) - np.float32(2**-23)),
        "infinitely small ones": np.where(np.arange(vocab) % 5, -np.inf, normal),
        "one that is not infinitely small": np.where(np.arange(vocab) == vocab // 2, -1.0, -np.inf),
        "wide": rng.choice([-1, 1], vocab) * 10 ** rng.uniform(-3, 3, vocab),
        "a cluster": np.where(np.arange(vocab) < 30, 10 + normal, normal),  # nearly all that matters is in one block
    }


@pytest.mark.parametrize("name", strange_logits(40))
def test_strange_logits(kernel: Kernel, name: str) -> None:
    logits = np.tile(strange_logits(kernel.vocab)[name].astype(np.float32), (2, 1))
    for options in (
        {"top_k": 5},
        {"top_p": 0.6},
        {"top_k": kernel.vocab // 2, "top_p": 0.9},
        {"temperature": 5.0, "top_k": 20, "top_p": 0.5, "min_p": 0.01, "logprobs": 20},
    ):
        check(kernel, SamplingParams(**{"temperature": 1.0, "seed": 3, **options}), logits, [1])  # type: ignore[arg-type]


def test_one_token_that_is_allowed(kernel: Kernel) -> None:
    bias = np.full(kernel.vocab, -np.inf, np.float32)
    bias[kernel.vocab - 2] = 0
    sampling = Sampling(1.0, top_k=9, top_p=0.5, min_p=0.1, logprobs=2, bias=bias)
    logits = random_logits(np.random.default_rng(1), kernel.vocab)
    assert kernel(sampling, logits, 1, 0, 1)[0] == [kernel.vocab - 2] * TOKENS


@pytest.mark.parametrize(
    ("options", "most"),
    [
        ({"logprobs": 20}, 1.0),
        ({"min_p": 0.05}, 1.5),
        ({"top_p": 0.95}, 2.2),
        ({"top_k": 2}, 2.6),
        ({"top_k": 20}, 4.0),
        ({"top_k": 20, "top_p": 0.8}, 5.0),
    ],
    ids=str,
)
def test_few_rounds_do(kernel: Kernel, options: dict[str, float], most: float) -> None:
    """Rounds of all blocks, on average of tokens. The first is what there is without any option, too."""
    logits = np.random.default_rng(2).normal(0, 1, (40, kernel.vocab)).astype(np.float32)
    kernel(SamplingParams(**{"temperature": 0.8, "seed": 5, **options}).lower(kernel.vocab, [1]), logits, 1, 0, 1)  # type: ignore[arg-type]
    assert len(logits) <= kernel.rounds <= most * len(logits)


def test_what_cannot_be_chosen_from_is_said(kernel: Kernel) -> None:
    logits = np.zeros((3, kernel.vocab), np.float32)
    kinds = [Sampling(), Sampling(1.0), Sampling(1.0, top_k=5, top_p=0.5, min_p=0.1, logprobs=2)]
    for value, row in ((np.nan, kernel.vocab - 2), (-np.nan, 0), (np.inf, kernel.vocab - 1)):
        damaged = logits.copy()
        damaged[1, row] = value
        for sampling in kinds:
            made, _ = kernel(sampling, damaged, 1, 0, 1)
            assert len(made) == 2 and made[1] == NOT_FINITE  # and the launch ends there
    for sampling in kinds:
        made, _ = kernel(replace(sampling, bias=np.full(kernel.vocab, -np.inf, np.float32)), logits, 1, 0, 1)
        assert made == [NONE_ALLOWED]
