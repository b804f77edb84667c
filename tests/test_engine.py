"""The engine's own work: checks, stops, texts, life cycle. The kernel is played by a runner whose tokens are known."""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

import flashformer
from flashformer import SamplingParams
from flashformer.backends import GREEDY, Made, RunStats, Turn
from flashformer.backends.sampling import PROMPT_BIT, Scores
from flashformer.checkpoint import open_checkpoint
from flashformer.engine import Device, Engine, default_context, find_device
from flashformer.errors import DeviceError, InputError
from flashformer.models import build_graph
from flashformer.plan import make_plan
from flashformer.shapes import shape
from flashformer.targets import get
from model_files import make_config, write_folder

CONTEXT = 32


class FakeRunner:
    """Makes `answer`, token by token, and remembers how it was used. It has one slot."""

    columns = slots = 1

    def __init__(self, answer: Sequence[int], vocab: int) -> None:
        self.answer, self.vocab = list(answer), vocab
        self.stats = RunStats()
        self.calls: list[tuple[list[int], int, int, frozenset[int]]] = []
        self.sampling = GREEDY
        self.open = self.closed = 0
        self.failure: BaseException | None = None  # raised after the answer
        self.holds = self.held = False  # makes no token after the next, but waits to be told to end

    def run(self, turns: Sequence[Turn]) -> Generator[Made, None, None]:
        (turn,) = turns
        self.calls.append((list(turn.tokens), turn.start, turn.count, frozenset(turn.stop)))
        self.sampling = turn.sampling
        self.open += 1
        try:
            for index, token in enumerate(self.answer[: turn.count]):
                while self.held and not turn.cancelled:
                    time.sleep(1e-3)
                if turn.cancelled:
                    return
                turn.fed = len(turn.tokens) + index
                scores = Scores(-1.0 - index, ((token, -1.0 - index), (7, -9.0)))
                yield Made(0, token, 0.0, scores if turn.sampling.logprobs is not None else None)
                self.held = self.holds
                if token in turn.stop:
                    return
            if self.failure is not None:
                raise self.failure
        finally:
            self.open -= 1

    def feeder(self, prompt: int) -> int:
        return 0

    def logits(self, tokens: Sequence[int], start: int, slot: int = 0) -> np.ndarray:
        return np.zeros((len(tokens), self.vocab), np.float32)

    def read_bandwidth(self) -> float:
        return 1.0

    def close(self) -> None:
        self.closed += 1


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("model"), make_config(vocab_size=300))


def make_engine(folder: Path, answer: str | Sequence[int]) -> tuple[Engine, FakeRunner]:
    """An engine whose model says `answer`."""
    checkpoint = open_checkpoint(folder)
    plan = make_plan(checkpoint.config, build_graph(checkpoint.config), get("cpu"), CONTEXT)
    ids = checkpoint.tokenizer().encode(answer, add_special=False) if isinstance(answer, str) else answer
    runner = FakeRunner(ids, checkpoint.config.vocab_size)
    return Engine(plan, runner, checkpoint, Device("cpu", "CPU", plan.target, 1 << 30)), runner


def test_text_comes_back_whole(folder: Path) -> None:
    engine, runner = make_engine(folder, "A café, 東京 ✓")
    results = list(engine.generate("hi", SamplingParams(max_tokens=len(runner.answer))))
    assert "".join(r.text for r in results) == "A café, 東京 ✓"
    assert [r.token for r in results] == runner.answer
    assert [r.finish for r in results[:-1]] == [None] * (len(results) - 1)
    assert runner.calls[0][0] == engine.tokenizer.encode("hi")


def test_limits_end_with_length(folder: Path) -> None:
    engine, _ = make_engine(folder, [40] * 100)
    assert [r.finish for r in engine.generate([5, 6], SamplingParams(max_tokens=3))] == [None, None, "length"]
    results = list(engine.generate([5] * (CONTEXT - 1), SamplingParams(max_tokens=50)))
    assert len(results) == 2 and results[-1].finish == "length"  # one more position, and the token made after it
    assert len(list(engine.generate([5] * CONTEXT))) == 1


def test_eos_ends_unless_ignored(folder: Path) -> None:
    engine, runner = make_engine(folder, [40, 41])
    eos = engine.tokenizer.eos_ids[0]
    runner.answer = [40, eos, 41]
    results = list(engine.generate([5], SamplingParams()))
    assert [(r.token, r.finish) for r in results] == [(40, None), (eos, "stop")] and results[-1].text == ""
    assert [r.token for r in engine.generate([5], SamplingParams(max_tokens=3, ignore_eos=True))] == [40, eos, 41]
    assert eos not in runner.calls[-1][3]


def test_stop_id_and_stop_text(folder: Path) -> None:
    engine, runner = make_engine(folder, "one two STOP three")
    results = list(engine.generate("x", SamplingParams(stop=["STOP"])))
    assert "".join(r.text for r in results) == "one two " and results[-1].finish == "stop"
    assert runner.open == 0  # the kernel was told
    token = runner.answer[2]
    assert [r.token for r in engine.generate("x", SamplingParams(stop=[token]))] == runner.answer[:3]


def test_what_is_asked_of_sampling_reaches_the_runner(folder: Path) -> None:
    engine, runner = make_engine(folder, [40, 41])
    params = SamplingParams(max_tokens=2, temperature=0.5, top_k=9, seed=3, repetition_penalty=1.5, logprobs=2)
    results = list(engine.generate([5, 6, 5], params))
    assert [(r.logprob, r.top_logprobs) for r in results] == [(-1.0, ((40, -1.0), (7, -9.0))), (-2.0, ((41, -2.0), (7, -9.0)))]
    assert (runner.sampling.temperature, runner.sampling.top_k, runner.sampling.seed) == (0.5, 9, 3)
    assert runner.sampling.seen is not None and {int(i) for i in np.flatnonzero(runner.sampling.seen == PROMPT_BIT)} == {5, 6}
    list(engine.generate([5, 6, 7], params))
    assert runner.calls[-1][1] > 0 and runner.sampling.seen[[5, 6, 7]].tolist() == [PROMPT_BIT] * 3  # what is reused counts, too
    assert [(r.logprob, r.top_logprobs) for r in engine.generate([5], SamplingParams(max_tokens=1))] == [(None, None)]
    seeds = set()
    for _ in range(3):
        list(engine.generate([5], SamplingParams(max_tokens=1, temperature=1.0)))
        seeds.add(runner.sampling.seed)
    assert len(seeds) == 3  # drawn anew
    with pytest.raises(InputError, match="token 300; the vocabulary has 300"):
        engine.generate([5], SamplingParams(logit_bias={300: 1.0}))


def test_leaving_early_frees_the_engine(folder: Path) -> None:
    engine, runner = make_engine(folder, [40] * 10)
    runner.holds = True
    results = engine.generate([5])
    next(results)
    assert runner.open == 1
    results.close()
    assert runner.open == 0
    runner.holds = runner.held = False
    assert len(list(engine.generate([5], SamplingParams(max_tokens=2)))) == 2


def fed(engine: Engine, runner: FakeRunner, prompt: list[int]) -> tuple[list[int], int]:
    """What the runner is fed for a prompt, and from which position."""
    list(engine.generate(prompt, SamplingParams(max_tokens=1)))
    return runner.calls[-1][:2]


def test_what_the_cache_holds_is_not_computed_again(folder: Path) -> None:
    engine, runner = make_engine(folder, [40, 41, 42])
    ends = SamplingParams(max_tokens=3, ignore_eos=True)
    assert fed(engine, runner, [5, 6, 7]) == ([5, 6, 7], 0)
    assert fed(engine, runner, [5, 6, 7]) == ([7], 2)  # the last one must run: its scores are the answer
    assert fed(engine, runner, [5, 6]) == ([6], 1)
    assert fed(engine, runner, [5, 6, 7]) == ([7], 2)
    assert fed(engine, runner, [5, 8, 7]) == ([8, 7], 1)
    assert fed(engine, runner, [5, 6, 7]) == ([6, 7], 1)
    list(engine.generate([5, 6], ends))
    assert fed(engine, runner, [5, 6, 40, 41, 42, 9]) == ([42, 9], 4)  # 42 was made but never fed back
    engine.logits([5, 6, 40, 41])
    assert fed(engine, runner, [5, 6, 40, 41, 42]) == ([42], 4)


def test_what_a_stopped_generation_leaves_is_reused(folder: Path) -> None:
    engine, runner = make_engine(folder, "one two STOP three")
    answer = runner.answer
    runner.holds = True
    for known in range(3):  # one more token each time
        results = engine.generate([5, 6, *answer[:known]])
        next(results)
        results.close()
        runner.held = False
        runner.answer = answer[known + 1 :]
    runner.answer, runner.holds = answer, False
    assert fed(engine, runner, [5, 6, *answer]) == (answer[2:], 4)
    made = [r.token for r in engine.generate([5], SamplingParams(stop=["STOP"]))]
    assert 0 < len(made) < len(answer)
    assert fed(engine, runner, [5, *answer]) == (answer[len(made) - 1 :], len(made))
    results = engine.generate([5, 6])
    results.close()  # before it began: nothing has changed
    assert fed(engine, runner, [5, answer[0], 7]) == ([7], 2)
    runner.held = True  # closed before the first token
    results = engine.generate([5, 8, 9])
    heard = signal.signal(signal.SIGALRM, signal.default_int_handler)
    signal.setitimer(signal.ITIMER_REAL, 0.05)
    with pytest.raises(KeyboardInterrupt):
        next(results)
    signal.signal(signal.SIGALRM, heard)
    runner.held = False
    assert fed(engine, runner, [5, 8, 9]) == ([8, 9], 1)


def test_what_a_failed_kernel_leaves_is_not_trusted(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, runner = make_engine(folder, [40, 41])
    runner.failure = DeviceError("gave up")
    with pytest.raises(DeviceError):
        list(engine.generate([5, 6]))
    runner.failure = None
    assert fed(engine, runner, [5, 6]) == ([5, 6], 0)

    def failing(tokens: Sequence[int], start: int, slot: int) -> np.ndarray:
        raise DeviceError("gave up")

    monkeypatch.setattr(runner, "logits", failing)
    with pytest.raises(DeviceError):
        engine.logits([5, 6])
    assert fed(engine, runner, [5, 6]) == ([5, 6], 0)


def test_a_kernel_that_fails_as_it_is_stopped_is_not_trusted(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, runner = make_engine(folder, [40, 41])

    def failing(*_: object) -> Generator[Made, None, None]:
        yield Made(0, 40, 0.0)
        raise DeviceError("gave up")

    with monkeypatch.context() as patch:
        patch.setattr(runner, "run", failing)
        results = engine.generate([5, 6])
        next(results)
        results.close()
    assert fed(engine, runner, [5, 6]) == ([5, 6], 0)


@pytest.mark.parametrize("seed", range(4))
def test_reuse_changes_no_bit(folder: Path, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Conversations of every kind, each against an engine that has seen nothing; then every KV entry said to be there is."""
    context, rng = 48, random.Random(seed)
    reused = 0
    with flashformer.load(folder, "cpu", context) as engine:
        past: list[int] = []
        for _ in range(60):
            kept = past[: rng.choice([0, len(past), len(past) - 1, rng.randint(0, len(past))])]
            prompt = (kept + [rng.randrange(300) for _ in range(rng.randint(0 if kept else 1, 9))])[:context]
            params = SamplingParams(
                max_tokens=rng.choice([1, 2, 20, 100]),
                ignore_eos=rng.random() < 0.5,
                stop=rng.sample(["e", "a", "\n", *range(300)], rng.choice([0, 0, 30])),
            )
            with flashformer.load(folder, "cpu", context) as fresh:
                expected = list(fresh.generate(prompt, params))
            kind = rng.choice(["all", "all", "all", "close", "logits", "fail"])
            if kind == "logits":
                engine.logits(prompt)
            elif kind == "close":
                some = rng.randint(0, len(expected))
                results = engine.generate(prompt, params)
                assert [next(results) for _ in range(some)] == expected[:some]
                results.close()
            elif kind == "fail":
                with monkeypatch.context() as patch, pytest.raises(DeviceError):
                    patch.setattr(engine.runner, "run", fail_after(engine, rng.randint(0, len(expected) - 1)))
                    list(engine.generate(prompt, SamplingParams(max_tokens=100, ignore_eos=True)))
            else:
                assert list(engine.generate(prompt, params)) == expected
                assert engine.stats.prompt_tokens + engine.stats.reused_tokens == len(prompt)
                reused += engine.stats.reused_tokens
            past = prompt + [r.token for r in expected]
            (cached,) = engine._scheduler.cached
            assert len(cached) <= context
            if len(cached) < context:
                probe = [rng.randrange(300)]
                with flashformer.load(folder, "cpu", context) as fresh:
                    whole = fresh.logits(cached + probe)
                # Written after all that is trusted, and so without harm to it.
                assert engine.runner.logits(probe, len(cached)).tobytes() == whole[-1:].tobytes()
    assert reused > 100


def fail_after(engine: Engine, count: int) -> Callable[[Sequence[Turn]], Generator[Made, None, None]]:
    """The runner's `run`, which fails after `count` tokens."""
    run = engine.runner.run

    def failing(turns: Sequence[Turn]) -> Generator[Made, None, None]:
        with closing(run(turns)) as tokens:
            yield from islice(tokens, count)
        raise DeviceError("gave up")

    return failing


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([], "empty"),
        ([1, 300], "token id 300 at position 1 is outside the vocabulary of 300"),
        ([-1], "token id -1"),
        ([1] * (CONTEXT + 1), f"33 tokens; the context holds {CONTEXT}"),
        ([1.5], "whole numbers"),
        ([[[1]], [[2]]], "whole numbers"),
    ],
)
def test_wrong_prompts_are_refused_before_anything_runs(folder: Path, prompt: list[int], message: str) -> None:
    engine, runner = make_engine(folder, [40])
    with pytest.raises(InputError, match=message):
        engine.generate(prompt)
    with pytest.raises(InputError, match=message):
        engine.logits(prompt)
    assert runner.calls == []


def test_the_chat_template_is_used(folder: Path) -> None:
    engine, _ = make_engine(folder, [40])
    ids = engine.chat_prompt([{"role": "user", "content": "Hello"}])
    assert engine.tokenizer.decode(ids).count("Hello") == 1 and len(ids) > len(engine.tokenizer.encode("Hello", add_special=False))


def test_closing_closes_everything_once(folder: Path) -> None:
    engine, runner = make_engine(folder, [40])
    with engine:
        pass
    engine.close()
    assert runner.closed == 1
    with pytest.raises(InputError, match="closed"):
        next(engine.generate([5]))
    with pytest.raises(InputError, match="closed"):
        engine.logits([5])


def test_ids_need_no_tokenizer(tmp_path: Path) -> None:
    folder = write_folder(tmp_path, make_config(vocab_size=300))
    (folder / "tokenizer.json").unlink()
    engine, _ = make_engine(folder, [40, 41])
    assert [(r.token, r.text) for r in engine.generate([5], SamplingParams(max_tokens=2))] == [(40, ""), (41, "")]
    with pytest.raises(flashformer.FlashFormerError, match="tokenizer"):
        list(engine.generate([5], SamplingParams(stop=["x"])))
    with pytest.raises(flashformer.FlashFormerError, match="tokenizer"):
        engine.generate("text")


def test_unknown_devices_are_refused() -> None:
    with pytest.raises(InputError, match="device is 'tpu'"):
        find_device("tpu")


def test_cuda_without_a_gpu_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flashformer.backends.cuda.probe", lambda: None)
    with pytest.raises(DeviceError, match=r"no CUDA GPU.*--device cpu"):
        find_device("cuda")
    assert find_device("auto").backend == "cpu"


def test_the_default_context_fits_the_memory() -> None:
    config = shape("llama-3.1-8b")
    graph = build_graph(config)
    target = get("sm_90")
    assert default_context(config, graph, Device("cuda", "GPU", target, 141 << 30)) == 131072
    some = default_context(config, graph, Device("cuda", "GPU", target, 24 << 30))
    assert 20_000 < some < 70_000  # 7 GB for 128 KB a position
    assert default_context(config, graph, Device("cpu", "CPU", get("cpu"), 64 << 30)) == 8192
    with pytest.raises(DeviceError, match="weights take 16"):
        default_context(config, graph, Device("cuda", "GPU", target, 15 << 30))
