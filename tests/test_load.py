"""Matrices on their way to the GPU, with a GPU that is only played: every piece arrives, whole, and nothing is overwritten early."""

from __future__ import annotations

import ctypes
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from flashformer.backends.cuda import RandomWeights
from flashformer.backends.cuda.codegen import place_vectors
from flashformer.backends.cuda.pack import SLOTS, TYPES, Packer, gather_vectors
from flashformer.checkpoint import check_tensors, open_checkpoint
from flashformer.config import parse_config, read_config
from flashformer.errors import CheckpointError, DeviceError, InputError
from flashformer.export import config_mapping
from flashformer.formats import choose, encode
from flashformer.models import build_graph
from flashformer.plan import Plan, make_plan
from flashformer.shapes import SHAPES, shape
from flashformer.tape import lay_tapes, tile_offsets
from flashformer.targets import get
from model_files import make_config, write_folder
from quant_models import FORMS, QuantizedCheckpoint
from test_results import script

NUMPY_TYPES = {number: {"bfloat16": np.dtype(ml_dtypes.bfloat16)}.get(name) or np.dtype(name) for name, number in TYPES.items()}


class FakeContext:
    """A GPU whose memory is the host's, and whose streams do nothing until somebody waits for them."""

    def __init__(self) -> None:
        self.memory: dict[int, np.ndarray] = {}
        self.pinned: dict[int, np.ndarray] = {}
        self.pinned_peak = 0
        self.stream: list[Callable[[], object]] = []
        self.placed: dict[int, list[tuple[int, np.ndarray]]] = {}  # address of a matrix's flag -> (first row, rows) in order
        self.tables: dict[int, int] = {}  # the same -> the first tile's offset
        self.coded: dict[int, list[np.ndarray]] = {}  # address of a stage's tile offsets -> codes, matrix after matrix
        self.scaled: dict[int, list[np.ndarray]] = {}  # the same of scale offsets -> bytes of scales
        self.divided: dict[int, list[np.ndarray]] = {}  # the same -> bytes of divisors, which lie behind them
        self.expanded: list[int] = []  # values that became 16-bit ones

    def new_stream(self) -> list[Callable[[], object]]:
        return []

    def allocate(self, nbytes: int, what: str, fill: int | None = None) -> int:
        memory = np.full(nbytes, 0xEE if fill is None else fill, np.uint8)
        self.memory[memory.ctypes.data] = memory
        return memory.ctypes.data

    def free(self, address: int) -> None:
        del self.memory[address]

    def allocate_pinned(self, nbytes: int, what: str) -> tuple[int, np.ndarray]:
        memory = np.full(nbytes, 0xEE, np.uint8)
        self.pinned[memory.ctypes.data] = memory
        self.pinned_peak = max(self.pinned_peak, sum(map(len, self.pinned.values())))
        return memory.ctypes.data, memory

    def free_pinned(self, address: int) -> None:
        del self.pinned[address]

    def upload(self, array: np.ndarray, what: str) -> int:
        address = self.allocate(array.nbytes, what)
        self.memory[address][:] = array.reshape(-1).view(np.uint8)
        return address

    def download(self, address: int, array: np.ndarray, what: str) -> np.ndarray:
        ctypes.memmove(array.ctypes.data, address, array.nbytes)
        return array

    def function(self, module: Any, name: str) -> str:
        return name.removeprefix("flashformer_")

    def copy_async(self, to: int, source: int, nbytes: int, stream: list[Callable[[], object]]) -> None:
        stream.append(lambda: ctypes.memmove(to, source, nbytes))

    def launch(
        self, function: str, grid: int, threads: int, arguments: tuple[Any, ...], stream: list[Callable[[], object]] | None = None
    ) -> None:
        copies = [type(a).from_buffer_copy(a) for a in arguments]  # as the driver does: the caller may change its own
        (self.stream if stream is None else stream).append(lambda: getattr(self, f"_{function}")(*copies))

    def event(self, stream: list[Callable[[], object]]) -> tuple[list[Callable[[], object]], Callable[[], object]]:
        stream.append(lambda: None)
        return stream, stream[-1]

    def finish(self, event: tuple[list[Callable[[], object]], Callable[[], object]]) -> None:
        stream, marker = event
        while marker in stream:
            stream.pop(0)()

    def wait(self) -> None:
        while self.stream:
            self.stream.pop(0)()

    def _values(self, source: int, count: int, kind: int, strange: int) -> np.ndarray:
        raw = (ctypes.c_uint8 * (count * NUMPY_TYPES[kind].itemsize)).from_address(source)
        values = np.frombuffer(raw, NUMPY_TYPES[kind]).astype(np.float32)
        if not np.isfinite(values).all():
            ctypes.c_uint32.from_address(strange).value = 1
        return values

    def _pack(self, job: Any) -> None:
        place = job.place
        values = self._values(job.source, place.rows * place.columns, job.type, job.strange)
        self.placed.setdefault(job.strange, []).append((place.first_row, values.reshape(place.rows, place.columns)))
        self.tables[job.strange] = ctypes.c_uint64.from_address(place.tile_offset).value

    def _bytes(self, address: int, *shape: int) -> np.ndarray:
        return np.frombuffer((ctypes.c_uint8 * int(np.prod(shape))).from_address(address), np.uint8).reshape(shape).copy()

    def _pack_codes(self, job: Any) -> None:
        place = job.place
        self.coded.setdefault(place.tile_offset, []).append(self._bytes(job.codes, place.rows, place.columns))

    def _pack_scales(self, job: Any) -> None:
        size = job.groups * job.scale_values * job.scale_bytes
        to = self.divided if job.place.tape else self.scaled
        to.setdefault(job.scale_offset, []).append(self._bytes(job.scales, job.place.rows, size))

    def _expand(self, job: Any) -> None:
        self.expanded.append(job.values)

    def _convert(self, source: Any, to: Any, count: Any, kind: Any, half: Any, strange: Any) -> None:
        values = self._values(source.value, count.value, kind.value, strange.value)
        kept = values.astype(np.float16 if half.value else ml_dtypes.bfloat16)
        ctypes.memmove(to.value, kept.ctypes.data, kept.nbytes)

    def _random(self, to: Any, pairs: Any, first: Any, seed: Any, scale: Any) -> None:
        from flashformer.backends.cuda.random_weights import draw

        values = draw(2 * first.value, 2 * pairs.value, seed.value, np.float32(scale.value))
        ctypes.memmove(to.value, values.ctypes.data, values.nbytes)


def plan_of(config: Any) -> Plan:
    return make_plan(config, build_graph(config), get("sm_90"), 64, workers=3)


def pack(plan: Plan, weights: Any, progress: Any = None, slot_bytes: int | None = None) -> tuple[FakeContext, np.ndarray, list[str]]:
    """The GPU afterwards, the embedding table as raw 16-bit values, and the names that were reported."""
    context, told = FakeContext(), []
    packer = Packer(context, None, plan, weights, progress or (lambda *step: told.append(step)))  # type: ignore[arg-type]
    packer.slot_bytes = slot_bytes or packer.slot_bytes
    table = np.zeros(plan.config.vocab_size * plan.config.hidden_size + 1, np.uint16)
    tape = lay_tapes(plan)
    strange = packer.run(tape, 0, table.ctypes.data)
    assert not context.memory and not context.pinned
    if progress is None:
        total = told[0][2]
        assert told[0][1] == 0 and told[-1][1] == total and all(step[1] < total for step in told[:-1])
    indices = [i for i, stage in enumerate(plan.stages) if stage.linear]
    expected = [int(tile_offsets(plan, tape, i)[0, 0]) for i in indices for _ in plan.stages[i].linear.blocks]  # type: ignore[union-attr]
    assert list(context.tables.values()) == expected
    return context, table[:-1], strange


def assert_all_arrived(plan: Plan, weights: Any, context: FakeContext, table: np.ndarray, dtype: Any = ml_dtypes.bfloat16) -> None:
    """Every matrix of every stage in order, each row once, and the embedding table."""
    names = [block.weight for stage in plan.stages if stage.linear for block in stage.linear.blocks]
    assert len(context.placed) == len(names)
    for name, parts in zip(names, context.placed.values(), strict=True):
        assert all(first % 8 == 0 for first, _ in parts)
        assert np.array_equal([first for first, _ in parts], np.cumsum([0, *(len(rows) for _, rows in parts)])[:-1])
        assert np.array_equal(np.concatenate([rows for _, rows in parts]), weights.read(name).astype(np.float32)), name
    assert np.array_equal(table.view(dtype), weights.read(plan.embedding).astype(dtype).reshape(-1))


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_every_row_arrives_once(tmp_path: Path, dtype: str, tied: bool) -> None:
    changes = {"vocab_size": 1003, "intermediate_size": 341, "hidden_size": 72, "tie_word_embeddings": tied, "torch_dtype": dtype}
    folder = write_folder(tmp_path, make_config(**changes), dtype=dtype)
    with open_checkpoint(folder) as weights:
        plan = plan_of(weights.config)
        context, table, strange = pack(plan, weights, slot_bytes=3072 * weights.read(plan.embedding).itemsize)  # more pieces than slots
        assert sum(map(len, context.placed.values())) > 3 * SLOTS
        assert_all_arrived(plan, weights, context, table, np.float16 if dtype == "float16" else ml_dtypes.bfloat16)
        assert strange == []


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_random_weights_need_no_host_memory(tied: bool) -> None:
    config = parse_config(make_config(vocab_size=1000, tie_word_embeddings=tied))
    plan, weights = plan_of(config), RandomWeights(config)
    context, table, _ = pack(plan, weights, slot_bytes=16384)
    assert_all_arrived(plan, weights, context, table)
    assert context.pinned_peak == 0


@pytest.mark.parametrize("name", ["Q4_1", "int8 rows", "fp8 blocks", "MXFP4", "NVFP4"])
def test_codes_and_scales_arrive_once(tmp_path: Path, name: str) -> None:
    """Of all matrices, and those of the embedding become a table, too."""
    folder = write_folder(tmp_path, make_config(vocab_size=1003, intermediate_size=352, hidden_size=256, tie_word_embeddings=True))
    with open_checkpoint(folder) as plain:
        graph = build_graph(plain.config)
        names = [w for w, weight in graph.weights().items() if len(weight.shape) == 2]
        weights = QuantizedCheckpoint(plain, {w: FORMS[name][0](plain.read(w).astype(np.float32)) for w in names})
        plan = make_plan(plain.config, graph, get("sm_90"), 64, workers=3, formats=choose(weights, names))
        context, made = FakeContext(), []
        packer = Packer(context, None, plan, weights, lambda *step: made.append(step[1:]))  # type: ignore[arg-type]
        packer.slot_bytes = 16384  # more pieces than slots
        assert packer.run(lay_tapes(plan), 0, 1) == []
        assert made[-1][0] == made[-1][1] and sum(context.expanded) == 1003 * 256
        stages = [stage for stage in plan.stages if stage.linear and stage.geometry]
        for stage, codes, scales in zip(stages, context.coded.values(), context.scaled.values(), strict=True):
            assert stage.linear is not None and stage.geometry is not None
            expected = [encode(weights.forms[b.weight], stage.geometry.format, b.weight) for b in stage.linear.blocks]
            assert np.array_equal(np.concatenate(codes), np.concatenate([e.codes for e in expected]))
            stored = [np.ascontiguousarray(e.scales).reshape(len(e.scales), -1).view(np.uint8) for e in expected]
            assert np.array_equal(np.concatenate(scales), np.concatenate(stored))
        divisors = [np.concatenate(parts).view(np.float32)[:, 0] for parts in context.divided.values()]
        for stage, found in zip(stages if name == "NVFP4" else [], divisors, strict=True):
            assert stage.linear is not None
            of = [weights.forms[b.weight] for b in stage.linear.blocks]
            assert np.array_equal(found, np.concatenate([np.full(len(form.codes), form.divisor, np.float32) for form in of]))  # type: ignore[union-attr]


@pytest.mark.parametrize("name", SHAPES)
def test_host_memory_is_bounded(name: str) -> None:
    plan = plan_of(shape(name))
    packer = Packer(FakeContext(), None, plan, None, lambda *_: None)  # type: ignore[arg-type]
    largest = max(2 * int(np.prod(s)) for s in plan.weights.values())
    # The slots, and what each thread holds of an expanded piece.
    assert 2 * SLOTS * packer.slot_bytes <= 2 * largest + 100e6
    assert packer.slot_bytes >= 8 * 4 * max(s[1] for s in plan.weights.values() if len(s) == 2)


class Broken:
    """A checkpoint, some of whose reading goes wrong."""

    def __init__(self, weights: Any, change: Callable[[str, slice | None, np.ndarray], np.ndarray]) -> None:
        self.weights, self.change = weights, change

    def read(self, name: str, rows: slice | None = None) -> np.ndarray:
        return self.change(name, rows, self.weights.read(name, rows))


def test_values_that_are_not_finite_are_reported(tmp_path: Path) -> None:
    names = ("model.layers.1.mlp.up_proj.weight", "model.embed_tokens.weight")

    def damage(name: str, rows: slice | None, values: np.ndarray) -> np.ndarray:
        values = values.copy()
        if name in names:
            values[-1, -1] = np.nan
        return values

    with open_checkpoint(write_folder(tmp_path, make_config())) as weights:
        plan = plan_of(weights.config)
        assert pack(plan, Broken(weights, damage))[2] == list(names)


def test_vectors_that_are_not_finite_are_reported(tmp_path: Path) -> None:
    names = ("model.layers.0.input_layernorm.weight", "model.layers.1.self_attn.k_proj.bias", "model.norm.weight")

    def damage(name: str, rows: slice | None, values: np.ndarray) -> np.ndarray:
        return np.full_like(values, np.inf) if name in names else values

    with open_checkpoint(write_folder(tmp_path, make_config("Qwen2ForCausalLM"))) as weights:
        plan = plan_of(weights.config)
        sound, none = gather_vectors(plan, place_vectors(plan), weights)
        assert np.isfinite(sound).all() and none == []
        found, strange = gather_vectors(plan, place_vectors(plan), Broken(weights, damage))
        assert sorted(strange) == sorted(names)
        assert np.isinf(found).sum() == 2 * plan.config.hidden_size + plan.config.num_kv_heads * plan.config.head_dim


def test_errors_end_all_reading(tmp_path: Path) -> None:
    def fail(name: str, rows: slice | None, values: np.ndarray) -> np.ndarray:
        if rows is not None and rows.stop > 100:
            raise CheckpointError("the disk is gone")
        return values

    def interrupt(what: str, done: int, total: int) -> None:
        if done:
            raise KeyboardInterrupt

    with open_checkpoint(write_folder(tmp_path, make_config())) as weights:
        plan, threads = plan_of(weights.config), set(threading.enumerate())
        with pytest.raises(CheckpointError, match="the disk is gone"):
            pack(plan, Broken(weights, fail), slot_bytes=16384)
        assert threads.issuperset(threading.enumerate())
        with pytest.raises(CheckpointError, match=r"q_proj\.weight has values of type int8; bfloat16, float16, float32 are supported"):
            pack(plan, Broken(weights, lambda name, rows, values: values.astype(np.int8)))
        with pytest.raises(KeyboardInterrupt) as caught:
            pack(plan, weights, interrupt, slot_bytes=16384)
        assert threads.issuperset(threading.enumerate()), caught  # though the traceback still holds all frames


# --- The benchmark ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SHAPES)
def test_the_configuration_of_a_shape_is_read_back(tmp_path: Path, name: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config_mapping(shape(name))))
    assert read_config(tmp_path) == shape(name)


def test_the_checkpoint_of_the_benchmark(tmp_path: Path) -> None:
    config = parse_config(make_config(hidden_size=200, vocab_size=1003))
    told: list[tuple[str, int, int]] = []
    nbytes = script("load").write_checkpoint(config, tmp_path, lambda *step: told.append(step), shard_bytes=300_000)
    assert told[-1][1:] == (nbytes, nbytes) and len(list(tmp_path.glob("*.safetensors"))) > 3
    with open_checkpoint(tmp_path) as checkpoint:
        weights = build_graph(config).weights()
        check_tensors(checkpoint, weights)
        values = [checkpoint.read(name).astype(np.float32).reshape(-1) for name in weights]
    assert nbytes == 2 * sum(map(len, values))
    whole = np.concatenate(values)
    assert np.isfinite(whole).all() and abs(whole).max() < 2 and 0.1 < whole.std() < 0.2


def test_what_the_measurements_come_to(tmp_path: Path) -> None:
    load = script("load")
    config = shape("llama-3.2-1b")

    def child(seconds: float, pack: float, host: int) -> dict[str, Any]:
        return {"seconds": {part: pack if part == "pack" else seconds for part in load.PARTS}, "host": host}

    loads = [child(9, 9, 9 * 10**9), child(0.2, 0.1, 7 * 10**8), child(0.1, 0.2, 8 * 10**8), child(0.3, 0.4, 6 * 10**8)]
    record = load.make_record("llama-3.2-1b", config, loads, {"gb_s": 50.0, "own": 3 * 10**8}, "Test GPU")
    assert record.bytes == 2_471_628_800 and record.first["compile"] == 9 and len(record.cached) == 3
    assert record.pack_gb_s == pytest.approx(12.358144) and record.fraction_of_copy == pytest.approx(0.24716288)
    assert record.start_seconds == pytest.approx(0.8)  # four parts, neither Python's start nor packing
    assert record.host_bytes == 5 * 10**8 and record.host_limit_bytes == 2 * 128256 * 2048 * 2 + 10**8
    for changed in (record, replace(record, model="other"), replace(record, gpu="newer")):
        load.keep(changed, tmp_path / "results" / "load.json")
    kept = json.loads((tmp_path / "results" / "load.json").read_text())
    assert [(r["model"], r["gpu"]) for r in kept] == [("other", "Test GPU"), ("llama-3.2-1b", "newer")]
    assert "which packing reaches 25%" in str(load.table(record).caption)


def test_a_folder_without_room_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load = script("load")
    monkeypatch.setattr(load.shutil, "disk_usage", lambda folder: SimpleNamespace(free=10**9))
    with pytest.raises(InputError, match=r"room for 1\.0 GB, the checkpoint needs 2\.5; choose another --folder"):
        load.write_checkpoint(shape("llama-3.2-1b"), tmp_path, lambda *_: None)
    assert not list(tmp_path.iterdir())


def test_what_one_load_measures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load = script("load")
    runner = SimpleNamespace(generate=lambda tokens, start, count, stop: iter([7] * count), context=SimpleNamespace(pinned_peak=10**9))

    clock = [100.0]

    @contextmanager
    def fake(folder: Path, device: str, progress: Any) -> Iterator[Any]:
        steps = [("compiling", 0, 1), ("compiling", 1, 1), *(("packing weights", done, 10) for done in (0, 3, 7, 10))]
        for step in steps[: 2 if folder.name == "stops" else 6]:
            clock[0] += 0.002
            progress(*step)
        yield SimpleNamespace(runner=runner)

    monkeypatch.setattr(load.flashformer, "load", fake)
    monkeypatch.setattr(load.time, "monotonic", lambda: clock[0])
    found = load.measure_load(tmp_path, 95.0)
    assert list(found["seconds"]) == list(load.PARTS)
    expected = {"python": 5, "open and plan": 0.002, "compile": 0.002, "claim": 0.002, "pack": 0.006, "rest": 0}
    assert found["seconds"] == pytest.approx(expected)
    assert 10**9 + 10**7 < found["host"] < 10**10
    with pytest.raises(DeviceError, match="that is not how a model is loaded"):
        load.measure_load(tmp_path / "stops", clock[0])
