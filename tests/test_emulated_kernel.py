"""The whole CUDA backend without a GPU: its kernels and its runner as they are, on a GPU that is emulated (emulated_gpu.py)."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import flashformer
from column_checks import check_cancelled_asleep, check_prompt_kernel
from emulated_gpu import Context, Device, compile_source, emulated_gpu, translated
from flashformer import SamplingParams
from flashformer.backends import Turn
from flashformer.backends.cuda import CudaRunner
from flashformer.backends.cuda import load as load_runner
from flashformer.backends.cuda.codegen import ROUND_TAGS
from flashformer.backends.cuda.turns import QUANTUM
from flashformer.check import check_runner, compare, sample_tokens
from flashformer.checkpoint import open_checkpoint
from flashformer.errors import BuildError, DeviceError, PlanError
from flashformer.formats import choose
from flashformer.geometry import Geometry
from flashformer.models import build_graph
from flashformer.plan import KvType
from flashformer.reference import Reference
from model_files import make_config, write_folder
from quant_models import FORMS, QuantizedCheckpoint
from running import assert_near, run_checkpoint
from sampler_checks import OPTIONS, PROMPT, check_steps, random_params
from test_formats import STAGES, forms_of

SMALL: dict[str, Any] = {"vocab_size": 300, "intermediate_size": 96}
CONTEXT = 64


@contextmanager
def running(folder: Path, device: Device, kv_type: KvType = "native", **config: Any) -> Iterator[tuple[CudaRunner, Reference]]:
    """A small model on the emulated GPU, and its reference."""
    write_folder(folder, make_config(**{**SMALL, **config}), dtype=config.get("torch_dtype", "bfloat16"))
    with (
        open_checkpoint(folder) as checkpoint,
        run_checkpoint(checkpoint, load_runner, device.target, CONTEXT, device.target.workers, kv_type=kv_type) as made,
    ):
        yield made


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    return emulated_gpu(monkeypatch)


# ---- the kernel ----


def test_the_same_bits_in_any_order_and_on_older_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for arch, seeds in (("sm_90", (10, 20)), ("sm_80", (30,))):
        device = emulated_gpu(monkeypatch, arch)
        with running(tmp_path, device) as (runner, reference):
            tokens = sample_tokens(runner.plan.config, 36, seed=1)
            for device.seed in seeds:
                found.append(runner.logits(tokens, 0))
            assert_near(compare(found[-1], reference.logits(tokens)), 2e-2)
            assert np.array_equal(runner.logits(tokens[33:], 33), found[0][33:])
    assert all(np.array_equal(found[0], other) for other in found[1:])


ODD: dict[str, Any] = {"architecture": "Qwen3ForCausalLM", "hidden_size": 56, "head_dim": 24, "vocab_size": 203}
BIASED: dict[str, Any] = {"architecture": "Qwen2ForCausalLM", "torch_dtype": "float16", "hidden_size": 24}


SHORT: dict[tuple[int, int], dict[str, Any]] = {  # (fragments, parts) of a warp of the stage that reads the activations
    (2, 1): {"hidden_size": 330, "intermediate_size": 9 * 32 + 3},
    (6, 2): {"hidden_size": 160, "intermediate_size": 41 * 32},
    (13, 4): {"hidden_size": 96, "intermediate_size": 100 * 32 - 8, "torch_dtype": "float16"},
}


@pytest.mark.parametrize("cut", SHORT, ids=str)
def test_warps_that_have_a_fragment_fewer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cut: tuple[int, int]) -> None:
    arch = "sm_80" if cut[1] == 2 else "sm_90"
    with running(tmp_path, emulated_gpu(monkeypatch, arch), num_hidden_layers=1, **SHORT[cut]) as (runner, reference):
        (down,) = (s.geometry for s in runner.plan.stages if s.name == "down" and s.geometry)
        assert (down.fragments, down.parts) == cut and down.short_warps > 0
        assert_near(check_runner(runner, reference, sample_tokens(runner.plan.config, 20, seed=5)), 2e-2)


@pytest.mark.parametrize(("kv_type", "workers", "changes"), [("int8", 2, ODD), ("fp8", 5, BIASED)], ids=["int8", "fp8"])
def test_a_cache_of_8_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kv_type: KvType, workers: int, changes: dict[str, Any]
) -> None:  # fmt: skip
    """Also fewer blocks than heads, and blocks without a part of some stages."""
    with running(tmp_path, emulated_gpu(monkeypatch, workers=workers), kv_type, num_hidden_layers=1, **changes) as (runner, reference):
        assert_near(check_runner(runner, reference, sample_tokens(runner.plan.config, 36, seed=3)), 2e-2)


def test_too_little_memory_is_said_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: Device) -> None:
    monkeypatch.setattr(Context, "free_bytes", lambda self: 1 << 20)
    monkeypatch.setattr("flashformer.backends.cuda.runner.rope_table", lambda *_: pytest.fail("it computed something first"))
    with pytest.raises(DeviceError, match=r"needs .* GB on the GPU .* 0\.0 are free"), running(tmp_path, device):
        pass


def check_codes(folder: Path, device: Device, forms: Mapping[str, Any], **config: Any) -> list[Geometry]:
    """How the linear stages of a model of one layer are cut, which has matrices in other forms and is right."""
    write_folder(folder, make_config(**{**SMALL, "num_hidden_layers": 1, **config}))
    with open_checkpoint(folder) as plain:
        checkpoint = QuantizedCheckpoint(plain, forms_of(plain, None, forms))
        formats = choose(checkpoint, build_graph(plain.config).weights())
        with run_checkpoint(checkpoint, load_runner, device.target, CONTEXT, device.target.workers, formats) as (runner, reference):
            assert_near(check_runner(runner, reference, sample_tokens(plain.config, 20, seed=4)), 2e-2)
            return [s.geometry for s in runner.plan.stages if s.geometry]


def test_every_kind_of_codes(tmp_path: Path, device: Device) -> None:
    """Every stage in another format."""
    names = ["Q4_0", "int8 rows", "fp8 rows", "NF4", "MXFP4"]
    chosen = {stage: FORMS[name] for stage, name in zip(STAGES, names, strict=True)}
    forms = {part: chosen[stage][0] for stage, parts in STAGES.items() for part in parts}
    cut = check_codes(tmp_path, device, forms, hidden_size=128, head_dim=32, intermediate_size=160, tie_word_embeddings=True)
    assert [g.format.name for g in cut] == [expected for _, expected in chosen.values()]


@pytest.mark.parametrize(("name", "sizes"), [("NF4", (3, 2)), ("int8 rows", (2, 2, 1)), ("NVFP4", (3, 2))])
def test_codes_of_long_rows(tmp_path: Path, device: Device, name: str, sizes: tuple[int, ...]) -> None:
    """In several parts; of tables of two digits a few slices at a time are loaded."""
    cut = check_codes(tmp_path, device, {"": FORMS[name][0]}, hidden_size=64, head_dim=32, intermediate_size=5120)
    assert (cut[3].format.name, cut[3].part_sizes()) == (FORMS[name][1], sizes)


# ---- launches ----


def test_generation_ends_and_waits_for_nothing(tmp_path: Path, device: Device) -> None:
    """Stop tokens, early ends, tags that wrap, and a kernel that is stuck; between them all is as before."""
    with running(tmp_path, device) as (runner, _):
        answer = check_steps(runner, SamplingParams(temperature=0), [5, 6], 20)

        def again(*stop: int) -> list[int]:
            return list(runner.generate([5, 6], 0, 20, stop))

        stop = answer[7]
        assert again(stop) == answer[: answer.index(stop) + 1]
        tokens = runner.generate([5, 6], 0, 60, ())
        assert next(tokens) == answer[0]
        tokens.close()
        assert runner.stats.generated_tokens < 60 and again() == answer

        turn = Turn(0, [5, 6], 0, 60)
        made = runner.run([turn])
        assert next(made).token == answer[0]
        turn.cancel()
        assert len(list(made)) < 59
        check_cancelled_asleep(runner)

        runner.params.epoch = (1 << 32) // max(runner.plan.config.num_layers + 1, ROUND_TAGS) - 30
        assert again() == answer and again() == answer
        assert runner.params.epoch < 100

        lengths = runner.params.table_length
        runner.params.table_length = runner.context.upload(np.ones(runner.plan.target.workers, np.uint32), "a tape cut short")
        closer = SamplingParams(temperature=1, top_k=3, top_p=0.5, logprobs=5, seed=1)  # its finishers wait in the head, too
        for params in (SamplingParams(), closer):
            with pytest.raises(DeviceError, match=r"gave up: stage '\w+', layer \d+, block \d+"):
                list(runner.generate([5, 6], 0, 2, (), params.lower(runner.plan.config.vocab_size, [5, 6])))
        runner.params.table_length = lengths
        assert again() == answer


def test_sampling(tmp_path: Path, device: Device) -> None:
    rng = np.random.default_rng(5)
    with running(tmp_path, device) as (runner, _):
        vocab = runner.plan.config.vocab_size
        check_steps(runner, SamplingParams(**{**OPTIONS["all"], "seed": 12}), PROMPT, 12)  # type: ignore[arg-type]
        for device.seed in range(100, 106):
            check_steps(runner, random_params(rng, vocab), PROMPT[: rng.integers(1, 5)], 3)
        params = SamplingParams(**{**OPTIONS["all"], "seed": 12})  # type: ignore[arg-type]
        whole = list(runner.generate(PROMPT, 0, 8, (), params.lower(vocab, PROMPT)))
        first = list(runner.generate(PROMPT, 0, 3, (), params.lower(vocab, PROMPT)))
        rest = runner.generate(first[-1:], len(PROMPT) + 2, 5, (), params.lower(vocab, PROMPT, first))
        assert first + list(rest) == whole


def test_slots_and_turns(tmp_path: Path, device: Device) -> None:
    folder = write_folder(tmp_path, make_config(**SMALL))
    params = SamplingParams(max_tokens=QUANTUM + 1, ignore_eos=True, temperature=0.9, seed=1, repetition_penalty=1.2)
    with flashformer.load(folder, "cuda", CONTEXT, slots=3, prompt_columns=0) as engine:
        prompts = [[5, 6, 7], [5, 8]]
        alone = [[r.token for r in engine.generate(prompt, params)] for prompt in prompts]
        made: list[list[int]] = [[] for _ in prompts]
        for index, result in engine.generate(prompts, [params] * len(prompts)):
            made[index].append(result.token)
        assert made == alone

        runner, tokens = engine.runner, sample_tokens(engine.config, 33, seed=2)
        whole = runner.logits(tokens, 0, 0)
        assert np.array_equal(runner.logits(tokens[:20], 0, 2), whole[:20])
        runner.logits(tokens[::-1], 0, 1)
        runner.copy(2, 1, 19)
        assert np.array_equal(runner.logits(tokens[19:], 19, 1), whole[19:])


def test_a_kernel_for_prompts(tmp_path: Path, device: Device) -> None:
    folder = write_folder(tmp_path, make_config(**SMALL))
    check_prompt_kernel(folder, CONTEXT, 4)
    for wrong in ({"prompt_columns": 3}, {"prompt_columns": 4, "columns": 2}, {"prompt_columns": 4, "device": "cpu"}):
        with pytest.raises(PlanError, match="prompt_columns is"):
            flashformer.load(folder, **{"device": "cuda", "max_context": CONTEXT, **wrong})  # type: ignore[arg-type]


# ---- what the emulated GPU finds ----

MISTAKES = r"""
#include "prelude.cuh"
extern __shared__ __align__(128) u8 bytes[];

extern "C" __global__ void misaligned(u32* out) { out[threadIdx.x] = load_shared(shared_address(memory) + 2); }
extern "C" __global__ void out_of_range(u32* out) { store_shared(shared_address(memory) + 4096, 1); }
extern "C" __global__ void at_different_operations(u32* out) {
  if (threadIdx.x & 1) out[0] = __shfl_xor_sync(kAllLanes, 1u, 1);
  else __syncwarp();
}
extern "C" __global__ void ended_lanes(u32* out) {
  if (threadIdx.x % 32 != 3) __syncwarp();
}
extern "C" __global__ void nobody_comes(u32* out) {
  if (threadIdx.x < 32) __syncthreads();
}
extern "C" __global__ void too_many_arrivals(u32* out) {
  if (threadIdx.x == 0) barrier_init(shared_address(memory), 65);
  __syncthreads();
  barrier_arrive(shared_address(memory));
  if (threadIdx.x == 0) bulk_copy(shared_address(memory) + 128, out, 16, shared_address(memory));
  __syncthreads();
  barrier_arrive(shared_address(memory));
}
template <bool kWait>
FF_DEVICE void read_copy(u32* out) {
  const u32 bar = shared_address(memory), to = bar + 128;
  if (threadIdx.x == 0) barrier_init(bar, 1);
  __syncthreads();
  if (threadIdx.x == 0) bulk_copy(to, out, 256, bar);
  __syncwarp();
  if (kWait)
    while (!barrier_test(bar, 0)) {
    }
  __syncthreads();
  const u32 v = load_shared(to + threadIdx.x * 4);
  __syncthreads();
  out[threadIdx.x] = 2 * v;
}
extern "C" __global__ void early_read(u32* out) { read_copy<false>(out); }
extern "C" __global__ void right_read(u32* out) { read_copy<true>(out); }
template <bool kSync>
FF_DEVICE void exchange(u32* out) {
  const u32 at = shared_address(memory);
  store_shared(at + threadIdx.x * 4, threadIdx.x);
  if (kSync) __syncthreads();
  out[threadIdx.x] = load_shared(at + (threadIdx.x ^ 32) * 4);
}
extern "C" __global__ void unsynchronised(u32* out) { exchange<false>(out); }
extern "C" __global__ void synchronised(u32* out) { exchange<true>(out); }
template <bool kFence>
FF_DEVICE void publish_two(u32* out) {  // block 0 publishes data, then a flag
  u64* words = (u64*)out;
  if (threadIdx.x) return;
  if (blockIdx.x == 0) {
    store_host(words, 7);
    if (kFence) fence_device();
    store_host(words + 1, 1);
  } else {
    while (load_volatile(out + 2) == 0) {
    }
    out[4] = load_volatile(out);
  }
}
extern "C" __global__ void unordered(u32* out) { publish_two<false>(out); }
extern "C" __global__ void ordered(u32* out) { publish_two<true>(out); }
"""


class Mistakes:
    """Kernels of two warps a block that are wrong, or right."""

    def __init__(self, device: Device) -> None:
        self.device = device
        self.library = compile_source(MISTAKES, device.target).cubin

    def __call__(self, name: str, blocks: int = 1) -> np.ndarray:
        """What the kernel leaves of 64 ones, uint32."""
        context = Context(self.device)
        try:
            ones = np.ones(64, np.uint32)
            out = context.upload(ones if blocks == 1 else 0 * ones, "words")
            context.launch(context.function(context.load(self.library), name), blocks, 64, (ctypes.c_uint64(out),), 4096, cooperative=True)
            context.wait()
            return context.download(out, np.empty(64, np.uint32), "words")
        finally:
            context.close()


@pytest.fixture
def kernels(device: Device) -> Mistakes:
    return Mistakes(device)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("misaligned", "shared address 2 is not a multiple of 4"),
        ("out_of_range", "4 bytes at shared address 4096 are out of range"),
        ("at_different_operations", "while other lanes wait to"),
        ("ended_lanes", "other lanes of the warp have ended|ends while lanes of its warp wait"),
        ("nobody_comes", "all warps wait at barriers"),
        ("too_many_arrivals", "too many arrivals"),
        ("early_read", "a copy is about to land"),
    ],
)
def test_mistakes_are_found(kernels: Mistakes, name: str, message: str) -> None:
    with pytest.raises(DeviceError, match=message):
        kernels(name)


def test_missing_synchronisation_shows(kernels: Mistakes) -> None:
    others, orders = np.arange(64) ^ 32, range(20)
    found: Mapping[str, list[bool]] = {name: [] for name in ("right_read", "unsynchronised", "synchronised", "unordered", "ordered")}
    for kernels.device.seed in orders:
        found["right_read"].append(bool((kernels("right_read") == 2).all()))
        for name in ("unsynchronised", "synchronised"):
            found[name].append(np.array_equal(kernels(name), others))
        for name in ("unordered", "ordered"):
            found[name].append(kernels(name, blocks=2)[4] == 7)
    right = {name for name, outcomes in found.items() if all(outcomes)}
    assert right == {"right_read", "synchronised", "ordered"}


def test_writes_out_of_bounds_are_found(device: Device) -> None:
    context = Context(device)
    address = context.allocate(100, "words")
    ctypes.memset(address + 100, 0, 1)
    with pytest.raises(AssertionError, match="out of bounds"):
        context.close()


def test_unknown_instructions_are_named() -> None:
    with pytest.raises(BuildError, match=r"no instruction frob\.rn\.u32"):
        translated('asm volatile("frob.rn.u32 %0, %1;" : "=r"(r) : "r"(a));')
