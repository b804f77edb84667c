"""The CUDA backend without a GPU: its kernels as they are, compiled for a CPU (emulated/gpu.cuh), behind a driver that is only played.

`emulated_gpu` puts both in the place of the real ones. From then on `flashformer.load(folder, "cuda")` and `CudaRunner` run on it.
"""

from __future__ import annotations

import ctypes
import re
import subprocess
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from queue import SimpleQueue
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from flashformer.backends.cpu.compile import find_compiler
from flashformer.backends.cuda import codegen
from flashformer.backends.cuda.compile import Kernel
from flashformer.backends.cuda.driver import DeviceInfo
from flashformer.build import cached_build
from flashformer.errors import BuildError, DeviceError
from flashformer.targets import Target, get

PRELUDE = Path(__file__).parent / "emulated" / "gpu.cuh"
OPTIONS = (
    "-std=c++17", "-O1", "-ffp-contract=off", "-fvisibility=hidden", "-fno-gnu-unique", "-fPIC", "-shared", "-w", "-U_FORTIFY_SOURCE",
)  # fmt: skip
# The instructions that headers other than prelude.cuh have of their own, as gpu.cuh says them.
INSTRUCTIONS = {
    "ld.relaxed.gpu.global.u64": "v = read_word(p);",
    "ld.acquire.gpu.global.u64": "v = read_word(p);",
    "ld.relaxed.gpu.global.v2.u64": "read_words(p, a, b);",
    "ld.relaxed.gpu.global.v2.u32": "read_two_pairs(p, a, b);",
    "ld.relaxed.gpu.global.v4.u32": "v = read_pairs(p);",
    "st.relaxed.gpu.global.u64": "gpu::publish(p, join(value, tag));",
    "st.relaxed.gpu.global.u32": "gpu::publish_half(p, pair);",
    "st.relaxed.gpu.global.v2.u64": "write_words(p, join(a, tag), join(b, tag));",
    "ld.global.L1::no_allocate.v4.u32": "v[i] = *p;",
    "prmt.b32": "r = permute_bytes(a, b, selector);",
    "dp2a.lo.u32.u32": "r = a >> 16;",
    "lop3.b32": "r = (a & mask) ^ flip;",
    "cvt.rn.f16x2.e4m3x2": "r = halves_of_e4m3(pair);",
    "max.u16x2": "r = larger_of_halves(a, b);",
    "fma.rn.f16x2": "r = fma_of_pairs<T>(a, b, c);",
    "fma.rn.bf16x2": "r = fma_of_pairs<T>(a, b, c);",
    "sub.rn.f16x2": "r = subtract_halves(pair, 0x64806480u);",
    "redux.sync.max.u32": "top = __reduce_max_sync(kAllLanes, top);",
    "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32": "multiply_bytes<kSigned>(d, a, b0, b1);",
    "mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32": "multiply_bytes<kSigned>(d, a, b0, b1);",
}
PAGE = 4096  # bytes: allocations begin at multiples, and before and behind them is as much that nobody may write
UNTOUCHED = 0xA5
DEVICE = threading.Lock()  # kernels run one at a time: a cooperative one needs the whole device


def translated(text: str) -> str:
    """A header with its instructions in C++. Raises BuildError for one that is not known."""

    def instruction(found: re.Match[str]) -> str:
        name = found[1]
        if name not in INSTRUCTIONS:
            raise BuildError(f"the emulated GPU has no instruction {name}: add it to INSTRUCTIONS in {Path(__file__).name}")
        return INSTRUCTIONS[name]

    return re.sub(r'asm(?: volatile)?\(\s*"([\w.:]+) .*?\);', instruction, text, flags=re.DOTALL)


def kernels(text: str, headers: dict[str, str]) -> list[str]:
    """Names of the kernels in a source and in what it includes."""
    found = re.findall(r'extern "C" __global__ void (?:__launch_bounds__\([^)]*\) )?(\w+)\(', text)
    for name in re.findall(r'#include "(\w+\.cuh)"', text):
        if name in headers:
            found += kernels(headers[name], headers)
    return list(dict.fromkeys(found))


def compile_source(source: str, target: Target, kind: str = "cuda") -> Kernel:
    """In the place of the function of that name: what comes for machine code is the path of a library with a `launch_` of each kernel."""
    headers = {Path(name).name: translated(text) for name, text in codegen.headers().items() if not name.endswith("prelude.cuh")}
    headers["prelude.cuh"] = PRELUDE.read_text()
    parameters = "u32 blocks, u32 threads, u32 shared, u64 seed, u32 cycles, void** arguments"
    launches = [
        f'extern "C" __attribute__((visibility("default"))) const char* launch_{name}({parameters}) '
        f"{{ return gpu::launch({name}, blocks, threads, shared, seed, cycles, arguments); }}"
        for name in kernels(source, headers)
    ]
    compiler = find_compiler()
    machine = [option for option in compiler.options if option.startswith("-m")]
    architecture = re.sub(r"\D", "", target.arch) + "0"
    options = [*machine, *OPTIONS, f"-D__CUDA_ARCH__={architecture}"]

    def produce(folder: Path) -> None:
        for name, text in headers.items():
            (folder / name).write_text(text)
        (folder / "source.cpp").write_text("\n".join([source, *launches]) + "\n")
        command = [compiler.path, *options, f"-I{folder}", str(folder / "source.cpp"), "-o", str(folder / "library.so")]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode:
            raise BuildError(f"the generated kernel does not compile for the emulated GPU:\n{result.stderr[:4000]}")

    key = {"compiler": compiler.identity, "options": " ".join(options), "source": source, "launches": "\n".join(launches), **headers}
    folder = cached_build(f"emulated-{kind}", key, produce)
    return Kernel(folder, str(folder / "library.so").encode(), "")


@dataclass
class Event:
    """Reached when the work before it is done."""

    reached: threading.Event = field(default_factory=threading.Event)
    seconds: float = 0.0


class Device:
    """A played GPU: what it is, and how its kernels run. Can be changed between launches."""

    def __init__(self, target: Target, seed: int, cycles: int) -> None:
        self.target = target
        self.seed = seed  # of the order in which its threads run
        self.cycles = cycles  # that pass with a turn of a warp
        self.launches = 0  # of cooperative kernels

    @property
    def info(self) -> DeviceInfo:
        """What `probe` finds."""
        t = self.target
        version = int(re.sub(r"\D", "", t.arch))
        return DeviceInfo(0, "emulated GPU", divmod(version, 10), t.workers, t.shared_bytes, 1 << 33, t)


class Context:
    """In the place of the driver's: the memory is the host's, and one thread does the work of all streams in order."""

    def __init__(self, device: Device) -> None:
        self.device = device
        self.context: object | None = self
        self.memory: dict[int, tuple[np.ndarray, int]] = {}  # address -> (with its guards, bytes)
        self.pinned: dict[int, int] = {}
        self.modules: list[ctypes.CDLL] = []
        self.pinned_peak = 0
        self.stream = "first"
        self.error: BaseException | None = None  # of a kernel: from then on everything fails, as on a GPU
        self.driver = SimpleNamespace(
            cuMemsetD8Async=lambda at, value, count, stream: self.fill(at, np.uint8(value), count),
            cuMemsetD8=lambda at, value, count: self.fill(at, np.uint8(value), count),
            cuMemsetD32Async=lambda at, value, count, stream: self.fill(at, np.uint32(value), count),
            cuMemsetD2D16Async=self.fill_rows,
            cuMemcpyDtoDAsync=lambda to, origin, nbytes, stream: self.do(lambda: ctypes.memmove(to, origin, nbytes)),
            cuEventDestroy=lambda event: (0,),
        )
        self.work: SimpleQueue[Callable[[], object] | None] = SimpleQueue()
        self.worker = threading.Thread(target=self._run, daemon=True)
        self.worker.start()

    def _run(self) -> None:
        while (work := self.work.get()) is not None:
            try:
                work()
            except BaseException as error:
                self.error = self.error or error

    def do(self, work: Callable[[], object]) -> tuple[int]:
        """Add to what is to be done; what the driver's functions return."""
        self.work.put(lambda: None if self.error else work())
        return (0,)

    def fill(self, at: int, value: Any, count: int) -> tuple[int]:
        """Set `count` values of this type."""
        values = np.full(count, value)
        return self.do(lambda: ctypes.memmove(at, values.ctypes.data, values.nbytes))

    def fill_rows(self, at: int, pitch: int, value: int, width: int, height: int, stream: Any) -> tuple[int]:
        """The first `width` 16-bit values of rows that are `pitch` bytes apart."""
        for row in range(height):
            self.fill(at + row * pitch, np.uint16(value), width)
        return (0,)

    def use(self) -> None:
        """There is one context."""

    def new_stream(self) -> str:
        """All are one."""
        return "another"

    def free_bytes(self) -> int:
        """Of memory, what is not allocated."""
        return self.device.info.memory_bytes - sum(nbytes for _, nbytes in self.memory.values())

    def allocate(self, nbytes: int, what: str, fill: int | None = None) -> int:
        """Memory between guards, that holds NaN unless it is filled."""
        nbytes = max(nbytes, 16)
        array = np.empty(nbytes + 3 * PAGE, np.uint8)
        begin = PAGE + -array.ctypes.data % PAGE
        array[:begin] = array[begin + nbytes :] = UNTOUCHED
        array[begin : begin + nbytes] = 0xFF if fill is None else fill
        self.memory[array.ctypes.data + begin] = array, nbytes
        return array.ctypes.data + begin

    def free(self, pointer: int) -> None:
        """Give back one allocation, whose guards must be as they were."""
        array, nbytes = self.memory.pop(pointer)
        begin = pointer - array.ctypes.data
        assert (array[:begin] == UNTOUCHED).all() and (array[begin + nbytes :] == UNTOUCHED).all(), "written out of bounds"

    def allocate_pinned(self, nbytes: int, what: str, fill: int | None = None) -> tuple[int, np.ndarray]:
        """The same memory on both sides."""
        address = self.allocate(nbytes, what, fill)
        self.pinned[address] = nbytes
        self.pinned_peak = max(self.pinned_peak, sum(self.pinned.values()))
        return address, np.ctypeslib.as_array((ctypes.c_uint8 * nbytes).from_address(address))

    def free_pinned(self, address: int) -> None:
        """Give it back."""
        del self.pinned[address]
        self.free(address)

    def upload(self, array: np.ndarray, what: str) -> int:
        """A copy of an array."""
        array = np.ascontiguousarray(array)
        pointer = self.allocate(array.nbytes, what)
        self.copy_async(pointer, array.ctypes.data, array.nbytes)
        self.wait()
        return pointer

    def download(self, pointer: int, array: np.ndarray, what: str) -> np.ndarray:
        """Fill an array."""
        assert array.flags.c_contiguous
        ctypes.memmove(array.ctypes.data, pointer, array.nbytes)
        return array

    def copy_async(self, pointer: int, address: int, nbytes: int, stream: Any = None) -> None:
        """A copy in its turn."""
        self.do(lambda: ctypes.memmove(pointer, address, nbytes))

    def load(self, cubin: bytes) -> ctypes.CDLL:
        """What `compile_source` made."""
        self.modules.append(ctypes.CDLL(cubin.decode()))
        return self.modules[-1]

    def function(self, module: ctypes.CDLL, name: str) -> Any:
        """A kernel."""
        function = getattr(module, f"launch_{name}")
        function.restype = ctypes.c_char_p
        return function

    def allow_shared(self, function: Any, nbytes: int) -> None:
        """Any that the target has."""

    def blocks_per_sm(self, function: Any, threads: int, shared: int) -> int:
        """As the kernel is made for it."""
        return int(shared <= self.device.info.shared_bytes and threads <= 1024)

    def launch(
        self, function: Any, grid: int, threads: int, arguments: tuple[Any, ...], shared: int = 0, cooperative: bool = False,
        stream: Any = None,
    ) -> None:  # fmt: skip
        """A kernel in its turn."""
        copies = [type(a).from_buffer_copy(a) for a in arguments]  # as the driver does: the caller may change its own
        addresses = (ctypes.c_void_p * len(copies))(*(ctypes.addressof(a) for a in copies))
        assert not cooperative or grid <= self.device.target.workers
        self.device.launches += cooperative
        seed, cycles = ctypes.c_uint64(self.device.seed + self.device.launches), ctypes.c_uint32(self.device.cycles)

        def run() -> None:
            with DEVICE:
                error = function(*map(ctypes.c_uint32, (grid, threads, shared)), seed, cycles, addresses)
            del copies[:]
            if error:
                raise DeviceError(f"the emulated GPU stopped: {error.decode()}")

        self.do(run)

    def event(self, stream: Any = None, sleeping: bool = False) -> Event:
        """After all work so far."""
        event = Event()

        def reach() -> None:
            event.seconds = time.perf_counter()
            event.reached.set()

        self.work.put(reach)
        return event

    def done(self, event: Event) -> bool:
        """Whether it is reached. Raises what a kernel raised."""
        reached = event.reached.is_set()
        if reached and self.error:
            raise self.error
        return reached

    def finish(self, event: Event) -> None:
        """Wait for it."""
        event.reached.wait()
        self.done(event)

    def elapsed(self, first: Event, last: Event) -> float:
        """Seconds of real time."""
        self.finish(last)
        return last.seconds - first.seconds

    def wait(self) -> None:
        """For all work."""
        self.finish(self.event())

    def close(self) -> None:
        """Free everything, and look at all guards."""
        if self.context is None:
            return
        self.context = None
        self.work.put(None)
        self.worker.join()
        self.pinned.clear()
        with DEVICE:
            for module in self.modules:
                module.free_stacks()
        for pointer in list(self.memory):
            self.free(pointer)


def checked(result: tuple[Any, ...], doing: str) -> Any:
    """What a function of the played driver returned."""
    assert result[0] == 0, doing
    return result[1] if len(result) > 1 else None


def emulated_gpu(monkeypatch: pytest.MonkeyPatch, arch: str = "sm_90", workers: int = 3, seed: int = 0, cycles: int = 2048) -> Device:
    """A GPU of so many SMs in the place of the real one, until the monkeypatch ends; `seed` decides the order in which threads run."""
    device = Device(replace(get(arch), workers=workers), seed, cycles)
    monkeypatch.setattr("flashformer.backends.cuda.probe", lambda ordinal=0: device.info)
    runner = "flashformer.backends.cuda.runner"
    for name, instead in (
        ("probe", lambda ordinal=0: device.info), ("compile_source", compile_source), ("Context", lambda ordinal=0: Context(device)),
        ("check", checked),
    ):  # fmt: skip
        monkeypatch.setattr(f"{runner}.{name}", instead)
    return device
