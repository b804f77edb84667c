"""The block types of GGUF decode to exactly what the gguf package gives, for any bytes."""

from __future__ import annotations

import itertools
from pathlib import Path

import gguf
import ml_dtypes
import numpy as np
import pytest

from flashformer.checkpoint import check_tensors, open_checkpoint
from flashformer.errors import CheckpointError
from flashformer.models.decoder import build_decoder
from flashformer.quant.gguf_blocks import BLOCKS, decode, unpack
from flashformer.quant.source import Source
from fuzzing import bounded_memory, mutations, survey
from model_files import gguf_name, make_config, permute_rotary, write_gguf

each_kind = pytest.mark.parametrize("kind", BLOCKS)


def reference(kind: str, stored: np.ndarray) -> np.ndarray:
    with np.errstate(all="ignore"):
        return gguf.dequantize(stored, gguf.GGMLQuantizationType[kind.upper()])


def blocks_with_sound_scales(kind: str, n: int, blocks: int, seed: int) -> np.ndarray:
    """Random bytes, uint8 [n, bytes of a row], but no block whose scales are infinite or NaN."""
    size = BLOCKS[kind][1]
    rows = np.random.default_rng(seed).integers(0, 256, (n * blocks, size), dtype=np.uint8)
    sound = np.isfinite(reference(kind, rows)).all(axis=1)
    rows[~sound] = rows[sound][0]
    return rows.reshape(n, blocks * size)


def test_sizes_are_those_of_the_library() -> None:
    assert {kind: gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind.upper()]] for kind in BLOCKS} == BLOCKS


@each_kind
def test_values_are_those_of_the_library(kind: str) -> None:
    stored = blocks_with_sound_scales(kind, 501, 3, seed=0)
    shape = (501, 3 * BLOCKS[kind][0])
    form = decode(Source("m", {"weight": stored}), kind, shape)
    expected = reference(kind, stored)
    np.testing.assert_array_equal(form.dequantize().view(np.uint32), expected.view(np.uint32))
    assert form.q.shape == shape and form.q.dtype == np.uint8 and form.q.max() == (1 << form.bits) - 1
    assert form.scale.shape == (501, shape[1] // form.group) and (form.zero is None) != (form.minimum is None)
    for rows in (slice(7, 29), slice(0, 0), slice(None, None, 5)):
        part = decode(Source("m", {"weight": stored}), kind, shape, rows)
        np.testing.assert_array_equal(part.dequantize(), expected[rows])


@each_kind
def test_unpack_takes_any_scale(kind: str) -> None:
    stored = np.random.default_rng(1).integers(0, 256, (3000, BLOCKS[kind][1]), dtype=np.uint8)
    ours, expected = unpack(kind, stored).dequantize(), reference(kind, stored)
    nan = np.isnan(expected)
    np.testing.assert_array_equal(np.isnan(ours), nan)
    np.testing.assert_array_equal(ours[~nan].view(np.uint32), expected[~nan].view(np.uint32))
    assert nan.any()


@each_kind
def test_zero_blocks_are_legal(kind: str) -> None:
    columns, size = BLOCKS[kind]
    form = decode(Source("m", {"weight": np.zeros((4, size), np.uint8)}), kind, (4, columns))
    assert not form.dequantize().any()


@each_kind
def test_damaged_blocks_are_refused(kind: str) -> None:
    columns, size = BLOCKS[kind]
    stored = blocks_with_sound_scales(kind, 8, 2, seed=2)
    shape = (8, 2 * columns)
    offset = 208 if kind == "q6_k" else 0  # of the float16 scale
    for scale in (np.inf, -np.inf, np.nan):
        bad = stored.copy()
        bad[-1, size + offset : size + offset + 2] = np.array([scale], np.float16).view(np.uint8)
        with pytest.raises(CheckpointError, match=r"m\.weight.*infinite or NaN"):
            decode(Source("m", {"weight": bad}), kind, shape)
    for parts, wrong in (
        ({}, shape),
        ({"weight": stored[:-1]}, shape),
        ({"weight": stored[:, :-1]}, shape),
        ({"weight": stored.astype(np.int32)}, shape),
        ({"weight": stored}, (8, 2 * columns + 1)),
        ({"weight": stored, "other": stored}, shape),
    ):
        with pytest.raises(CheckpointError, match=r"m\.(weight|other)"):
            decode(Source("m", parts), kind, wrong)


def test_unknown_types_are_refused() -> None:
    with pytest.raises(CheckpointError, match="iq4_xs"):
        decode(Source("m", {"weight": np.zeros((1, 18), np.uint8)}), "iq4_xs", (1, 32))


# --- Whole files ---------------------------------------------------------------------------------------------------------------

WIDE = make_config(num_hidden_layers=1, hidden_size=256, num_attention_heads=4, head_dim=64, intermediate_size=256, vocab_size=270)


def write_mixed(path: Path) -> Path:
    """A model whose matrices take turns through all block types, with random blocks, as a Q4_K_M file mixes them."""
    source = gguf.GGUFReader(write_gguf(path.with_suffix(".source"), WIDE))
    writer = gguf.GGUFWriter(path, "llama")
    for field in source.fields.values():
        if not field.name.startswith("GGUF.") and field.name != "general.architecture":
            kind = field.types[0]
            writer.add_key_value(field.name, field.contents(), kind, field.types[-1] if len(field.types) > 1 else None)
    kinds = itertools.cycle(BLOCKS)
    for i, tensor in enumerate(source.tensors):
        if len(tensor.shape) == 1:
            writer.add_tensor(tensor.name, np.array(tensor.data))
            continue
        kind = next(kinds)
        raw = blocks_with_sound_scales(kind, int(tensor.shape[1]), 256 // BLOCKS[kind][0], seed=i)
        writer.add_tensor(tensor.name, raw, raw_dtype=gguf.GGMLQuantizationType[kind.upper()])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_file_of_mixed_types_is_read(tmp_path: Path) -> None:
    """Each tensor by its own type, expanded to bfloat16, the rows of q and k in the order of Hugging Face."""
    path = write_mixed(tmp_path / "m.gguf")
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    kinds = set()
    with open_checkpoint(path) as checkpoint:
        check_tensors(checkpoint, build_decoder(checkpoint.config).weights())
        for name in checkpoint.names():
            spec, tensor = checkpoint.spec(name), tensors[gguf_name(name)]
            assert spec.nbytes == tensor.n_bytes
            read = checkpoint.read(name)
            form, values = checkpoint.form(name), checkpoint.values(name)
            if spec.dtype not in BLOCKS:
                assert form is None and values.dtype == np.float32
                np.testing.assert_array_equal(values, read)
                continue
            kinds.add(spec.dtype)
            heads = {"q_proj": 4, "k_proj": 2}.get(name.split(".")[-2])
            as_stored = read if heads is None else permute_rotary(read, heads)
            exact = gguf.dequantize(tensor.data, tensor.tensor_type)
            np.testing.assert_array_equal(as_stored.view(np.uint16), exact.astype(ml_dtypes.bfloat16).view(np.uint16))
            assert form is not None and form.dequantize().dtype == np.float32
            np.testing.assert_array_equal(values if heads is None else permute_rotary(values, heads), exact)
            for rows in (slice(None), slice(3, 9), slice(0, 0)):
                np.testing.assert_array_equal(checkpoint.values(name, rows), values[rows])
                np.testing.assert_array_equal(form.take(rows).dequantize(), values[rows])
            np.testing.assert_array_equal(checkpoint.read(name, slice(3, 9)).view(np.uint16), read[3:9].view(np.uint16))
    assert kinds == set(BLOCKS)


def test_damaged_files_give_our_error(tmp_path: Path) -> None:
    data = write_mixed(tmp_path / "m.gguf").read_bytes()
    header = len(data) - sum(tensor.n_bytes for tensor in gguf.GGUFReader(tmp_path / "m.gguf").tensors)

    def use(path: Path) -> None:
        with open_checkpoint(path) as checkpoint:
            check_tensors(checkpoint, build_decoder(checkpoint.config).weights())
            for name in checkpoint.names():
                checkpoint.read(name)

    use(tmp_path / "m.gguf")
    with bounded_memory(128 << 20):
        accepted, refused = survey(tmp_path / "f.gguf", mutations(data, header, 1_000, seed=4), use)
    assert accepted > 25 and refused > 250


def test_a_damaged_scale_is_refused_by_name(tmp_path: Path) -> None:
    """`form` and `values` refuse it; the types and shapes that `check_tensors` looks at are sound."""
    path = write_gguf(tmp_path / "m.gguf", make_config(), quant="Q4_1")
    at = gguf.GGUFReader(path).tensors[-1].data_offset
    name = next(t.name for t in gguf.GGUFReader(path).tensors if t.data_offset == at)
    data = bytearray(path.read_bytes())
    data[at : at + 2] = np.float16(np.nan).tobytes()
    path.write_bytes(data)
    with open_checkpoint(path) as checkpoint:
        check_tensors(checkpoint, build_decoder(checkpoint.config).weights())
        ours = next(ours for ours in checkpoint.names() if gguf_name(ours) == name)
        assert checkpoint.spec(ours).dtype == "q4_1"
        for use in (checkpoint.form, checkpoint.values):
            with pytest.raises(CheckpointError, match=f"{ours}.*infinite or NaN"):
                use(ours)
        with pytest.raises(CheckpointError, match="no tensor"):
            checkpoint.form("nothing.weight")
