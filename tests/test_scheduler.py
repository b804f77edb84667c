"""Many generations on one engine: lists, threads, tasks; joining, leaving and failing at any time, without a wrong token."""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import flashformer
from flashformer import Engine, SamplingParams, Stream
from flashformer.errors import DeviceError, InputError, PlanError
from model_files import make_config, write_folder

SLOTS, CONTEXT = 3, 64
ALL = SamplingParams(max_tokens=20, ignore_eos=True)
ENDLESS = SamplingParams(max_tokens=10_000, ignore_eos=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    small = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
    config = make_config(vocab_size=300, max_position_embeddings=1 << 20, **small)
    return write_folder(tmp_path_factory.mktemp("model"), config)


@pytest.fixture
def engine(folder: Path) -> Iterator[Engine]:
    with flashformer.load(folder, "cpu", CONTEXT, slots=SLOTS) as engine:
        yield engine


def expected(folder: Path, prompts: list[list[int]], params: SamplingParams = ALL) -> list[list[int]]:
    """Each prompt's tokens, alone."""
    with flashformer.load(folder, "cpu", CONTEXT, columns=1) as engine:
        return [[r.token for r in engine.generate(prompt, params)] for prompt in prompts]


def is_idle(engine: Engine) -> bool:
    """Whether every slot is free and nobody waits or runs."""
    s = engine._scheduler
    with s._lock:
        thread = s._thread
    if thread is not None:
        thread.join(60)
    return sorted(s._free) == list(range(SLOTS)) and not s._waiting and not s._active and s._thread is None


# --- lists -----------------------------------------------------------------------------------------------------------------


def test_a_list_gives_what_each_prompt_gives_alone(engine: Engine, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = [[5, 6, i] for i in range(7)]
    made: list[list[int]] = [[] for _ in prompts]
    run, together = engine.runner.run, []
    monkeypatch.setattr(engine.runner, "run", lambda turns: together.append(len(turns)) or run(turns))
    for index, result in engine.generate(prompts, ALL):
        made[index].append(result.token)
    assert made == expected(folder, prompts)
    assert together[0] == SLOTS and sum(together) >= len(prompts)
    assert is_idle(engine)


def test_texts_and_their_own_parameters(engine: Engine) -> None:
    params = [SamplingParams(max_tokens=n + 1, ignore_eos=True) for n in range(3)]
    made: list[list[str]] = [[], [], []]
    for index, result in engine.generate(["one", "two", "three"], params):
        made[index].append(result.text)
    assert [len(m) for m in made] == [1, 2, 3]
    for text, texts, its in zip(["one", "two", "three"], made, params, strict=True):
        assert [r.text for r in engine.generate(text, its)] == texts
    with pytest.raises(InputError, match="3 prompts and 2 SamplingParams"):
        engine.generate(["one", "two", "three"], params[:2])
    with pytest.raises(InputError, match="one prompt has one"):
        engine.generate("one", params)  # type: ignore[call-overload]
    with pytest.raises(InputError, match="token id 300"):
        engine.generate([[1], [300]])
    assert is_idle(engine)


def test_a_shared_seed_is_counted_up(engine: Engine) -> None:
    params = SamplingParams(max_tokens=12, ignore_eos=True, temperature=1.0, seed=2**64 - 1)
    made: list[list[int]] = [[], [], []]
    for index, result in engine.generate([[5, 6]] * 3, params):
        made[index].append(result.token)
    assert len({tuple(m) for m in made}) == 3
    assert [r.token for r in engine.generate([5, 6], params)] == made[0]
    assert [r.token for r in engine.generate([5, 6], SamplingParams(max_tokens=12, ignore_eos=True, temperature=1.0, seed=0))] == made[1]


def test_closing_a_list_ends_all(engine: Engine) -> None:
    results = engine.generate([[i] for i in range(8)], ENDLESS)
    next(results)
    results.close()
    assert is_idle(engine)


# --- slots -----------------------------------------------------------------------------------------------------------------


def test_who_waits_is_served_in_order(folder: Path) -> None:
    with flashformer.load(folder, "cpu", 1 << 18, slots=1) as engine:
        running = engine.stream([1], SamplingParams(max_tokens=200_000, ignore_eos=True))
        next(running)
        waiting = [engine.stream([i], SamplingParams(max_tokens=3, ignore_eos=True)) for i in range(2, 5)]
        assert all(stream._request.slot == -1 for stream in waiting)
        running.cancel()
        ends = [[r.token for r in stream] for stream in waiting]
        begun = [stream._request._began for stream in waiting]
        assert begun == sorted(begun) and [len(e) for e in ends] == [3] * 3
        late = engine.stream([1], SamplingParams(max_tokens=200_000, ignore_eos=True))
        never = engine.stream([2], ALL)
        never.cancel()  # while it waits
        assert list(never) == []
        late.cancel()


def test_a_newcomer_joins_a_launch_that_is_running(folder: Path) -> None:
    with flashformer.load(folder, "cpu", 1 << 18, slots=2) as engine:
        long = engine.stream([1], SamplingParams(max_tokens=200_000, ignore_eos=True))
        next(long)
        made = [r.token for r in engine.generate([5, 6], ALL)]
        assert not long._request.over
        scores = engine.logits([1, 2, 3])
        assert scores.shape == (3, 300) and not long._request.over
        long.cancel()
        assert made == [r.token for r in engine.generate([5, 6], ALL)]
        several = [r.token for r in long]
        again = engine.generate([1], SamplingParams(max_tokens=len(several) + 1, ignore_eos=True))
        assert [r.token for r in again][1:] == several


def test_a_common_prefix_is_copied(engine: Engine, folder: Path) -> None:
    text = [(7 * i) % 300 for i in range(40)]
    list(engine.generate([*text, 1], ALL))
    (slot,) = {i for i, cached in enumerate(engine._scheduler.cached) if cached}
    with engine._scheduler._lock:  # all are there before the first begins
        streams = [engine.stream([*text, last], ALL) for last in (2, 3, 4)]
    made = [[r.token for r in stream] for stream in streams]
    assert made == expected(folder, [[*text, last] for last in (2, 3, 4)])
    assert [stream._request.stats.reused_tokens for stream in streams] == [40] * 3
    assert {stream._request.slot for stream in streams} == set(range(SLOTS)) and streams[0]._request.slot == slot


def test_what_there_are_no_slots_for(folder: Path) -> None:
    with pytest.raises(InputError, match="slots is 0"):
        flashformer.load(folder, "cpu", slots=0)
    with pytest.raises(DeviceError, match="choose a smaller"):
        flashformer.load(folder, "cpu", 1 << 20, slots=1 << 20)
    with pytest.raises(PlanError, match="columns is 5"):
        flashformer.load(folder, "cpu", columns=5)


# --- streams ---------------------------------------------------------------------------------------------------------------


def test_threads(engine: Engine, folder: Path) -> None:
    prompts = [[i, 9] for i in range(8)]
    made: dict[int, list[int]] = {}

    def read(i: int) -> None:
        made[i] = [r.token for r in engine.stream(prompts[i], ALL)]

    threads = [threading.Thread(target=read, args=(i,)) for i in range(len(prompts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert [made[i] for i in range(len(prompts))] == expected(folder, prompts)


def test_tasks(engine: Engine, folder: Path) -> None:
    prompts = [[i, 8] for i in range(8)]

    async def read(prompt: list[int]) -> list[int]:
        async with engine.stream(prompt, ALL) as stream:
            return [r.token async for r in stream]

    async def main() -> list[list[int]]:
        endless = asyncio.create_task(read_endless())
        await asyncio.sleep(0.02)
        made = await asyncio.gather(*(read(prompt) for prompt in prompts))
        endless.cancel()
        with pytest.raises(asyncio.CancelledError):
            await endless
        return made

    async def read_endless() -> None:
        while True:
            async for _ in engine.stream([1], ENDLESS):
                pass

    assert asyncio.run(main()) == expected(folder, prompts)
    assert is_idle(engine)


def test_breaking_off(engine: Engine) -> None:
    with engine.stream([5], ENDLESS) as stream:
        next(stream)
    assert len(list(stream)) < CONTEXT  # what was there already
    assert is_idle(engine)
    stream.cancel()


def test_a_cancellation_between_two_launches(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with flashformer.load(folder, "cpu", 1 << 18, slots=2) as engine:
        scheduler, run = engine._scheduler, engine.runner.run
        stream = engine.stream([1], SamplingParams(max_tokens=200_000, ignore_eos=True))
        next(stream)
        settle, launched = scheduler._settle, []

        def settled(*arguments: object) -> None:
            settle(*arguments)
            if not stream._request.cancelled:
                scheduler.cancel(stream._request)
                monkeypatch.setattr(engine.runner, "run", lambda turns: launched.append(len(turns)) or run(turns))

        monkeypatch.setattr(scheduler, "_settle", settled)
        assert len(list(engine.generate([6], ALL))) == ALL.max_tokens
        assert launched == [1]


# --- errors ----------------------------------------------------------------------------------------------------------------


def test_an_error_in_one_sequence_leaves_the_others_alone(folder: Path, tmp_path: Path) -> None:
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.embed_tokens.weight"][299] = np.nan
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.warns(UserWarning, match="not finite"), flashformer.load(tmp_path, "cpu", CONTEXT, slots=SLOTS) as engine:
        good, bad = [[5, 6], [7, 8]], [5, 299, 6]
        wanted = expected(folder, good)
        made: list[list[int]] = [[], [], []]
        for index, result in engine.generate([good[0], bad, good[1]], ALL):
            made[index].append(result.token)
            if index == 1:
                assert result.finish == "error" and "position 3 are not finite" in str(result.error)
        assert made == [wanted[0], [-1], wanted[1]]
        stream = engine.stream(bad, ALL)
        with pytest.raises(DeviceError, match="not finite"):
            next(stream)
        assert [r.token for r in engine.generate(good[0], ALL)] == wanted[0] and is_idle(engine)


def test_a_kernel_that_fails_is_told_to_all(engine: Engine, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(engine.runner, "run", lambda turns: (_ for _ in ()).throw(DeviceError("gave up")))
        streams = [engine.stream([i], ALL) for i in range(5)]
        for stream in streams:
            with pytest.raises(DeviceError, match="gave up"):
                list(stream)
        patch.setattr(engine.runner, "run", lambda turns: iter(()))
        with pytest.raises(AttributeError):  # what no one has foreseen does not hang, either
            list(engine.generate([5], ALL))
    assert is_idle(engine) and not any(engine._scheduler.cached)
    assert [r.token for r in engine.generate([5], ALL)] == expected(folder, [[5]])[0]


def test_closing_ends_everything(folder: Path) -> None:
    engine = flashformer.load(folder, "cpu", CONTEXT, slots=2)
    streams = [engine.stream([i], ENDLESS) for i in range(6)]
    engine.close()
    for stream in streams:
        try:
            list(stream)
        except InputError as error:
            assert "closed" in str(error)
    with pytest.raises(InputError, match="closed"):
        engine.stream([1])


# --- everything at once ----------------------------------------------------------------------------------------------------


def test_ten_thousand_joins_leaves_and_cancels(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No wrong token, no slot lost, no hang: streams of known answers come, are read, are left and are cancelled at random."""
    monkeypatch.setenv("FF_THREADS", "1")
    rng = random.Random(0)
    prompts = [[rng.randrange(300) for _ in range(rng.randint(1, 30))] for _ in range(12)]
    prompts += [[*prompt[: len(prompt) // 2], 7] for prompt in prompts]
    with flashformer.load(folder, "cpu", CONTEXT, slots=SLOTS, columns=4) as engine:
        params = [
            SamplingParams(max_tokens=rng.randint(1, 30), ignore_eos=True, temperature=rng.choice([0, 1.0]), seed=i, repetition_penalty=1.1)
            for i in range(len(prompts))
        ]
        answers = [[r.token for r in engine.generate(prompt, its)] for prompt, its in zip(prompts, params, strict=True)]
        threads = threading.active_count()
        alive: list[tuple[Stream, list[int], int]] = []
        finished = cancelled = 0
        for _ in range(10_000):
            action = rng.random()
            if not alive or (action < 0.3 and len(alive) < 2 * SLOTS):
                which = rng.randrange(len(prompts))
                alive.append((engine.stream(prompts[which], params[which]), answers[which], 0))
                continue
            at = rng.randrange(len(alive))
            stream, answer, read = alive.pop(at)
            if action < 0.4:
                stream.cancel()
                rest = [r.token for r in stream]
                assert answer[read : read + len(rest)] == rest
                cancelled += 1
            elif action < 0.5:
                assert [r.token for r in stream] == answer[read:]
                finished += 1
            else:
                assert next(stream).token == answer[read]
                if read + 1 < len(answer):
                    alive.append((stream, answer, read + 1))
        for stream, answer, read in alive:
            assert [r.token for r in stream] == answer[read:]
        assert finished > 500 and cancelled > 500 and is_idle(engine)
        assert threading.active_count() <= threads
