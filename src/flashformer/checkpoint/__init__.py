"""Checkpoints: named, memory-mapped tensors with the configuration and the tokenizer beside them.

A checkpoint is read, never executed, and nothing that it says is trusted: every size is checked against the file before use.
"""

from __future__ import annotations

import mmap
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import ml_dtypes
import numpy as np

from ..config import ModelConfig
from ..errors import CheckpointError
from ..graph import Weight

if TYPE_CHECKING:
    from ..quant.forms import Form
    from ..tokenizer import Tokenizer

# Element types that are read as views of the file, by the name that `TensorSpec.dtype` gives them.
PLAIN_TYPES: dict[str, np.dtype[Any]] = {
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype("<f2"),
    "float32": np.dtype("<f4"),
}

# Tensors that files carry and models do not need: inverse rotary frequencies and masks that are derived from the configuration.
_HARMLESS_EXTRAS = re.compile(r".*\.rotary_emb\.inv_freq|rope_freqs\.weight|.*\.self_attn\.(bias|masked_bias)")


@dataclass(frozen=True)
class TensorSpec:
    """A tensor of a model: matrices are [rows, columns], `nbytes` counts stored bytes.

    `dtype` is one of PLAIN_TYPES, or says how a quantised matrix is stored ("q4_k", "awq int4 g128"), or is a type that no model uses.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    nbytes: int


class Checkpoint(ABC):
    """Read access to a model on disk; a context manager. Tensors have their Hugging Face names and layout."""

    path: Path
    config: ModelConfig

    @abstractmethod
    def names(self) -> Sequence[str]:
        """The names of all tensors."""

    @abstractmethod
    def spec(self, name: str) -> TensorSpec:
        """Shape and type of a tensor; CheckpointError if there is none of that name."""

    @abstractmethod
    def read(self, name: str, rows: slice | None = None) -> np.ndarray:
        """A tensor, or some of its rows, as bfloat16, float16 or float32.

        Plain types come as read-only views of the mapped file where the layout allows that; quantised matrices are expanded
        to bfloat16 (rounded to nearest, ties to even). Raises CheckpointError for an unknown name or an unsupported type.
        """

    def form(self, name: str, rows: slice | None = None) -> Form | None:
        """The quantised form of a matrix, or of some of its rows; None for a tensor that is stored plainly.

        Of no rows, `slice(0, 0)`, it is cheap: types and shapes are checked, values are not. Raises CheckpointError for an
        unknown name, and for stored tensors that are missing, misshapen or impossible.
        """
        self.spec(name)
        return None

    def values(self, name: str, rows: slice | None = None) -> np.ndarray:
        """What a tensor, or some of its rows, stands for, unrounded: float32 of a quantised matrix, otherwise what `read` gives.

        Raises what `form` and `read` raise.
        """
        form = self.form(name, rows)
        return self.read(name, rows) if form is None else form.dequantize()

    @abstractmethod
    def tokenizer(self) -> Tokenizer:
        """The tokenizer that comes with the model; CheckpointError if it is missing or cannot be used."""

    @abstractmethod
    def close(self) -> None:
        """Let go of the files. Arrays that `read` returned stay valid as long as they are referenced."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


class MappedFile:
    """A file in memory, read-only."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                self.map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:  # ValueError: an empty file cannot be mapped
            raise CheckpointError(f"{path}: cannot be read ({error})") from error

    def array(self, offset: int, dtype: np.dtype[Any], shape: tuple[int, ...]) -> np.ndarray:
        """The elements from byte `offset` on, as a read-only view."""
        count = 1
        for size in shape:
            count *= size
        return np.frombuffer(self.map, dtype, count, offset).reshape(shape) if count else np.empty(shape, dtype)

    def close(self) -> None:
        """Unmap the file; while arrays still refer to it, it is unmapped with the last of them."""
        with suppress(BufferError):
            self.map.close()


def shown(name: object) -> str:
    """A name or value from a file, made safe and short enough for a message."""
    return ascii(name) if len(ascii(name)) <= 100 else ascii(name)[:97] + "..."


def open_checkpoint(path: Path) -> Checkpoint:
    """Open a GGUF file, or a Hugging Face folder with `config.json` and safetensors.

    Raises CheckpointError if the files are missing or malformed, ConfigError if the model is not supported.
    """
    from .gguf import GGUFCheckpoint
    from .safetensors import SafetensorsCheckpoint

    if path.is_dir():
        return SafetensorsCheckpoint(path)
    if path.suffix == ".gguf":
        return GGUFCheckpoint(path)
    if not path.exists():
        raise CheckpointError(f"{path}: no such file or folder")
    raise CheckpointError(f"{path}: not a model; expected a .gguf file, or a folder with config.json and safetensors files")


def check_tensors(checkpoint: Checkpoint, weights: Mapping[str, Weight]) -> None:
    """Check that a checkpoint holds exactly the weights of a model, in shapes that fit and types that can be read.

    Tensors that are known to be unnecessary are passed over: derived rotary frequencies and masks, and a separate head of
    the embedding's shape where the configuration ties the two. Raises CheckpointError that lists everything found wrong.
    """
    present = set(checkpoint.names())
    problems = [f"missing: {name} {list(weight.shape)}" for name, weight in weights.items() if name not in present]
    for name, weight in weights.items():
        if name not in present:
            continue
        spec = checkpoint.spec(name)
        if spec.shape != weight.shape:
            problems.append(f"misshapen: {name} is {list(spec.shape)}, the configuration says {list(weight.shape)}")
        elif spec.dtype not in PLAIN_TYPES:
            problems.extend(_problem_of_type(checkpoint, spec))
    for name in sorted(present - set(weights)):
        tied_head = name == "lm_head.weight" and checkpoint.config.tied_embeddings
        if tied_head and checkpoint.spec(name).shape == (checkpoint.config.vocab_size, checkpoint.config.hidden_size):
            continue
        if not _HARMLESS_EXTRAS.fullmatch(name):
            problems.append(f"unexpected: {shown(name)} {list(checkpoint.spec(name).shape)}")
    if problems:
        more = f"\n  ... and {len(problems) - 10} more" if len(problems) > 10 else ""
        raise CheckpointError(
            f"{checkpoint.path}: the tensors do not fit the configuration:\n  " + "\n  ".join(problems[:10]) + more
        )


def _problem_of_type(checkpoint: Checkpoint, spec: TensorSpec) -> Iterator[str]:
    """What keeps a tensor from being read that is not of a plain type, as far as types and shapes tell."""
    try:
        if checkpoint.form(spec.name, slice(0, 0)) is None:
            yield f"type: {spec.name} is {spec.dtype}; supported are {', '.join(PLAIN_TYPES)} and quantised matrices"
    except CheckpointError as error:
        yield f"quantised: {error}"
