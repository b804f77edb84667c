"""Seeded mutations of binary files, for the fuzz tests of the readers."""

from __future__ import annotations

import random
import resource
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from flashformer.errors import CheckpointError, ConfigError

_HOSTILE = [0, 1, 7, 8, 31, 33, 255, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**62, 2**63 - 1, 2**63, 2**64 - 8, 2**64 - 1]


def mutations(data: bytes, header: int, count: int, seed: int) -> Iterator[bytes]:
    """`count` damaged copies of `data`, mostly within its first `header` bytes: bits flipped, pieces cut, doubled, moved or
    overwritten with hostile integers and lengths, digits changed, and the file truncated.
    """
    rng = random.Random(seed)
    for _ in range(count):
        out = bytearray(data)
        for _ in range(rng.choice((1, 1, 1, 2, 4))):
            end = max(1, min(header, len(out)))
            at, kind = rng.randrange(end), rng.randrange(8)
            if kind == 0:
                del out[rng.randrange(len(out) + 1) :]
            elif kind == 1:
                out[at] ^= 1 << rng.randrange(8)
            elif kind == 2:
                out[at] = rng.randrange(256)
            elif kind == 3:
                width = rng.choice((4, 8))
                out[at : at + width] = (rng.choice(_HOSTILE) & (1 << 8 * width) - 1).to_bytes(width, "little")
            elif kind == 4:
                del out[at : at + rng.randrange(1, 40)]
            elif kind == 5:
                out[at:at] = out[at : at + rng.randrange(1, 40)]
            elif kind == 6:
                source = rng.randrange(end)
                piece = out[source : source + rng.randrange(1, 40)]
                out[at : at + len(piece)] = piece
            else:
                digits = [i for i in range(end) if 48 <= out[i] < 58]
                for i in rng.sample(digits, min(len(digits), 2)):
                    out[i] = rng.randrange(48, 58)
            if not out:
                break
        yield bytes(out)


def survey(target: Path, variants: Iterator[bytes], use: Callable[[Path], None]) -> tuple[int, int]:
    """Write each variant to `target` and `use` it; any exception but our own escapes. Returns (accepted, refused).

    A variant that takes more than a second of the processor fails.
    """
    accepted = refused = 0
    for data in variants:
        target.write_bytes(data)
        start = time.process_time()
        try:
            use(target)
            accepted += 1
        except (CheckpointError, ConfigError) as error:
            str(error).encode("utf-8")  # the message can be printed
            refused += 1
        assert time.process_time() - start < 1.0
        target.unlink()  # the old mapping keeps the old file
    return accepted, refused


@contextmanager
def bounded_memory(more: int) -> Iterator[None]:
    """Within, this process may map at most `more` bytes beyond what it has mapped: what asks for more gets a MemoryError."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + more, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
