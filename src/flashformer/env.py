"""Environment variables, each read here and nowhere else.

FF_CACHE_DIR  where generated sources, binaries and packed weights are kept (default: ~/.cache/flashformer)
FF_THREADS    workers of the CPU backend (default: one for each core that this process may use)
FF_DEBUG      how much to tell on stderr, each level with those before it: 1 a summary and cache hits, 2 where the time goes,
              3 the plan, 4 the generated source, 5 the compiler's log (registers, spills), 6 the machine code
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

from .errors import InputError

MAX_THREADS = 1024
MAX_DEBUG = 6


def _integer(name: str, low: int, high: int) -> int | None:
    """The value of a variable, or None where it is unset or empty; InputError for anything but an integer in range."""
    text = os.environ.get(name, "")
    if not text:
        return None
    if not (text.isascii() and text.isdigit() and len(text) < 10 and low <= int(text) <= high):
        raise InputError(f"{name}={text[:40]!r}: must be an integer from {low} to {high}")
    return int(text)


def debug_level() -> int:
    """FF_DEBUG, 0 where it is not set. Raises InputError if it is not a level."""
    return _integer("FF_DEBUG", 0, MAX_DEBUG) or 0


def debug(level: int, text: str | Callable[[], str]) -> None:
    """Tell `text` (or what it returns) on stderr if FF_DEBUG is at least `level`."""
    if debug_level() >= level:
        print(text if isinstance(text, str) else text(), file=sys.stderr, flush=True)


def threads() -> int:
    """FF_THREADS, by default the number of cores that this process may run on. Raises InputError if it is not a count."""
    given = _integer("FF_THREADS", 1, MAX_THREADS)
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return given or min(available, MAX_THREADS)


def cache_dir() -> Path:
    """The folder for everything that need not be made twice: FF_CACHE_DIR, else the user's cache folder (XDG)."""
    given = os.environ.get("FF_CACHE_DIR", "")
    try:
        if given:
            return Path(given).expanduser().absolute()
        shared = os.environ.get("XDG_CACHE_HOME", "")
        # By the XDG specification a relative path is invalid and passed over.
        base = Path(shared) if os.path.isabs(shared) else Path.home() / ".cache"
        return base / "flashformer"
    except RuntimeError as error:  # no home folder
        raise InputError(f"No home folder to keep a cache in ({error}); set FF_CACHE_DIR to a folder") from error
