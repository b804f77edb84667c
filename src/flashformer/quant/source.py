"""The stored tensors of one quantised matrix, fetched with type and shape checked, and the unpacking that formats share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NoReturn

import numpy as np

from ..checkpoint import shown
from ..errors import CheckpointError

FLOATS = ("float16", "bfloat16", "float32")
FP8 = "float8_e4m3fn"
E8M0 = "float8_e8m0fnu"

# E2M1: a sign, two bits of exponent, one of mantissa.
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)


class Source:
    """The tensors of a module by what follows its name (`weight_packed`, `weight_scale`); every refusal names one of them."""

    def __init__(self, module: str, parts: Mapping[str, np.ndarray]) -> None:
        self.module, self._parts = module, parts

    def fail(self, part: str, reason: str) -> NoReturn:
        """Raise a CheckpointError about one tensor."""
        raise CheckpointError(f"{shown(f'{self.module}.{part}')}: {reason}")

    def has(self, part: str) -> bool:
        """Whether the module has this tensor."""
        return part in self._parts

    def only(self, *parts: str) -> None:
        """Refuse tensors that the format does not know; a bias belongs to every linear layer."""
        for part in self._parts:
            if part not in parts and part != "bias":
                self.fail(part, f"does not belong to this format; expected are {', '.join(parts)}")

    def vector(self, part: str, dtype: str) -> np.ndarray:
        """A tensor of one dimension and any length."""
        return self.get(part, dtype, (self._parts[part].size,) if part in self._parts else ())

    def get(self, part: str, types: str | Sequence[str], *shapes: tuple[int, ...]) -> np.ndarray:
        """A tensor of one of these types and shapes; CheckpointError if it is missing or something else."""
        allowed = (types,) if isinstance(types, str) else types
        if part not in self._parts:
            self.fail(part, "this tensor is missing")
        tensor = self._parts[part]
        if tensor.dtype.name not in allowed:
            self.fail(part, f"is {tensor.dtype.name}; expected is {' or '.join(allowed)}")
        if tensor.shape not in shapes:
            self.fail(part, f"is {list(tensor.shape)}; expected is {' or '.join(str(list(shape)) for shape in shapes)}")
        return tensor

    def scales(
        self, part: str, types: str | Sequence[str], *shapes: tuple[int, ...], rows: slice | None = None, zero: bool = False
    ) -> np.ndarray:
        """Scales (of some rows) as float32, finite and (unless `zero` allows that) not zero; CheckpointError otherwise."""
        tensor = self.get(part, types, *shapes)
        return self.sound(part, (tensor if rows is None else tensor[rows]).astype(np.float32), zero)

    def sound(self, part: str, scales: np.ndarray, zero: bool = False) -> np.ndarray:
        """The scales, if they are finite and (unless `zero` allows that) not zero; CheckpointError otherwise."""
        for wrong, what in ((np.isnan(scales), "NaN"), (np.isinf(scales), "infinite"), ((scales == 0) & (not zero), "zero")):
            if wrong.any():
                index = [int(i) for i in np.argwhere(wrong)[0]]
                self.fail(part, f"the scale at {index} is {what}; the file is damaged or was not quantised to the end")
        return scales

    def multiple(self, part: str, what: str, size: int, of: int) -> None:
        """Refuse a size that is not a multiple of another."""
        if size % of:
            self.fail(part, f"{what} = {size} is not a multiple of {of}, which this format needs")


def e8m0(source: Source, part: str, exponents: np.ndarray) -> np.ndarray:
    """2^(e - 127) as float32, of uint8; CheckpointError for 255, which is NaN."""
    if (exponents == 255).any():
        source.fail(part, "a scale is NaN; the file is damaged")
    return np.ldexp(np.float32(1), exponents.astype(np.int32) - 127)


def unpack_bytes(packed: np.ndarray, high_first: bool = False) -> np.ndarray:
    """Two nibbles a byte: uint8 [R, C] -> uint8 [R, 2 C], the low nibble first unless told otherwise."""
    codes = np.empty((*packed.shape, 2), np.uint8)
    np.bitwise_and(packed, 15, out=codes[..., int(high_first)])
    np.right_shift(packed, 4, out=codes[..., int(not high_first)])
    return codes.reshape(len(packed), 2 * packed.shape[1])


def unpack_words(words: np.ndarray, bits: int) -> np.ndarray:
    """Codes of 4 or 8 bits from 32-bit words, the lowest bits first: int32 [R, C] -> uint8 [R, C * 32 / bits]."""
    octets = np.ascontiguousarray(words, "<i4").view(np.uint8)
    return octets if bits == 8 else unpack_bytes(octets)


def unpack_some_words(words: np.ndarray, bits: int, columns: slice, count: int) -> np.ndarray:
    """`unpack_words`, of some of `count` codes of each row only: int32 [R, C] -> uint8 [R, codes]."""
    start, stop, step = columns.indices(count)
    if step != 1:
        return unpack_words(words, bits)[:, :count][:, columns]
    per_word = 32 // bits
    first = start // per_word
    return unpack_words(words[:, first : -(-stop // per_word)], bits)[:, start - first * per_word : stop - first * per_word]


def groups_of_columns(source: Source, part: str, columns: int, group: int) -> np.ndarray | None:
    """The group of each column from an index tensor, int32 [K]; None if columns of a group lie side by side as usual."""
    index = source.get(part, "int32", (columns,))
    groups = -(-columns // group)
    if index.min() < 0 or index.max() >= groups:
        source.fail(part, f"names groups from {index.min()} to {index.max()}; there are {groups}")
    return None if np.array_equal(index, np.arange(columns) // group) else index
