"""The GGUF reader against the reference library and malformed files (mutations: test_fuzz.py)."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import gguf
import ml_dtypes
import numpy as np
import pytest

from flashformer.checkpoint import check_tensors, open_checkpoint
from flashformer.checkpoint.blocks import expand
from flashformer.checkpoint.gguf_file import GGUFFile
from flashformer.config import ModelConfig, RopeScaling, parse_config
from flashformer.errors import CheckpointError, ConfigError
from flashformer.models.decoder import build_decoder
from flashformer.quant.gguf_blocks import BLOCKS
from model_files import gguf_name, make_config, permute_rotary, random_tensors, write_folder, write_gguf

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
FAMILIES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
SMALL = make_config(num_hidden_layers=1, hidden_size=32, head_dim=8, intermediate_size=32, vocab_size=270)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("quant", ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0"])
def test_file_reads_back(tmp_path: Path, family: str, quant: str) -> None:
    """Names, rotary layout and values: exactly what the reference library reads, quantised ones rounded to bfloat16."""
    content = make_config(family)
    path = write_gguf(tmp_path / "m.gguf", content, seed=5, quant=quant)
    config = parse_config(content)
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    with open_checkpoint(path) as checkpoint:
        check_tensors(checkpoint, build_decoder(checkpoint.config).weights())
        for name, value in random_tensors(config, seed=5).items():
            read = checkpoint.read(name)
            spec, tensor = checkpoint.spec(name), stored[gguf_name(name)]
            assert spec.shape == value.shape and spec.nbytes == tensor.n_bytes
            assert spec.dtype == {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}.get(tensor.tensor_type.name, quant.lower())
            heads = {"q_proj": config.num_heads, "k_proj": config.num_kv_heads}.get(name.split(".")[-2])
            permuted = heads is not None and checkpoint.config.architecture == "LlamaForCausalLM"
            as_stored = permute_rotary(read, heads) if permuted else read
            expected = gguf.dequantize(tensor.data, tensor.tensor_type).reshape(spec.shape)
            if spec.dtype in BLOCKS:
                expected = expected.astype(ml_dtypes.bfloat16)
            np.testing.assert_array_equal(as_stored.astype(np.float32), expected.astype(np.float32))
            if spec.dtype not in BLOCKS:  # these hold every value that was written
                np.testing.assert_array_equal(read.astype(np.float32), value)
            np.testing.assert_array_equal(
                checkpoint.read(name, slice(5, 23)).view(np.uint8), np.ascontiguousarray(read[5:23]).view(np.uint8)
            )
            if spec.dtype in ("bfloat16", "float16", "float32") and "q_proj" not in name and "k_proj" not in name:
                assert not read.flags.owndata and not read.flags.writeable


@pytest.mark.parametrize("kind", BLOCKS)
def test_expand_equals_the_reference_on_any_bytes(kind: str) -> None:
    """Random bytes: scales of every size, infinite and NaN; more blocks than one step, and not a multiple of it."""
    blocks = np.random.default_rng(0).integers(0, 256, (5_003, BLOCKS[kind][1]), dtype=np.uint8)
    with np.errstate(all="ignore"):
        expected = gguf.dequantize(blocks, getattr(gguf.GGMLQuantizationType, kind.upper())).astype(ml_dtypes.bfloat16)
    ours = expand(kind, blocks)
    nan = np.isnan(expected)
    np.testing.assert_array_equal(np.isnan(ours), nan)
    np.testing.assert_array_equal(ours.view(np.uint16)[~nan], expected.view(np.uint16)[~nan])
    assert nan.any() and not nan.all()


@pytest.mark.parametrize("family", FAMILIES)
def test_config_agrees_with_the_folder(tmp_path: Path, family: str) -> None:
    for scaling in (None, LLAMA3, {"type": "linear", "factor": 4.0}):
        content = make_config(family, rope_scaling=scaling, rope_theta=500000.0, head_dim=32)
        expected = parse_config(content)
        with open_checkpoint(write_gguf(tmp_path / "m.gguf", content)) as checkpoint:
            found = checkpoint.config
        architecture = "LlamaForCausalLM" if family == "MistralForCausalLM" else family
        assert found == ModelConfig(**{**vars(expected), "architecture": architecture})


def test_mistral_window_is_noted(tmp_path: Path) -> None:
    def window(writer: gguf.GGUFWriter) -> None:
        writer.add_sliding_window(100)

    with open_checkpoint(rewrite(tmp_path, window)) as checkpoint:
        assert checkpoint.config.max_positions == 100 and "100" in checkpoint.config.notes[0]


def rewrite(folder: Path, change: Any, drop: tuple[str, ...] = (), quant: str = "F32", config: dict[str, Any] | None = None) -> Path:
    """A small GGUF file with metadata keys dropped, and `change(writer)` applied before it is written."""
    source = gguf.GGUFReader(write_gguf(folder / "source.gguf", config or SMALL, quant=quant))
    path = folder / "changed.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    for field in source.fields.values():
        if not field.name.startswith("GGUF.") and field.name not in ("general.architecture", *drop):
            kind = field.types[0]
            writer.add_key_value(field.name, field.contents(), kind, field.types[-1] if len(field.types) > 1 else None)
    for tensor in source.tensors:
        writer.add_tensor(tensor.name, np.array(tensor.data), raw_dtype=tensor.tensor_type)
    change(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize(
    ("change", "drop", "message"),
    [
        (lambda w: w.add_expert_count(8), (), r"llama\.expert_count = 8"),
        (lambda w: w.add_uint32("llama.new_mathematics", 1), (), r"llama\.new_mathematics = 1.*not known"),
        (lambda w: w.add_rope_scaling_type(gguf.RopeScalingType.YARN), (), r"rope\.scaling\.type = 'yarn'"),
        (lambda w: w.add_tensor("rope_freqs.weight", np.arange(1, 5, dtype=np.float32)), (), r"rope_freqs\.weight"),
        (lambda w: w.add_tensor("rope_freqs.weight", np.full(4, np.nan, np.float32)), (), r"rope_freqs\.weight"),
        (lambda w: w.add_uint32("split.count", 3), (), r"split\.count = 3"),
        (lambda w: w.add_rope_dimension_count(4), ("llama.rope.dimension_count",), r"rope\.dimension_count = 4"),
        (lambda w: w.add_block_count(2_000_000), ("llama.block_count",), r"block_count = 2000000"),
        (lambda w: w.add_array("llama.attention.head_count", [4, 2]), ("llama.attention.head_count",), r"head_count = \[4, 2\]"),
        (lambda w: None, ("llama.block_count",), r"block_count: the key is required"),
    ],
)
def test_unsupported_metadata_is_refused_by_name(tmp_path: Path, change: Any, drop: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        open_checkpoint(rewrite(tmp_path, change, drop))


def test_unsupported_files_are_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    writer = gguf.GGUFWriter(path, "falcon")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(ConfigError, match="'falcon'"):
        open_checkpoint(path)
    raw = np.zeros((8, 110), np.uint8)
    with pytest.raises(CheckpointError, match="Q3_K"):
        open_checkpoint(rewrite(tmp_path, lambda w: w.add_tensor("x", raw, raw_dtype=gguf.GGMLQuantizationType.Q3_K)))
    path.write_bytes(b"GGUF" + struct.pack(">IQQ", 3, 0, 0))
    with pytest.raises(CheckpointError, match="big-endian"):
        open_checkpoint(path)


def text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


def tensor(name: bytes = b"t", dims: tuple[int, ...] = (4,), kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


def file(*parts: bytes, tensors: int = 0, keys: int = 0, data: bytes = b"") -> bytes:
    head = b"GGUF" + struct.pack("<IQQ", 3, tensors, keys) + b"".join(parts)
    return head + bytes(-len(head) % 32) + data


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "cannot be read"),
        (b"GGML" + bytes(100), "not a GGUF file"),
        (b"GGUF" + struct.pack("<IQQ", 1, 0, 0), "version 1"),
        (file(tensors=2**63), "entries cannot lie"),
        (file(keys=2**40), "entries cannot lie"),
        (file(text(b"k" * 70_000), struct.pack("<I", 4), keys=1), "longer than 65535"),
        (file(struct.pack("<Q", 2**64 - 1), bytes(64), keys=1), "longer than"),
        (file(text(b"k"), struct.pack("<IQ", 8, 2**40), bytes(64), keys=1), "longer than"),
        (file(text(b"k"), struct.pack("<I", 13), bytes(64), keys=1), "unknown type 13"),
        (file(text(b"k"), struct.pack("<IB", 7, 2), bytes(64), keys=1), "truth value"),
        (file(text(b"k"), struct.pack("<IIQ", 9, 9, 1), bytes(64), keys=1), "array of the unsupported type 9"),
        (file(text(b"k"), struct.pack("<IIQ", 9, 4, 2**62), bytes(64), keys=1), "entries cannot lie"),
        (file(text(b"k"), struct.pack("<IIQ", 9, 8, 2**62), bytes(64), keys=1), "entries cannot lie"),
        (file(text(b"\xff"), struct.pack("<I", 4), bytes(64), keys=1), "not valid UTF-8"),
        (file(*[text(b"k") + struct.pack("<II", 4, 1)] * 2, keys=2), "occurs twice"),
        (file(text(b"general.alignment"), struct.pack("<II", 4, 24), bytes(64), keys=1), "power of two"),
        (file(text(b"general.alignment"), struct.pack("<II", 4, 0), bytes(64), keys=1), "power of two"),
        (file(tensor(), tensors=1, data=bytes(15)), "truncated"),
        (file(tensor(offset=2**63), tensors=1, data=bytes(64)), "truncated"),
        (file(tensor(offset=4), tensors=1, data=bytes(64)), "not aligned"),
        (file(tensor(b"a"), tensor(b"b"), tensors=2, data=bytes(64)), "overlaps"),
        (file(tensor(), tensor(offset=32), tensors=2, data=bytes(64)), "occurs twice"),
        (file(tensor(dims=()), bytes(64), tensors=1), "dimensions"),
        (file(tensor(dims=(1,) * 5), bytes(64), tensors=1), "dimensions"),
        (file(tensor(dims=(0,)), bytes(64), tensors=1), "dimension of 0"),
        (file(tensor(dims=(2**40, 2**40)), bytes(64), tensors=1), "truncated"),
        (file(tensor(dims=(33,), kind=8), bytes(64), tensors=1), "33 columns"),
        (file(tensor(kind=99), bytes(64), tensors=1), "unknown type 99"),
        (file(tensor(b"n" * 65), bytes(64), tensors=1), "longer than 64"),
    ],
)
def test_malformed_file_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        GGUFFile(path)


def test_folder_and_file_hold_the_same_model(tmp_path: Path) -> None:
    write_folder(tmp_path / "folder", SMALL, seed=1, dtype="float32")
    with open_checkpoint(tmp_path / "folder") as a, open_checkpoint(write_gguf(tmp_path / "m.gguf", SMALL, seed=1)) as b:
        assert a.config == b.config and sorted(a.names()) == sorted(b.names())
        for name in a.names():
            np.testing.assert_array_equal(a.read(name).astype(np.float32), b.read(name))
        sentence = "then he ran in the rain"
        assert a.tokenizer().encode(sentence) == b.tokenizer().encode(sentence)


def test_demo_model(demo_model: Path) -> None:
    path = demo_model
    with open_checkpoint(path) as checkpoint:
        assert checkpoint.config.rope_scaling is None and checkpoint.config.tied_embeddings
        assert checkpoint.config.norm_eps == 1e-5 and checkpoint.config.rope_theta == 100_000.0
        check_tensors(checkpoint, build_decoder(checkpoint.config).weights())
        stored = {t.name: t for t in gguf.GGUFReader(path).tensors}
        for ours, theirs in (("model.embed_tokens", "token_embd"), ("model.layers.7.mlp.down_proj", "blk.7.ffn_down")):
            t = stored[f"{theirs}.weight"]
            expected = gguf.dequantize(t.data[:1000], t.tensor_type).astype(ml_dtypes.bfloat16)
            read = checkpoint.read(f"{ours}.weight", slice(0, 1000))
            np.testing.assert_array_equal(read.view(np.uint16), expected.view(np.uint16))


@pytest.mark.parametrize(
    ("factor", "theta", "head_dim"), [(8.0, 5e5, 128), (32.0, 5e5, 64), (32.0, 1e4, 8), (8.0, 1e4, 16), (4.0, 5e5, 256)]
)
def test_llama3_scaling_is_found_in_its_divisors(tmp_path: Path, factor: float, theta: float, head_dim: int) -> None:
    """Published models, and heads so small that no wavelength is divided by the whole factor."""
    content = {**SMALL, "head_dim": head_dim, "rope_theta": theta, "rope_scaling": {**LLAMA3, "factor": factor}}
    with open_checkpoint(write_gguf(tmp_path / "m.gguf", content)) as checkpoint:
        assert checkpoint.config.rope_scaling == RopeScaling("llama3", factor, 1.0, 4.0, 8192)


def test_llama3_divisors_of_other_bands_are_refused(tmp_path: Path) -> None:
    for change in ({"low_freq_factor": 2.0}, {"high_freq_factor": 8.0}, {"original_max_position_embeddings": 4096}):
        content = {**SMALL, "head_dim": 64, "rope_theta": 5e5, "rope_scaling": {**LLAMA3, **change}}
        with pytest.raises(ConfigError, match=r"rope_freqs\.weight does not hold"):
            open_checkpoint(write_gguf(tmp_path / "m.gguf", content))
