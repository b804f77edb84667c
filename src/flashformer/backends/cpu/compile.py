"""Source -> shared library through the system's C++ compiler, in the build cache."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from ...build import cached_build
from ...errors import BuildError
from .codegen import headers, include_paths

COMPILERS = ("c++", "g++", "clang++")
NATIVE = ("-march=native", "-mcpu=native")  # the first one that the compiler knows
# NOTE: hidden, because a process may hold several models, whose symbols have the same names.
OPTIONS = ("-std=c++17", "-O3", "-ffp-contract=fast", "-fvisibility=hidden", "-shared", "-fPIC", "-pthread")
SECONDS = 600.0  # that one run of the compiler may take
INSTALL = (
    "no C++ compiler was found (looked for {}); install one: "
    "apt install g++ (Debian, Ubuntu), dnf install gcc-c++ (Fedora), xcode-select --install (macOS)"
)


@dataclass(frozen=True)
class Compiler:
    """A C++ compiler, its options, and all that decides what it makes of a source."""

    path: str
    options: tuple[str, ...]
    identity: str  # the macros it defines: its version, and every instruction set of this machine


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    """Run a compiler; BuildError where it cannot be started or does not end."""
    try:
        return subprocess.run(
            command, capture_output=True, text=True, errors="replace", stdin=subprocess.DEVNULL, timeout=SECONDS, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"the C++ compiler {command[0]} cannot be used: {error}") from error


def find_compiler() -> Compiler:
    """The system's compiler, set for this machine. Raises BuildError that says what to install where there is none."""
    path = next(filter(None, map(shutil.which, COMPILERS)), None)
    if path is None:
        raise BuildError(INSTALL.format(", ".join(COMPILERS)))
    return examine(path)


@cache
def examine(path: str) -> Compiler:
    """Find out what a compiler is and which options it takes."""
    result = None
    for native in (*((option,) for option in NATIVE), ()):
        options = (*OPTIONS, *native)
        result = _run([path, *options, "-dM", "-E", "-x", "c++", "/dev/null"])
        if result.returncode == 0:
            return Compiler(path, options, result.stdout)
    assert result is not None
    raise BuildError(f"the C++ compiler {path} does not work:\n{result.stderr.strip()}")


def compile_source(source: str, kind: str = "cpu") -> ctypes.CDLL:
    """Compile, or take the result from the cache, and load it. Raises BuildError with the compiler's log."""
    compiler = find_compiler()

    def produce(folder: Path) -> None:
        (folder / "source.cpp").write_text(source)
        command = [compiler.path, *compiler.options, *(f"-I{path}" for path in include_paths())]
        result = _run([*command, str(folder / "source.cpp"), "-o", str(folder / "library.so")])
        (folder / "compiler.log").write_text(result.stderr)
        if result.returncode != 0:
            raise BuildError(f"the generated source does not compile ({' '.join(command)}):\n{result.stderr.strip()}")

    # NOTE: include paths name this installation, not the program: they stay out of the key, the headers' text is in it.
    key = {"compiler": compiler.identity, "options": " ".join(compiler.options), "source": source, **headers()}
    library = cached_build(kind, key, produce) / "library.so"
    try:
        return ctypes.CDLL(str(library))
    except OSError as error:
        raise BuildError(f"{library} cannot be loaded: {error}; remove it with: flashformer cache --clear") from error
