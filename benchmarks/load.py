"""From files in the page cache to a model that is ready, against a plain pinned copy: writes benchmarks/results/load-<gpu>.json.

usage: python benchmarks/load.py [--models llama-3.2-1b,llama-3.1-8b] [--folder FOLDER] [--commit HASH] [--results FOLDER]

A checkpoint of random values is written to a temporary folder, then loaded by one process after another: the first builds the
kernel, the others find it in the cache.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import date
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

import flashformer
from flashformer.backends import Progress
from flashformer.backends.cuda.driver import Context, probe
from flashformer.config import ModelConfig
from flashformer.errors import DeviceError, FlashFormerError, InputError
from flashformer.export import config_mapping
from flashformer.models import build_graph
from flashformer.progress import bars
from flashformer.records import commit, driver_version, results_file
from flashformer.shapes import shape

RESULTS = Path(__file__).parent / "results"
SHARD_BYTES = 4 << 30
PIECE_BYTES = 16 << 20  # that one thread draws and writes at a time
COPY_BYTES = 64 << 20  # of one plain copy
CHILD_SECONDS = 300  # for one load
FINITE = np.uint64(0xBFFF_BFFF_BFFF_BFFF)  # four bfloat16 without the top bit of their exponents: below 2
OWN_BYTES = 100 * 10**6  # of host memory, for everything but weights
PARTS = ("python", "open and plan", "compile", "claim", "pack", "rest")  # of a load, in order


@dataclass(frozen=True)
class LoadRecord:
    """One model's loads, as they are kept in benchmarks/results."""

    model: str
    weights: str  # their format
    bytes: int  # of all tensors
    cores: int
    first: dict[str, float]  # seconds of each of PARTS, with the kernel built
    cached: list[dict[str, float]]  # the same of each load that found the kernel in the cache
    pack_gb_s: float  # median of the cached loads
    copy_gb_s: float  # of a plain pinned copy of as many bytes
    fraction_of_copy: float
    start_seconds: float  # median of the cached loads, from the call to the model ready, without packing
    host_bytes: int  # most private and pinned memory of the cached loads, without what Python and the CUDA driver take
    host_limit_bytes: int  # two of the largest tensors and OWN_BYTES
    gpu: str
    driver: str
    date: str
    commit: str


# --- The checkpoint --------------------------------------------------------------------------------------------------------


def write_checkpoint(config: ModelConfig, folder: Path, progress: Progress, shard_bytes: int = SHARD_BYTES) -> int:
    """A Hugging Face folder of random bfloat16 values below 2, in shards, by all cores; returns the bytes of all tensors.

    Raises InputError where the folder has no room for it.
    """
    weights = build_graph(config).weights()
    sizes = {name: 2 * int(np.prod(weight.shape)) for name, weight in weights.items()}
    total = sum(sizes.values())
    free = shutil.disk_usage(folder).free
    if total + (1 << 20) > free:
        raise InputError(f"{folder} has room for {free / 1e9:.1f} GB, the checkpoint needs {total / 1e9:.1f}; choose another --folder")
    shards: list[list[str]] = [[]]
    for name in sizes:
        if shards[-1] and sum(sizes[n] for n in shards[-1]) + sizes[name] > shard_bytes:
            shards.append([])
        shards[-1].append(name)
    files = {f"model-{i:05d}-of-{len(shards):05d}.safetensors": names for i, names in enumerate(shards, 1)}
    (folder / "config.json").write_text(json.dumps(config_mapping(config), indent=1))
    index = {"metadata": {"total_size": total}, "weight_map": {name: file for file, names in files.items() for name in names}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    done = 0
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for number, (file, names) in enumerate(files.items()):
            for nbytes in _write_shard(folder / file, {name: weights[name].shape for name in names}, number, pool):
                done += nbytes
                progress("writing the checkpoint", done, total)
    return total


def _write_shard(path: Path, shapes: Mapping[str, Sequence[int]], seed: int, pool: ThreadPoolExecutor) -> Iterator[int]:
    """Write one safetensors file, and say how many bytes each piece had."""
    entries, at = {}, 0
    for name, dimensions in shapes.items():
        end = at + 2 * int(np.prod(dimensions))
        entries[name] = {"dtype": "BF16", "shape": list(dimensions), "data_offsets": [at, end]}
        at = end
    header = json.dumps(entries).encode()
    header += b" " * (-len(header) % 8)

    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.flush()
        start = file.tell()
        file.truncate(start + at)

        def write(first: int) -> int:
            count = min(PIECE_BYTES, at - first)
            generator = np.random.Generator(np.random.SFC64((seed, first)))
            values = generator.integers(1 << 64, size=-(-count // 8), dtype=np.uint64)
            values &= FINITE
            left = values.data.cast("B")[:count]
            while left:
                left = left[os.pwrite(file.fileno(), left, start + first + count - len(left)) :]
            return count

        yield from pool.map(write, range(0, at, PIECE_BYTES))


# --- What each process measures --------------------------------------------------------------------------------------------


@contextmanager
def watched_memory() -> Iterator[list[int]]:
    """Bytes of private memory (mapped files are not) of this process, looked at all the time: one list of all values."""
    seen = [private_bytes()]
    end = threading.Event()

    def look() -> None:
        while not end.wait(0.005):
            seen.append(private_bytes())

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield seen
    finally:
        end.set()
        thread.join()


def private_bytes() -> int:
    """Anonymous memory of this process that is in use now."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:"))


def measure_load(folder: Path, started: float) -> dict[str, object]:
    """Load a model as a user does: seconds of each of PARTS from `started` (time.monotonic of the parent) on, and host memory.

    Pinned memory is counted by itself, so that it is not missed where the system does not call it private.
    """
    marks = [("python", time.monotonic())]

    def progress(what: str, done: int, total: int) -> None:
        if what == "compiling":
            marks.append(("compile" if done else "open and plan", time.monotonic()))
        elif done == 0:
            marks.append(("claim", time.monotonic()))
        elif done == total:
            marks.append(("pack", time.monotonic()))

    with watched_memory() as seen, flashformer.load(folder, "cuda", progress=progress) as engine:
        marks.append(("rest", time.monotonic()))
        made = list(engine.runner.generate([1], 0, 4, ()))
        pinned = engine.runner.context.pinned_peak  # type: ignore[attr-defined]
    if len(made) != 4 or [name for name, _ in marks] != list(PARTS):
        raise DeviceError(f"{folder}: {made} after {marks}: that is not how a model is loaded")
    begins = [started, *(at for _, at in marks)]
    return {"seconds": {name: at - begin for (name, at), begin in zip(marks, begins, strict=False)}, "host": max(seen) + pinned}


def measure_copy(nbytes: int) -> dict[str, object]:
    """GB/s of a plain pinned host-to-device copy of so many bytes, and the private memory of a process that has a CUDA context."""
    context = Context()
    try:
        own = private_bytes()
        sources = [context.allocate_pinned(COPY_BYTES, "a copy")[0] for _ in range(2)]
        target = context.allocate(COPY_BYTES, "a copy")
        context.copy_async(target, sources[0], COPY_BYTES)  # the first warms up
        begin = context.event()
        for i in range(-(-nbytes // COPY_BYTES)):
            context.copy_async(target, sources[i % 2], min(COPY_BYTES, nbytes - i * COPY_BYTES))
        return {"gb_s": nbytes / context.elapsed(begin, context.event()) / 1e9, "own": own}
    finally:
        context.close()


# --- The whole -------------------------------------------------------------------------------------------------------------


def child(cache: Path, *arguments: str) -> dict[str, object]:
    """What one of the measurements above says, from a process of its own. Raises DeviceError with its last words where it fails."""
    command = [sys.executable, __file__, *arguments, "--started", str(time.monotonic())]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=CHILD_SECONDS, env={**os.environ, "FF_CACHE_DIR": str(cache)}, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise DeviceError(f"a load did not end within {CHILD_SECONDS} s") from error
    if done.returncode:
        raise DeviceError(f"a load failed: {done.stderr.strip()[-2000:]}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def measure(model: str, folder: Path, repeats: int, gpu: str, progress: Progress) -> LoadRecord:
    """Write the model's checkpoint below `folder` and load it 1 + `repeats` times; nothing of it is left."""
    config = shape(model)
    with tempfile.TemporaryDirectory(prefix="flashformer-load-", dir=folder) as name:
        home, cache = Path(name) / "model", Path(name) / "cache"
        home.mkdir()
        nbytes = write_checkpoint(config, home, progress)
        loads = []
        for i in range(1 + repeats):
            progress("loading", i, 1 + repeats)
            loads.append(child(cache, "--load", str(home)))
        copy = child(cache, "--copy", str(nbytes))
        progress("loading", 1 + repeats, 1 + repeats)
    return make_record(model, config, loads, copy, gpu)


def make_record(model: str, config: ModelConfig, loads: Sequence[Mapping[str, object]], copy: Mapping[str, object], gpu: str) -> LoadRecord:
    """What the measurements come to; the first load is the one that built the kernel."""
    sizes = [2 * int(np.prod(w.shape)) for w in build_graph(config).weights().values()]
    seconds: list[dict[str, float]] = [dict(load["seconds"]) for load in loads]  # type: ignore[call-overload]
    first, *cached = seconds
    rate = sum(sizes) / statistics.median(s["pack"] for s in cached) / 1e9
    copied = float(copy["gb_s"])  # type: ignore[arg-type]
    return LoadRecord(
        model, "bf16", sum(sizes), os.cpu_count() or 1, first, cached, rate, copied, rate / copied,
        statistics.median(sum(s[part] for part in PARTS[1:] if part != "pack") for s in cached),
        max(int(load["host"]) for load in loads[1:]) - int(copy["own"]),  # type: ignore[call-overload]
        2 * max(sizes) + OWN_BYTES, gpu, driver_version(), date.today().isoformat(), commit(),
    )  # fmt: skip


def keep(record: LoadRecord, path: Path) -> None:
    """Add a record to those in a file; it replaces one of the same model."""
    path.parent.mkdir(parents=True, exist_ok=True)
    kept = json.loads(path.read_text()) if path.exists() else []
    kept = [r for r in kept if r["model"] != record.model]
    path.write_text(json.dumps([*kept, asdict(record)], indent=1) + "\n")


def table(record: LoadRecord) -> Table:
    """A record for people."""
    shown = Table(title=f"{record.model}, {record.bytes / 1e9:.2f} GB, {record.gpu}, {record.cores} cores: seconds", title_justify="left")
    for column in ("load", *PARTS, "all", "packing GB/s"):
        shown.add_column(column, justify="right")
    for name, parts in (("first", record.first), *((f"cached {i}", s) for i, s in enumerate(record.cached, 1))):
        figures = [f"{parts[part]:.3f}" for part in PARTS]
        shown.add_row(name, *figures, f"{sum(parts.values()):.3f}", f"{record.bytes / parts['pack'] / 1e9:.2f}")
    shown.caption = (
        f"plain pinned copy {record.copy_gb_s:.1f} GB/s, of which packing reaches {record.fraction_of_copy:.0%}; "
        f"{record.start_seconds:.2f} s besides packing; "
        f"host memory {record.host_bytes / 1e6:,.0f} MB, limit {record.host_limit_bytes / 1e6:,.0f} MB"
    )
    shown.caption_justify = "left"
    return shown


def main() -> None:
    """Model by model; each is kept as soon as it is measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="llama-3.2-1b,llama-3.1-8b", help="named shapes (default: %(default)s)")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="for the checkpoints (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="loads with the kernel in the cache (default: %(default)s)")
    parser.add_argument("--commit", help="commit of this tree, where git is not at hand")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--load", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--copy", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--started", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args()
    try:
        if options.load or options.copy:
            print(json.dumps(measure_load(options.load, options.started) if options.load else measure_copy(options.copy)))
            return
        info = probe()
        if info is None:
            raise DeviceError("no CUDA GPU was found")
        for model in options.models.split(","):
            with bars() as progress:
                record = measure(model, options.folder, options.repeats, info.name, progress)
            record = replace(record, commit=options.commit or record.commit)
            keep(record, results_file(options.results, info.name, "load"))
            Console(width=140).print(table(record))
    except FlashFormerError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
