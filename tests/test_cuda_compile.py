"""Every kernel compiles for every GPU, without spills. Needs NVRTC, but no GPU."""

from __future__ import annotations

import ctypes
import re

import pytest

from flashformer.backends.cuda import RandomWeights
from flashformer.backends.cuda.codegen import (
    LAYOUTS,
    OWN_SEQUENCE,
    PARAMETERS,
    PREFILL_PARAMETERS,
    SCALES,
    Params,
    PrefillParams,
    SequenceStruct,
    code_layout,
    generate,
    headers,
    threads,
)
from flashformer.backends.cuda.prefill import possible
from flashformer.backends.cuda.prompts import prompt_plan
from flashformer.config import ModelConfig
from flashformer.errors import BuildError
from flashformer.formats import NAMED, Format
from flashformer.geometry import WIDE
from flashformer.models import build_graph
from flashformer.plan import KvType, Plan, make_plan
from flashformer.shapes import shape
from flashformer.targets import available, get
from flashformer.validate import validate

pytest.importorskip("cuda.bindings.nvrtc", reason="NVRTC is not installed")

CUDA = sorted(name for name, target in available().items() if target.kind == "cuda")
SHAPES = ["smollm2-135m", "qwen3-0.6b", "llama-3.2-1b", "llama-3.2-3b", "llama-3.1-8b", "qwen3-14b"]
LARGE = ["qwen3-32b", "llama-3.1-70b"]  # do not fit the older GPUs
REGISTERS = 65536  # of an SM
MOST_CODE = 256 << 10  # bytes: more would hardly stay in the instruction caches
MOST_WIDE_CODE = 320 << 10  # of kernels of 16 columns: what they do for a byte of weights takes longer than to fetch it


def odd(**changes: object) -> ModelConfig:
    """A small configuration with unusual sizes."""
    sizes: dict[str, object] = {
        "architecture": "Qwen3ForCausalLM", "hidden_size": 200, "num_layers": 2, "num_heads": 6, "num_kv_heads": 2, "head_dim": 24,
        "ffn_size": 341, "vocab_size": 1003, "norm_eps": 1e-6, "rope_theta": 1e4, "max_positions": 512, "qk_norm": True, "qkv_bias": True,
    }  # fmt: skip
    return ModelConfig(**{**sizes, **changes})  # type: ignore[arg-type]


ODD = {
    "odd": odd(),
    "tiny": odd(hidden_size=64, num_heads=4, num_kv_heads=2, head_dim=16, ffn_size=160, vocab_size=300),
    "mqa": odd(num_heads=12, num_kv_heads=1, head_dim=8),
    "wide heads": odd(head_dim=256, dtype="float16"),
    "short warps": odd(hidden_size=3200, num_heads=24, num_kv_heads=8, head_dim=128, ffn_size=9600),
    "large vocabulary": odd(vocab_size=262144, hidden_size=2560, head_dim=256, ffn_size=6912),
}


def planned(config: ModelConfig, target: str, kv_type: KvType = "native") -> Plan:
    """The plan of a model on a typical device of a target."""
    return make_plan(config, build_graph(config), get(target), kv_type=kv_type)


def assert_clean(plan: Plan, most_code: int = MOST_CODE) -> None:
    """Compile and look at what the assembler says."""
    from flashformer.backends.cuda.compile import compile_source

    kernel = compile_source(generate(plan).text, plan.target)
    assert len(kernel.cubin) > 10_000
    assert kernel.spills == 0, kernel.log
    assert 0 < kernel.registers <= 255
    assert 50_000 < kernel.code_bytes <= most_code
    # Warps share the registers of the SM's four parts.
    warps = -(-threads(plan) // 32 // 4) if threads(plan) % 128 == 0 else threads(plan) // 128 + 1
    assert kernel.registers * 32 * warps * 4 <= REGISTERS


@pytest.mark.parametrize("target", CUDA)
@pytest.mark.parametrize("name", SHAPES)
def test_real_shapes(name: str, target: str) -> None:
    assert_clean(planned(shape(name), target))


@pytest.mark.parametrize("target", [t for t in CUDA if get(t).bulk_copy])
@pytest.mark.parametrize("name", LARGE)
def test_large_shapes(name: str, target: str) -> None:
    assert_clean(planned(shape(name), target))


@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
@pytest.mark.parametrize("name", ODD)
def test_odd_shapes(name: str, target: str) -> None:
    assert_clean(planned(ODD[name], target))


@pytest.mark.parametrize("target", CUDA)
@pytest.mark.parametrize("kv_type", ["int8", "fp8"])
def test_caches_of_8_bits(kv_type: KvType, target: str) -> None:
    assert_clean(planned(odd(head_dim=80, hidden_size=320), target, kv_type))


FP4, NF4 = NAMED["nvfp4"].table, NAMED["nf4"].table
# The formats of two kernels, stage by stage.
FORMATS = [
    {
        "qkv": Format("int", 8, 32, "zero", "float16"), "attention_output": NAMED["nvfp4"], "gate_up": NAMED["mxfp4"],
        "down": Format("int", 4, 128, "minimum", "bfloat16"), "head": Format("int", 8, 0, scale="exponent"),
    },
    {
        "qkv": Format("fp8", 8, 128, scale="exponent"), "attention_output": Format("table", 4, 64, scale="float32", table=NF4),
        "gate_up": Format("int", 4, 16, "minimum", "float32"), "down": Format("int", 8, 16, "zero", "float16"),
        "head": Format("table", 4, 0, scale="bfloat16", table=(*NF4[::2], *NF4[1::2])),
    },
]  # fmt: skip
NAMES = {"q_proj": "qkv", "k_proj": "qkv", "v_proj": "qkv", "o_proj": "attention_output", "gate": "gate_up", "up_": "gate_up",
         "down": "down", "embed": "head"}  # fmt: skip


def test_formats_that_are_compiled_are_all_there_are() -> None:
    every = [format for stages in FORMATS for format in stages.values()]
    assert {code_layout(format) for format in every} == LAYOUTS.keys()
    assert {format.scale for format in every} == SCALES.keys()
    assert {format.offset for format in every} == {"none", "zero", "minimum"}
    assert {format.group for format in every} == {0, 16, 32, 64, 128}


@pytest.mark.parametrize("target", CUDA)
@pytest.mark.parametrize("stages", FORMATS, ids=["first", "second"])
def test_formats_of_codes(stages: dict[str, Format], target: str) -> None:
    config = shape("llama-3.2-1b")
    graph = build_graph(config)
    formats = {w: stages[stage] for w in graph.weights() for part, stage in NAMES.items() if part in w}
    plan = make_plan(config, graph, get(target), formats=formats)
    assert {s.name: s.geometry.format for s in plan.stages if s.geometry} == stages
    assert_clean(plan)


def of_codes(name: str, weights: str) -> Plan:
    """The plan of a model whose matrices are all in one format, on sm_90."""
    config = shape(name)
    return make_plan(config, build_graph(config), get("sm_90"), formats=RandomWeights(config, format=NAMED[weights]).formats)


@pytest.mark.parametrize("weights", ["int8", "int4"])
@pytest.mark.parametrize("name", LARGE)
def test_large_shapes_of_codes(name: str, weights: str) -> None:
    assert_clean(of_codes(name, weights))


# Of several columns: the fewest and the most that a target has, and one of odd sizes; every format of codes.
@pytest.mark.parametrize(
    ("target", "columns"), [(target, columns) for target in CUDA for columns in sorted({get(target).columns[1], max(get(target).columns)})]
)
@pytest.mark.parametrize("name", ["llama-3.1-8b", "odd", "tiny"])
def test_several_columns(name: str, target: str, columns: int) -> None:
    config = ODD[name] if name in ODD else shape(name)
    assert_clean(make_plan(config, build_graph(config), get(target), columns=columns), MOST_WIDE_CODE if columns == WIDE else MOST_CODE)


@pytest.mark.parametrize(("target", "columns"), [("sm_80", 4), ("sm_90", 8)])
@pytest.mark.parametrize("stages", FORMATS, ids=["first", "second"])
def test_several_columns_and_codes(stages: dict[str, Format], target: str, columns: int) -> None:
    config = shape("llama-3.2-1b")
    graph = build_graph(config)
    formats = {w: stages[stage] for w in graph.weights() for part, stage in NAMES.items() if part in w}
    assert_clean(make_plan(config, graph, get(target), formats=formats, kv_type="int8", columns=columns))


# A kernel for prompts has chunks that are cut for one column.
@pytest.mark.parametrize(
    ("target", "weights", "columns"), [("sm_80", "bf16", 8), ("sm_90", "bf16", 16), ("sm_90", "int4", 16), ("sm_120", "bf16", 4)]
)
@pytest.mark.parametrize("name", ["llama-3.2-1b", "llama-3.1-8b"])
def test_kernels_for_prompts(name: str, target: str, weights: str, columns: int) -> None:
    assert_prompt_kernel(shape(name), target, weights, columns)


# Every model gets one where nobody says otherwise.
@pytest.mark.parametrize("name", ODD)
def test_kernels_for_prompts_of_unusual_models(name: str) -> None:
    assert_prompt_kernel(ODD[name], "sm_90", "bf16", get("sm_90").usual_prompt_columns)


def assert_prompt_kernel(config: ModelConfig, target: str, weights: str, columns: int) -> None:
    """It has the tiles of the usual kernel, and compiles."""
    formats = RandomWeights(config, format=NAMED[weights]).formats
    usual = make_plan(config, build_graph(config), get(target), formats=formats, prompt_columns=columns)
    plan = prompt_plan(usual)
    validate(plan)
    assert plan.columns == columns and [s.count for s in plan.stages] == [s.count for s in usual.stages]
    assert_clean(plan, MOST_WIDE_CODE)


# One for long prompts: formats with scales of a row, of groups, tables of one term and of two; unusual models.
@pytest.mark.parametrize(
    ("name", "weights", "kv"),
    [
        *(("llama-3.1-8b", *kinds) for kinds in (("bf16", "native"), ("fp8", "fp8"), ("nf4", "native"), ("nvfp4", "int8"))),
        *((name, "bf16", "native") for name in ("mqa", "wide heads", "short warps")),
    ],
)
def test_kernels_for_long_prompts(name: str, weights: str, kv: KvType) -> None:
    from flashformer.backends.cuda.compile import compile_source

    config = ODD[name] if name in ODD else shape(name)
    formats = RandomWeights(config, format=NAMED[weights]).formats
    plan = make_plan(config, build_graph(config), get("sm_90"), formats=formats, kv_type=kv, prompt_columns=16)
    assert possible(plan)
    kernel = compile_source(generate(plan, prefill=True).text, plan.target)
    assert kernel.spills == 0 and "serialized" not in kernel.log


@pytest.mark.parametrize("target", CUDA)
def test_tools(target: str) -> None:
    from flashformer.backends.cuda.compile import compile_source

    assert compile_source('#include "code_tools.cuh"\n', get(target), "cuda-tools").spills == 0


def test_every_target_has_a_file_that_says_what_it_is() -> None:
    assert {"sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120"} <= set(CUDA)
    for name in CUDA:
        assert get(name).name == name and get(name).shared_bytes > 0


def test_host_and_kernel_agree_on_the_parameters() -> None:
    """The structures that Python fills and those that the source declares have the same members in the same order."""
    text = generate(planned(odd(), "sm_90")).text
    text += generate(planned(odd(), "sm_90"), prefill=True).text
    structs = (
        ("Params", Params, PARAMETERS), ("Sequence", SequenceStruct, OWN_SEQUENCE),
        ("PrefillParams", PrefillParams, PREFILL_PARAMETERS),
    )  # fmt: skip
    for name, filled, fields in structs:
        body = re.search(rf"struct {name} \{{(.*?)\n\}};", text, re.S)
        assert body is not None
        assert re.findall(r"(\w+);", body[1]) == [field for field, *_ in fields]
        assert ctypes.sizeof(filled) == sum(ctypes.sizeof(kind) for _, _, kind, _ in fields)  # no padding between them


def test_generation_is_reproducible() -> None:
    assert generate(planned(odd(), "sm_90")).text == generate(planned(odd(), "sm_90")).text


def test_stages_that_are_alike_share_the_consumers_code() -> None:
    """Not where one has more columns than the other, or another form, or there is one column, whose code is small enough."""

    def twins(name: str, columns: int = 16, **formats: Format) -> list[tuple[str, str]]:
        config = shape(name)
        graph = build_graph(config)
        forms = {w: form for w in graph.weights() for part, form in formats.items() if f"{part}.weight" in w}
        text = generate(make_plan(config, graph, get("sm_90"), columns=columns, formats=forms)).text
        return re.findall(r"TwinColumns<Model, stage::(\w+), stage::(\w+)>::run", text)

    alike, both = [("AttentionOutput", "GateUp")], ("o_proj", "gate_proj", "up_proj")
    int4 = NAMED["int4"]
    assert twins("llama-3.1-8b") == twins("llama-3.1-8b", 2) == twins("llama-3.1-8b", **dict.fromkeys(both, int4)) == alike
    assert twins("llama-3.1-8b", o_proj=int4) == twins("qwen3-0.6b") == twins("llama-3.1-8b", 1) == []


def test_the_source_names_no_folder_of_this_machine() -> None:
    assert all("/" not in name.split("/", 1)[0] for name in headers())
    assert "/" not in "".join(re.findall(r'#include "([^"]+)"', generate(planned(odd(), "sm_90")).text))


def test_a_source_that_does_not_compile_shows_the_log() -> None:
    from flashformer.backends.cuda.compile import compile_source

    with pytest.raises(BuildError, match="undefined_name"):
        compile_source("__global__ void f() { undefined_name(); }", get("sm_90"))
