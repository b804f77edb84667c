"""Packing and multiplying codes as the CUDA kernels do it, without a GPU: their own code, compiled for a CPU (emulated/)."""

from __future__ import annotations

import ctypes
import re
import subprocess
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from flashformer.backends.cpu.compile import find_compiler
from flashformer.backends.cuda import RandomWeights, codegen
from flashformer.backends.cuda.pack import Packer
from flashformer.backends.source import constants
from flashformer.checkpoint import Checkpoint, open_checkpoint
from flashformer.config import parse_config
from flashformer.formats import NAMED, Format, choose
from flashformer.models import build_graph
from flashformer.plan import Plan, Stage, make_plan
from flashformer.tape import Tape, block_rows, lay_tapes
from flashformer.targets import get
from flashformer.validate import validate
from model_files import make_config, write_folder
from quant_models import FORMS, QuantizedCheckpoint
from test_formats import STAGES, Quantise, forms_of
from test_load import FakeContext

EMULATED = Path(__file__).parent / "emulated"
WORKERS = 3
SIZES: dict[str, Any] = {"hidden_size": 256, "head_dim": 32, "intermediate_size": 1184, "vocab_size": 291, "tie_word_embeddings": True}
# Instructions as the emulator has them, by the first word of their names.
INSTRUCTIONS = {
    "prmt": "r = prmt(a, b, selector);", "dp2a": "r = a >> 16;", "lop3": "r = (a & mask) ^ flip;", "redux": "top = largest_of_lanes(top);",
    "max": "r = larger_of_halves(a, b);", "mma": "multiply_bytes<kSigned>(d, a, b0, b1);", "cvt": "r = halves_of_e4m3(pair);",
}  # fmt: skip


def build(folder: Path, stages: list[Stage], arch: int) -> ctypes.CDLL:
    """The emulator for some stages, whose products are `multiply0` and so on."""
    (folder / "prelude.cuh").write_text((EMULATED / "warp.cuh").read_text())
    for name in ("codes.cuh", "integers.cuh", "code_tools.cuh", "tools.cuh"):
        text = (codegen.HEADERS / name).read_text().split("// A plain read of", maxsplit=1)[0]
        (folder / name).write_text(re.sub(r'asm\("(\w+).*?\);', lambda found: INSTRUCTIONS[found[1]], text, flags=re.DOTALL))
    lines = []
    for i, stage in enumerate(stages):
        g = stage.geometry
        assert g is not None
        facts = [("kWarpsColumns", g.warps_columns), ("kWarpsRows", g.warps_rows), ("kFragments", g.fragments), ("kParts", g.parts)]
        lines += [f"struct Stage{i} {{", *constants([("int", *fact) for fact in facts]), *constants([("u32", "kStack", g.stack)])]
        lines += [*codegen.describe_format(g.format), "};", f'extern "C" void multiply{i}(const u8* tape, const u64* chunks, u32 tiles, ']
        lines.append(f"const u16* x, float* sums) {{ multiply_tiles<Stage{i}>(tape, chunks, tiles, x, sums); }}")
    (folder / "stages.h").write_text("\n".join(lines))
    compiler = find_compiler()
    machine = [option for option in compiler.options if option.startswith("-m")]
    options = ["-std=c++17", "-O1", "-ffp-contract=off", "-fPIC", "-shared", "-w", f"-D__CUDA_ARCH__={arch}"]
    # Each library has tables of its own, though they have the same names.
    command = [compiler.path, *machine, *options, "-fno-gnu-unique", "-Wl,-Bsymbolic"]
    library = folder / "codes.so"
    subprocess.run([*command, f"-I{folder}", str(EMULATED / "codes.cpp"), "-o", str(library)], check=True)
    return ctypes.CDLL(str(library))


class Context(FakeContext):
    """A played GPU whose packing kernels are the real ones."""

    def __init__(self, library: ctypes.CDLL) -> None:
        super().__init__()
        self.library = library
        self.driver = SimpleNamespace(cuMemsetD32Async=self.fill)

    def fill(self, at: int, value: int, count: int, stream: list[Any]) -> None:
        values = np.full(count, value, np.uint32)
        stream.append(lambda: ctypes.memmove(at, values.ctypes.data, values.nbytes))

    def launch(self, function: str, grid: int, threads: int, arguments: tuple[Any, ...], stream: Any = None) -> None:
        if not hasattr(self.library, function):
            return super().launch(function, grid, threads, arguments, stream)
        copies = [type(a).from_buffer_copy(a) for a in arguments]  # as the driver does: the caller may change its own
        passed = [ctypes.byref(a) if isinstance(a, ctypes.Structure) else a for a in copies]
        kernel, count = getattr(self.library, function), ctypes.c_uint64(grid * threads)
        (self.stream if stream is None else stream).append(lambda: kernel(*passed, count))


def multiply(library: ctypes.CDLL, number: int, plan: Plan, tape: Tape, arena: np.ndarray, stage: Stage, x: np.ndarray) -> np.ndarray:
    """All rows of a stage times x (bfloat16 [columns]), float32 [rows]."""
    g, index = stage.geometry, plan.stages.index(stage)
    assert g is not None
    out = []
    for worker, tiles in enumerate(stage.count):
        first, last = tape.starts[index : index + 2, worker]
        chunks = tape.offset[first:last, worker].astype(np.uint64) * np.uint64(tape.unit)
        sums = np.full((tiles * 8, g.warps_columns * 4), np.nan, np.float32)
        pointers = [ctypes.c_void_p(array.ctypes.data) for array in (arena, chunks, x, sums)]
        getattr(library, f"multiply{number}")(*pointers[:2], ctypes.c_uint32(tiles), *pointers[2:])
        out.append(sums.sum(axis=1))
    return np.concatenate(out)


def assert_right(folder: Path, weights: Checkpoint, formats: Mapping[str, Format], arch: int = 900) -> list[str]:
    """Pack a model, multiply with each of its stages, and look at the embedding table; the names of their formats."""
    plan = make_plan(weights.config, build_graph(weights.config), get("sm_90"), 64, WORKERS, formats)
    validate(plan)
    stages = [s for s in plan.stages if s.geometry and s.layer <= 0]
    library = build(folder, stages, arch)
    tape = lay_tapes(plan)
    memory = np.zeros(tape.nbytes + 128, np.uint8)
    arena = memory[-memory.ctypes.data % 128 :]
    table = np.zeros((plan.config.vocab_size, plan.config.hidden_size), ml_dtypes.bfloat16)
    packer = Packer(Context(library), None, plan, weights, lambda *_: None)  # type: ignore[arg-type]
    packer.slot_bytes = 1 << 17  # more than one piece
    assert packer.run(tape, arena.ctypes.data, table.ctypes.data) == []
    assert np.array_equal(table.view(np.uint16), weights.read(plan.embedding).view(np.uint16))
    for number, stage in enumerate(stages):
        assert stage.linear is not None and stage.geometry is not None
        values = np.random.default_rng(number).standard_normal(stage.linear.columns_used)
        x = np.zeros(stage.geometry.columns, ml_dtypes.bfloat16)
        x[: len(values)] = values
        found = multiply(library, number, plan, tape, arena, stage, x)
        for block, of in enumerate(stage.linear.blocks):
            form = weights.form(of.weight)
            assert form is not None
            expected = form.dequantize().astype(np.float64) @ x[: len(values)].astype(np.float64)
            error = found[block_rows(stage, block)] - expected
            # NOTE: fixed point has 15 bits of the largest x; of a table's values fp16 has 11 bits of each, two digits 14 of the largest.
            most = {"table": 3e-4, "digit_table": 8e-5}.get(codegen.code_layout(stage.geometry.format), 3e-5)
            assert np.sqrt(np.mean(error**2)) < most * np.sqrt(np.mean(expected**2)), (stage.name, stage.geometry.format.name)
    return [s.geometry.format.name for s in stages if s.geometry]


def quantized(folder: Path, others: Mapping[str, Quantise | None], arch: int = 900, **changes: Any) -> list[str]:
    """The same of a small model with matrices that are made as `others` say."""
    write_folder(folder, make_config(**{**SIZES, **changes}))
    with open_checkpoint(folder) as plain:
        weights = QuantizedCheckpoint(plain, forms_of(plain, FORMS["Q8_0"][0], others))
        return assert_right(folder, weights, choose(weights, build_graph(plain.config).weights()), arch)


@pytest.mark.parametrize("names", [list(FORMS)[i : i + len(STAGES)] for i in range(0, len(FORMS), len(STAGES))], ids=", ".join)
def test_every_form(tmp_path: Path, names: list[str]) -> None:
    """Every stage in another format."""
    chosen = {stage: FORMS[names[i % len(names)]] for i, stage in enumerate(STAGES)}
    others = {part: chosen[stage][0] for stage, parts in STAGES.items() for part in parts}
    assert quantized(tmp_path, others) == [chosen[stage][1] for stage in STAGES]


@pytest.mark.parametrize("name", ["fp8 rows", "NVFP4"])
def test_older_gpus_and_padding(tmp_path: Path, name: str) -> None:
    """Before sm_89 there is no instruction for e4m3. Matrices of a stage have different divisors, rows of padding none."""
    changes = {"hidden_size": 208, "num_attention_heads": 6, "vocab_size": 1003}
    assert set(quantized(tmp_path, {"": FORMS[name][0]}, 800, **changes)) == {FORMS[name][1]}


@pytest.mark.parametrize("name", [name for name in NAMED if name != "bf16"])
def test_random_codes(tmp_path: Path, name: str) -> None:
    """What the device draws is what the host says it is."""
    weights = RandomWeights(parse_config(make_config(**{**SIZES, "intermediate_size": 1280})), format=NAMED[name])
    assert set(assert_right(tmp_path, weights, weights.formats)) == {NAMED[name].name}
