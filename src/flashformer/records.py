"""Records of measurements: what is kept in benchmarks/results, and how people see it."""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from .errors import InputError

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(kw_only=True)
class Kept:
    """What benchmarks/results keeps files of: a measurement, or several of a kind, and where they were made."""

    gpu: str
    driver: str
    date: str
    commit: str

    @property
    def whence(self) -> dict[str, str]:
        """Where it was made, for another record of the same."""
        return {"gpu": self.gpu, "driver": self.driver, "date": self.date, "commit": self.commit}

    @property
    def key(self) -> tuple[object, ...]:
        """What it is a measurement of: a newer one of the same takes its place."""
        raise NotImplementedError


R = TypeVar("R", bound=Kept)
PLAIN = {"bfloat16": "bf16", "float16": "f16"}  # what a record calls weights that are not quantised, by their type


@dataclass
class Record(Kept):
    """One measurement of decoding."""

    model: str
    weights: str  # their format, and that of the KV cache where it is not native
    batch: int
    context: int  # positions before the first timed token
    tokens_timed: int
    repeats: int
    ms_per_token: dict[str, float]  # min, median, max over the repeats
    spread: float  # (max - min) / median
    bytes_per_token: int  # weights and KV cache, at the middle of the timed tokens
    read_ceiling_gb_s: float
    fraction_of_ceiling: float
    checked: dict[str, float] | None  # layers, positions, kl_mean, kl_max, top1 against the reference; None: not checked
    timed_region: str
    baselines: dict[str, float] = field(default_factory=dict)  # name -> ms per token
    baseline_versions: dict[str, str] = field(default_factory=dict)  # name -> what it was
    tuned: dict[str, Any] = field(default_factory=dict)  # numbers of the target that `flashformer tune` had changed
    first_token_ms: float | None = None  # from a prompt of `context` tokens to the first of its answer; None: not measured

    @property
    def ms(self) -> float:
        """Median milliseconds per token."""
        return self.ms_per_token["median"]

    @property
    def floor_ms(self) -> float:
        """Milliseconds that the bytes of a token take at the read ceiling."""
        return self.bytes_per_token / self.read_ceiling_gb_s / 1e6

    @property
    def plain(self) -> bool:
        """Whether weights and KV cache have 16 bits a value."""
        return self.weights in PLAIN.values()

    @property
    def of(self) -> tuple[object, ...]:
        """What was decoded."""
        return self.gpu, self.model, self.weights, self.batch, self.context

    @property
    def key(self) -> tuple[object, ...]:
        """See `Kept`. What was measured beside others stays, until it is measured beside others again."""
        return *self.of, bool(self.baselines)


def newest(records: Sequence[Record]) -> list[Record]:
    """The last one of each that was decoded."""
    return [*{r.of: r for r in records}.values()]


def save(records: Sequence[R], path: Path) -> None:
    """Merge records (one at least) into a file, which is replaced as a whole: a new one takes the place of an older one of the same.

    Raises InputError if the file is there and holds something else, or cannot be written.
    """
    fresh = {r.key for r in records}
    try:
        kept = load_records(path, type(records[0])) if path.exists() else []
        path.parent.mkdir(parents=True, exist_ok=True)
        whole = [asdict(r) for r in [*(r for r in kept if r.key not in fresh), *records]]
        beside = path.with_name(f".{path.name}.{os.getpid()}")
        beside.write_text(json.dumps(whole, indent=1) + "\n")
        beside.replace(path)
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror})") from error


def load_records(path: Path, kind: type[R]) -> list[R]:
    """The records of a file. Raises InputError if it holds something else."""
    try:
        return [kind(**r) for r in json.loads(path.read_text())]
    except (ValueError, TypeError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not a file of benchmark records ({error})") from error


def results_file(folder: Path, gpu: str, what: str = "decode") -> Path:
    """Where the records of a GPU are kept."""
    return folder / f"{what}-{re.sub(r'[^a-z0-9]+', '-', gpu.lower()).strip('-')}.json"


def table(records: Sequence[Record]) -> Table:
    """Records of one model for people."""
    from rich.table import Table

    first = records[0]
    names = tuple(dict.fromkeys(name for r in records for name in r.baselines))
    shown = Table(title=f"{first.model}, {first.weights}, batch 1, {first.gpu}", title_justify="left")
    prompts = ("first token",) * any(r.first_token_ms is not None for r in records)
    for column in ("context", "ms/token", "min", "max", "spread", "tokens/s", "GB/s", "of ceiling", *prompts, *(f"vs {n}" for n in names)):
        shown.add_column(column, justify="right")
    for r in records:
        low, high = r.ms_per_token["min"], r.ms_per_token["max"]
        shown.add_row(
            f"{r.context:,}", f"{r.ms:.4f}", f"{low:.4f}", f"{high:.4f}", f"{r.spread:.2%}", f"{1e3 / r.ms:.1f}",
            f"{r.bytes_per_token / r.ms / 1e6:,.0f}", f"{r.fraction_of_ceiling:.1%}",
            *(f"{r.first_token_ms:,.1f} ms" if r.first_token_ms is not None else "" for _ in prompts),
            *(f"{r.baselines[n] / r.ms:.2f}x" if n in r.baselines else "" for n in names),
        )  # fmt: skip
    checked = "not checked against the reference"
    if first.checked:
        c = first.checked
        checked = f"{c['layers']} layers checked at {c['positions']} positions: mean KL {c['kl_mean']:.1e}, top-1 {c['top1']:.1%}"
    shown.caption = f"read ceiling {first.read_ceiling_gb_s:,.0f} GB/s; {first.tokens_timed} tokens, {first.repeats} times; {checked}"
    shown.caption_justify = "left"
    return shown


def whence(gpu: str, commit_given: str | None = None) -> dict[str, str]:
    """What a record of today says of where it was made; `commit_given`: of the tree, where git is not at hand."""
    return {"gpu": gpu, "driver": driver_version(), "date": date.today().isoformat(), "commit": commit_given or commit()}


def driver_version() -> str:
    """Version of the GPU's driver, or "unknown"."""
    return _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").split("\n")[0] or "unknown"


def commit() -> str:
    """Commit of the working tree that this package lies in (with a + where it has changes), or "unknown"."""
    where = str(Path(__file__).parent)
    name = _output("git", "-C", where, "rev-parse", "--short", "HEAD")
    return name + ("+" if name and _output("git", "-C", where, "status", "--porcelain", "-uno") else "") or "unknown"


def _output(*command: str) -> str:
    """What a command prints, or nothing where it fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""
