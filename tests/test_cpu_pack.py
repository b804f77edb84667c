"""Packing for the CPU: every value in its place, once; and what was packed is found again, or made again."""

from __future__ import annotations

import errno
import json
import os
import tracemalloc
import warnings
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from flashformer.backends import no_progress
from flashformer.backends.cpu.layout import Layout, lay_out
from flashformer.backends.cpu.pack import FACTS, WEIGHTS, Tools, allocate, packed_weights
from flashformer.build import Cache
from flashformer.checkpoint import Checkpoint, open_checkpoint
from flashformer.errors import CheckpointError
from flashformer.formats import choose, encode
from flashformer.models import build_graph
from flashformer.plan import Plan, make_plan
from flashformer.targets import get
from model_files import make_config, write_folder
from quant_models import FORMS, QuantizedCheckpoint

NUMPY = {"bfloat16": np.dtype(ml_dtypes.bfloat16), "float16": np.dtype(np.float16), "float32": np.dtype(np.float32)}
ODD: dict[str, Any] = {"architecture": "Qwen3ForCausalLM", "hidden_size": 200, "head_dim": 24, "intermediate_size": 341, "vocab_size": 1003}


class Made:
    """A model, laid out for the CPU."""

    def __init__(self, folder: Path, workers: int = 2, dtype: str = "bfloat16", source: str = "bfloat16", **changes: Any) -> None:
        architecture = changes.pop("architecture", "LlamaForCausalLM")
        write_folder(folder, make_config(architecture, torch_dtype=dtype, **changes), dtype=source)
        self.checkpoint: Checkpoint = open_checkpoint(folder)
        self.plan: Plan = make_plan(self.checkpoint.config, build_graph(self.checkpoint.config), get("cpu"), 64, workers)
        self.layout: Layout = lay_out(self.plan)
        self.tools = Tools(self.plan)

    def pack(self) -> tuple[np.ndarray, list[str]]:
        """Packed into fresh memory."""
        memory = allocate(self.layout.nbytes)
        return memory, self.tools.pack(memory, self.layout, self.plan.config.dtype, self.checkpoint, no_progress)

    def packed_weights(self) -> tuple[np.ndarray, list[str]]:
        """Packed, or from the cache."""
        return packed_weights(self.plan, self.layout, self.checkpoint, self.tools, no_progress)


def line_order(dtype: str) -> np.ndarray:
    """Column of each value of a line: bfloat16 halves alternate (`place` in prelude.h)."""
    return np.arange(32).reshape(2, 16).T.reshape(-1) if dtype == "bfloat16" else np.arange(32)


def unpack(memory: np.ndarray, layout: Layout, dtype: str, tile_rows: int) -> list[tuple[str, np.ndarray]]:
    """Every matrix read back, float32 [rows, columns]; what is left over must be zero."""
    values = memory.view(np.uint16).copy()
    found = []
    for place in layout.placements:
        line = np.arange(place.geometry.columns // 32)[:, None] * (tile_rows * 32) + np.argsort(line_order(dtype))
        at = (place.row_offset.astype(np.int64) // 2)[:, None] + line.reshape(-1)
        rows = values[at].view(NUMPY[dtype]).astype(np.float32)
        groups = -(-place.columns // place.column_group)
        stored = rows[:, : groups * place.column_stride].reshape(len(rows), groups, place.column_stride)[:, :, : place.column_group]
        found.append((place.weight, stored.reshape(len(rows), -1)))
        written = np.zeros(rows.shape[1], bool)
        written[: groups * place.column_stride].reshape(groups, -1)[:, : place.column_group] = True
        assert not rows[:, ~written].any()
        values[at] = 0
    assert not values.any()
    return found


@pytest.mark.parametrize("workers", [1, 3, 7])
@pytest.mark.parametrize("source", ["same", "float32"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("tied", [True, False])
def test_every_value_is_in_its_place(tmp_path: Path, workers: int, source: str, dtype: str, tied: bool) -> None:
    made = Made(tmp_path, workers, dtype, dtype if source == "same" else source, tie_word_embeddings=tied, **ODD)
    memory, strange = made.pack()
    assert strange == [] and memory.ctypes.data % 64 == 0
    found = unpack(memory, made.layout, dtype, made.plan.target.tile_rows)
    matrices = [name for name, shape in made.plan.weights.items() if len(shape) == 2]
    assert sorted(name for name, _ in found) == sorted(matrices)  # a tied embedding once
    for name, values in found:
        assert np.array_equal(values, made.checkpoint.read(name).astype(np.float32)), name
    assert len(made.layout.embedding) == (workers if tied else 1)


@pytest.mark.parametrize("name", ["Q4_1", "Q6_K", "int8 zeros", "NF4", "fp8 blocks", "int4 rows", "MXFP4", "NVFP4"])
def test_every_code_and_scale_is_in_its_place(tmp_path: Path, name: str) -> None:
    """Read back as formats.h says: planes of four columns of four rows, then the scales of each group."""
    made = Made(tmp_path, 3, hidden_size=192, intermediate_size=320, head_dim=48, tie_word_embeddings=name != "NF4", vocab_size=291)
    graph = build_graph(made.checkpoint.config)
    forms = {w: FORMS[name][0](made.checkpoint.read(w).astype(np.float32)) for w, shape in made.plan.weights.items() if len(shape) == 2}
    made.checkpoint = QuantizedCheckpoint(made.checkpoint, forms)
    made.plan = make_plan(made.plan.config, graph, get("cpu"), 64, 3, choose(made.checkpoint, made.plan.weights))
    made.layout = lay_out(made.plan)
    memory, strange = made.pack()
    assert strange == [] and sorted(place.weight for place in made.layout.placements) == sorted(forms)
    left = memory.copy()
    for place in made.layout.placements:
        f, columns = place.geometry.format, np.arange(place.columns)
        encoded = encode(forms[place.weight], f, place.weight)
        assert f.name == FORMS[name][1] or f.group == 0
        first = place.row_offset.astype(np.int64)[:, None]
        if f.bits == 8:
            at = first + columns // 4 * 16 + columns % 4
            codes = memory[at]
        else:
            plane = columns % 32 // 4
            at = first + columns // 32 * 64 + columns % 4 * 4 + plane // 2
            codes = memory[at] >> (plane % 2 * 4) & 15
        assert np.array_equal(codes, encoded.codes)
        size = encoded.scales.itemsize
        values = np.arange(encoded.scales.shape[1] * encoded.scales.shape[2])
        where = place.scale_offset.astype(np.int64)[:, None, None] + values[:, None] * 4 * size + np.arange(size)
        assert np.array_equal(memory[where].reshape(len(first), -1).view(encoded.scales.dtype), encoded.scales.reshape(len(first), -1))
        left[at] = 0
        left[where] = 0
        if encoded.divisors is not None:  # behind all scales of the tile
            where = place.divisor_offset.astype(np.int64)[:, None] + np.arange(4)
            assert np.array_equal(memory[where].view(np.float32)[:, 0], encoded.divisors)
            left[where] = 0
    assert not left.any()


def test_all_kinds_of_values_are_converted_as_numpy_does(tmp_path: Path) -> None:
    """Every 16-bit pattern, and float32 values at ties, limits and below the normal range."""
    from safetensors.numpy import load_file, save_file

    every = np.arange(1 << 16, dtype=np.uint16)
    random = np.random.default_rng(0).integers(0, 1 << 32, 200_000, dtype=np.uint64).astype(np.uint32).view(np.float32)
    halves = (every.astype(np.uint32) << 16 | 0x8000).view(np.float32)  # ties of bfloat16
    with np.errstate(all="ignore"):
        small = (every.view(np.float16).astype(np.float64) * 1.5).astype(np.float32)  # ties of float16, and what overflows it
        for name, values in {
            "bfloat16": every.view(ml_dtypes.bfloat16),
            "float16": every.view(np.float16),
            "float32": np.concatenate((random, halves, small)),
        }.items():
            columns = 64
            rows = -(-len(values) // columns)
            for dtype in ("bfloat16", "float16"):
                folder = tmp_path / f"{name}-{dtype}"
                made = Made(folder, 2, dtype, name, vocab_size=max(rows, 8), hidden_size=columns)
                tensors = load_file(folder / "model.safetensors")
                table = np.resize(values, (rows, columns))
                tensors["lm_head.weight"] = table
                save_file(tensors, folder / "model.safetensors")
                made.checkpoint = open_checkpoint(folder)
                memory, strange = made.pack()
                assert strange == ["lm_head.weight"]
                stored = dict(unpack(memory, made.layout, dtype, made.plan.target.tile_rows))["lm_head.weight"]
                expected = table.astype(np.float32).astype(NUMPY[dtype]).astype(np.float32)
                assert np.array_equal(stored, expected, equal_nan=True), (name, dtype)


def test_what_was_packed_is_found_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = Made(tmp_path / "model", **ODD)
    expected, _ = made.pack()
    first, _ = made.packed_weights()
    assert np.array_equal(first, expected) and isinstance(first, np.memmap) and not first.flags.writeable

    def pack(*_: object) -> list[str]:
        raise AssertionError("packed again")

    monkeypatch.setattr(Tools, "pack", pack)
    again, _ = made.packed_weights()
    assert np.array_equal(again, expected)
    file = tmp_path / "model" / "model.safetensors"
    os.utime(file, ns=(0, file.stat().st_mtime_ns + 1))
    with pytest.raises(AssertionError, match="packed again"):  # the file may be another one now
        made.packed_weights()


def test_a_damaged_entry_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FF_CACHE_DIR", str(tmp_path / "cache"))
    made = Made(tmp_path / "model", **ODD)
    expected = made.packed_weights()[0].copy()
    (entry,) = [e for e in Cache(tmp_path / "cache").entries() if e.kind == "cpu-weights"]
    with (entry.path / WEIGHTS).open("r+b") as file:  # as after a power failure
        file.seek(len(expected) // 2)
        file.write(bytes([file.read(1)[0] ^ 1]))
    assert np.array_equal(made.packed_weights()[0], expected)
    facts = entry.path / FACTS
    facts.write_bytes(bytes(facts.stat().st_size))
    assert np.array_equal(made.packed_weights()[0], expected)
    assert json.loads(facts.read_text())["strange"] == []


def test_a_cache_that_cannot_be_used_breaks_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = Made(tmp_path / "model", **ODD)
    expected, _ = made.pack()

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", full)
        with pytest.warns(UserWarning, match=r"packed weights cannot be kept.*No space left.*free some space"):
            memory, _ = made.packed_weights()
        assert np.array_equal(memory, expected)
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("FF_CACHE_DIR", str(tmp_path / "file"))
    with pytest.warns(UserWarning, match=r"packed weights cannot be kept.*FF_CACHE_DIR"):
        memory, _ = made.packed_weights()
    assert np.array_equal(memory, expected)


def test_strange_values_are_told_at_every_start(tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    made = Made(tmp_path, source="float32")
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = np.nan
    tensors["lm_head.weight"][-1, -1] = np.inf
    save_file(tensors, tmp_path / "model.safetensors")
    made.checkpoint = open_checkpoint(tmp_path)
    for _ in range(2):
        assert made.packed_weights()[1] == ["model.layers.1.mlp.up_proj.weight", "lm_head.weight"]


def test_progress_and_little_memory(tmp_path: Path) -> None:
    """Packing needs the packed weights and little more: numpy allocates nothing of a matrix's size."""
    made = Made(tmp_path, source="float32", hidden_size=1024, intermediate_size=4096, vocab_size=8192)
    seen: list[tuple[str, int, int]] = []
    memory = allocate(made.layout.nbytes)
    tracemalloc.start()
    try:
        made.tools.pack(memory, made.layout, "bfloat16", made.checkpoint, lambda *told: seen.append(told))
        assert tracemalloc.get_traced_memory()[1] < 4 << 20 < made.layout.nbytes // 10
    finally:
        tracemalloc.stop()
    done = [now for _, now, _ in seen]
    assert len(done) > 10 and done == sorted(done) and done[0] == 0 and seen[-1][1] == seen[-1][2]
    assert {what for what, _, _ in seen} == {"packing weights"}


def test_an_interrupt_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FF_CACHE_DIR", str(tmp_path / "cache"))
    made = Made(tmp_path / "model")

    def interrupt(what: str, done: int, total: int) -> None:
        if done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        packed_weights(made.plan, made.layout, made.checkpoint, made.tools, interrupt)
    assert [e.kind for e in Cache(tmp_path / "cache").entries()] == ["cpu-tools"]
    assert not list((tmp_path / "cache" / "cpu-weights").iterdir())


def test_other_types_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = Made(tmp_path)
    monkeypatch.setattr(made.checkpoint, "read", lambda name, rows=None: np.zeros((1, 64), np.float64))
    with pytest.raises(CheckpointError, match="values of type float64; bfloat16, float16, float32 are supported"):
        made.pack()


def test_the_entry_says_what_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FF_CACHE_DIR", str(tmp_path / "cache"))
    made = Made(tmp_path / "model")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made.packed_weights()
    (entry,) = [e for e in Cache(tmp_path / "cache").entries() if e.kind == "cpu-weights"]
    facts = json.loads((entry.path / FACTS).read_text())
    assert facts == {"checksum": made.tools.checksum(made.pack()[0]), "strange": []}
    assert entry.nbytes >= made.layout.nbytes


def test_the_checksum_sees_every_word_and_its_place(tmp_path: Path) -> None:
    tools = Made(tmp_path).tools
    memory = allocate(20 << 20)
    memory[:] = np.random.default_rng(0).integers(0, 256, len(memory), dtype=np.uint8)
    words = memory.view(np.uint64)
    first = tools.checksum(memory)
    for a, b in ((0, 1), (3, 64 + 3), (5, len(words) - 1), (0, len(words) // 2)):
        words[[a, b]] = words[[b, a]]
        assert tools.checksum(memory) != first
        words[[a, b]] = words[[b, a]]
    for at in (0, len(memory) // 3, len(memory) - 1):
        memory[at] ^= 128
        assert tools.checksum(memory) != first
        memory[at] ^= 128
    assert tools.checksum(memory) == first


def test_bandwidth_is_that_of_a_memory(tmp_path: Path) -> None:
    assert 0.5 < Made(tmp_path).tools.bandwidth(allocate(4096)) < 10_000
