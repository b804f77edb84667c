"""What a kernel of several columns must be able to do, on any backend: `Open` makes a runner for a checkpoint."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import flashformer
from flashformer import SamplingParams
from flashformer.backends import Made, Runner, Turn
from flashformer.backends.cuda.runner import CudaRunner
from flashformer.check import compare, sample_tokens
from flashformer.checkpoint import Checkpoint, open_checkpoint
from flashformer.errors import DeviceError, ScoreError
from flashformer.models import build_graph
from flashformer.plan import KvType
from flashformer.reference import Reference
from model_files import make_config, write_folder

SAMPLED = SamplingParams(
    temperature=1.1, top_k=40, top_p=0.95, seed=5, repetition_penalty=1.3, presence_penalty=0.2, frequency_penalty=0.1,
    logit_bias={7: 1.0}, logprobs=3,
)  # fmt: skip
CONTEXT = 128  # positions of each slot


class Open(Protocol):
    """A model on a backend, with `CONTEXT` positions in each slot."""

    def __call__(
        self, checkpoint: Checkpoint, columns: int = ..., slots: int = ..., kv_type: KvType = ...
    ) -> AbstractContextManager[Runner]:
        """Free after use."""
        ...


@contextmanager
def opened(folder: Path, shape: dict[str, Any], dtype: str = "bfloat16") -> Iterator[Checkpoint]:
    """A small random model."""
    write_folder(folder, make_config("Qwen3ForCausalLM", torch_dtype=dtype, **shape), dtype=dtype)
    with open_checkpoint(folder) as checkpoint:
        yield checkpoint


def tokens_of(made: Sequence[Made], turn: int) -> list[int]:
    """What a turn of a launch made."""
    return [one.token for one in made if one.turn == turn]


def check_logits(runner: Runner, checkpoint: Checkpoint, length: int) -> None:
    """As the reference has them, and the same bits however the text is cut."""
    tokens, slot = sample_tokens(checkpoint.config, length, seed=1), runner.slots - 1
    ours = runner.logits(tokens, 0, slot)
    result = compare(ours, Reference(build_graph(checkpoint.config), checkpoint).logits(tokens))
    assert result.within, result.describe()
    parts = [runner.logits(tokens[a:b], a, slot) for a, b in ((0, 1), (1, 17), (17, 19), (19, length))]
    assert np.array_equal(np.concatenate(parts), ours)


def companions(rng: random.Random, vocab: int, slots: Sequence[int]) -> list[Turn]:
    """Turns that have nothing to do with the one in question."""
    return [Turn(slot, [rng.randrange(vocab) for _ in range(rng.randint(1, 40))], 0, rng.randint(1, 12)) for slot in slots]


def check_companions(runner: Runner, vocab: int, rounds: int, count: int = 12) -> None:
    """A sequence alone, then among random others, in any place of the list and in any slot: bit for bit the same."""
    rng = random.Random(0)
    for params in (SamplingParams(logprobs=2), SAMPLED):
        prompt = [rng.randrange(vocab) for _ in range(21)]
        alone = list(runner.run([Turn(0, prompt, 0, count, (), params.lower(vocab, prompt))]))
        for _ in range(rounds):
            slots = rng.sample(range(runner.slots), runner.slots)
            turns = companions(rng, vocab, slots[: rng.randint(1, len(slots) - 1)])
            place = rng.randint(0, len(turns))
            turns.insert(place, Turn(slots[-1], prompt, 0, count, (), params.lower(vocab, prompt)))
            made = [one for one in runner.run(turns) if one.turn == place]
            assert [(one.token, one.scores) for one in made] == [(one.token, one.scores) for one in alone]


def check_taking_turns(runner: Runner, count: int = 9, in_order: bool = True) -> None:
    """More sequences than columns: nobody gets ahead of the others.

    in_order: the host sees that; else it finds many tokens of each at a time.
    """
    n = runner.slots
    turns = [Turn(slot, [5 + slot, 6], 0, count) for slot in range(n)]
    made = sorted(runner.run(turns), key=lambda one: one.seconds)
    assert n > runner.columns and [turn.fed for turn in turns] == [count + 1] * n
    for slot in range(n):
        assert tokens_of(made, slot) == list(runner.generate([5 + slot, 6], 0, count, ()))
    for at in range(runner.columns, len(made), runner.columns) if in_order else ():
        counts = [len(tokens_of(made[:at], slot)) for slot in range(n)]
        assert max(counts) - min(counts) <= 2


def check_ends(runner: Runner, count: int = 100) -> None:
    """A stop token, a limit, a cancellation while it runs and one before: each ends its own turn alone."""
    whole = list(runner.generate([5, 6], 0, 40, ()))
    stop = whole[3]
    turns = [Turn(0, [5, 6], 0, 40, {stop}), Turn(1, [5, 6], 0, 2), Turn(2, [5, 6], 0, count), Turn(3, [5, 6], 0, 30)]
    turns[3].cancel()
    made = []
    for one in runner.run(turns):
        made.append(one)
        if one.turn == 2 and len(tokens_of(made, 2)) == 10:
            turns[2].cancel()
    assert tokens_of(made, 0) == whole[: whole.index(stop) + 1] and tokens_of(made, 1) == whole[:2] and not tokens_of(made, 3)
    assert 10 <= len(tokens_of(made, 2)) <= count and tokens_of(made, 2)[:40] == whole[: len(tokens_of(made, 2))]
    assert turns[3].fed == 0 and turns[2].fed == 1 + len(tokens_of(made, 2))


def check_drafts(runner: Runner, vocab: int, params: SamplingParams, counts: Sequence[int] = (1, 3, 7)) -> None:
    """All right, all wrong, and wrong from some place on; of any number, also more than a pass carries: no token changes."""
    prompt = [5, 6, 7, 5]
    made = list(runner.run([Turn(0, prompt, 0, 9 + max(counts) + 1, (), params.lower(vocab, prompt))]))
    answer = [one.token for one in made]
    for known in (0, 1, 9):  # tokens of the answer in the cache, but for the last
        for count in counts:
            for right in range(count + 1):
                drafts = answer[known : known + right] + [(token + 1) % vocab for token in answer[known + right : known + count]]
                text = [*prompt, *answer[:known]]
                sampling = params.lower(vocab, prompt, answer[:known])
                runner.logits(text[:-1], 0, 3)
                turn = Turn(3, [text[-1], *drafts], len(text) - 1, count + 1, (), sampling, count)
                (others,) = companions(random.Random(count), vocab, [1])
                found = [one for one in runner.run([others, turn]) if one.turn == 1]
                assert [one.token for one in found] == answer[known : known + right + 1]
                assert [one.scores for one in found] == [one.scores for one in made[known : known + right + 1]]
                assert turn.fed == 1 + right
                # What wrong drafts have left in the cache is overwritten.
                again = Turn(3, [text[-1], *answer[known : known + right]], len(text) - 1, 3)
                follow = tokens_of(list(runner.run([again])), 0)
                assert follow == list(runner.generate([*text, *answer[known : known + right]], 0, 3, ()))


def check_copies(runner: Runner, checkpoint: Checkpoint) -> None:
    """A prefix is copied between slots."""
    tokens = sample_tokens(checkpoint.config, 60, seed=2)
    whole = runner.logits(tokens, 0, 1)
    runner.logits(tokens[::-1], 0, 4)
    runner.copy(1, 4, 37)
    assert np.array_equal(runner.logits(tokens[37:], 37, 4), whole[37:])
    assert np.array_equal(runner.logits(tokens[37:], 37, 1), whole[37:])


def check_scores_not_finite(open_runner: Open, folder: Path, shape: dict[str, Any]) -> None:
    """They end one turn."""
    write_folder(folder, make_config("Qwen3ForCausalLM", torch_dtype="bfloat16", **shape), dtype="bfloat16")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.embed_tokens.weight"][9] = np.nan
    save_file(tensors, folder / "model.safetensors")
    with pytest.warns(UserWarning, match="not finite"), open_checkpoint(folder) as checkpoint, open_runner(checkpoint) as runner:
        expected = list(runner.generate([5, 6], 0, 20, ()))
        made = list(runner.run([Turn(0, [5, 6], 0, 20), Turn(1, [5, 9, 6], 0, 20)]))
        assert tokens_of(made, 0) == expected
        (failed,) = [one for one in made if one.turn == 1]
        assert isinstance(failed.error, ScoreError) and "position 3 are not finite" in str(failed.error)


def check_cancelled_asleep(runner: CudaRunner) -> None:
    """A turn that is cancelled ends its launch, which wakes who waits for tokens, however long that was going to sleep."""
    turn = Turn(0, [5, 6], 0, 40)

    def next_look() -> float:
        turn.cancel()
        return 1000.0

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner.pace, "next_look", next_look)
        assert len(list(runner.run([turn]))) < 40


def check_refusals(runner: Runner) -> None:
    """What does not fit."""
    for turns in ([], [Turn(0, [1], 0, 1), Turn(0, [1], 0, 1)], [Turn(runner.slots, [1], 0, 1)]):
        with pytest.raises(DeviceError, match="turn"):
            list(runner.run(turns))
    for turn in (Turn(0, [1, 2], 0, 1, drafts=2), Turn(0, [1] * (CONTEXT + 1), 0, 1), Turn(1, [1], CONTEXT, 1)):
        with pytest.raises(DeviceError, match=f"do not fit into {CONTEXT} positions"):
            list(runner.run([turn]))


def check_prompt_kernel(folder: Path, context: int, columns: int) -> None:
    """A kernel for prompts on a GPU feeds all of a prompt but the last token.

    What is made does not tell what else there was to do, or what was in the cache.
    """
    params = SamplingParams(max_tokens=5, ignore_eos=True, logprobs=0)

    def answers(engine: flashformer.Engine, ids: list[int]) -> list[tuple[int, float]]:
        return [(r.token, r.logprob or 0.0) for r in engine.generate(ids, params)]

    with flashformer.load(folder, "cuda", context, prompt_columns=0) as engine:
        ids = sample_tokens(engine.config, 21, seed=3)
        slow = answers(engine, ids)
    with flashformer.load(folder, "cuda", context, slots=2, prompt_columns=columns) as engine:
        assert isinstance(engine.runner, CudaRunner) and engine.runner.prompts
        prompts, engine.runner.prefill = engine.runner.prompts, None  # as where a model's formats have no kernel for long ones
        first = answers(engine, ids)
        assert prompts.params.epoch == 1 + len(ids) - 1  # passes that there was room for
        assert abs(first[0][1] - slow[0][1]) < 0.05
        assert answers(engine, ids) == first  # with what is left of the prompt in the cache
        longer = [*ids, *(token for token, _ in first), *ids[:3]]
        reused = answers(engine, longer)
        assert engine.stats.reused_tokens == len(ids) - 1  # but none of the answer
        both: list[list[tuple[int, float]]] = [[], []]
        for index, result in engine.generate([longer, ids], [params] * 2):
            both[index].append((result.token, result.logprob or 0.0))
        assert both == [reused, first]
        engine.logits(longer)  # by the other kernel: nothing to begin a prompt with
        assert answers(engine, longer) == reused
    with flashformer.load(folder, "cuda", context, prompt_columns=columns) as engine:
        assert isinstance(engine.runner, CudaRunner)
        engine.runner.prefill = None
        assert answers(engine, longer) == reused
        assert answers(engine, ids[:1]) and engine.stats.reused_tokens == 0
