"""The CUDA driver, as little of it as we need: context, memory, modules, launches, events. Every failure is a DeviceError."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...errors import DeviceError
from ...targets import Target, available


def check(result: tuple[Any, ...], doing: str) -> Any:
    """Unwrap what a driver call returns; raises DeviceError saying what was being done."""
    from cuda.bindings import driver

    code, *values = result
    if int(code) != 0:
        _, name = driver.cuGetErrorString(code)
        text = name.decode() if isinstance(name, bytes) else str(code)
        raise DeviceError(f"CUDA could not {doing}: {text} ({code})")
    return values[0] if len(values) == 1 else tuple(values)


@dataclass(frozen=True)
class DeviceInfo:
    """One GPU and the target that fits it."""

    ordinal: int
    name: str
    capability: tuple[int, int]
    workers: int  # SMs
    shared_bytes: int  # that one block may ask for
    memory_bytes: int
    target: Target | None  # None: no target for this capability

    @property
    def target_name(self) -> str:
        """Name of the target, or the capability for which there is none."""
        return self.target.name if self.target else f"sm_{self.capability[0]}{self.capability[1]}"


def choose_target(capability: tuple[int, int]) -> Target | None:
    """The target for a compute capability: its own, else an older one of the same generation whose code it runs (8.x)."""
    targets = available()
    exact = targets.get(f"sm_{capability[0]}{capability[1]}")
    if exact or capability[0] != 8:
        return exact
    older = [m for m in range(capability[1]) if f"sm_8{m}" in targets]
    return targets[f"sm_8{older[-1]}"] if older else None


def probe(ordinal: int = 0) -> DeviceInfo | None:
    """The GPU, or None where there is no driver, no device, or the CUDA packages are not installed."""
    try:
        from cuda.bindings import driver
    except ImportError:
        return None
    try:
        if int(driver.cuInit(0)[0]) != 0:
            return None
    except (RuntimeError, OSError):  # the bindings raise where libcuda itself is missing
        return None
    code, count = driver.cuDeviceGetCount()
    if int(code) != 0 or count <= ordinal:
        return None
    device = check(driver.cuDeviceGet(ordinal), "open the GPU")
    a = driver.CUdevice_attribute

    def attribute(which: Any) -> int:
        return int(check(driver.cuDeviceGetAttribute(which, device), "ask the GPU what it is"))

    capability = (
        attribute(a.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR),
        attribute(a.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR),
    )
    name = check(driver.cuDeviceGetName(128, device), "ask the GPU its name")
    return DeviceInfo(
        ordinal,
        name.decode().split("\0")[0].strip(),
        capability,
        attribute(a.CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT),
        attribute(a.CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN),
        int(check(driver.cuDeviceTotalMem(device), "ask the GPU how much memory it has")),
        choose_target(capability),
    )


class Context:
    """The device's primary context (shared with whatever else the process runs on it), and all that we allocate in it."""

    def __init__(self, ordinal: int = 0) -> None:
        from cuda.bindings import driver

        self.driver = driver
        check(driver.cuInit(0), "start")
        self.device = check(driver.cuDeviceGet(ordinal), "open the GPU")
        self.context = check(driver.cuDevicePrimaryCtxRetain(self.device), "make a context")
        self.buffers: list[int] = []
        self.pinned: dict[int, int] = {}  # address -> bytes
        self.pinned_peak = 0  # most bytes of it at a time
        self.modules: list[Any] = []
        self.streams: list[Any] = []
        self.use()
        self.stream = self.new_stream()

    def use(self) -> None:
        """Make the context current in this thread."""
        check(self.driver.cuCtxSetCurrent(self.context), "use the GPU")

    def new_stream(self) -> Any:
        """A further stream; what is not told otherwise runs on the first, `stream`."""
        self.streams.append(check(self.driver.cuStreamCreate(self.driver.CUstream_flags.CU_STREAM_NON_BLOCKING), "make a stream"))
        return self.streams[-1]

    def free_bytes(self) -> int:
        """Device memory that is free now."""
        return int(check(self.driver.cuMemGetInfo(), "ask for free memory")[0])

    def allocate(self, nbytes: int, what: str, fill: int | None = None) -> int:
        """Device memory, optionally filled with a byte; returns its address."""
        pointer = int(check(self.driver.cuMemAlloc(max(nbytes, 16)), f"allocate {nbytes / 1e9:.2f} GB for {what}"))
        self.buffers.append(pointer)
        if fill is not None:
            check(self.driver.cuMemsetD8Async(pointer, fill, max(nbytes, 16), self.stream), f"clear {what}")
        return pointer

    def free(self, pointer: int) -> None:
        """Give back one allocation."""
        self.buffers.remove(pointer)
        check(self.driver.cuMemFree(pointer), "free memory")

    def allocate_pinned(self, nbytes: int, what: str, fill: int | None = None) -> tuple[int, np.ndarray]:
        """Host memory that the device sees, optionally filled with a byte: (address on both sides, bytes as uint8 array)."""
        address = int(check(self.driver.cuMemHostAlloc(nbytes, 2), f"pin {nbytes / 1e6:.0f} MB of host memory for {what}"))
        self.pinned[address] = nbytes
        self.pinned_peak = max(self.pinned_peak, sum(self.pinned.values()))
        array = np.ctypeslib.as_array((ctypes.c_uint8 * nbytes).from_address(address))
        if fill is not None:
            array[:] = fill
        return address, array

    def free_pinned(self, address: int) -> None:
        """Give back one such allocation."""
        del self.pinned[address]
        check(self.driver.cuMemFreeHost(address), "free pinned memory")

    def upload(self, array: np.ndarray, what: str) -> int:
        """A copy of a small host array on the device."""
        array = np.ascontiguousarray(array)
        pointer = self.allocate(array.nbytes, what)
        if array.nbytes:
            # NOTE: a copy outside our streams may end after the call does, and kernels on them would not wait for it.
            check(self.driver.cuMemcpyHtoDAsync(pointer, array.ctypes.data, array.nbytes, self.stream), f"copy {what}")
            self.wait()
        return pointer

    def download(self, pointer: int, array: np.ndarray, what: str) -> np.ndarray:
        """Fill a host array from the device."""
        check(self.driver.cuMemcpyDtoH(array.ctypes.data, pointer, array.nbytes), f"copy {what} back")
        return array

    def copy_async(self, pointer: int, address: int, nbytes: int, stream: Any = None) -> None:
        """Host to device, on a stream; the host's memory must stay until then."""
        check(self.driver.cuMemcpyHtoDAsync(pointer, address, nbytes, self.stream if stream is None else stream), "copy to the GPU")

    def load(self, cubin: bytes) -> Any:
        """A module from machine code."""
        module = check(self.driver.cuModuleLoadData(cubin), "load a kernel")
        self.modules.append(module)
        return module

    def function(self, module: Any, name: str) -> Any:
        """A kernel of a module."""
        return check(self.driver.cuModuleGetFunction(module, name.encode()), f"find kernel {name}")

    def allow_shared(self, function: Any, nbytes: int) -> None:
        """Let a kernel ask for more shared memory than the default."""
        which = self.driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        check(self.driver.cuFuncSetAttribute(function, which, nbytes), f"give a block {nbytes} bytes of shared memory")

    def blocks_per_sm(self, function: Any, threads: int, shared: int) -> int:
        """How many blocks of a kernel fit on one SM at a time."""
        return int(check(self.driver.cuOccupancyMaxActiveBlocksPerMultiprocessor(function, threads, shared), "ask for occupancy"))

    def launch(
        self, function: Any, grid: int, threads: int, arguments: tuple[Any, ...], shared: int = 0, cooperative: bool = False,
        stream: Any = None,
    ) -> None:  # fmt: skip
        """Start a kernel on a stream. Arguments are ctypes values or structures."""
        stream = self.stream if stream is None else stream
        addresses = (ctypes.c_void_p * len(arguments))(*(ctypes.addressof(a) for a in arguments))
        where = ctypes.addressof(addresses)
        if cooperative:
            result = self.driver.cuLaunchCooperativeKernel(function, grid, 1, 1, threads, 1, 1, shared, stream, where)
        else:
            result = self.driver.cuLaunchKernel(function, grid, 1, 1, threads, 1, 1, shared, stream, where, 0)
        check(result, "launch a kernel")

    def event(self, stream: Any = None, sleeping: bool = False) -> Any:
        """An event recorded on a stream now. sleeping: who waits for it costs no processor time."""
        flags = self.driver.CUevent_flags
        flag = flags.CU_EVENT_BLOCKING_SYNC if sleeping else flags.CU_EVENT_DEFAULT
        event = check(self.driver.cuEventCreate(flag), "make an event")
        check(self.driver.cuEventRecord(event, self.stream if stream is None else stream), "record an event")
        return event

    def finish(self, event: Any) -> None:
        """Wait for the work before an event, and destroy the event."""
        check(self.driver.cuEventSynchronize(event), "run the kernel")
        check(self.driver.cuEventDestroy(event), "destroy an event")

    def elapsed(self, first: Any, last: Any) -> float:
        """Seconds between two events; waits for the second and destroys both."""
        check(self.driver.cuEventSynchronize(last), "run the kernel")
        milliseconds = float(check(self.driver.cuEventElapsedTime(first, last), "read a time"))
        for event in (first, last):
            check(self.driver.cuEventDestroy(event), "destroy an event")
        return milliseconds / 1e3

    def wait(self) -> None:
        """Until the first stream is idle."""
        check(self.driver.cuStreamSynchronize(self.stream), "run the kernel")

    def close(self) -> None:
        """Free everything; safe to call twice."""
        if self.context is None:
            return
        self.use()
        for stream in self.streams:
            self.driver.cuStreamSynchronize(stream)
        for module in self.modules:
            self.driver.cuModuleUnload(module)
        for pointer in self.buffers:
            self.driver.cuMemFree(pointer)
        for address in self.pinned:
            self.driver.cuMemFreeHost(address)
        for stream in self.streams:
            self.driver.cuStreamDestroy(stream)
        self.driver.cuDevicePrimaryCtxRelease(self.device)
        self.context = None
