"""The GGUF container (versions 2 and 3, little-endian): metadata and tensor table, parsed with every size checked first.

Format: github.com/ggml-org/ggml, docs/gguf.md. A count or length from the file is compared with the bytes that are left
before anything is allocated, so memory stays proportional to the file.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from ..errors import CheckpointError
from ..quant.gguf_blocks import BLOCKS
from . import PLAIN_TYPES, MappedFile, TensorSpec, shown

_KEY_LIMIT = 65_535  # bytes of a metadata key, from the format
_NAME_LIMIT = 64  # bytes of a tensor's name, from the format
_MAX_DIMENSIONS = 4
_ALIGNMENT_LIMIT = 1 << 20

_STRING, _ARRAY, _BOOL, _FLOAT32 = 8, 9, 7, 6
# Metadata value types: number -> element type.
_NUMBERS: dict[int, np.dtype[Any]] = {
    number: np.dtype(code)
    for number, code in enumerate(["u1", "i1", "<u2", "<i2", "<u4", "<i4", "<f4", "u1", "", "", "<u8", "<i8", "<f8"])
    if code
}
# Tensor types: number -> name; those that `TensorSpec` does not know are refused by name.
# fmt: off
_TENSOR_TYPES = {
    0: "float32", 1: "float16", 2: "q4_0", 3: "q4_1", 6: "q5_0", 8: "q8_0", 12: "q4_k", 13: "q5_k", 14: "q6_k", 30: "bfloat16",
}
_OTHER_TENSOR_TYPES = {
    7: "Q5_1", 9: "Q8_1", 10: "Q2_K", 11: "Q3_K", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S",
    20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64", 29: "IQ1_M",
    34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4", 40: "NVFP4",
}
# fmt: on


@dataclass(frozen=True)
class Placed:
    """A tensor and the byte of the file at which it begins."""

    spec: TensorSpec
    begin: int


class GGUFFile:
    """A parsed GGUF file. `metadata` holds int, float, bool, str, list[str] or numpy arrays; `tensors` the table, by name."""

    def __init__(self, path: Path) -> None:
        self.file = MappedFile(path)
        self.metadata: dict[str, Any] = {}
        self.tensors: dict[str, Placed] = {}
        self._position = 0
        try:
            self._parse()
        except CheckpointError:
            self.file.close()
            raise

    def _parse(self) -> None:
        if self._bytes(4) != b"GGUF":
            raise CheckpointError(f"{self.file.path}: not a GGUF file")
        version = self._unpack("<I")
        if version not in (2, 3):
            endian = " (a big-endian file)" if version in (2 << 24, 3 << 24) else ""
            self._fail(f"GGUF version {version}{endian} is not supported; convert the model again with a current llama.cpp")
        tensor_count = self._count(smallest=8 + 4 + 8 + 4 + 8)
        for _ in range(self._count(smallest=8 + 4 + 1)):
            key = self._string(_KEY_LIMIT, "a metadata key")
            if key in self.metadata:
                self._fail(f"the metadata key {shown(key)} occurs twice")
            self.metadata[key] = self._value(self._unpack("<I"), key)
        self._parse_tensors(tensor_count)

    def _parse_tensors(self, count: int) -> None:
        """The table: name, dimensions (columns first), type, offset; checked against the file and one another."""
        alignment = self.metadata.get("general.alignment", 32)
        # A power of two and a multiple of 8, as the format asks: every element then lies at a multiple of its size.
        if type(alignment) is not int or not 8 <= alignment <= _ALIGNMENT_LIMIT or alignment & (alignment - 1):
            self._fail(f"general.alignment = {shown(alignment)} must be a power of two from 8 to {_ALIGNMENT_LIMIT}")
        entries = [self._tensor_entry() for _ in range(count)]
        start = -(-self._position // alignment) * alignment
        end = 0
        for offset, spec in sorted(entries, key=lambda entry: entry[0]):
            if offset % alignment:
                self._fail(f"the tensor {shown(spec.name)} is not aligned to {alignment} bytes")
            if offset < end:
                self._fail(f"the tensor {shown(spec.name)} overlaps another one")
            end = offset + spec.nbytes
        if entries and start + end > len(self.file.map):
            self._fail(f"truncated: the tensors end at byte {start + end} of a file of {len(self.file.map)}")
        for offset, spec in entries:
            if spec.name in self.tensors:
                self._fail(f"the tensor {shown(spec.name)} occurs twice")
            self.tensors[spec.name] = Placed(spec, start + offset)

    def _tensor_entry(self) -> tuple[int, TensorSpec]:
        name = self._string(_NAME_LIMIT, "a tensor name")
        dimensions = self._unpack("<I")
        if not 1 <= dimensions <= _MAX_DIMENSIONS:
            self._fail(f"the tensor {shown(name)} has {dimensions} dimensions; 1 to {_MAX_DIMENSIONS} are possible")
        shape = tuple(self._unpack("<Q") for _ in range(dimensions))[::-1]
        kind, offset = self._unpack("<I"), self._unpack("<Q")
        dtype = _TENSOR_TYPES.get(kind)
        if dtype is None:
            label = _OTHER_TENSOR_TYPES.get(kind, f"the unknown type {kind}")
            supported = ", ".join(["F32", "F16", "BF16", *(name.upper() for name in BLOCKS)])
            self._fail(f"the tensor {shown(name)} is {label}; supported are {supported}")
        elements = 1
        for size in shape:
            elements *= size
        if not elements:
            self._fail(f"the tensor {shown(name)} has a dimension of 0")
        if dtype in PLAIN_TYPES:
            nbytes = elements * PLAIN_TYPES[dtype].itemsize
        else:
            columns, block_bytes = BLOCKS[dtype]
            if shape[-1] % columns:
                self._fail(f"the tensor {shown(name)} has {shape[-1]} columns, not a multiple of the {columns} of a block")
            nbytes = elements // columns * block_bytes
        return offset, TensorSpec(name, shape, dtype, nbytes)

    def _value(self, kind: int, key: str) -> Any:
        """A metadata value of a type number."""
        if kind == _STRING:
            return self._string(len(self.file.map), key)
        if kind == _ARRAY:
            return self._array(key)
        if kind not in _NUMBERS:
            self._fail(f"the metadata key {shown(key)} has the unknown type {kind}")
        dtype = _NUMBERS[kind]
        value = np.frombuffer(self._bytes(dtype.itemsize), dtype)[0]
        if kind == _BOOL:
            if value > 1:
                self._fail(f"the metadata key {shown(key)} is a truth value of {value}")
            return bool(value)
        # The shortest decimal that gives this float32: 1e-05, as the model's author wrote, and not 9.999999747378752e-06.
        return float(str(value)) if kind == _FLOAT32 else value.item()

    def _array(self, key: str) -> list[str] | np.ndarray:
        """Texts as a list, numbers as a view of the file. Arrays of arrays occur in no model and are refused."""
        kind = self._unpack("<I")
        if kind == _STRING:
            return [self._string(len(self.file.map), key) for _ in range(self._count(smallest=8))]
        if kind not in _NUMBERS:
            self._fail(f"the metadata key {shown(key)} is an array of the unsupported type {kind}")
        dtype = _NUMBERS[kind]
        count = self._count(smallest=dtype.itemsize)
        values = self.file.array(self._position, dtype, (count,))
        self._position += values.nbytes
        return values

    def _count(self, smallest: int) -> int:
        """A number of things that follow, each of at least `smallest` bytes."""
        count: int = self._unpack("<Q")
        left = len(self.file.map) - self._position
        if count * smallest > left:
            self._fail(f"truncated or malformed: {count} entries cannot lie in the {left} bytes that are left")
        return count

    def _string(self, limit: int, what: str) -> str:
        length = self._unpack("<Q")
        if length > limit:
            self._fail(f"{shown(what)}: a text of {length} bytes is longer than {limit}")
        try:
            return self._bytes(length).decode("utf-8")
        except UnicodeDecodeError:
            self._fail(f"{shown(what)}: a text is not valid UTF-8")

    def _unpack(self, layout: str) -> Any:
        return struct.unpack(layout, self._bytes(struct.calcsize(layout)))[0]

    def _bytes(self, length: int) -> bytes:
        position = self._position
        if length > len(self.file.map) - position:
            self._fail("truncated")
        self._position += length
        return self.file.map[position : position + length]

    def _fail(self, reason: str) -> NoReturn:
        raise CheckpointError(f"{self.file.path}: at byte {self._position}: {reason}")
