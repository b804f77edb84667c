"""What kernels hold weights in: exactly what a checkpoint says, in the fewest bytes; and the CPU's kernels for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import flashformer
from flashformer.backends.cpu import CpuRunner, compile
from flashformer.backends.cpu import load as load_runner
from flashformer.check import check_runner, compare, sample_tokens
from flashformer.checkpoint import Checkpoint, open_checkpoint
from flashformer.errors import CheckpointError, InputError
from flashformer.explain import describe, expansions
from flashformer.formats import NAMED, PLAIN, Format, choose, encode, format_of, join
from flashformer.models import build_graph
from flashformer.plan import Plan, make_plan
from flashformer.quant.forms import Affine, Form, Scaled, Table
from flashformer.reference import Reference
from flashformer.shapes import shape
from flashformer.targets import Target, get
from flashformer.validate import validate
from model_files import make_config, write_folder, write_gguf
from quant_models import FORMS, QuantizedCheckpoint, affine, scaled
from running import assert_near, run_checkpoint

Quantise = Callable[[np.ndarray], Form]


def random(rows: int = 70, columns: int = 256) -> np.ndarray:
    """Values of a matrix."""
    return np.random.default_rng(0).standard_normal((rows, columns), dtype=np.float32)


def exact(form: Form) -> np.ndarray:
    """The values that a form stands for, in float64, where none of them is rounded."""
    if isinstance(form, Table):
        scale = form.scale / np.float32(form.divisor)
        return form.table.astype(np.float64)[form.codes] * np.repeat(scale.astype(np.float64), form.group, axis=1)
    if isinstance(form, Scaled):
        part = form.take(slice(None))
        return part.values.astype(np.float64) * np.repeat(part.scale.astype(np.float64), part.block[1], axis=1)[:, : part.values.shape[1]]
    group = np.arange(form.q.shape[1]) // form.group
    zero = 0 if form.zero is None else form.zero[:, group].astype(np.float64)
    minimum = 0 if form.minimum is None else form.minimum[:, group].astype(np.float64)
    return (form.q - zero) * form.scale[:, group].astype(np.float64) + minimum


def held(form: Form, format: Format) -> np.ndarray:
    """The values that codes and scales of a format stand for, in float64."""
    encoded = encode(form, format, "w")
    group = np.arange(encoded.codes.shape[1]) // format.group if format.group else np.zeros(encoded.codes.shape[1], int)
    scales = encoded.scales.astype(np.float32)
    if encoded.divisors is not None:
        scales /= encoded.divisors[:, None, None]
    scale, *offsets = scales.astype(np.float64)[:, group].transpose(2, 0, 1)
    if format.kind == "table":
        codes = np.array(format.table)[encoded.codes]
    elif format.kind == "fp8":
        codes = encoded.codes.view(ml_dtypes.float8_e4m3fn).astype(np.float64)
    elif format.bits == 8:
        codes = encoded.codes.view(np.int8).astype(np.float64)
    else:
        assert encoded.codes.max() < 16
        codes = encoded.codes - (8.0 if format.offset == "none" else 0.0)
    if format.offset == "zero":
        return (codes - offsets[0]) * scale
    return codes * scale + (offsets[0] if offsets else 0)


# --- formats ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FORMS)
def test_forms_are_held_exactly(name: str) -> None:
    quantise, expected = FORMS[name]
    form = quantise(random())
    format = format_of(form)
    assert format is not None and format.name == expected
    assert np.array_equal(held(form, format), exact(form))
    some = slice(11, 40)
    assert np.array_equal(held(form.take(some), format), exact(form)[some])


@pytest.mark.parametrize("columns", [40, 100, 200])
def test_the_last_group_of_a_row_may_be_short(columns: int) -> None:
    for form in (affine(random(9, columns), 4, 32, zeros=True), affine(random(9, columns), 8, 32), scaled(random(9, columns), (4, 32))):
        format = format_of(form)
        assert format is not None and format.groups(columns) == -(-columns // 32)
        assert np.array_equal(held(form, format), exact(form))


def test_bytes_are_those_of_the_file() -> None:
    """Of types whose blocks hold what a format holds; k-quants pay for scales of 6 bits. NVFP4 has a divisor for each row."""
    columns = 1024
    bits = {"Q8_0": 8.5, "Q4_0": 4.5, "Q4_1": 5.0, "int4 g128 zeros": 4.25, "Q4_K": 6.0, "Q6_K": 10.0, "MXFP4": 4.25, "NVFP4": 4.53125}
    for name, expected in bits.items():
        format = format_of(FORMS[name][0](random(4, columns)))
        assert format is not None and format.row_bytes(columns) * 8 == expected * columns, name
    assert PLAIN.row_bytes(columns) == 2 * columns


def test_what_no_format_holds() -> None:
    form = affine(random(), 4, 32)
    assert format_of(replace(form, group_of=np.arange(256, dtype=np.int32)[::-1] // 32)) is None
    assert format_of(affine(random(), 8, 32, minima=True)) is None
    assert join([Format("int", 4, 32), None]) is None


E2M1 = NAMED["mxfp4"].table
INT4, INT8 = Format("int", 4, 32, scale="float16"), Format("int", 8, 16, scale="float32")


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        (INT4, INT4, INT4),
        (INT4, INT8, Format("int", 8, 16, scale="float32")),
        (INT4, Format("int", 4, 0, scale="bfloat16"), Format("int", 4, 32, scale="float32")),
        (INT4, Format("int", 4, 128, "minimum", "float16"), Format("int", 4, 32, "minimum", "float16")),
        (Format("int", 4, 48), Format("int", 4, 32), Format("int", 4, 16)),
        (Format("int", 4, 32, "zero"), Format("int", 4, 32, "minimum"), None),
        (Format("fp8", 8, 128), Format("int", 8, 128), None),
        (Format("table", 4, 32, table=(0.0,) * 16), Format("table", 4, 32, table=(1.0,) * 16), None),
        (Format("fp8", 8, 128, scale="exponent"), Format("fp8", 8, 128, scale="bfloat16"), Format("fp8", 8, 128, scale="bfloat16")),
        (Format("int", 8, 16, scale="exponent"), INT8, INT8),
        (
            Format("table", 4, 16, scale="e4m3", table=E2M1),
            Format("table", 4, 32, scale="exponent", table=E2M1),
            Format("table", 4, 16, scale="float32", table=E2M1),
        ),
        (PLAIN, INT4, None),
        (PLAIN, PLAIN, PLAIN),
    ],
)
def test_the_cheapest_that_holds_both(a: Format, b: Format, expected: Format | None) -> None:
    assert join([a, b]) == join([b, a]) == expected


def test_what_is_joined_is_held_exactly() -> None:
    names = [name for name in FORMS if name.startswith(("Q", "int", "FP4", "NVFP4", "MXFP4"))]
    together = 0
    for a in names:
        for b in names:
            forms = [FORMS[name][0](random()) for name in (a, b)]
            format = join(map(format_of, forms))
            if format is None:
                continue
            for form in forms:
                if isinstance(form, Affine) and form.bits == 8 and format.offset == "minimum":
                    continue
                together += 1
                assert np.array_equal(held(form, format), exact(form)), (a, b, format.name)
    assert together > 100


def test_what_does_not_hold_all_rows_is_refused() -> None:
    form = affine(random(), 4, 32)
    format = format_of(form)
    assert format is not None and form.zero is not None
    scale = form.scale.copy()
    scale[40, 3] += 1e-6
    zero = form.zero.copy()
    zero[1, 1] = 7
    for wrong in (
        replace(form, scale=scale),
        replace(form, zero=zero),
        affine(random(), 5, 32),
        affine(random(), 4, 48),
        scaled(random(), (1, 64)),
    ):
        with pytest.raises(CheckpointError, match=r"^w: int4 g32 float16, which .* expand it \(weights='bf16'\)"):
            encode(wrong, format, "w")


def test_scales_of_a_byte() -> None:
    """Only where they hold everything: exponents have no zero, and what is divided stays in the range of kernels."""
    form = FORMS["MXFP4"][0](random())
    assert isinstance(form, Table)
    form.scale[0, :3] = 2.0**-127, 2.0**-126, 2.0**127
    format = format_of(form)
    assert format is not None and format.scale == "exponent" and np.array_equal(held(form, format), exact(form))
    form.scale[40, 3] = 0
    with pytest.raises(CheckpointError, match=r"^w: table g32 exponent, which holds its first and last rows"):
        encode(form, format, "w")
    zeros = format_of(form)
    assert zeros is not None and zeros.scale == "bfloat16" and np.array_equal(held(form, zeros), exact(form))
    offsets = format_of(affine(random(), 4, 32, "exponent", zeros=True))
    assert offsets is not None and offsets.name == "int4 g32 zero bfloat16"
    form = FORMS["NVFP4"][0](random())
    assert isinstance(form, Table)
    for divisor, scale in ((-3.0, "e4m3"), (2.0**-126, "e4m3"), (1.5 * 2.0**126, "float32"), (1.0, "bfloat16")):
        divided = format_of(replace(form, divisor=divisor))
        assert divided is not None and divided.scale == scale


def test_numbers_that_are_none_are_told() -> None:
    form = scaled(random(), (128, 128))
    form.values[3, 200] = np.nan
    format = format_of(form)
    assert format is not None
    encoded = encode(form, format, "w")
    assert not encoded.finite and np.isnan(encoded.scales.astype(np.float32)).sum() == 1 and np.isnan(encoded.scales[3, 1, 0])
    assert encode(form.take(slice(4, 70)), format, "w").finite


# --- plans -----------------------------------------------------------------------------------------------------------------


CPU = get("cpu")


def all_in(format: Format, name: str = "llama-3.2-1b", target: Target = CPU, **others: Format) -> Plan:
    """The plan of a known shape with all matrices in a format, or in that of their stage."""
    config = shape(name)
    graph = build_graph(config)
    weights = {w: format for w, weight in graph.weights().items() if len(weight.shape) == 2}
    for part, other in others.items():
        weights.update({w: other for w in weights if part in w})
    return make_plan(config, graph, target, formats=weights)


def test_a_token_reads_the_bytes_of_its_formats() -> None:
    head = Format("int", 8, 32, scale="float16")
    plan = all_in(INT4, embed_tokens=head)
    validate(plan)
    layers = 16 * (2048 * 2048 * 2 + 2 * 512 * 2048 + 3 * 8192 * 2048)
    assert plan.weight_bytes() == layers * 18 // 32 + 128256 * 2048 * 34 // 32
    assert plan.embedding_format == head and plan.embedding_bytes() == 128256 * 2048 * 34 // 32
    assert plan.weight_bytes() == plan.tape_bytes()
    assert "1.236 B parameters" in describe(plan, 100) and "int8 g32 float16" in describe(plan, 100)
    small = all_in(Format("int", 4, 32, "minimum", "float16"), "smollm2-135m")
    assert small.tape_bytes() / small.weight_bytes() < 1.02


def test_stages_take_what_holds_all_of_their_matrices() -> None:
    plan = all_in(INT4, v_proj=INT8, up_proj=PLAIN, **{"layers.3.mlp.down_proj": INT8})
    validate(plan)
    formats = {s.name: s.geometry.format for s in plan.layer_stages(0) if s.geometry}
    assert formats == {"qkv": INT8, "attention_output": INT4, "gate_up": PLAIN, "down": INT4}
    assert [s.geometry.format for s in plan.stages if s.name == "down" and s.geometry].index(INT8) == 3


def test_a_target_without_kernels_expands() -> None:
    target = replace(get("sm_90"), kernels=(("float", 16),))
    plan = all_in(INT4, target=target)
    validate(plan)
    assert plan == all_in(PLAIN, target=target)
    assert all_in(Format("int", 4, 24)) == all_in(PLAIN)


def test_groups_need_heads_without_padding() -> None:
    config = replace(shape("smollm2-135m"), head_dim=24)
    graph = build_graph(config)
    for format, expected in ((INT4, PLAIN), (Format("int", 8), Format("int", 8))):
        plan = make_plan(config, graph, get("cpu"), formats=dict.fromkeys(graph.weights(), format))
        validate(plan)
        found = {s.name: s.geometry.format for s in plan.layer_stages(0) if s.geometry}
        assert found["attention_output"] == expected and found["qkv"] == format


# --- kernels ---------------------------------------------------------------------------------------------------------------


def forms_of(checkpoint: Checkpoint, quantise: Quantise, others: Mapping[str, Quantise | None]) -> dict[str, Form]:
    """All matrices as `quantise` makes them, those with a part of their name in `others` as that does (None: not at all)."""
    forms = {}
    for name, weight in build_graph(checkpoint.config).weights().items():
        how = next((how for part, how in others.items() if part in name), quantise)
        if len(weight.shape) == 2 and how is not None:
            forms[name] = how(checkpoint.read(name).astype(np.float32))
    return forms


@contextmanager
def running(
    folder: Path, quantise: Quantise, others: Mapping[str, Quantise | None] | None = None, workers: int = 2, **config: Any
) -> Iterator[tuple[CpuRunner, Reference]]:
    """A small model with quantised matrices on the CPU, and its reference."""
    sizes: dict[str, Any] = {
        "hidden_size": 256, "head_dim": 32, "intermediate_size": 384, "vocab_size": 291, "tie_word_embeddings": True, **config,
    }  # fmt: skip
    write_folder(folder, make_config(**sizes))
    with open_checkpoint(folder) as plain:
        checkpoint = QuantizedCheckpoint(plain, forms_of(plain, quantise, others or {}))
        formats = choose(checkpoint, build_graph(plain.config).weights())
        with run_checkpoint(checkpoint, load_runner, get("cpu"), 256, workers, formats) as made:
            yield made


def assert_right(runner: CpuRunner, reference: Reference, positions: int = 60) -> None:
    """Compare logits and greedy tokens with those of the exact dequantised weights."""
    result = check_runner(runner, reference, sample_tokens(runner.plan.config, positions, seed=1))
    assert_near(result, 4e-3)  # the KV cache has 16 bits


STAGES = {"qkv": ("q_proj", "k_proj", "v_proj"), "attention_output": ("o_proj",), "gate_up": ("gate_proj", "up_proj"),
          "down": ("down_proj",), "head": ("embed_tokens",)}  # fmt: skip


@pytest.mark.parametrize("names", [list(FORMS)[i : i + len(STAGES)] for i in range(0, len(FORMS), len(STAGES))], ids=", ".join)
def test_kernels_agree_with_the_reference(tmp_path: Path, names: list[str]) -> None:
    """Every stage in another format."""
    chosen = {stage: FORMS[names[i % len(names)]] for i, stage in enumerate(STAGES)}
    others = {part: chosen[stage][0] for stage, parts in STAGES.items() for part in parts}
    with running(tmp_path, others["embed_tokens"], others) as (runner, reference):
        found = {s.name: s.geometry.format.name for s in runner.plan.stages if s.geometry}
        assert found == {stage: expected for stage, (_, expected) in chosen.items()}
        assert runner.plan.embedding_format.name == found["head"]
        assert_right(runner, reference)


ODD: dict[str, Any] = {"architecture": "Qwen3ForCausalLM", "hidden_size": 200, "head_dim": 24, "intermediate_size": 341, "vocab_size": 1003}


@pytest.mark.parametrize(("name", "workers"), [("int4 g128 zeros", 5), ("int8 rows", 1)])
def test_odd_shapes(tmp_path: Path, name: str, workers: int) -> None:
    """Groups that end within a row's last fragment, and heads with padding."""
    with running(tmp_path, FORMS[name][0], workers=workers, **ODD) as (runner, reference):
        assert_right(runner, reference)


# Matrices of one stage with different divisors, and a head whose last tile is not full.
DIVIDED: dict[str, Any] = {"num_attention_heads": 6, "hidden_size": 208, "intermediate_size": 336, "vocab_size": 1003}


def test_divisors_of_each_matrix(tmp_path: Path) -> None:
    with running(tmp_path, FORMS["NVFP4"][0], **DIVIDED) as (runner, reference):
        assert {s.geometry.format.name for s in runner.plan.stages if s.geometry} == {"table g16 e4m3"}
        assert runner.plan.embedding_format.divisor_bytes
        assert_right(runner, reference)


def test_layers_and_stages_of_many_formats(tmp_path: Path) -> None:
    """As in files that mix types; the table is not the head, and has a format of its own."""
    others = {
        "embed_tokens": FORMS["Q6_K"][0], "lm_head": FORMS["Q8_0"][0], "layers.0.mlp.down": FORMS["Q6_K"][0],
        "layers.1.mlp.down": None, "layers.1.self_attn.v": FORMS["Q6_K"][0], "layers.2.self_attn.o": FORMS["NF4"][0],
    }  # fmt: skip
    changes = {"tie_word_embeddings": False, "num_hidden_layers": 4, "attention_bias": True}
    with running(tmp_path, FORMS["Q4_K"][0], others, 3, **changes) as (runner, reference):
        names = [s.geometry.format.name for s in runner.plan.stages if s.name in ("qkv", "down") and s.geometry]
        assert names[:4] == ["int4 g32 minimum float32", "int8 g16 float32", "int8 g16 minimum float32", "16-bit"]
        assert runner.plan.embedding_format.name == "int8 g16 float32"
        assert_right(runner, reference)


def test_a_plain_table_beside_quantised_layers(tmp_path: Path) -> None:
    with running(tmp_path, FORMS["Q4_0"][0], {"embed_tokens": None}) as (runner, reference):
        assert runner.plan.embedding_format == PLAIN == runner.plan.stages[-2].geometry.format  # type: ignore[union-attr]
        assert_right(runner, reference)


@pytest.mark.parametrize("level", ["x86-64", "x86-64-v3"])
def test_narrower_vectors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, level: str) -> None:
    """The paths of processors without AVX-512, and without AVX."""
    if "avx2" not in Path("/proc/cpuinfo").read_text():
        pytest.skip("the options are those of x86-64 with AVX2")
    monkeypatch.setattr(compile, "NATIVE", (f"-march={level}",))
    compile.examine.cache_clear()
    others = {"q_proj": FORMS["NF4"][0], "k_proj": FORMS["NF4"][0], "v_proj": FORMS["NF4"][0], "o_proj": FORMS["fp8 rows"][0],
              "down": FORMS["Q6_K"][0], "embed": FORMS["int8 rows"][0]}  # fmt: skip
    try:
        with running(tmp_path, FORMS["Q4_1"][0], others) as (runner, reference):
            assert f"-march={level}" in compile.find_compiler().options
            assert_right(runner, reference)
    finally:
        compile.examine.cache_clear()


def test_the_same_bits_every_time(tmp_path: Path) -> None:
    with running(tmp_path, FORMS["Q4_1"][0], workers=3) as (runner, _):
        tokens = sample_tokens(runner.plan.config, 40, seed=4)
        first = runner.logits(tokens, 0)
        assert all(np.array_equal(runner.logits(tokens, 0), first) for _ in range(20))


def test_values_that_are_not_finite_are_told(tmp_path: Path) -> None:
    def damaged(values: np.ndarray) -> Form:
        form = scaled(values, (128, 128))
        form.values[5, 7] = np.nan
        return form

    with (
        pytest.warns(UserWarning, match=r"layers\.1\.mlp\.up_proj\.weight holds values that are not finite"),
        running(tmp_path, FORMS["fp8 rows"][0], {"layers.1.mlp.up": damaged}) as (runner, _),
    ):
        assert np.isnan(runner.logits([1], 0)).all()


# --- files -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("quant", ["Q4_1", "Q5_0"])
def test_a_gguf_file_runs_as_it_is(tmp_path: Path, quant: str) -> None:
    path = write_gguf(tmp_path / "model.gguf", make_config(vocab_size=300), quant=quant)
    tokens = list(range(1, 40))
    with flashformer.load(path, "cpu") as engine:
        expected = Reference(build_graph(engine.config), engine.checkpoint).logits(tokens)
        assert compare(engine.logits(tokens), expected).within
        bits = {"Q4_1": 5, "Q5_0": 8.5}[quant]  # codes of 5 bits take a byte
        matrices = sum(s.linear.rows_used * s.linear.columns_used for s in engine.plan.stages if s.linear)
        assert engine.plan.weight_bytes() == matrices * bits / 8
        told = "qkv, attention_output, gate_up, down, head, embedding: q5_0 is held as int8 g32 "
        assert [note.startswith(told) for note in engine.config.notes] == ([True] if quant == "Q5_0" else [])
    with flashformer.load(path, "cpu", weights="bf16") as engine:
        assert engine.plan.weight_bytes() == 2 * matrices
        assert compare(engine.logits(tokens), expected).within
        assert f"embedding: {quant.lower()} is expanded to bfloat16: +0.00 GB" in engine.config.notes[-1]
    with pytest.raises(InputError, match="weights is 'int3'; it must be one of native, bf16"):
        flashformer.load(path, "cpu", weights="int3")


def test_what_expansion_costs_is_told(tmp_path: Path) -> None:
    write_folder(tmp_path, make_config())
    with open_checkpoint(tmp_path) as plain:
        graph = build_graph(plain.config)
        assert expansions(make_plan(plain.config, graph, get("sm_90")), plain) == ""
        checkpoint = QuantizedCheckpoint(plain, forms_of(plain, FORMS["Q4_0"][0], {"embed": None, "lm_head": None, "q_proj": None}))
        told = expansions(make_plan(plain.config, graph, get("sm_90")), checkpoint)
        assert told == "qkv, attention_output, gate_up, down: few bits is expanded to bfloat16: +0.00 GB"
        native = make_plan(plain.config, graph, get("cpu"), formats=choose(checkpoint, graph.weights()))
        assert expansions(native, checkpoint) == "qkv: few bits is expanded to bfloat16: +0.00 GB"
