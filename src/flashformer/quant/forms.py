"""What every quantised format becomes once it is unpacked: integer codes, codes into a table, or small values, with their scales.

N is a matrix's rows (outputs), K its columns (inputs). Values are float32, computed in the order that the formulas say. Arrays may
be views of the file. Forms of some rows alone come from `take`, so that a large matrix need never be expanded at once.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np


@dataclass(frozen=True)
class Affine:
    """Integers with a scale and an offset per group: (q - zero) * scale, or q * scale + minimum. One of the two offsets is given."""

    q: np.ndarray  # uint8 [N, K], from 0 to 2^bits - 1
    bits: int
    group: int  # columns that share a scale; the last group of a row may be shorter
    scale: np.ndarray  # float32 [N, groups]
    zero: np.ndarray | None = None  # int16 [N, groups]
    minimum: np.ndarray | None = None  # float32 [N, groups]
    group_of: np.ndarray | None = None  # int32 [K]: the group of each column; None: column // group

    @property
    def permuted(self) -> bool:
        """Whether the columns of a group do not lie side by side (GPTQ's act-order)."""
        return self.group_of is not None

    def take(self, rows: slice) -> Affine:
        """The same form of some rows; arrays are views."""
        zero = None if self.zero is None else self.zero[rows]
        minimum = None if self.minimum is None else self.minimum[rows]
        return replace(self, q=self.q[rows], scale=self.scale[rows], zero=zero, minimum=minimum)

    def dequantize(self, rows: slice = slice(None)) -> np.ndarray:
        """The values of some rows (all of them by default), float32 [rows, K]."""
        part = self.take(rows)
        values = part.q.astype(np.float32)
        with np.errstate(over="ignore", invalid="ignore"):  # an infinite scale of a damaged file gives infinite values
            if part.zero is not None:
                self._apply(np.subtract, values, part.zero)
            self._apply(np.multiply, values, part.scale)
            if part.minimum is not None:
                self._apply(np.add, values, part.minimum)
        return values

    def _apply(self, operation: np.ufunc, values: np.ndarray, grouped: np.ndarray) -> None:
        """operation(values [rows, K], each column's of grouped [rows, groups]), in place."""
        if self.group_of is not None:
            grouped = grouped[:, self.group_of]
        elif values.shape[1] % self.group == 0:
            values = values.reshape(len(values), grouped.shape[1], self.group)  # a view, so that nothing is repeated in memory
            grouped = grouped[:, :, None]
        else:
            grouped = np.repeat(grouped, self.group, axis=1)[:, : values.shape[1]]
        operation(values, grouped, out=values)


@dataclass(frozen=True)
class Table:
    """Codes into a table of 16 values with a scale per group: table[code] * (scale / divisor)."""

    codes: np.ndarray  # uint8 [N, K], from 0 to 15
    table: np.ndarray  # float32 [16]
    group: int  # columns that share a scale; divides K
    scale: np.ndarray  # float32 [N, groups]
    divisor: float = 1.0  # of the whole matrix; a float32 value

    def take(self, rows: slice) -> Table:
        """The same form of some rows; arrays are views."""
        return replace(self, codes=self.codes[rows], scale=self.scale[rows])

    def dequantize(self, rows: slice = slice(None)) -> np.ndarray:
        """The values of some rows (all of them by default), float32 [rows, K]."""
        part = self.take(rows)
        values = self.table[part.codes]
        grouped = values.reshape(*part.scale.shape, self.group)  # a view, so that nothing is repeated in memory
        grouped *= (part.scale / np.float32(self.divisor))[:, :, None]
        return values


@dataclass(frozen=True)
class Scaled:
    """Values of 8 bits with a scale per rectangle of `block` rows and columns: value * scale.

    The whole matrix is one rectangle where a tensor has one scale, a row where each output channel has its own.
    """

    values: np.ndarray  # float8_e4m3fn or int8 [N, K]
    block: tuple[int, int]  # rows, columns; those at the edges may be smaller
    scale: np.ndarray  # float32 [ceil(N / rows), ceil(K / columns)]

    def take(self, rows: slice) -> Scaled:
        """The same form of some rows, with a scale for each row; values are a view."""
        index = np.arange(len(self.values))[rows] // self.block[0]
        return Scaled(self.values[rows], (1, self.block[1]), self.scale[index])

    def dequantize(self, rows: slice = slice(None)) -> np.ndarray:
        """The values of some rows (all of them by default), float32 [rows, K]."""
        part = self.take(rows)
        values = part.values.astype(np.float32)
        values *= np.repeat(part.scale, self.block[1], axis=1)[:, : values.shape[1]]
        return values


Form = Affine | Table | Scaled
