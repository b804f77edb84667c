"""Speculation: the same tokens as without it, whoever guesses; guesses that are worth something; and knowing when they are not."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from click.testing import CliRunner

import flashformer
from flashformer import SamplingParams
from flashformer.backends import GREEDY, Turn
from flashformer.backends.sampling import Sampling
from flashformer.cli import main
from flashformer.errors import InputError
from flashformer.speculate import LEAST_REST, PROBE, DraftModel, Lookup, Speculation
from model_files import make_config, write_folder

PROMPT = [5, 6, 7, 8, 9, 5, 6, 7]
PARAMS = [
    SamplingParams(max_tokens=120, ignore_eos=True),
    SamplingParams(max_tokens=120, ignore_eos=True, temperature=0.8, seed=3, logprobs=2),
    SamplingParams(
        max_tokens=120, ignore_eos=True, temperature=1.0, seed=4, top_k=30, top_p=0.9, min_p=0.01, repetition_penalty=1.2,
        frequency_penalty=0.1, presence_penalty=0.2, logit_bias={5: 2.0},
    ),
    SamplingParams(max_tokens=120, stop=["e", 17]),
    SamplingParams(max_tokens=120, ignore_eos=True, temperature=1.0, seed=9, logit_bias={5: math.inf, 6: math.inf}),  # repeats itself
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("model"), make_config(vocab_size=300))


class Random:
    """Guesses at random, sometimes nothing."""

    def __init__(self) -> None:
        self._rng = random.Random(1)

    def draft(self, slot: int, tokens: Sequence[int], count: int, sampling: Sampling) -> list[int]:
        return [self._rng.choice([self._rng.randrange(300), tokens[-1]]) for _ in range(self._rng.randint(0, count))]


class Eager(Speculation):
    """Uses as many drafts as fit, whether they pay or not."""

    def learn(self, turn: Turn, made: int) -> None:
        super().learn(turn, made)
        self._passes, self._length = 0, 15


@pytest.mark.parametrize("slots", [1, 3])
@pytest.mark.parametrize("drafter", ["lookup", "model", "random"])
def test_tokens_are_those_without_it(folder: Path, drafter: str, slots: int, monkeypatch: pytest.MonkeyPatch) -> None:
    draft = {"lookup": "lookup", "model": str(folder), "random": "lookup"}[drafter]
    prompts = [[*PROMPT, i] for i in range(4)]
    with flashformer.load(folder, "cpu", 256, slots=slots, draft=draft) as guessing, flashformer.load(folder, "cpu", 256) as plain:
        monkeypatch.setattr("flashformer.engine.Speculation", Eager)
        if drafter == "random":
            guessing._drafter = Random
        for params in PARAMS:
            for prompt in prompts:
                assert list(guessing.generate(prompt, params)) == list(plain.generate(prompt, params))
                stats = guessing.stats
                assert 0 <= stats.accepted <= stats.drafted
                assert stats.accepted > 0 or params is not PARAMS[-1]
            found: list[list[flashformer.Result]] = [[] for _ in prompts]
            for index, result in guessing.generate(prompts, params):
                found[index].append(result)
            wanted: list[list[flashformer.Result]] = [[] for _ in prompts]
            for index, result in plain.generate(prompts, params):
                wanted[index].append(result)
            assert found == wanted
        whole = list(guessing.generate([5] * 250, SamplingParams(max_tokens=50, ignore_eos=True)))
        assert len(whole) == 7 and whole == list(plain.generate([5] * 250, SamplingParams(max_tokens=50, ignore_eos=True)))


def test_the_model_itself_guesses_everything(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flashformer.engine.Speculation", Eager)
    with flashformer.load(folder, "cpu", 256, draft=str(folder)) as engine:
        for params in PARAMS[:2]:  # also what is sampled: the noise is the same
            list(engine.generate(PROMPT, params))
            assert engine.stats.accepted == engine.stats.drafted > 100
            passes = 1 + 120 - engine.stats.accepted
            assert passes < 20 and engine.stats.bytes_read < 20 * engine.plan.token_bytes(128)
        follow = SamplingParams(max_tokens=40, ignore_eos=True)
        list(engine.generate([*PROMPT[:5], 20], follow))  # goes back in the draft model's cache, too
        assert engine.stats.accepted == engine.stats.drafted > 20


def test_lookup() -> None:
    lookup = Lookup()
    text = [1, 2, 3, 4, 5, 1, 2]
    assert lookup.draft(0, text, 3, GREEDY) == [3, 4, 5]
    assert lookup.draft(0, [*text, 9], 3, GREEDY) == []
    assert lookup.draft(0, [*text, 9, 1, 2], 2, GREEDY) == [9, 1]  # the latest
    assert lookup.draft(0, [*text, 9, 1, 2, 3], 4, GREEDY) == [4, 5, 1, 2]  # the longest that fits
    assert Lookup().draft(0, [7, 8, 7, 8], 5, GREEDY) == [7, 8, 7, 8, 7]
    assert Lookup().draft(0, [1], 5, GREEDY) == []


class Clock:
    """Time that passes when it is told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr(time, "perf_counter", lambda: self.now)


class Always:
    """Guesses 1, 2, 3, ..."""

    def draft(self, slot: int, tokens: Sequence[int], count: int, sampling: Sampling) -> list[int]:
        return list(range(1, count + 1))


def simulate(clock: Clock, speculation: Speculation, right: float, cost: float, tokens: int) -> float:
    """Seconds that `tokens` take if a pass takes 1 and `cost` for each draft, of which a share is right, from the first on."""
    began, made = clock.now, 0
    rng = random.Random(0)
    while made < tokens:
        plan = speculation.plan(0, [0], 15, GREEDY)
        accepted = next((i for i in range(len(plan.drafts)) if rng.random() >= right), len(plan.drafts))
        clock.now += 1 + cost * len(plan.drafts) if plan.drafts else plan.passes
        some = accepted + 1 if plan.drafts else plan.passes
        speculation.learn(Turn(0, [0, *plan.drafts], 0, 1, drafts=len(plan.drafts)), some)
        made += some
    return (clock.now - began) / made * tokens


def test_it_goes_on_while_it_pays_and_rests_when_it_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    good = Speculation(Always())
    assert simulate(clock, good, 0.98, 0.05, 2000) < 2000 / 4 and good.speedup > 4
    bad = Speculation(Always())
    assert simulate(clock, bad, 0.0, 0.1, 2000) < 2000 * 1.02 and 0.98 < bad.speedup <= 1
    dear = Speculation(Always())
    assert simulate(clock, dear, 0.5, 2.0, 2000) < 2000 * 1.05
    # What changes is noticed.
    assert simulate(clock, dear, 0.98, 0.05, 4000) < 4000 / 2


def test_it_begins_by_finding_out_what_a_token_takes() -> None:
    speculation = Speculation(Always())
    passes = []
    for _ in range(3):
        plan = speculation.plan(0, [0], 15, GREEDY)
        passes.append((plan.passes, len(plan.drafts)))
        speculation.learn(Turn(0, [0], 0, 1), plan.passes)
    assert passes == [(1, 0), (PROBE, 0), (1, 3)]
    nothing = Speculation(Lookup())
    for expected in (1, PROBE, LEAST_REST, LEAST_REST):
        assert nothing.plan(0, [0], 15, GREEDY).passes == expected
        nothing.learn(Turn(0, [0], 0, 1), expected)
    assert nothing.plan(0, [0], 0, GREEDY).drafts == []  # no room


def test_a_draft_model_with_a_shorter_context(folder: Path) -> None:
    with flashformer.load(folder, "cpu", 16) as small:
        drafter = DraftModel(small.runner, 16)
        assert len(drafter.draft(0, list(range(14)), 5, GREEDY)) == 3
        assert drafter.draft(0, list(range(17)), 5, GREEDY) == []
        small.runner.close()
        assert drafter.draft(0, [1], 5, GREEDY) == []  # the large model goes on


def test_what_cannot_speculate(folder: Path, tmp_path: Path) -> None:
    other = write_folder(tmp_path, make_config(vocab_size=301))
    with pytest.raises(InputError, match="has 301 tokens, the model 300"):
        flashformer.load(folder, "cpu", 64, draft=str(other))
    with pytest.raises(InputError, match="a kernel of one column has no room"):
        flashformer.load(folder, "cpu", 64, columns=1, draft="lookup")


def test_the_command_line(folder: Path) -> None:
    plain, lookup, model = (
        CliRunner().invoke(main, [
            "generate", str(folder), "-p", "a b a b a b a b", "--raw", "--device", "cpu", "--max-tokens", "60", "--stats",
            "--speculate", how,
        ])
        for how in ("none", "lookup", str(folder))
    )  # fmt: skip
    assert plain.exit_code == lookup.exit_code == model.exit_code == 0
    assert plain.stdout == lookup.stdout == model.stdout
    assert "guessed tokens were right" not in plain.stderr and "guessed tokens were right" in model.stderr
