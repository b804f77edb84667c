"""`flashformer quantize`: a model with the weights of its linear layers in few bits, as a Hugging Face folder (compressed-tensors).

The graph is walked operator by operator; each weight is read, quantised and written when its operator's turn comes, so that no more
than one matrix is held at a time (and, while calibrating, the activations of a text).
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Collection
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from .backends import Progress
from .checkpoint import PLAIN_TYPES, Checkpoint
from .config import ModelConfig
from .errors import CheckpointError, InputError
from .export import write_beside
from .graph import Graph, Operator
from .quant_methods import rtn
from .quant_methods.calibration import Activations, read_text, sample_windows
from .quant_methods.compressed_tensors import assemble, pack, quantization_config
from .quant_methods.gptq import Solver
from .quant_methods.grids import Grid
from .safetensors_writer import SHARD_BYTES, SafetensorsWriter

ROWS = 2048  # of a matrix that are quantised at a time
GROUPS = (128, 64, 32)  # columns that share a scale in int4, as kernels have them

_MXFP4_GROUP = 32  # the format's
_HEAD = "lm_head"


@dataclass(frozen=True)
class Recipe:
    """What to make of a model."""

    to: Literal["int4", "int8", "fp8", "mxfp4"]
    group: int | None = GROUPS[0]  # of int4: it, or the next smaller one that divides the columns of all matrices; None: a row
    head: Literal["16", "same"] = "16"
    text: Path | None = None  # to calibrate with; None: rounding to nearest

    def grid(self, columns: Collection[int], config: ModelConfig) -> Grid | None:
        """The grid for matrices with so many columns; None if no group divides all of them.

        NOTE: one for the whole model, since transformers does not expand a model of several.
        """
        scale_type = PLAIN_TYPES[config.dtype]
        if self.to in ("int8", "fp8"):
            return Grid("int" if self.to == "int8" else "fp8", 8, None, scale_type)
        if self.to == "int4" and self.group is None:
            return Grid("int", 4, None, scale_type)
        sizes = [_MXFP4_GROUP] if self.to == "mxfp4" else [group for group in GROUPS if group <= (self.group or 0)]
        fitting = [group for group in sizes if not any(size % group for size in columns)]
        return Grid("mxfp4" if self.to == "mxfp4" else "int", 4, fitting[0], scale_type) if fitting else None


@dataclass(frozen=True)
class Outcome:
    """What was made."""

    bytes_before: int  # of the model's weights as they are stored
    bytes_after: int
    notes: tuple[str, ...]  # what a user should know


def quantize(model: str, out: Path, recipe: Recipe, progress: Progress | None = None, shard_bytes: int = SHARD_BYTES) -> Outcome:
    """Quantise the linear layers of `model` (see `hub.resolve`) by `recipe` into the folder `out`, which appears when all is done.

    Everything else is stored in the model's 16-bit type. Raises InputError if `out` exists and is not empty, or cannot be written, or
    the recipe does not fit the model; CheckpointError or ConfigError for a model that cannot be read.
    """
    from .checkpoint import check_tensors, open_checkpoint
    from .hub import resolve
    from .models import build_graph
    from .progress import bars

    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out}: exists already; choose another name, or remove it")
    with open_checkpoint(resolve(model)) as checkpoint:
        graph = build_graph(checkpoint.config)
        check_tensors(checkpoint, graph.weights())
        before = sum(checkpoint.spec(name).nbytes for name in graph.weights())
        beside = out.with_name(f".{out.name}.{os.getpid()}")
        try:
            beside.mkdir()
            with bars(progress) as told, closing(SafetensorsWriter(beside, shard_bytes)) as writer:
                job = _Job(checkpoint, graph, recipe, writer, told)
                write_beside(checkpoint, beside, job.config_changes())
                job.run()
            beside.rename(out)
        except OSError as error:
            raise InputError(f"{out}: cannot be written ({error.strerror or error})") from error
        finally:
            shutil.rmtree(beside, ignore_errors=True)
    return Outcome(before, writer.total_bytes, job.notes)


class _Job:
    """One model on its way to one recipe."""

    def __init__(self, checkpoint: Checkpoint, graph: Graph, recipe: Recipe, writer: SafetensorsWriter, progress: Progress) -> None:
        """Decides the grid of the linear layers. Raises InputError where the recipe does not fit the model or its text is not one."""
        self._checkpoint, self._graph, self._writer, self._progress = checkpoint, graph, writer, progress
        self._type = PLAIN_TYPES[checkpoint.config.dtype]
        self._head16 = recipe.head == "16"
        *_, self._head, self._choice = graph.operators
        linear = [op for op in graph.operators if op.kind == "linear" and not (op is self._head and self._head16)]
        columns = {op.weights[0].shape[1]: self._module(op) for op in linear}
        grid = recipe.grid(columns, checkpoint.config)
        if grid is None:
            size = next(size for size in columns if size % GROUPS[-1])
            instead = "--group row" if recipe.to == "int4" else "fp8"
            raise InputError(f"{columns[size]} has {size} columns, which groups of {GROUPS[-1]} do not divide; use {instead}")
        self._grid, self._modules = grid, {self._module(op) for op in linear}
        self._activations: Activations | None = None
        if recipe.text is not None:
            windows = sample_windows(read_text(recipe.text), checkpoint.tokenizer(), checkpoint.config)
            self._activations = Activations(graph, checkpoint.config, windows)
        self._solver: tuple[str, Solver] | None = None  # with the value that it is for: matrices that read the same value share it
        self._written: set[str] = set()
        self._done, self._total = 0, sum(op.size for op in linear)
        self.notes = (*checkpoint.config.notes, *self._notes(recipe))

    def config_changes(self) -> dict[str, Any]:
        """Keys of config.json that the quantised model has in its own way. A tied head that is quantised is tied no more."""
        tied = self._checkpoint.config.tied_embeddings and self._head16
        return {"tie_word_embeddings": tied, "quantization_config": quantization_config(self._grid, [_HEAD] if self._head16 else [])}

    def run(self) -> None:
        """Quantise and write all tensors in the order in which the model reads them."""
        for op in self._graph.operators:
            quantized = self._module(op) in self._modules
            weights = [self._quantize(op)] if quantized else []
            weights += [self._copy(weight.name) for weight in op.weights[quantized:]]
            if self._activations is not None and op not in (self._head, self._choice):
                self._activations.run(op, weights)
        self._writer.finish()

    def _quantize(self, op: Operator) -> np.ndarray:
        """Quantise and write a linear layer's matrix; its values, float32 [N, K], where activations need them."""
        module, name, columns = self._module(op), op.weights[0].name, op.weights[0].shape[1]
        parts, values = [], [np.empty((0, columns), np.float32)]
        method = rtn.quantize
        if self._activations is not None:
            if self._solver is None or self._solver[0] != op.inputs[0]:
                self._solver = None  # the old one's memory is free before the new one's is taken
                self._solver = op.inputs[0], Solver(self._activations.moments(op.inputs[0]))
            method = self._solver[1].quantize
        for first in range(0, op.size, ROWS):
            rows = self._checkpoint.values(name, slice(first, min(first + ROWS, op.size))).astype(np.float32)
            if not np.isfinite(rows).all():
                raise CheckpointError(f"{name} has values that are not finite; it cannot be quantised")
            part = method(rows, self._grid)
            parts.append(pack(self._grid, part))
            if self._activations is not None and op is not self._head:
                values.append(part.dequantize())
            self._done += len(rows)
            self._progress("quantizing", self._done, self._total)
        for suffix, tensor in assemble(self._grid, parts, columns).items():
            self._writer.add(f"{module}.{suffix}", tensor)
        return np.concatenate(values)

    def _copy(self, name: str) -> np.ndarray:
        """A tensor that stays in 16 bits, written the first time."""
        tensor = self._checkpoint.read(name).astype(self._type, copy=False)
        if name not in self._written:
            self._writer.add(name, tensor)
            self._written.add(name)
        return tensor

    def _module(self, op: Operator) -> str:
        """The module of an operator's (first) weight; that of the head has its own name where it shares the embedding's."""
        if op is self._head:
            return _HEAD
        return op.weights[0].name.removesuffix(".weight") if op.weights else ""

    def _notes(self, recipe: Recipe) -> list[str]:
        """What a user should know of this model and recipe."""
        notes = []
        stored = sorted({self._checkpoint.spec(name).dtype for name in self._graph.weights()} - set(PLAIN_TYPES))
        if stored:
            notes.append(f"The source is quantised itself ({', '.join(stored)}): what that lost stays lost.")
        if recipe.to == "int4" and self._grid.group != recipe.group:
            notes.append(f"Groups of {self._grid.group}: some matrices have columns that groups of {recipe.group} do not divide.")
        return notes
