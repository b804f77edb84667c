"""Columns of a pass on the CPU: right in every width, and no bit of one depends on the others."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flashformer import SamplingParams
from flashformer.backends import Made, Turn
from flashformer.backends.cpu import CpuRunner
from flashformer.backends.cpu import load as load_runner
from flashformer.check import compare, sample_tokens
from flashformer.checkpoint import Checkpoint, open_checkpoint
from flashformer.errors import DeviceError, PlanError, ScoreError
from flashformer.formats import choose
from flashformer.models import build_graph
from flashformer.plan import KvType, make_plan
from flashformer.reference import Reference
from flashformer.targets import get
from flashformer.validate import validate
from model_files import make_config, write_folder
from quant_models import FORMS, QuantizedCheckpoint
from test_formats import forms_of

SHAPE: dict[str, Any] = {"hidden_size": 200, "head_dim": 24, "intermediate_size": 341, "vocab_size": 503}
SAMPLED = SamplingParams(
    temperature=1.1, top_k=40, top_p=0.95, seed=5, repetition_penalty=1.3, presence_penalty=0.2, frequency_penalty=0.1,
    logit_bias={7: 1.0}, logprobs=3,
)  # fmt: skip


@contextmanager
def opened(folder: Path, dtype: str = "bfloat16") -> Iterator[Checkpoint]:
    """A small random model."""
    write_folder(folder, make_config("Qwen3ForCausalLM", torch_dtype=dtype, **SHAPE), dtype=dtype)
    with open_checkpoint(folder) as checkpoint:
        yield checkpoint


@contextmanager
def running(
    checkpoint: Checkpoint, columns: int = 16, workers: int = 2, slots: int = 5, kv_type: KvType = "native"
) -> Iterator[CpuRunner]:
    """A model on the CPU."""
    graph = build_graph(checkpoint.config)
    formats = choose(checkpoint, graph.weights())
    plan = make_plan(checkpoint.config, graph, get("cpu"), 128, workers, formats, kv_type, columns, slots)
    validate(plan)
    runner = load_runner(plan, checkpoint)
    try:
        yield runner
    finally:
        runner.close()


def tokens_of(made: Sequence[Made], turn: int) -> list[int]:
    """What a turn of a launch made."""
    return [one.token for one in made if one.turn == turn]


@pytest.mark.parametrize("columns", [1, 2, 4, 8, 16])
def test_every_width_agrees_with_the_reference(tmp_path: Path, columns: int) -> None:
    with opened(tmp_path) as checkpoint, running(checkpoint, columns) as runner:
        tokens = sample_tokens(checkpoint.config, 100, seed=1)
        ours = runner.logits(tokens, 0, slot=4)
        result = compare(ours, Reference(build_graph(checkpoint.config), checkpoint).logits(tokens))
        assert runner.columns == columns and result.within, result.describe()
        parts = [runner.logits(tokens[a:b], a, slot=4) for a, b in ((0, 1), (1, 17), (17, 19), (19, 100))]
        assert np.array_equal(np.concatenate(parts), ours)


def companions(rng: random.Random, vocab: int, slots: Sequence[int]) -> list[Turn]:
    """Turns that have nothing to do with the one in question."""
    return [Turn(slot, [rng.randrange(vocab) for _ in range(rng.randint(1, 40))], 0, rng.randint(1, 12)) for slot in slots]


def check_companions(runner: CpuRunner, rounds: int) -> None:
    """A sequence alone, then among random others, in any place of the list and in any slot: bit for bit the same."""
    rng = random.Random(0)
    vocab = runner.plan.config.vocab_size
    for params in (SamplingParams(logprobs=2), SAMPLED):
        prompt = [rng.randrange(vocab) for _ in range(21)]
        alone = list(runner.run([Turn(0, prompt, 0, 12, (), params.lower(vocab, prompt))]))
        for _ in range(rounds):
            slots = rng.sample(range(runner.slots), runner.slots)
            turns = companions(rng, vocab, slots[: rng.randint(1, len(slots) - 1)])
            place = rng.randint(0, len(turns))
            turns.insert(place, Turn(slots[-1], prompt, 0, 12, (), params.lower(vocab, prompt)))
            made = [one for one in runner.run(turns) if one.turn == place]
            assert [(one.token, one.scores) for one in made] == [(one.token, one.scores) for one in alone]


@pytest.mark.parametrize("kv_type", ["native", "int8"])
@pytest.mark.parametrize("columns", [2, 16])
def test_random_companions_change_no_bit(tmp_path: Path, columns: int, kv_type: KvType) -> None:
    with opened(tmp_path) as checkpoint, running(checkpoint, columns, kv_type=kv_type) as runner:
        check_companions(runner, 15)


# Groups of 16, 32, 64, 128 and whole rows; no offsets, zeros and minima; every kind of code.
@pytest.mark.parametrize("name", ["Q8_0", "Q4_1", "Q6_K", "int4 rows", "int8 zeros", "NF4", "fp8 blocks", "NVFP4"])
def test_companions_with_quantised_weights(tmp_path: Path, name: str) -> None:
    write_folder(tmp_path, make_config(hidden_size=256, head_dim=32, intermediate_size=384, vocab_size=291))
    quantise, format_name = FORMS[name]
    with open_checkpoint(tmp_path) as plain:
        checkpoint = QuantizedCheckpoint(plain, forms_of(plain, quantise, {}))
        with running(checkpoint) as runner:
            assert format_name in {stage.geometry.format.name for stage in runner.plan.stages if stage.geometry}
            check_companions(runner, 4)


def test_more_sequences_than_columns_take_turns(tmp_path: Path) -> None:
    with opened(tmp_path) as checkpoint, running(checkpoint, 2) as runner:
        turns = [Turn(slot, [5 + slot, 6], 0, 9) for slot in range(5)]
        made = sorted(runner.run(turns), key=lambda one: one.seconds)
        assert [turn.fed for turn in turns] == [10] * 5
        for slot in range(5):
            assert tokens_of(made, slot) == list(runner.generate([5 + slot, 6], 0, 9, ()))
        # Nobody gets ahead of the others.
        for at in range(2, len(made), 2):
            counts = [len(tokens_of(made[:at], slot)) for slot in range(5)]
            assert max(counts) - min(counts) <= 2


def test_turns_end_one_by_one(tmp_path: Path) -> None:
    with opened(tmp_path) as checkpoint, running(checkpoint) as runner:
        whole = list(runner.generate([5, 6], 0, 40, ()))
        stop = whole[3]
        turns = [Turn(0, [5, 6], 0, 40, {stop}), Turn(1, [5, 6], 0, 2), Turn(2, [5, 6], 0, 100), Turn(3, [5, 6], 0, 30)]
        turns[3].cancel()
        made = []
        for one in runner.run(turns):
            made.append(one)
            if one.turn == 2 and len(tokens_of(made, 2)) == 10:
                turns[2].cancel()
        assert tokens_of(made, 0) == whole[: whole.index(stop) + 1] and tokens_of(made, 1) == whole[:2] and not tokens_of(made, 3)
        assert 10 <= len(tokens_of(made, 2)) <= 100 and tokens_of(made, 2)[:40] == whole[: len(tokens_of(made, 2))]
        assert turns[3].fed == 0 and turns[2].fed == 1 + len(tokens_of(made, 2))


@pytest.mark.parametrize("params", [SamplingParams(), SAMPLED])
def test_drafts_change_no_token(tmp_path: Path, params: SamplingParams) -> None:
    """All right, all wrong, and wrong from some place on; of any number, also more than a pass carries."""
    with opened(tmp_path) as checkpoint, running(checkpoint, 4) as runner:
        vocab, prompt = SHAPE["vocab_size"], [5, 6, 7, 5]
        made = list(runner.run([Turn(0, prompt, 0, 30, (), params.lower(vocab, prompt))]))
        answer = [one.token for one in made]
        for known in (0, 1, 9):  # tokens of the answer in the cache, but for the last
            for count in (1, 3, 7):
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


def test_a_prefix_is_copied_between_slots(tmp_path: Path) -> None:
    with opened(tmp_path) as checkpoint, running(checkpoint) as runner:
        tokens = sample_tokens(checkpoint.config, 90, seed=2)
        whole = runner.logits(tokens, 0, 1)
        runner.logits(tokens[::-1], 0, 4)
        runner.copy(1, 4, 37)
        assert np.array_equal(runner.logits(tokens[37:], 37, 4), whole[37:])
        assert np.array_equal(runner.logits(tokens[37:], 37, 1), whole[37:])
        for source, target, positions in ((0, 5, 1), (-1, 0, 1), (0, 1, 129)):
            with pytest.raises(DeviceError, match="cannot be copied"):
                runner.copy(source, target, positions)


def test_scores_that_are_not_finite_end_one_turn(tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    write_folder(tmp_path, make_config("Qwen3ForCausalLM", torch_dtype="bfloat16", **SHAPE), dtype="bfloat16")
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.embed_tokens.weight"][9] = np.nan
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.warns(UserWarning, match="not finite"), open_checkpoint(tmp_path) as checkpoint, running(checkpoint) as runner:
        expected = list(runner.generate([5, 6], 0, 20, ()))
        made = list(runner.run([Turn(0, [5, 6], 0, 20), Turn(1, [5, 9, 6], 0, 20)]))
        assert tokens_of(made, 0) == expected
        (failed,) = [one for one in made if one.turn == 1]
        assert isinstance(failed.error, ScoreError) and "position 3 are not finite" in str(failed.error)


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    with opened(tmp_path) as checkpoint, running(checkpoint, slots=2) as runner:
        for turns in ([], [Turn(0, [1], 0, 1), Turn(0, [1], 0, 1)], [Turn(2, [1], 0, 1)]):
            with pytest.raises(DeviceError, match="turn"):
                list(runner.run(turns))
        for turn in (Turn(0, [1, 2], 0, 1, drafts=2), Turn(0, [1] * 129, 0, 1), Turn(1, [1], 128, 1)):
            with pytest.raises(DeviceError, match="do not fit into 128 positions"):
                list(runner.run([turn]))
        graph = build_graph(checkpoint.config)
        with pytest.raises(PlanError, match="columns is 3; cpu has kernels for 1, 2, 4, 8, 16"):
            make_plan(checkpoint.config, graph, get("cpu"), columns=3)
        with pytest.raises(PlanError, match="columns is 2; sm_90 has kernels for 1"):
            make_plan(checkpoint.config, graph, get("sm_90"), columns=2)
        with pytest.raises(PlanError, match="at least one slot"):
            make_plan(checkpoint.config, graph, get("cpu"), slots=0)
