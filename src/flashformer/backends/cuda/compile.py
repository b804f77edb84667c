"""Source -> cubin through NVRTC, in the build cache. Needs no GPU and no toolkit."""

from __future__ import annotations

import re
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from ... import env
from ...build import cached_build
from ...errors import BuildError
from ...targets import Target
from .codegen import headers, include_paths

INSTALL = 'the CUDA compiler is not installed; run: pip install "flashformer[cuda]"'


@dataclass(frozen=True)
class Kernel:
    """A compiled source: machine code and what the assembler said about it."""

    folder: Path
    cubin: bytes
    log: str

    @property
    def registers(self) -> int:
        """Registers a thread, the most of all kernels in the source."""
        return max(map(int, re.findall(r"Used (\d+) registers", self.log)), default=0)

    @property
    def spills(self) -> int:
        """Bytes of spill stores and loads, over all kernels in the source."""
        return sum(map(int, re.findall(r"(\d+) bytes spill (?:stores|loads)", self.log)))

    @property
    def code_bytes(self) -> int:
        """Bytes of machine code over all kernels in the source: what the instruction caches must hold."""
        sections = _sections(self.cubin)
        names_at = sections[struct.unpack_from("<H", self.cubin, 62)[0]][1]
        return sum(size for name, _, size in sections if self.cubin.startswith(b".text.", names_at + name))


def _sections(elf: bytes) -> list[tuple[int, int, int]]:
    """(offset of its name, offset, size) of every section of a 64-bit little-endian ELF file."""
    at, entry, count = struct.unpack_from("<Q", elf, 40)[0], *struct.unpack_from("<HH", elf, 58)
    headers_at = range(at, at + entry * count, entry)
    return [(*struct.unpack_from("<I", elf, first), *struct.unpack_from("<QQ", elf, first + 24)) for first in headers_at]


@cache
def compiler_version() -> str:
    """NVRTC's version. Raises BuildError where it is not installed."""
    try:
        from cuda.bindings import nvrtc

        _, major, minor = nvrtc.nvrtcVersion()
    except (ImportError, RuntimeError, OSError) as error:
        raise BuildError(INSTALL) from error
    return f"nvrtc {major}.{minor}"


def compile_source(source: str, target: Target, kind: str = "cuda") -> Kernel:
    """Compile for a target, or take the result from the cache. Raises BuildError with the compiler's log."""
    version = compiler_version()

    def produce(folder: Path) -> None:
        cubin, log = run_nvrtc(source, target, include_paths())
        (folder / "source.cu").write_text(source)
        (folder / "compiler.log").write_text(log)
        (folder / "kernel.cubin").write_bytes(cubin)

    # NOTE: include paths name this installation, not the program: they stay out of the key, the headers' text is in it.
    key = {"compiler": version, "options": " ".join(_options(target)), "source": source, **headers()}
    folder = cached_build(kind, key, produce)
    kernel = Kernel(folder, (folder / "kernel.cubin").read_bytes(), (folder / "compiler.log").read_text())
    env.debug(1, lambda: f"{kind}: {kernel.registers} registers, {kernel.spills} bytes spilled, {kernel.code_bytes / 1024:.0f} KB of code")
    return kernel


def _options(target: Target) -> list[str]:
    """What the compiler is told for a target."""
    # NOTE: NVRTC 13.0 takes generic lambdas for host functions, and refuses them, unless functions are of the device by default.
    return [f"--gpu-architecture={target.arch}", "--std=c++17", "--device-as-default-execution-space", "--ptxas-options=-v"]


def run_nvrtc(source: str, target: Target, include: Sequence[Path]) -> tuple[bytes, str]:
    """One run of the compiler, headers from the folders `include`: (cubin, log). Raises BuildError with the log."""
    from cuda.bindings import nvrtc

    options = [*_options(target), *(f"--include-path={path}" for path in include)]

    def check(result: tuple[object, ...]) -> object:
        if int(result[0]) != 0:  # type: ignore[call-overload]
            raise BuildError(f"NVRTC failed: {result[0]}")
        return result[1] if len(result) > 1 else None

    program = check(nvrtc.nvrtcCreateProgram(source.encode(), b"flashformer.cu", 0, [], []))
    try:
        code = nvrtc.nvrtcCompileProgram(program, len(options), [o.encode() for o in options])[0]
        log = b" " * int(check(nvrtc.nvrtcGetProgramLogSize(program)))  # type: ignore[call-overload]
        check(nvrtc.nvrtcGetProgramLog(program, log))
        text = log.decode(errors="replace").rstrip("\0 \n")
        if int(code) != 0:
            raise BuildError(f"the generated kernel does not compile:\n{text}")
        cubin = b" " * int(check(nvrtc.nvrtcGetCUBINSize(program)))  # type: ignore[call-overload]
        check(nvrtc.nvrtcGetCUBIN(program, cubin))
        return cubin, text
    finally:
        nvrtc.nvrtcDestroyProgram(program)
