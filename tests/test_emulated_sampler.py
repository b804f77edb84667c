"""The token stage of the CUDA kernel, run without a GPU: its own code, compiled for a CPU (emulated/), against the numpy reference."""

from __future__ import annotations

import ctypes
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

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
FREE_BYTES = 2560  # of shared memory for what meets: all finishers, or each of them where each has columns of its own
LIST_BYTES = 1536  # more of it, for lists, where all finishers have one column
SHORTLIST = 12  # tokens that a block lists at most: sometimes there are more, as there are more than the lists' shared memory holds


def compile_stage(shape: tuple[int, int, int], columns: int, folder: Path) -> Any:
    """The stage for one shape: `emulate` of emulated/sampler.cpp."""
    workers, vocab, finishers = shape
    structs = [("Sampling", SAMPLING), ("Sequence", codegen.OWN_SEQUENCE), ("Params", codegen.PARAMETERS)]
    (folder / "parameters.h").write_text("\n".join(line for name, fields in structs for line in struct(name, fields)))
    roles = (codegen.HEADERS / "roles.cuh").read_text()
    for name, first, last in (  # what is taken from the real ones
        ("columns", "// One token position of a pass", "// What a launch is told;"),
        ("pass", "  // Of several columns: the pass", "  // Wait until `step` tokens"),
        ("candidates", "  float best; ", "  FF_DEVICE u32 buffer() const"),
    ):
        (folder / f"{name}.h").write_text(roles[roles.index(first) : roles.index(last)])
    (folder / "columns.cuh").write_text((codegen.HEADERS / "columns.cuh").read_text())  # away from the real roles.cuh
    free = FREE_BYTES * finishers if columns > 1 else FREE_BYTES + LIST_BYTES
    values = {"WORKERS": workers, "VOCAB": vocab, "FINISHERS": finishers, "FREE_BYTES": free, "COLUMNS": columns, "SHORTLIST": SHORTLIST}
    values |= {name: getattr(codegen, name) for name in ("PART_WORDS", "ROUND_TAGS", "LIST_WORDS")}
    defines = [f"-D{name}={value}" for name, value in values.items()]
    include = [f"-I{path}" for path in (EMULATED, folder, codegen.OPERATORS)]
    compiler = find_compiler()
    machine = [option for option in compiler.options if option.startswith("-m")]
    command = [compiler.path, *machine, "-std=c++17", "-O1", "-ffp-contract=fast", "-fPIC", "-shared", "-w", "-U_FORTIFY_SOURCE"]
    library = folder / "sampler.so"
    subprocess.run([*command, *defines, *include, str(EMULATED / "sampler.cpp"), "-o", str(library)], check=True)
    return ctypes.CDLL(str(library)).emulate


class Kernel:
    """The stage for one shape and one column."""

    def __init__(self, shape: tuple[int, int, int], folder: Path) -> None:
        self.workers, self.vocab, _ = shape
        self.emulate = compile_stage(shape, 1, folder)
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


def check_reports(reports: np.ndarray, logits: np.ndarray, made: list[int], alternatives: int) -> None:
    """The tokens that were made have the log probabilities of the reference."""
    for words, row, token in zip(reports, logits, made, strict=False):
        ours, expected = read_report(words, alternatives), sample.scores_of(row, token, alternatives)
        assert [t for t, _ in ours.top] == [t for t, _ in expected.top]
        assert np.allclose([ours.logprob, *(p for _, p in ours.top)], [expected.logprob, *(p for _, p in expected.top)], atol=1e-5)


def check(kernel: Kernel, params: SamplingParams, logits: np.ndarray, prompt: list[int], position: int = 0, order: int = 1) -> None:
    """A launch makes the tokens and the reports of the reference."""
    sampling = params.lower(kernel.vocab, prompt)
    made, reports = kernel(sampling, logits, len(prompt), position, order)
    assert len(made) == len(logits)
    for i, row in enumerate(logits):
        assert made[i] == sample.choose(params.lower(kernel.vocab, prompt, made[:i]), row, position + len(prompt) + i), params
    if sampling.logprobs is not None:
        check_reports(reports, logits, made, sampling.logprobs)


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


@pytest.mark.parametrize("kernel", [SHAPES[0]], ids=str, indirect=True)
@pytest.mark.parametrize("options", [{"top_k": 2}, {"top_k": 7}, {"top_k": 4, "top_p": 0.8, "min_p": 0.01, "logprobs": 3}], ids=str)
def test_one_round_does_where_lists_are_short(kernel: Kernel, options: dict[str, float]) -> None:
    logits = np.random.default_rng(2).normal(0, 1, (40, kernel.vocab)).astype(np.float32)
    kernel(SamplingParams(**{"temperature": 0.8, "seed": 5, **options}).lower(kernel.vocab, [1]), logits, 1, 0, 1)  # type: ignore[arg-type]
    assert kernel.rounds == len(logits)


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


# ---- several columns ----

COLUMNS = [2, 4, 16]
Launch = tuple[list[int], np.ndarray]  # a sequence's tokens, and its reports


@dataclass
class Part:
    """A sequence of a launch: what it is fed, what it is chosen by, and its logits at each token that it may be fed."""

    params: SamplingParams
    prompt: list[int]
    logits: np.ndarray  # float32 [tokens, vocab]
    count: int
    start: int = 0
    drafts: Sequence[int] = ()
    stop: Sequence[int] = ()
    cancel_after: int | None = None  # tokens

    def expected(self) -> list[int]:
        """The reference's choices."""
        made: list[int] = []
        forced = [*self.prompt, *self.drafts]
        for index in range(len(self.prompt) - 1, len(self.logits)):
            row = self.logits[index]
            made.append(sample.choose(self.params.lower(len(row), self.prompt, made), row, self.start + index + 1))
            wrong = index + 1 < len(forced) and forced[index + 1] != made[-1]
            if wrong or len(made) == self.count or made[-1] in self.stop:
                break
        return made


class ColumnKernel:
    """The stage for one shape and several columns."""

    def __init__(self, shape: tuple[int, int, int], columns: int, folder: Path) -> None:
        self.shape, self.columns, self.vocab = shape, columns, shape[1]
        self.emulate = compile_stage(shape, columns, folder)

    def __call__(self, parts: Sequence[Part], order: int = 1) -> list[Launch]:
        """What one launch of all makes."""
        kept: list[dict[str, np.ndarray]] = []
        sequences = (codegen.SequenceStruct * len(parts))()
        pointers = (ctypes.c_void_p * len(parts))()
        for i, part in enumerate(parts):
            sampling = part.params.lower(self.vocab, part.prompt)
            forced = [*part.prompt, *part.drafts]
            arrays = {
                "forced": np.array(forced, np.uint32),
                "stop": np.array(part.stop, np.uint32),
                "tokens": np.zeros(part.count, np.uint64),
                "report": np.full((part.count, REPORT_WORDS), NOTHING, np.uint64),
                "logits": np.ascontiguousarray(part.logits),
            }
            arrays |= {name: a.copy() for name, a in (("bias", sampling.bias), ("seen", sampling.seen)) if a is not None}
            at = {name: array.ctypes.data for name, array in arrays.items()}
            sampled = {name: at[name] for name in ("bias", "seen", "report") if name in at}
            sequences[i] = codegen.SequenceStruct(
                tokens=at["tokens"], forced=at["forced"], stop=at["stop"], sampling=sampling.struct(**sampled),
                forced_count=len(forced), drafts=len(part.drafts), stop_count=len(part.stop), slot=i, start=part.start, count=part.count,
            )  # fmt: skip
            pointers[i] = at["logits"]
            kept.append(arrays)
        steps = sum(len(part.logits) for part in parts)
        cancel_after = np.array([part.cancel_after or part.count for part in parts], np.uint32)
        data = ctypes.c_void_p(cancel_after.ctypes.data)
        assert self.emulate(sequences, len(parts), pointers, steps, data, order) >= 0, "it does not end"
        made = [[int(t) & 0xFFFFFFFF for t in arrays["tokens"] if t] for arrays in kept]
        for part, arrays, tokens in zip(parts, kept, made, strict=True):
            assert (arrays["report"][len(tokens) :] == NOTHING).all()  # only of what was made
            if "seen" in arrays and tokens and tokens[-1] < self.vocab:
                assert np.array_equal(arrays["seen"], part.params.lower(self.vocab, part.prompt, tokens).seen)
        return [(tokens, arrays["report"]) for tokens, arrays in zip(made, kept, strict=True)]


@pytest.fixture(scope="module", params=[(shape, COLUMNS[i]) for i, shape in enumerate(SHAPES)], ids=str)
def columns(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ColumnKernel:
    return ColumnKernel(*request.param, tmp_path_factory.mktemp("columns"))


def random_part(rng: np.random.Generator, vocab: int, columns: int) -> Part:
    """A sequence with a prompt of up to some passes, often with drafts, some of which are right."""
    prompt = [int(t) for t in rng.integers(0, vocab, rng.integers(1, 2 * columns))]
    params = random_params(rng, vocab) if rng.random() < 0.7 else selecting(rng, vocab)
    count = int(rng.integers(1, 7))
    logits = rng.normal(0, rng.choice([0.1, 1, 5]), (len(prompt) + count - 1, vocab)).astype(np.float32)
    part = Part(params, prompt, logits, count, int(rng.integers(100)))
    made = part.expected()
    drafts = made[: rng.integers(0, count)]
    if drafts and rng.random() < 0.5:
        drafts[rng.integers(len(drafts))] = int(rng.integers(vocab))
    stop = [made[rng.integers(count)]] if rng.random() < 0.2 else []
    return replace(part, drafts=drafts, stop=stop)


def assert_right(part: Part, launch: Launch) -> None:
    """A launch of several columns made the tokens and the reports of the reference."""
    made, reports = launch
    assert made == part.expected(), part
    if part.params.logprobs is not None:
        check_reports(reports, part.logits[len(part.prompt) - 1 :], made, part.params.logprobs)


def test_each_column_is_chosen_for_as_if_alone(columns: ColumnKernel) -> None:
    rng = np.random.default_rng(columns.columns)
    for _ in range(8):
        parts = [random_part(rng, columns.vocab, columns.columns) for _ in range(rng.integers(1, columns.columns + 3))]
        for part, launch in zip(parts, columns(parts, int(rng.integers(1 << 31))), strict=True):
            assert_right(part, launch)


def test_companions_change_no_bit(columns: ColumnKernel) -> None:
    rng = np.random.default_rng(7)
    parts = [random_part(rng, columns.vocab, columns.columns) for _ in range(min(columns.columns + 1, 7))]
    parts = [replace(part, params=replace(part.params, logprobs=5)) for part in parts]
    for part, (made, reports) in zip(parts, columns(parts, 2), strict=True):
        alone = columns([part], 3)[0]
        assert made == alone[0] and np.array_equal(reports, alone[1])


def test_columns_that_are_all_greedy(columns: ColumnKernel) -> None:
    rng = np.random.default_rng(3)
    parts = [replace(random_part(rng, columns.vocab, columns.columns), params=SamplingParams(temperature=0), drafts=()) for _ in range(3)]
    for part, launch in zip(parts, columns(parts), strict=True):
        assert_right(part, launch)


def test_a_sequence_that_is_cancelled_leaves_the_others_alone(columns: ColumnKernel) -> None:
    rng = np.random.default_rng(4)
    logits = rng.normal(0, 1, (30, columns.vocab)).astype(np.float32)
    parts = [Part(SamplingParams(temperature=1.0, seed=i, top_k=5 * (i % 2)), [1], logits, 30) for i in range(3)]
    parts[1].cancel_after = 2
    launches = columns(parts)
    assert_right(parts[0], launches[0])
    assert_right(parts[2], launches[2])
    made = launches[1][0]
    assert 2 <= len(made) < 30 and made == parts[1].expected()[: len(made)]


def test_a_column_that_cannot_be_chosen_for_leaves_the_others_alone(columns: ColumnKernel) -> None:
    rng = np.random.default_rng(5)
    for greedy in (SamplingParams(temperature=0), SamplingParams(temperature=0, logprobs=1)):
        logits = rng.normal(0, 1, (3, 3, columns.vocab)).astype(np.float32)
        logits[0, 1, rng.integers(columns.vocab)] = np.nan
        logits[2, 1] = -np.inf
        parts = [Part(greedy, [1], rows, 3) for rows in logits]
        launches = columns(parts)
        assert launches[0][0][1:] == [NOT_FINITE] and launches[2][0][1:] == [NONE_ALLOWED]
        assert_right(parts[1], launches[1])
