"""Hugging Face folders: `config.json` with one safetensors file, or several that an index names.

The format (github.com/huggingface/safetensors): the header's length as 8 little-endian bytes, a JSON header of at most
100 MB that gives type, shape and byte range of every tensor, then the tensors, which cover the rest of the file without
holes or overlaps. The reader is ours because it maps bfloat16 without a copy and refuses whatever breaks those rules.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np

from ..config import parse_json, read_config, read_json
from ..errors import CheckpointError
from . import PLAIN_TYPES, Checkpoint, MappedFile, TensorSpec, shown
from .quantized import QuantizedMatrix, quantized_matrices

if TYPE_CHECKING:
    from ..quant.forms import Form
    from ..tokenizer import Tokenizer

_HEADER_LIMIT = 100_000_000  # bytes, from the format

# The types that the format names in whole bytes.
_TYPES: dict[str, np.dtype[Any]] = {
    **{"BOOL": np.dtype(bool), "U8": np.dtype("u1"), "I8": np.dtype("i1")},
    **{f"{kind}{8 * size}": np.dtype(f"<{kind.lower()}{size}") for kind in "UI" for size in (2, 4, 8)},
    **{"BF16": PLAIN_TYPES["bfloat16"], "F16": PLAIN_TYPES["float16"], "F32": PLAIN_TYPES["float32"], "F64": np.dtype("<f8")},
    **{"F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn), "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2)},
    **{"F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu), "C64": np.dtype("<c8")},
}
_BY_NAME = {dtype.name: dtype for dtype in _TYPES.values()}


class SafetensorsFile:
    """One safetensors file: its tensors' specs, and the byte at which each begins."""

    def __init__(self, path: Path) -> None:
        self.file = MappedFile(path)
        self.specs: dict[str, TensorSpec] = {}
        self.begins: dict[str, int] = {}
        try:
            self._parse_header()
        except CheckpointError:
            self.file.close()
            raise

    def _parse_header(self) -> None:
        path, size = self.file.path, len(self.file.map)
        length = int.from_bytes(self.file.map[:8], "little")
        if size < 8 or length > min(size - 8, _HEADER_LIMIT):
            raise CheckpointError(f"{path}: truncated, or not a safetensors file (header of {length} bytes, file of {size})")
        header = parse_json(self.file.map[8 : 8 + length], f"{path}: header")
        metadata = header.pop("__metadata__", {})
        if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
            raise CheckpointError(f"{path}: __metadata__ must map texts to texts")
        ranges = []
        for name, entry in header.items():
            spec, begin, end = _parse_entry(path, name, entry)
            self.specs[name], self.begins[name] = spec, 8 + length + begin
            ranges.append((begin, end))
        position = 0
        for begin, end in sorted(ranges):
            if begin != position:
                raise CheckpointError(f"{path}: the tensors overlap or leave a hole at byte {position} of the data")
            position = end
        if position != size - 8 - length:
            raise CheckpointError(f"{path}: truncated or malformed: the tensors take {position} bytes of {size - 8 - length}")

    def read(self, name: str) -> np.ndarray:
        """A whole tensor as a view; CheckpointError if its type is not a plain one."""
        if self.specs[name].dtype not in PLAIN_TYPES:
            kind = self.specs[name].dtype
            raise CheckpointError(f"{self.file.path}: {shown(name)} is {kind}; supported are {', '.join(PLAIN_TYPES)}")
        return self.view(name)

    def view(self, name: str) -> np.ndarray:
        """A whole tensor of any type as a view."""
        spec = self.specs[name]
        return self.file.array(self.begins[name], _BY_NAME[spec.dtype], spec.shape)


def _parse_entry(path: Path, name: str, entry: object) -> tuple[TensorSpec, int, int]:
    """A header entry, checked: the spec, and the range of bytes within the data."""

    def counts(value: object) -> bool:
        return isinstance(value, list) and all(type(x) is int and 0 <= x < 1 << 63 for x in value)

    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"{path}: the entry of {shown(name)} must have dtype, shape and data_offsets, and nothing else")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _TYPES:
        raise CheckpointError(f"{path}: {shown(name)} has the unknown type {shown(dtype)}")
    if not counts(shape) or len(shape) > 8 or not counts(offsets) or len(offsets) != 2:
        raise CheckpointError(f"{path}: {shown(name)} has a malformed shape or data_offsets")
    kind = _TYPES[dtype]
    nbytes = kind.itemsize * math.prod(shape)
    if offsets[1] - offsets[0] != nbytes:
        raise CheckpointError(f"{path}: {shown(name)} needs {nbytes} bytes but spans {offsets[1] - offsets[0]}")
    if math.prod(size for size in shape if size) >= 1 << 56:  # an empty tensor's other sizes, which numpy limits
        raise CheckpointError(f"{path}: {shown(name)} has a malformed shape")
    return TensorSpec(name, tuple(shape), kind.name, nbytes), offsets[0], offsets[1]


class SafetensorsCheckpoint(Checkpoint):
    """A folder with `config.json` and `model.safetensors`, or shards and `model.safetensors.index.json`."""

    def __init__(self, folder: Path) -> None:
        self.path = folder
        if not (folder / "config.json").exists():
            raise CheckpointError(f"{folder}: no config.json here; expected a Hugging Face model folder or a .gguf file")
        self.config = read_config(folder)
        self._files: dict[str, SafetensorsFile] = {}
        self._home: dict[str, SafetensorsFile] = {}
        self._matrices: dict[str, QuantizedMatrix] = {}
        try:
            self._open()
        except CheckpointError:
            self.close()
            raise

    def _open(self) -> None:
        index = self.path / "model.safetensors.index.json"
        if (self.path / "model.safetensors").exists():
            self._home = dict.fromkeys(self._shard("model.safetensors").specs, self._files["model.safetensors"])
        elif index.exists():
            self._open_shards(index)
        else:
            pickled = any(self.path.glob("*.bin")) or any(self.path.glob("*.pth"))
            advice = "; pickled weights (.bin, .pth) are never read, convert them to safetensors" if pickled else ""
            raise CheckpointError(f"{self.path}: neither model.safetensors nor model.safetensors.index.json here{advice}")
        self._matrices = quantized_matrices(self.config, {name: self._home[name].specs[name] for name in self._home}, self._view)

    def _open_shards(self, index: Path) -> None:
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise CheckpointError(f"{index}: weight_map must map tensor names to file names")
        for name, file in weight_map.items():
            # A plain name: nothing outside the folder may be read because an index says so.
            if not isinstance(file, str) or not file.endswith(".safetensors") or not file.isprintable() or any(c in file for c in "/\\:"):
                raise CheckpointError(f"{index}: {shown(file)} is not the name of a safetensors file in this folder")
            shard = self._shard(file)
            if name not in shard.specs:
                raise CheckpointError(f"{index}: {shown(name)} is not in {shown(file)}")
            self._home[name] = shard
        for file, shard in self._files.items():
            for name in shard.specs:
                if self._home.get(name) is not shard:
                    raise CheckpointError(f"{index}: {shown(name)} lies in {shown(file)}, but the index does not say so")

    def _shard(self, file: str) -> SafetensorsFile:
        if file not in self._files:
            self._files[file] = SafetensorsFile(self.path / file)
        return self._files[file]

    def names(self) -> Sequence[str]:
        taken = {part for matrix in self._matrices.values() for part in matrix.stored}
        return (*(name for name in self._home if name not in taken), *self._matrices)

    def spec(self, name: str) -> TensorSpec:
        return self._matrices[name].spec if name in self._matrices else self._find(name).specs[name]

    def read(self, name: str, rows: slice | None = None) -> np.ndarray:
        if name in self._matrices:
            return self._matrices[name].expand(rows)
        tensor = self._find(name).read(name)
        return tensor if rows is None else tensor[rows]

    def form(self, name: str, rows: slice | None = None) -> Form | None:
        if name in self._matrices:
            return self._matrices[name].form(rows)
        self._find(name)
        return None

    def _view(self, name: str) -> np.ndarray:
        return self._home[name].view(name)

    def _find(self, name: str) -> SafetensorsFile:
        if name not in self._home:
            raise CheckpointError(f"{self.path}: there is no tensor {shown(name)}")
        return self._home[name]

    def tokenizer(self) -> Tokenizer:
        from ..tokenizer import from_folder

        return from_folder(self.path, self.config)

    def close(self) -> None:
        for shard in self._files.values():
            shard.file.close()
        self._files, self._home, self._matrices = {}, {}, {}
