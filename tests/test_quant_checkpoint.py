"""Quantised model folders: opened, checked and read in every format; what is damaged is refused by the tensor's name."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import flashformer
from flashformer.check import check_runner, sample_tokens
from flashformer.checkpoint import Checkpoint, check_tensors, open_checkpoint
from flashformer.checkpoint.quantized import QuantizedMatrix
from flashformer.config import parse_config
from flashformer.errors import CheckpointError, ConfigError
from flashformer.models import build_graph
from flashformer.quant import read_quantization
from flashformer.reference import Reference
from fuzzing import bounded_memory, mutations, survey
from quant_files import element
from quant_folders import CASES, Model, Writer, awq, compressed, packed_integers, quantized_model

each_case = pytest.mark.parametrize("case", CASES)

Q, DOWN = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"


def opened(folder: Path) -> Checkpoint:
    """The checkpoint in a folder, with its tensors checked."""
    checkpoint = open_checkpoint(folder)
    check_tensors(checkpoint, build_graph(checkpoint.config).weights())
    return checkpoint


def bits(values: np.ndarray) -> np.ndarray:
    return values.view(f"u{values.itemsize}")


# --- right -----------------------------------------------------------------------------------------------------------------


@each_case
def test_values_are_exact(tmp_path: Path, case: str) -> None:
    """Values as packed, `read` rounded to bfloat16, some rows alike; tensors that are not quantised as they lie in the file."""
    model = quantized_model(CASES[case])
    with opened(model.write(tmp_path)) as checkpoint:
        assert sorted(checkpoint.names()) == sorted(model.values)
        for name, expected in model.values.items():
            spec, values, read = checkpoint.spec(name), checkpoint.values(name), checkpoint.read(name)
            assert spec.name == name and spec.shape == expected.shape == read.shape
            np.testing.assert_array_equal(bits(read), bits(expected.astype(ml_dtypes.bfloat16)))
            form = checkpoint.form(name)
            assert (form is not None) == (name in model.quantized)
            if form is None:
                assert spec.dtype == "bfloat16" and not values.flags.owndata
                continue
            assert spec.dtype == CASES[case].dtype
            assert spec.nbytes == sum(t.nbytes for n, t in model.tensors.items() if n.startswith(name.removesuffix("weight")))
            np.testing.assert_array_equal(values, expected)
            np.testing.assert_array_equal(form.dequantize(), expected)
            for rows in (slice(3, 11), slice(0, 0), slice(24, None), slice(None, None, 5), slice(None, None, -3), slice(-2, None)):
                np.testing.assert_array_equal(checkpoint.values(name, rows), expected[rows])
                np.testing.assert_array_equal(bits(checkpoint.read(name, rows)), bits(read[rows]))


@each_case
def test_the_reference_runs_on_exact_values(tmp_path: Path, case: str) -> None:
    """The same logits, bit for bit, as on a folder of the dequantised values."""
    model = quantized_model(CASES[case], num_hidden_layers=1)
    logits = []
    for folder in (model.write(tmp_path / "quantised"), model.write_plain(tmp_path / "plain")):
        with opened(folder) as checkpoint:
            tokens = sample_tokens(checkpoint.config, 20, seed=3)
            logits.append(Reference(build_graph(checkpoint.config), checkpoint).logits(tokens))
    np.testing.assert_array_equal(logits[0], logits[1])
    assert np.isfinite(logits[0]).all() and logits[0].std() > 0.1


@pytest.mark.parametrize("case", ["awq", "gptq v2 act-order", "fp8 blocks", "nf4"])
def test_the_cpu_runs_them(tmp_path: Path, case: str) -> None:
    folder = quantized_model(CASES[case]).write(tmp_path)
    with flashformer.load(folder, device="cpu", max_context=128) as engine, opened(folder) as checkpoint:
        reference = Reference(build_graph(checkpoint.config), checkpoint)
        result = check_runner(engine.runner, reference, sample_tokens(engine.config, 60, seed=1))
        assert result.within, result.describe()


def test_head_and_embedding_may_be_quantised(tmp_path: Path) -> None:
    """Targets by name; the other modules keep plain weights."""
    groups = {"g": {**CASES["int4"].config["config_groups"]["group_0"], "targets": ["Linear", "model.embed_tokens"]}}
    case = CASES["int4"]
    config = {**case.config, "config_groups": groups, "ignore": ["re:.*layers.0.*"]}
    model = quantized_model(case, also=("lm_head", "model.embed_tokens"))
    plain = quantized_model(case)
    model.config["quantization_config"] = config
    for name in list(model.quantized):
        if ".layers.0." in name:
            for part in [part for part in model.tensors if part.startswith(name)]:
                del model.tensors[part]
            model.tensors[name] = model.values[name] = model.values[name].astype(ml_dtypes.bfloat16).astype(np.float32)
            model.quantized.remove(name)
    assert plain.quantized != model.quantized
    with opened(model.write(tmp_path)) as checkpoint:
        for name, expected in model.values.items():
            assert (checkpoint.form(name, slice(0, 0)) is not None) == (name in model.quantized)
            np.testing.assert_array_equal(checkpoint.values(name).astype(np.float32), expected)
        assert checkpoint.spec("model.embed_tokens.weight").dtype == checkpoint.spec("lm_head.weight").dtype == case.dtype


def test_formats_may_mix(tmp_path: Path) -> None:
    int4, fp8 = CASES["int4"], CASES["fp8 channel"]
    model, other = quantized_model(int4, seed=1), quantized_model(fp8, seed=2)
    for name in other.quantized:
        if "down_proj" in name:
            stem = name.removesuffix("weight")
            model.tensors = {n: t for n, t in model.tensors.items() if not n.startswith(stem)}
            model.tensors |= {n: t for n, t in other.tensors.items() if n.startswith(stem)}
            model.values[name] = other.values[name]
    groups = {
        "a": {**int4.config["config_groups"]["group_0"], "format": "pack-quantized"},
        "b": {**fp8.config["config_groups"]["group_0"], "format": "float-quantized", "targets": ["re:.*down_proj$"]},
    }
    model.config["quantization_config"] = compressed("mixed-precision", {}, config_groups=groups)
    with opened(model.write(tmp_path)) as checkpoint:
        assert {checkpoint.spec(name).dtype for name in model.quantized} == {int4.dtype, fp8.dtype}
        for name in model.quantized:
            np.testing.assert_array_equal(checkpoint.values(name), model.values[name])


# --- what a user is told ---------------------------------------------------------------------------------------------------


def test_notes_of_the_method_are_notes_of_the_model(tmp_path: Path) -> None:
    model = quantized_model(CASES["fp8 blocks"])
    with opened(model.write(tmp_path)) as checkpoint:
        assert [note for note in checkpoint.config.notes if "activations" in note]


def test_input_scales_are_accepted(tmp_path: Path) -> None:
    """Static scales of activations: of no use here, which the model's notes say."""
    model = quantized_model(CASES["fp8 tensor"])
    model.config["quantization_config"]["config_groups"]["group_0"]["input_activations"] = {"num_bits": 8, "type": "float"}
    model.tensors |= {f"{name.removesuffix('.weight')}.input_scale": np.ones(1, np.float32) for name in model.quantized}
    with opened(model.write(tmp_path)) as checkpoint:
        assert "activations" in checkpoint.config.notes[0]
        np.testing.assert_array_equal(checkpoint.values(f"{Q}.weight"), model.values[f"{Q}.weight"])


# --- bounded ---------------------------------------------------------------------------------------------------------------


def large(case: str, size: int) -> QuantizedMatrix:
    """A matrix of a case with `size` rows and columns."""
    parts, _ = CASES[case].write(np.random.default_rng(0), size, size)
    quantization = read_quantization(CASES[case].config)
    scheme = quantization.scheme_of("m.proj")
    assert scheme is not None
    return QuantizedMatrix(quantization.method, scheme, "m.proj", (size, size), parts)


@pytest.mark.parametrize("case", ["awq", "gptq v1", "gptq v2 act-order", "int4 asymmetric", "nvfp4", "fp8 blocks", "nf4 double"])
def test_memory_is_that_of_a_few_rows(case: str) -> None:
    """Some rows cost a few MB at most, all of them little beside the result; a check costs nothing like that."""
    matrix = large(case, 2048)
    peaks = []
    for use in (lambda: matrix.form(slice(0, 0)), lambda: matrix.form(slice(64, 72)).dequantize(), matrix.expand):
        tracemalloc.start()
        use()
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    check, rows, whole = peaks
    assert check < 400_000 and rows < 1_000_000 and whole < 2 * 2048 * 2048 + 6_000_000


def test_many_threads_read_the_same(tmp_path: Path) -> None:
    model = quantized_model(CASES["awq"], hidden_size=256, intermediate_size=512)
    with opened(model.write(tmp_path)) as checkpoint:
        pieces = [(name, slice(at, at + 24)) for name in model.quantized for at in range(0, len(model.values[name]), 24)] * 4
        with ThreadPoolExecutor(8) as pool:
            read = list(pool.map(lambda piece: checkpoint.read(*piece), pieces))
        for (name, rows), values in zip(pieces, read, strict=True):
            np.testing.assert_array_equal(bits(values), bits(model.values[name][rows].astype(ml_dtypes.bfloat16)))


# --- refused ---------------------------------------------------------------------------------------------------------------

Change = Callable[[np.ndarray], np.ndarray | None]


def missing(_: np.ndarray) -> None:
    return None


def shorter(tensor: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(tensor[:-1])


def doubled(tensor: np.ndarray) -> np.ndarray:
    return np.concatenate([tensor, tensor])


def f64(tensor: np.ndarray) -> np.ndarray:
    return tensor.astype(np.float64)


# What is wrong with types, shapes and presence shows when a model is opened: (case, part, change, what the message says).
AT_ONCE: list[tuple[str, str, Change, str]] = [
    ("awq", "scales", missing, "missing"),
    ("awq", "qweight", missing, "missing"),
    ("awq", "qzeros", shorter, "expected is"),
    ("awq", "scales", doubled, "expected is"),
    ("gptq v1", "g_idx", missing, "missing"),
    ("gptq v1", "g_idx", element(99), "groups"),
    ("gptq v1", "qweight", doubled, "expected is"),
    ("int4", "weight_scale", missing, "missing"),
    ("int4", "weight_scale", f64, "float64"),
    ("int4", "weight_shape", element(7), "configuration"),
    ("int4", "weight_packed", shorter, "expected is"),
    ("int4 asymmetric", "weight_zero_point", missing, "missing"),
    ("fp8 channel", "weight_scale", missing, "missing"),
    ("fp8 blocks", "weight", shorter, "expected is"),
    ("nvfp4", "weight_global_scale", missing, "missing"),
    ("nvfp4", "weight_global_scale", element(0), "zero"),
    ("mxfp4", "weight_scale", doubled, "expected is"),
    ("nf4", "weight.absmax", missing, "missing"),
    ("nf4", "weight.quant_state.bitsandbytes__nf4", missing, "missing"),
    ("nf4", "weight.quant_state.bitsandbytes__nf4", lambda t: np.zeros(5000, np.uint8), "4096"),
    ("nf4 double", "weight.nested_quant_map", shorter, "expected is"),
]
# What is wrong with values shows when they are read.
WHEN_READ: list[tuple[str, str, Change, str]] = [
    ("awq", "scales", element(0), "zero"),
    ("awq", "scales", element(np.nan), "NaN"),
    ("gptq v1", "scales", element(np.inf), "infinite"),
    ("gptq v1", "qzeros", element(-1), "gptq_v2"),
    ("int4", "weight_scale", element(0), "zero"),
    ("fp8 tensor", "weight", element(np.nan), "NaN"),
    ("mxfp4", "weight_scale", element(255), "NaN"),
    ("nvfp4", "weight_scale", element(np.nan), "NaN"),
    ("nf4", "weight.absmax", element(np.inf), "infinite"),
]


def damaged(case: str, part: str, change: Change) -> Model:
    """A model whose last matrix has one tensor changed."""
    model = quantized_model(CASES[case])
    changed = change(model.tensors.pop(f"{DOWN}.{part}"))
    if changed is not None:
        model.tensors[f"{DOWN}.{part}"] = changed
    return model


@pytest.mark.parametrize(("case", "part", "change", "says"), AT_ONCE)
def test_what_does_not_fit_is_refused_when_opened(tmp_path: Path, case: str, part: str, change: Change, says: str) -> None:
    with pytest.raises(CheckpointError, match=says) as error:
        opened(damaged(case, part, change).write(tmp_path))
    assert f"{DOWN}.{part}" in str(error.value) and Q not in str(error.value)


@pytest.mark.parametrize(("case", "part", "change", "says"), WHEN_READ)
def test_damaged_values_are_refused_when_read(tmp_path: Path, case: str, part: str, change: Change, says: str) -> None:
    with opened(damaged(case, part, change).write(tmp_path)) as checkpoint:
        checkpoint.values(f"{Q}.weight")
        for use in (checkpoint.values, checkpoint.form, checkpoint.read):
            with pytest.raises(CheckpointError, match=says) as error:
                use(f"{DOWN}.weight")
            assert f"{DOWN}.{part}" in str(error.value)


def refusal(folder: Path, model: Model) -> str:
    with pytest.raises(CheckpointError) as error:
        opened(model.write(folder))
    return str(error.value)


def test_tensors_that_do_not_belong_are_refused(tmp_path: Path) -> None:
    case = CASES["int4"]
    model = quantized_model(case)
    model.tensors |= {f"{Q}.surprise": np.zeros(3, np.float32), "lm_head.weight_scale": np.ones(3, np.float32)}
    text = refusal(tmp_path, model)
    assert f"unexpected: '{Q}.surprise' [3]" in text and "unexpected: 'lm_head.weight_scale' [3]" in text

    model = quantized_model(case)  # a plain weight as well
    model.tensors[f"{Q}.weight"] = np.zeros((64, 64), np.float16)
    text = refusal(tmp_path, model)
    assert f"unexpected: '{Q}.weight_packed' [64, 8]" in text and f"unexpected: '{Q}.weight_scale' [64, 2]" in text

    model = quantized_model(case)  # quantised, though the configuration says that it is not
    model.config["quantization_config"] = {**case.config, "ignore": [Q]}
    text = refusal(tmp_path, model)
    assert f"missing: {Q}.weight [64, 64]" in text and f"unexpected: '{Q}.weight_packed'" in text

    model = quantized_model(case)
    model.tensors[f"{Q}.weight_zero_point"] = np.zeros((8, 2), np.int32)  # of a format that has none
    assert f"'{Q}.weight_zero_point': does not belong" in refusal(tmp_path, model)

    model = quantized_model(case)
    model.tensors = {name: tensor for name, tensor in model.tensors.items() if not name.startswith(Q)}
    assert f"missing: {Q}.weight [64, 64]" in refusal(tmp_path, model)


def test_every_problem_is_named(tmp_path: Path) -> None:
    model = quantized_model(CASES["awq"])
    for name in (f"{Q}.scales", f"{DOWN}.qzeros", "model.norm.weight"):
        del model.tensors[name]
    text = refusal(tmp_path, model)
    assert all(name in text for name in (f"{Q}.scales", f"{DOWN}.qzeros", "missing: model.norm.weight"))


@pytest.mark.parametrize(
    ("case", "key", "value", "names"),
    [
        ("awq", "group_size", 16, "scales|qzeros"),
        ("awq", "group_size", -1, "scales|qzeros"),
        ("awq", "group_size", 48, "scales"),  # 64 columns are not a multiple
        ("gptq v1", "group_size", 64, "scales|qzeros"),
        ("gptq v1", "bits", 8, "qweight"),
        ("fp8 blocks", "weight_block_size", [16, 40], "weight_scale_inv"),
        ("fp8 blocks", "weight_block_size", None, "weight_scale_inv"),
    ],
)
def test_a_configuration_that_does_not_fit_is_refused(tmp_path: Path, case: str, key: str, value: Any, names: str) -> None:
    model = quantized_model(CASES[case])
    model.config["quantization_config"] = {**CASES[case].config, key: value}
    with pytest.raises(CheckpointError, match=rf"layers\.0\.self_attn\.q_proj\.({names})"):
        opened(model.write(tmp_path))


@pytest.mark.parametrize(
    ("case", "odd", "columns", "part", "says"),
    [
        ("int4", packed_integers(24), 120, "weight_scale", "K = 120 is not a multiple of 32"),
        ("awq", awq(24), 120, "scales", "K = 120 is not a multiple of 32"),
        ("nf4", CASES["nf4"].write, 160, "weight.quant_state", "K = 160 is not a multiple of blocksize = 64"),
    ],
)
def test_columns_that_no_group_divides_are_refused(tmp_path: Path, case: str, odd: Writer, columns: int, part: str, says: str) -> None:
    """down_proj is written by `odd`, which takes such a number of columns."""
    written = replace(CASES[case], write=lambda rng, n, k: (odd if k == columns else CASES[case].write)(rng, n, k))
    text = refusal(tmp_path, quantized_model(written, intermediate_size=columns))
    assert f"{DOWN}.{part}" in text and says in text
    assert "model.layers.0.mlp.up_proj" not in text  # whose columns fit


@pytest.mark.parametrize(
    ("quantization", "says"),
    [
        ({"quant_method": "hqq"}, "quant_method = 'hqq': is not supported; supported are awq, "),
        ({"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemv"}, "version = 'gemv'"),
        (compressed("marlin-24", {}), "format = 'marlin-24'"),
        ({**CASES["gptq v1"].config, "bits": 3}, "bits = 3"),
        ([], "quant_method: the key is required"),
    ],
)
def test_unknown_formats_are_refused_by_name(tmp_path: Path, quantization: Any, says: str) -> None:
    model = quantized_model(CASES["awq"])
    model.config["quantization_config"] = quantization
    with pytest.raises(ConfigError, match=f"quantization_config.*{says}"):
        open_checkpoint(model.write(tmp_path))


def test_a_layout_is_part_of_the_configuration() -> None:
    """Two configurations that read the same files differently are not equal, so nothing kept for one is used for the other."""
    case = CASES["gptq v1"]
    first = parse_config(quantized_model(case).config)
    second = parse_config({**quantized_model(case).config, "quantization_config": {**case.config, "checkpoint_format": "gptq_v2"}})
    assert first != second and repr(first) != repr(second) and hash(first) == hash(parse_config(quantized_model(case).config))


@pytest.mark.parametrize("case", ["gptq v2 act-order", "int4 asymmetric", "fp8 blocks", "nf4 double"])
@pytest.mark.parametrize("file", ["config.json", "model.safetensors"])
def test_damaged_files_give_our_error(tmp_path: Path, case: str, file: str) -> None:
    small = {"hidden_size": 64, "intermediate_size": 64, "vocab_size": 270, "num_hidden_layers": 1}
    folder = quantized_model(CASES[case], **small).write(tmp_path)
    data = (folder / file).read_bytes()
    header = len(data) if file == "config.json" else 8 + int.from_bytes(data[:8], "little")

    def use(path: Path) -> None:
        with opened(path.parent) as checkpoint:
            for name in checkpoint.names():
                with suppress(CheckpointError), np.errstate(all="ignore"):
                    assert checkpoint.read(name).shape == checkpoint.spec(name).shape
                    checkpoint.values(name)

    use(folder / file)
    with bounded_memory(128 << 20):
        survey(folder / file, mutations(data, header, 100, seed=5), use)
        accepted, refused = survey(folder / file, mutations(data, len(data), 100, seed=6), use)
    assert refused > 20 and (accepted > 10 or file == "config.json")
