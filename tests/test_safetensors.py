"""The safetensors reader: real files, malformed ones and shards (mutations: test_fuzz.py)."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from flashformer.checkpoint import check_tensors, open_checkpoint
from flashformer.checkpoint.safetensors import SafetensorsFile
from flashformer.config import parse_config
from flashformer.errors import CheckpointError
from flashformer.models.decoder import build_decoder
from model_files import make_config, random_tensors, write_folder

FAMILIES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")


def write_raw(path: Path, header: Any, data: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def entry(dtype: str = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("shards", [1, 3])
def test_folder_reads_back(tmp_path: Path, family: str, dtype: str, shards: int) -> None:
    config = make_config(family)
    write_folder(tmp_path, config, seed=3, dtype=dtype, shards=shards)
    expected = random_tensors(parse_config(config), seed=3)
    with open_checkpoint(tmp_path) as checkpoint:
        check_tensors(checkpoint, build_decoder(checkpoint.config).weights())
        assert sorted(checkpoint.names()) == sorted(expected)
        for name, value in expected.items():
            read = checkpoint.read(name)
            assert checkpoint.spec(name).dtype == dtype == read.dtype.name
            assert checkpoint.spec(name).nbytes == read.nbytes
            assert not read.flags.writeable and not read.flags.owndata
            np.testing.assert_array_equal(read.astype(np.float32), value)
            np.testing.assert_array_equal(checkpoint.read(name, slice(3, 9)).astype(np.float32), value[3:9])
            assert checkpoint.form(name) is None and checkpoint.values(name).dtype == read.dtype
            np.testing.assert_array_equal(checkpoint.values(name, slice(3, 9)), read[3:9])


def test_views_outlive_the_checkpoint(tmp_path: Path) -> None:
    write_folder(tmp_path, make_config())
    with open_checkpoint(tmp_path) as checkpoint:
        view = checkpoint.read("model.norm.weight")
        before = view.copy()
    np.testing.assert_array_equal(view, before)
    for use in (checkpoint.read, checkpoint.form, checkpoint.values):
        with pytest.raises(CheckpointError, match="no tensor"):
            use("model.norm.weight")


@pytest.mark.parametrize(
    ("header", "data", "message"),
    [
        ({"a": entry()}, bytes(7), "take 8 bytes of 7"),
        ({"a": entry()}, bytes(9), "take 8 bytes of 9"),
        ({"a": entry(offsets=[0, 4])}, bytes(4), "needs 8 bytes"),
        ({"a": entry(offsets=[8, 0])}, bytes(8), "needs 8 bytes"),
        ({"a": entry(offsets=[1, 9])}, bytes(9), "overlap or leave a hole"),
        ({"a": entry(), "b": entry(offsets=[4, 12])}, bytes(12), "overlap or leave a hole"),
        ({"a": entry(), "b": entry(offsets=[12, 20])}, bytes(20), "overlap or leave a hole"),
        ({"a": entry(shape=[-2])}, bytes(8), "malformed shape"),
        ({"a": entry(shape=[2.0])}, bytes(8), "malformed shape"),
        ({"a": entry(shape=[True, 2])}, bytes(8), "malformed shape"),
        ({"a": entry(shape=[2**62, 2**62, 4])}, bytes(8), "needs"),
        ({"a": entry(shape=[2**62, 0], offsets=[0, 0])}, b"", "malformed shape"),
        ({"a": entry(shape=2)}, bytes(8), "malformed shape"),
        ({"a": entry(offsets=[0])}, bytes(8), "malformed shape"),
        ({"a": entry(offsets=None)}, bytes(8), "malformed shape"),
        ({"a": entry(dtype="F33")}, bytes(8), "unknown type"),
        ({"a": entry(dtype=["F32"])}, bytes(8), "unknown type"),  # type: ignore[arg-type]
        ({"a": {**entry(), "extra": 1}}, bytes(8), "nothing else"),
        ({"a": [1]}, bytes(8), "nothing else"),
        ({"__metadata__": {"x": 1}}, b"", "__metadata__"),
        ([], b"", "JSON object"),
        (b'{"a": 1, "a": 1}', b"", "occurs twice"),
        (b"\xff{}", b"", "not valid JSON"),
        (b"[" * 100_000, b"", "not valid JSON"),
        (b'{"a": ' + b"9" * 10_000 + b"}", b"", "not valid JSON"),
        (b"", b"", "not valid JSON"),
    ],
)
def test_malformed_file_is_refused(tmp_path: Path, header: Any, data: bytes, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        SafetensorsFile(write_raw(tmp_path / "x.safetensors", header, data))


@pytest.mark.parametrize("content", [b"", b"1234567", struct.pack("<Q", 2**64 - 1) + b"{}", struct.pack("<Q", 3) + b"{}"])
def test_hostile_header_length_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError):
        SafetensorsFile(path)


def test_legal_oddities_are_read(tmp_path: Path) -> None:
    """Padding after the header, an odd header length (unaligned data), empty and scalar tensors, types that we do not use."""
    header = {"a": entry(), "empty": entry(shape=[0, 5], offsets=[8, 8]), "one": entry(shape=[], offsets=[8, 12])}
    header |= {"ids": entry("I64", [1], [12, 20]), "__metadata__": {"format": "pt"}}  # type: ignore[dict-item]
    data = np.array([1.5, -2.5, 7], np.float32).tobytes() + bytes(8)
    for pad in range(8):
        file = SafetensorsFile(write_raw(tmp_path / "x.safetensors", json.dumps(header).encode() + b" " * pad, data))
        assert file.read("a").tolist() == [1.5, -2.5]
        assert file.read("one") == 7 and file.read("one").shape == ()
        assert file.read("empty").shape == (0, 5)
        with pytest.raises(CheckpointError, match="int64"):
            file.read("ids")


@pytest.mark.parametrize("file", ["../model.safetensors", "/etc/passwd", "a\\b.safetensors", "model.bin", 7, "x/y.safetensors"])
def test_index_must_stay_in_the_folder(tmp_path: Path, file: Any) -> None:
    folder = write_folder(tmp_path / "m", make_config(), shards=2)
    save_file({"a": np.zeros(3, np.float32)}, tmp_path / "model.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": file}}))
    with pytest.raises(CheckpointError, match="not the name of a safetensors file"):
        open_checkpoint(folder)


def test_index_must_agree_with_the_shards(tmp_path: Path) -> None:
    folder = write_folder(tmp_path, make_config(), shards=2)
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    for change, message in (({"nothing": "model-00001-of-00002.safetensors"}, "is not in"), ({}, "the index does not say so")):
        weight_map = {**index["weight_map"], **change}
        if not change:
            del weight_map["model.norm.weight"]
        path.write_text(json.dumps({"weight_map": weight_map}))
        with pytest.raises(CheckpointError, match=message):
            open_checkpoint(folder)
    path.write_text(json.dumps(index))
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match="00002-of-00002"):
        open_checkpoint(folder)


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such file or folder"):
        open_checkpoint(tmp_path / "nothing")
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        open_checkpoint(tmp_path)
    folder = write_folder(tmp_path, make_config())
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="pickled weights"):
        open_checkpoint(folder)


def test_check_tensors_names_every_problem(tmp_path: Path) -> None:
    folder = write_folder(tmp_path, make_config(num_hidden_layers=1))
    tensors = {n: v.astype(ml_dtypes.bfloat16) for n, v in random_tensors(parse_config(make_config(num_hidden_layers=1))).items()}
    harmless = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(8, np.float32)}

    def problems(change: dict[str, Any], config: dict[str, Any] | None = None) -> str:
        content = {n: v for n, v in {**tensors, **harmless, **change}.items() if v is not None}
        save_file(content, folder / "model.safetensors")
        if config is not None:
            (folder / "config.json").write_text(json.dumps(config))
        with open_checkpoint(folder) as checkpoint:
            try:
                check_tensors(checkpoint, build_decoder(checkpoint.config).weights())
            except CheckpointError as error:
                return str(error)
        return ""

    assert problems({}) == ""
    text = problems({"model.norm.weight": None, "lm_head.weight": np.zeros((288, 63), np.float32), "extra": np.zeros(1, np.float32)})
    assert "missing: model.norm.weight [64]" in text
    assert "misshapen: lm_head.weight is [288, 63], the configuration says [288, 64]" in text
    assert "unexpected: 'extra' [1]" in text
    assert "type: model.norm.weight is int8" in problems({"model.norm.weight": np.zeros(64, np.int8)})
    assert "unexpected" in problems({"model.layers.0.self_attn.q_proj.bias": np.zeros(64, np.float32)})
    tied = make_config(num_hidden_layers=1, tie_word_embeddings=True)
    assert problems({}, tied) == ""  # a head beside tied embeddings, of the same shape
    assert "unexpected: 'lm_head.weight'" in problems({"lm_head.weight": np.zeros((280, 64), np.float32)}, tied)
