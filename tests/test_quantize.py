"""Making quantised models: the grids, both methods, the files, and the command."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from click.testing import CliRunner, Result
from safetensors.numpy import load_file

from flashformer.checkpoint import open_checkpoint
from flashformer.checkpoint.safetensors import SafetensorsFile
from flashformer.cli import main
from flashformer.config import RopeScaling, parse_config
from flashformer.errors import CheckpointError, ConfigError, FlashFormerError, InputError
from flashformer.export import config_mapping
from flashformer.models import build_graph
from flashformer.quant import decode
from flashformer.quant.scheme import Scheme
from flashformer.quant_methods import rtn
from flashformer.quant_methods.calibration import Activations, sample_windows
from flashformer.quant_methods.compressed_tensors import assemble, pack
from flashformer.quant_methods.gptq import DAMPING, Solver
from flashformer.quant_methods.grids import Grid, Quantized
from flashformer.quantize import Recipe, quantize
from flashformer.reference import Reference
from model_files import make_config, write_folder, write_gguf
from quant_files import load, stored

BF16 = np.dtype(ml_dtypes.bfloat16)
INT4 = Grid("int", 4, 16, BF16)
GRIDS = {"int4": INT4, "int8": Grid("int", 8, None, BF16), "fp8": Grid("fp8", 8, None, BF16), "mxfp4": Grid("mxfp4", 4, 32, BF16)}
TEXT = "".join(f"The {a} {b} went to the {c}, and there it ate {d} apples.\n" for a, b, c, d in itertools.product(
    ("small", "old", "quick", "green"), ("hare", "dragon", "cat"), ("river", "town", "hill"), ("two", "nine")
))  # fmt: skip


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(a) for a in arguments])


def quiet(what: str, done: int, total: int) -> None:
    assert 0 <= done <= total


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose matrices have 64 columns, but for the down projection's 256."""
    return write_folder(tmp_path_factory.mktemp("model"), make_config(vocab_size=300, intermediate_size=256))


# --- Grids -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("int4", np.arange(-8, 8)),
        ("int8", np.arange(-128, 128)),
        ("fp8", np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float64)),
        ("mxfp4", np.outer((1, -1), (0, 0.5, 1, 1.5, 2, 3, 4, 6))),
    ],
)
def test_nearest_is_the_nearest_value(name: str, values: np.ndarray) -> None:
    values = np.unique(values[np.isfinite(values)])
    x = np.random.default_rng(0).uniform(1.2 * values[0], 1.2 * values[-1], 5000).astype(np.float32)
    expected = values[np.abs(x[:, None].astype(np.float64) - values).argmin(axis=1)]
    assert np.array_equal(GRIDS[name].nearest(x), expected)
    assert np.array_equal(GRIDS[name].nearest(values.astype(np.float32)), values)


def test_ties_go_to_the_even_code() -> None:
    middles = np.array([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5], np.float32)
    assert GRIDS["mxfp4"].nearest(middles).tolist() == [0, 1, 1, 2, 2, 4, 4]
    assert INT4.nearest(np.array([0.5, 1.5, -2.5], np.float32)).tolist() == [0, 2, -2]


def test_scales_hold_the_largest_weight() -> None:
    largest = np.array([[0.0, 1e-30, 0.9, 1.0, 1.74, 1.75, 6.0, 1000.0]], np.float32)
    for grid in GRIDS.values():
        scale = grid.scale(largest)
        assert (scale > 0).all() and np.isfinite(scale).all()
    assert np.allclose(INT4.scale(largest)[0, 2:], largest[0, 2:] / 7.5, rtol=2**-8)
    assert np.array_equal(INT4.scale(largest), INT4.scale(largest).astype(BF16).astype(np.float32))
    assert GRIDS["mxfp4"].scale(largest)[0, 2:].tolist() == [0.25, 0.25, 0.25, 0.5, 1, 256]


# --- Methods ---------------------------------------------------------------------------------------------------------------


def correlated(k: int, seed: int = 0) -> np.ndarray:
    """Second moments of inputs that lie mostly in few directions, float32 [k, k]."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((512, k // 4)) @ rng.standard_normal((k // 4, k)) + 0.3 * rng.standard_normal((512, k))
    return np.asarray(x.T @ x, np.float32)


def plain_gptq(weights: np.ndarray, moments: np.ndarray, grid: Grid, scale: np.ndarray) -> np.ndarray:
    """The method as its paper derives it: each column's error is spread by the inverse of the moments of those that remain."""
    h = moments.astype(np.float64)
    h[np.diag_indices(len(h))] += DAMPING * np.diag(h).mean()
    each = np.repeat(scale, grid.columns(weights.shape[1]), axis=1).astype(np.float64)
    rest, out = weights.astype(np.float64), np.zeros(weights.shape)
    left = np.argsort(-np.diag(moments), kind="stable").tolist()
    while left:
        inverse = np.linalg.inv(h[np.ix_(left, left)])
        i = left[0]
        out[:, i] = grid.nearest((rest[:, i] / each[:, i]).astype(np.float32))
        error = (rest[:, i] - out[:, i] * each[:, i]) / inverse[0, 0]
        rest[:, left] -= np.outer(error, inverse[0])
        left.pop(0)
    return out


@pytest.mark.parametrize("name", GRIDS)
def test_gptq_is_what_its_paper_derives(name: str) -> None:
    moments, grid = correlated(160), GRIDS[name]
    weights = np.random.default_rng(1).standard_normal((12, 160), dtype=np.float32)
    made = Solver(moments).quantize(weights, grid)
    expected = plain_gptq(weights, moments, grid, made.scale)
    assert np.mean(made.values == expected) > 0.98  # a value near a tie may fall to the other side in float32
    assert np.abs(made.dequantize() - Quantized(expected, made.scale).dequantize()).mean() < 0.02 * np.abs(weights).mean()


@pytest.mark.parametrize("name", ["int4", "mxfp4"])
def test_gptq_halves_the_error_of_the_output(name: str) -> None:
    moments, grid = correlated(256), GRIDS[name]
    weights = np.random.default_rng(2).standard_normal((64, 256), dtype=np.float32)

    def loss(made: Quantized) -> float:
        error = (made.dequantize() - weights).astype(np.float64)
        return float(np.einsum("nk,kl,nl", error, moments.astype(np.float64), error))

    assert loss(Solver(moments).quantize(weights, grid)) < 0.5 * loss(rtn.quantize(weights, grid))


def test_gptq_of_unrelated_columns_rounds_to_nearest() -> None:
    weights = np.random.default_rng(3).standard_normal((8, 64), dtype=np.float32)
    made = Solver(np.eye(64, dtype=np.float32)).quantize(weights, INT4)
    assert np.array_equal(made.values, INT4.nearest(weights / np.repeat(made.scale, 16, axis=1)))


def test_gptq_survives_inputs_that_say_nothing() -> None:
    weights = np.random.default_rng(4).standard_normal((8, 64), dtype=np.float32)
    one = np.zeros((64, 64), np.float32)
    one[5, 5] = 1e-20
    for moments in (np.zeros((64, 64), np.float32), one, np.ones((64, 64), np.float32)):
        made = Solver(moments).quantize(weights, INT4)
        assert np.isfinite(made.values).all() and np.abs(made.dequantize() - weights).max() < 2
    with pytest.raises(CheckpointError, match="overflow"):
        Solver(np.full((4, 4), np.inf, np.float32))


def test_activations_are_those_of_the_reference(folder: Path) -> None:
    with open_checkpoint(folder) as checkpoint:
        graph = build_graph(checkpoint.config)
        windows = sample_windows(TEXT * 2, checkpoint.tokenizer(), checkpoint.config)
        assert len(windows) > 1 and len({len(w) for w in windows}) == 1
        activations = Activations(graph, checkpoint.config, windows)
        expected = np.zeros((checkpoint.config.vocab_size,) * 2)
        for window in windows:
            logits = Reference(graph, checkpoint).logits(window).astype(np.float64)
            expected += logits.T @ logits
        for op in graph.operators[:-1]:
            activations.run(op, [checkpoint.read(w.name).astype(np.float32) for w in op.weights])
        assert np.allclose(activations.moments(graph.operators[-2].output), expected, rtol=1e-3, atol=1e-3 * np.abs(expected).max())


# --- Files -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("case", "kind", "bits", "group"),
    [
        ("int4-sym-g16", "int", 4, 16),
        ("int4-sym-channel", "int", 4, None),
        ("int4-bf16-ragged", "int", 4, None),
        ("int8-sym-channel", "int", 8, None),
        ("fp8-channel", "fp8", 8, None),
        ("mxfp4", "mxfp4", 4, 32),
    ],
)
def test_packing_gives_the_bytes_of_compressed_tensors(case: str, kind: Any, bits: int, group: int | None) -> None:
    parts = stored(load("compressed_tensors")[case])
    scheme = Scheme(
        {"int": "pack", "fp8": "float", "mxfp4": "mxfp4-pack"}[kind] + "-quantized", bits, "group" if group else "channel", group
    )
    scheme = replace(scheme, floating=kind != "int")
    shape = (
        len(parts["weight_scale"]),
        int(parts["weight_shape"][1]) if kind == "int" else load("compressed_tensors")[case]["expected"].shape[1],
    )
    form: Any = decode("compressed-tensors", case, parts, shape, scheme)
    values = (
        form.q.astype(np.float32) - (1 << (bits - 1))
        if kind == "int"
        else form.values.astype(np.float32)
        if kind == "fp8"
        else form.table[form.codes]
    )
    grid = Grid(kind, bits, group, parts["weight_scale"].dtype)
    made = [pack(grid, Quantized(values[rows], form.scale[rows])) for rows in (slice(0, 5), slice(5, None))]
    whole = assemble(grid, made, shape[1])
    assert set(whole) == set(parts)
    for name, tensor in whole.items():
        ours, theirs = tensor.reshape(-1).view(np.uint8), parts[name].reshape(-1).view(np.uint8)
        if name == "weight_packed" and kind == "mxfp4":  # the library also writes -0
            theirs = np.where(theirs & 0x0F == 0x08, theirs & 0xF0, theirs)
            theirs = np.where(theirs & 0xF0 == 0x80, theirs & 0x0F, theirs)
        assert np.array_equal(ours, theirs), name


@pytest.mark.parametrize("head", ["16", "same"])
@pytest.mark.parametrize("to", GRIDS)
def test_what_is_written_is_what_was_chosen(folder: Path, tmp_path: Path, to: Any, head: Any) -> None:
    recipe = Recipe(to, head=head)
    outcome = quantize(str(folder), tmp_path / "out", recipe, quiet)
    assert outcome.bytes_after < outcome.bytes_before
    with open_checkpoint(folder) as source, open_checkpoint(tmp_path / "out") as made:
        graph = build_graph(source.config)
        assert graph == build_graph(made.config)
        assert set(made.names()) == set(source.names())
        for op in graph.operators:
            for weight in op.weights:
                original = source.read(weight.name)
                form = made.form(weight.name)
                if op.kind != "linear" or (head == "16" and op.layer < 0):
                    assert form is None and np.array_equal(made.read(weight.name), original)
                else:
                    grid = recipe.grid([64, 256], source.config)
                    assert grid is not None and form is not None
                    assert np.array_equal(form.dequantize(), rtn.quantize(original.astype(np.float32), grid).dequantize())


def test_calibrating_comes_nearer(folder: Path, text: Path, tmp_path: Path) -> None:
    def distance(recipe: Recipe) -> float:
        out = tmp_path / str(recipe.text is None)
        quantize(str(folder), out, recipe, quiet)
        with open_checkpoint(folder) as source, open_checkpoint(out) as made:
            tokens = source.tokenizer().encode(TEXT[-600:])[:200]
            logits = [Reference(build_graph(c.config), c).logits(tokens) for c in (source, made)]
        return float(np.square(logits[0] - logits[1]).mean())

    assert distance(Recipe("int4", text=text)) < 0.8 * distance(Recipe("int4"))


def test_the_same_input_gives_the_same_bytes(folder: Path, text: Path, tmp_path: Path) -> None:
    for name in "ab":
        quantize(str(folder), tmp_path / name, Recipe("int4", text=text), quiet)
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == (tmp_path / "b" / "model.safetensors").read_bytes()


def test_shards_are_bounded_and_indexed(folder: Path, tmp_path: Path) -> None:
    quantize(str(folder), tmp_path / "one", Recipe("int4"), quiet)
    quantize(str(folder), tmp_path / "many", Recipe("int4"), quiet, shard_bytes=50_000)
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert len(files) == 3 and sorted(p.name for p in (tmp_path / "many").glob("*.safetensors")) == files
    whole = load_file(tmp_path / "one" / "model.safetensors")
    found = {}
    for file in files:
        tensors = load_file(tmp_path / "many" / file)
        assert len(tensors) == 1 or sum(t.nbytes for t in tensors.values()) <= 50_000
        found.update(tensors)
        read = SafetensorsFile(tmp_path / "many" / file)
        assert all(read.begins[name] % tensors[name].itemsize == 0 for name in tensors)
    assert found.keys() == whole.keys() == index["weight_map"].keys()
    assert all(np.array_equal(found[name].view(np.uint8), whole[name].view(np.uint8)) for name in whole)
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in whole.values())


def test_tensors_of_odd_sizes_are_aligned(tmp_path: Path) -> None:
    source = write_folder(
        tmp_path / "m", make_config(hidden_size=60, head_dim=15 * 2, num_attention_heads=2, num_key_value_heads=1, vocab_size=301)
    )
    quantize(str(source), tmp_path / "out", Recipe("fp8", head="same"), quiet)
    read = SafetensorsFile(tmp_path / "out" / "model.safetensors")
    size_of = {"float8_e4m3fn": 1, "bfloat16": 2}
    assert any(spec.nbytes % 8 for spec in read.specs.values())
    assert all(read.begins[name] % size_of[spec.dtype] == 0 for name, spec in read.specs.items())


def test_a_tied_head_in_few_bits_is_tied_no_more(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "m", make_config(tie_word_embeddings=True))
    for head, tied in (("16", True), ("same", False)):
        quantize(str(source), tmp_path / head, Recipe("int8", head=head), quiet)  # type: ignore[arg-type]
        with open_checkpoint(tmp_path / head) as made, open_checkpoint(source) as plain:
            assert made.config.tied_embeddings is tied
            assert ("lm_head.weight" in made.names()) is not tied
            assert np.array_equal(made.read("model.embed_tokens.weight"), plain.read("model.embed_tokens.weight"))


@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"])
def test_a_gguf_file_becomes_a_folder(tmp_path: Path, architecture: str) -> None:
    path = write_gguf(tmp_path / "model.gguf", make_config(architecture, vocab_size=300), quant="Q8_0")
    outcome = quantize(str(path), tmp_path / "out", Recipe("int8"), quiet)
    assert any("q8_0" in note for note in outcome.notes)
    with open_checkpoint(path) as source, open_checkpoint(tmp_path / "out") as made:
        assert replace(made.config, notes=(), quantization=None) == replace(source.config, notes=(), quantization=None)
        ours, theirs = made.tokenizer(), source.tokenizer()
        assert ours.encode("the answer in 12 <|end|>ü") == theirs.encode("the answer in 12 <|end|>ü")
        assert (ours.bos_id, ours.eos_ids, ours.chat_template) == (theirs.bos_id, theirs.eos_ids, theirs.chat_template)
        tokens = [1, 5, 77, 299]
        logits = [Reference(build_graph(c.config), c).logits(tokens) for c in (source, made)]
        assert np.abs(logits[0] - logits[1]).max() < 0.1


def test_configurations_survive_their_file() -> None:
    for scaling in (None, RopeScaling("linear", 2.0), RopeScaling("llama3", 32.0, 1.0, 4.0, 8192)):
        config = replace(parse_config(make_config()), rope_scaling=scaling)
        assert parse_config(config_mapping(config)) == config
    with pytest.raises(ConfigError, match=r"cannot express this model's qkv_bias"):
        config_mapping(replace(parse_config(make_config()), qkv_bias=True))


def test_transformers_reads_the_same_weights(folder: Path, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed (extra: oracle)")
    transformers = pytest.importorskip("transformers", reason="transformers is not installed (extra: oracle)")
    pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")
    for to in GRIDS:
        quantize(str(folder), tmp_path / to, Recipe(to), quiet)  # type: ignore[arg-type]
        how = transformers.CompressedTensorsConfig(run_compressed=False)
        model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / to, dtype=torch.bfloat16, quantization_config=how)
        theirs = dict(model.float().named_parameters())
        with open_checkpoint(tmp_path / to) as checkpoint:
            for name in build_graph(checkpoint.config).weights():
                assert np.array_equal(theirs[name].detach().numpy(), checkpoint.read(name).astype(np.float32)), name


# --- The command -----------------------------------------------------------------------------------------------------------


def test_quantize_and_generate(folder: Path, text: Path, tmp_path: Path) -> None:
    result = run("quantize", folder, tmp_path / "out", "--to", "int4", "--text", text)
    assert result.exit_code == 0, result.output
    assert "MB of weights became" in result.output
    assert "note: Groups of 64: some matrices have columns that groups of 128 do not divide" in result.output
    assert run("generate", tmp_path / "out", "-p", "Hello", "--device", "cpu", "--max-tokens", "4").exit_code == 0
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_mistakes_end_with_one_line(folder: Path, text: Path, tmp_path: Path) -> None:
    def failed(*arguments: object) -> str:
        result = run("quantize", *arguments)
        assert result.exit_code == 2 and "Traceback" not in result.output, result.output
        return result.output

    out, empty = tmp_path / "out", tmp_path / "empty.txt"
    empty.write_text(" \n")
    assert "gptq calibrates with a text" in failed(folder, out, "--to", "int4", "--method", "gptq")
    assert "rtn reads none" in failed(folder, out, "--to", "int4", "--method", "rtn", "--text", text)
    assert "--group is for int4" in failed(folder, out, "--to", "fp8", "--group", "64")
    assert "holds no text" in failed(folder, out, "--to", "int4", "--text", empty)
    assert "cannot be read as text" in failed(folder, out, "--to", "int4", "--text", tmp_path / "nothing")
    assert "exists already" in failed(folder, folder, "--to", "int8")
    assert "exists already" in failed(folder, empty, "--to", "int8")
    assert "cannot be written" in failed(folder, tmp_path / "no" / "out", "--to", "int8")
    assert "no such model" in failed("no/such/model", out, "--to", "int8")
    odd = write_folder(tmp_path / "odd", make_config(intermediate_size=200))
    assert "down_proj has 200 columns" in failed(odd, out, "--to", "int4")
    assert "down_proj has 200 columns" in failed(odd, out, "--to", "mxfp4")
    assert run("quantize", odd, out, "--to", "int4", "--group", "row").exit_code == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["empty.txt", "odd", "out"]


def test_weights_that_are_not_finite_are_named(tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    source = write_folder(tmp_path / "m", make_config())
    tensors = dict(load_file(source / "model.safetensors"))
    tensors["model.layers.1.mlp.up_proj.weight"] = np.full_like(tensors["model.layers.1.mlp.up_proj.weight"], np.nan)
    save_file(tensors, source / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.up_proj\.weight has values that are not finite"):
        quantize(str(source), tmp_path / "out", Recipe("int8"), quiet)
    assert [p.name for p in tmp_path.iterdir()] == ["m"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_nothing_is_left_of_what_was_not_finished(folder: Path, tmp_path: Path, error: Any) -> None:
    def stop(what: str, done: int, total: int) -> None:
        if done > total // 2:
            raise error

    expected: Callable[..., Any] = InputError if isinstance(error, OSError) else KeyboardInterrupt
    with pytest.raises(expected):  # type: ignore[call-overload]
        quantize(str(folder), tmp_path / "out", Recipe("int8"), stop)
    assert not list(tmp_path.iterdir())
    assert issubclass(InputError, FlashFormerError)
