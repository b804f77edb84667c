"""The build cache: what is generated, compiled or packed once is found again by the content of everything that went into it.

An entry is a folder `<cache>/<kind>/<sha256 of all parts>` with whatever was produced (source, log, binary) and `key.json`.
It is made beside its final place and renamed into it, so that no entry is ever seen half made.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from . import env
from .errors import BuildError

Produce = Callable[[Path], None]  # fills an empty folder

_DIGEST = re.compile(r"[0-9a-f]{64}")
_KIND = re.compile(r"[a-z][a-z0-9-]{0,30}")
_KEY = "key.json"
_SHOWN_PART = 200  # characters of a part that key.json repeats; longer ones by digest


@dataclass(frozen=True)
class Entry:
    """One finished entry of the cache."""

    kind: str
    path: Path
    nbytes: int


def digest(parts: Mapping[str, str | bytes]) -> str:
    """SHA-256 over names and values, whatever their order; no two different mappings feed it the same bytes."""
    state = hashlib.sha256()
    for name in sorted(parts):
        value = parts[name]
        for text in (name, type(value).__name__, value):
            data = text.encode() if isinstance(text, str) else text
            state.update(len(data).to_bytes(8, "little"))
            state.update(data)
    return state.hexdigest()


class Cache:
    """A folder of entries, shared by any number of processes."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def build(self, kind: str, parts: Mapping[str, str | bytes], produce: Produce) -> Path:
        """The folder of the entry with this content, made by `produce` (given an empty folder) unless it is there already.

        `parts` is all that the product depends on: compiler version, flags, source, every header. Where several processes
        want the same entry, one makes it and the others wait; if that one dies, the next takes over. Raises BuildError if
        the cache cannot be written; what `produce` raises passes through and leaves nothing behind.
        """
        if not _KIND.fullmatch(kind):
            raise ValueError(f"{kind!r} is not a name for a kind of entry")
        name = digest(parts)
        entry = self.root / kind / name
        if not _finished(entry):
            with self._writing():
                entry.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
                with _lock(entry.with_suffix(".lock")):
                    if not _finished(entry):
                        _make(entry, kind, parts, produce)
        else:
            env.debug(1, f"cache: {kind} {name[:12]} found")
        _tell(entry)
        return entry

    def entries(self) -> list[Entry]:
        """Every finished entry, by kind and name."""
        kinds = [path for path in sorted(self.root.glob("*")) if _KIND.fullmatch(path.name)]
        return [
            Entry(kind.name, path, _size(path))
            for kind in kinds
            for path in sorted(kind.glob("*"))
            if _DIGEST.fullmatch(path.name) and _finished(path)
        ]

    def clear(self) -> int:
        """Remove every entry and what dead processes left; returns the bytes freed. Other files in the folder stay."""
        freed = 0
        with self._writing():
            for kind in self.root.glob("*"):
                if not (_KIND.fullmatch(kind.name) and kind.is_dir()):
                    continue
                for name in sorted({path.stem for path in kind.iterdir() if _DIGEST.fullmatch(path.stem)}):
                    with _lock(kind / f"{name}.lock"):
                        for path in (kind / name, kind / f"{name}.partial"):
                            freed += _size(path)
                            shutil.rmtree(path, ignore_errors=True)
        return freed

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Turns failures of the file system into a BuildError that says what to do."""
        try:
            yield
        except OSError as error:
            if error.filename is not None and not Path(os.fsdecode(error.filename)).is_relative_to(self.root):
                raise  # of another file, which `produce` did not find
            reason = error.strerror or str(error)
            advice = "free some space" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "make it writable"
            raise BuildError(
                f"The cache folder {self.root} cannot be used ({reason}: {error.filename or self.root}); {advice}, "
                "or set FF_CACHE_DIR to another folder"
            ) from error


def cached_build(kind: str, key_parts: Mapping[str, str | bytes], produce: Produce) -> Path:
    """`Cache.build` in the user's cache folder."""
    return Cache(env.cache_dir()).build(kind, key_parts, produce)


def _make(entry: Path, kind: str, parts: Mapping[str, str | bytes], produce: Produce) -> None:
    """Produce an entry beside its place and rename it there; the caller holds its lock."""
    began = time.perf_counter()
    partial = entry.with_suffix(".partial")
    for leftover in (partial, entry):  # of a process that died, or of a disk that lost data
        if leftover.exists():
            shutil.rmtree(leftover)
    partial.mkdir(mode=0o700)
    try:
        produce(partial)
        files = {str(path.relative_to(partial)): path.stat().st_size for path in sorted(partial.rglob("*")) if path.is_file()}
        key = {"kind": kind, "parts": {name: _shown(value) for name, value in parts.items()}, "files": files}
        (partial / _KEY).write_text(json.dumps(key, indent=1) + "\n")
        os.rename(partial, entry)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    env.debug(1, f"cache: {kind} {entry.name[:12]} made in {time.perf_counter() - began:.2f} s")


def _shown(value: str | bytes) -> str:
    """A part for a human eye: the text itself if it is short, else its digest."""
    if isinstance(value, str) and len(value) <= _SHOWN_PART:
        return value
    return "sha256:" + hashlib.sha256(value.encode() if isinstance(value, str) else value).hexdigest()


def _finished(entry: Path) -> bool:
    """Whether an entry is there with all its files in full size (a power failure can lose what a rename had promised)."""
    try:
        files: dict[str, int] = json.loads((entry / _KEY).read_bytes())["files"]
        return all((entry / name).stat().st_size == size for name, size in files.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _size(folder: Path) -> int:
    """Bytes of all files in a folder; files that vanish meanwhile count nothing."""
    total = 0
    for path in folder.rglob("*"):
        with suppress(OSError):
            total += path.stat().st_size if path.is_file() else 0
    return total


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Hold a lock file alone. The system lets go of it if this process dies; who held it removes the file."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            # The holder before us may have removed the file that we opened: then another one guards this name now.
            if not _is_file(path, descriptor):
                continue
            try:
                yield
            finally:
                with suppress(FileNotFoundError):
                    path.unlink()
            return
        finally:
            os.close(descriptor)


def _is_file(path: Path, descriptor: int) -> bool:
    """Whether a path still leads to an open file."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def _tell(entry: Path) -> None:
    """What FF_DEBUG asks to see of an entry: its source, the compiler's log, the machine code."""
    level = env.debug_level()
    patterns = [pattern for at, pattern in ((4, "source.*"), (5, "*.log")) if level >= at]
    for pattern in patterns:
        for path in sorted(entry.glob(pattern)):
            env.debug(1, f"--- {path}\n{path.read_text(errors='replace')}")
    if level >= 6:
        for tool, options, pattern in (("nvdisasm", ["-c"], "*.cubin"), ("objdump", ["-d", "--no-show-raw-insn"], "*.so")):
            for path in sorted(entry.glob(pattern)):
                command = [tool, *options, str(path)]
                if shutil.which(tool) is None:
                    env.debug(1, f"--- {path}: install {tool} to see its machine code ({' '.join(command)})")
                    continue
                env.debug(1, f"--- {path}\n{subprocess.run(command, capture_output=True, text=True, check=False).stdout}")
