"""What a kernel holds the weights of a linear stage in: 16-bit values, or codes of 8 or 4 bits with scales, as plain data.

A checkpoint's quantised matrix has a `Form` (quant/forms.py); `format_of` names the cheapest `Format` that holds it exactly, `join` the
cheapest that holds what either of two holds, and `encode` turns a form into the codes and scales of a format.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import ml_dtypes
import numpy as np

from .errors import CheckpointError
from .quant.forms import Affine, Form, Scaled, Table

if TYPE_CHECKING:
    from .checkpoint import Checkpoint

Offset = Literal["none", "zero", "minimum"]
ScaleType = Literal["exponent", "e4m3", "bfloat16", "float16", "float32"]

# Types of scales. An exponent is a byte, e8m0: 2^(byte - 127).
SCALES: dict[ScaleType, np.dtype[Any]] = {
    "exponent": np.dtype(ml_dtypes.float8_e8m0fnu),
    "e4m3": np.dtype(ml_dtypes.float8_e4m3fn),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
    "float32": np.dtype(np.float32),
}
# Those that are tried, in order, with offsets and without. NOTE: float16 holds most bfloat16 scales too, but not the smallest ones.
_WITH_OFFSETS: tuple[ScaleType, ...] = ("bfloat16", "float16", "float32")
_ALONE: tuple[ScaleType, ...] = ("exponent", *_WITH_OFFSETS)
_DIVISORS = (2.0**-126, 2.0**126)  # least and most that a row is divided by: kernels take the fast division
NAN = 0x7F  # the magnitude of e4m3 that is no number
SAMPLE = 32  # rows at both ends of a matrix by which its format is chosen; `encode` refuses what does not hold for all others


@dataclass(frozen=True)
class Format:
    """Codes and what they stand for. Of `float` they are the values themselves; otherwise a value is, with the scale of its group,

    code * scale (`offset` none), (code - zero) * scale, or code * scale + minimum, where a code is an integer (`int`), an e4m3 number
    (`fp8`), or the value that `table` has for it. Scales of e4m3 are divided by a float32 that all groups of a row share.
    """

    kind: Literal["float", "int", "fp8", "table"] = "float"
    bits: Literal[16, 8, 4] = 16
    group: int = 0  # columns that share a scale, the last of a row may be fewer; 0: the whole row
    offset: Offset = "none"
    scale: ScaleType = "float32"
    table: tuple[float, ...] = ()  # 16 values

    @property
    def name(self) -> str:
        """For people: "int4 g32 minimum float16"."""
        if self.kind == "float":
            return f"{self.bits}-bit"
        codes = f"int{self.bits}" if self.kind == "int" else self.kind
        parts = (codes, f"g{self.group}" if self.group else "row", self.offset.removesuffix("none"), self.scale)
        return " ".join(filter(None, parts))

    @property
    def group_bytes(self) -> int:
        """Bytes of one row's scale, and offset, of one group."""
        return 0 if self.kind == "float" else SCALES[self.scale].itemsize * self.scale_values

    @property
    def divisor_bytes(self) -> int:
        """Bytes of what a row's scales are divided by."""
        return 4 if self.scale == "e4m3" else 0

    @property
    def scale_values(self) -> int:
        """Values beside the codes of one group: a scale, or a scale and an offset."""
        return 1 if self.offset == "none" else 2

    def groups(self, columns: int) -> int:
        """Groups of a row of so many columns."""
        if self.kind == "float":
            return 0
        return -(-columns // self.group) if self.group else 1

    def row_bytes(self, columns: int) -> int:
        """Bytes of a row of a matrix with so many columns, scales included, without padding: what a token must read of it."""
        return -(-columns * self.bits // 8) + self.groups(columns) * self.group_bytes + self.divisor_bytes


PLAIN = Format()
_FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_E2M1 = (*_FP4, *(-x for x in _FP4))
_NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip

# What people mean by these names, for benchmarks: scales as the usual checkpoints have them.
NAMED: dict[str, Format] = {
    "bf16": PLAIN,
    "int8": Format("int", 8, scale="bfloat16"),
    "fp8": Format("fp8", 8, scale="bfloat16"),
    "int4": Format("int", 4, 128, scale="bfloat16"),
    "mxfp4": Format("table", 4, 32, scale="exponent", table=_E2M1),
    "nvfp4": Format("table", 4, 16, scale="e4m3", table=_E2M1),
    "nf4": Format("table", 4, 64, table=_NF4),
}


def format_of(form: Form) -> Format | None:
    """The cheapest format that holds this form exactly; None where there is none (columns in any order, more than 8 bits)."""
    if isinstance(form, Table):
        format = Format("table", 4, _group(form.group, form.codes.shape[1]), table=tuple(map(float, form.table)))
        if form.divisor != 1 and _DIVISORS[0] <= abs(form.divisor) <= _DIVISORS[1] and _holds("e4m3", form.scale):
            return replace(format, scale="e4m3")
        return replace(format, scale=_scale_type(_table_scale(form)))
    if isinstance(form, Scaled):
        kind: Literal["int", "fp8"] = "int" if form.values.dtype == np.int8 else "fp8"
        return Format(kind, 8, _group(form.block[1], form.values.shape[1]), scale=_scale_type(form.scale))
    if form.permuted or form.bits > 8 or (form.bits == 8 and form.minimum is not None):
        return None
    format = Format("int", 4 if form.bits <= 4 else 8, _group(form.group, form.q.shape[1]))
    if form.minimum is not None:
        return replace(format, offset="minimum", scale=_scale_type(form.scale, form.minimum))
    assert form.zero is not None
    if (form.zero == 1 << (form.bits - 1)).all():
        return replace(format, scale=_scale_type(form.scale))
    return replace(format, offset="zero", scale=_scale_type(form.scale, form.zero))


def join(formats: Iterable[Format | None]) -> Format | None:
    """The cheapest format that holds exactly what any of these holds; None where there is none."""
    joined, *others = formats
    for other in others:
        if joined is None or other is None:
            return None
        joined = _join(joined, other)
    return joined


def _join(a: Format, b: Format) -> Format | None:
    if a == b:
        return a
    offsets = {a.offset, b.offset} - {"none"}
    if a.kind != b.kind or a.kind == "float" or a.table != b.table or len(offsets) > 1:
        return None
    return replace(
        a,
        bits=max(a.bits, b.bits),
        group=math.gcd(a.group, b.group),
        offset=offsets.pop() if offsets else "none",
        scale=_join_scales(a.scale, b.scale),
    )


def _join_scales(a: ScaleType, b: ScaleType) -> ScaleType:
    """The smallest type that holds what either does."""
    if a == b:
        return a
    return "bfloat16" if {a, b} == {"exponent", "bfloat16"} else "float32"


def choose(checkpoint: Checkpoint, names: Iterable[str]) -> dict[str, Format]:
    """The format of every quantised matrix among `names` that some format holds exactly, judged by rows at both of its ends."""
    found = {}
    for name in names:
        if len(checkpoint.spec(name).shape) != 2 or checkpoint.form(name, slice(0, 0)) is None:
            continue
        rows = checkpoint.spec(name).shape[0]
        ends = (slice(0, min(SAMPLE, rows)), slice(max(rows - SAMPLE, 0), rows))
        format = join(format_of(form) for form in (checkpoint.form(name, end) for end in ends) if form is not None)
        if format is not None:
            found[name] = format
    return found


@dataclass(frozen=True)
class Encoded:
    """Rows of a matrix in a format."""

    codes: np.ndarray  # [N, K]: uint8 from 0 to 15 (4 bits; of integers without an offset: plus 8), int8, or the bytes of e4m3
    scales: np.ndarray  # [N, groups, scale_values] in the format's type of scales
    divisors: np.ndarray | None = None  # float32 [N]: what a row's scales are divided by; None: nothing

    @property
    def finite(self) -> bool:
        """Whether all values are finite. A NaN of e4m3 has become one of its scale."""
        return bool(np.isfinite(self.scales.astype(np.float32)).all())


def encode(form: Form, format: Format, name: str) -> Encoded:
    """A form in a format that `format_of` or `join` has named for it. Raises CheckpointError, about the matrix `name`, where
    it does not hold these rows exactly."""
    if isinstance(form, Table):
        codes, columns, group, offset = form.codes, form.codes.shape[1], form.group, None
        scale = form.scale if format.divisor_bytes else _table_scale(form)
        fits = format.kind == "table" and format.table == tuple(map(float, form.table))
    elif isinstance(form, Scaled):
        columns, group = form.values.shape[1], form.block[1]
        scale = form.scale[np.arange(len(form.values)) // form.block[0]]
        codes, offset = form.values, np.zeros_like(scale)
        fits = format.kind == ("int" if codes.dtype == np.int8 else "fp8") and format.bits == 8
        if format.kind == "fp8" and fits:
            scale = _poisoned(codes.view(np.uint8), scale, group)
    else:
        columns, group, scale = form.q.shape[1], form.group, form.scale
        codes, offset, fits = _integers(form, format)
    groups = format.groups(columns)
    source = np.arange(groups) * format.group // group  # the form's group that each group of the format is a part of
    fits = fits and (groups == 1 or (format.group > 0 and group % format.group == 0)) and int(source[-1]) < scale.shape[1]
    fits = fits and (groups > 1 or scale.shape[1] == 1)
    parts = [scale] if format.offset == "none" else [scale, np.zeros_like(scale) if offset is None else offset]
    values = np.stack(parts, axis=-1)[:, source] if fits else np.zeros(0, np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        scales = values.astype(SCALES[format.scale])
    if not fits or not np.array_equal(scales.astype(np.float32), values.astype(np.float32), equal_nan=True):
        raise CheckpointError(
            f"{name}: {format.name}, which holds its first and last rows exactly, does not hold all of them; expand it (weights='bf16')"
        )
    if format.kind == "int":
        codes = codes.astype(np.uint8 if format.bits == 4 else np.int8)
    divisor = form.divisor if isinstance(form, Table) else 1.0
    return Encoded(codes.view(np.uint8), scales, np.full(len(codes), divisor, np.float32) if format.divisor_bytes else None)


def _integers(form: Affine, format: Format) -> tuple[np.ndarray, np.ndarray | None, bool]:
    """Codes [N, K], offsets [N, groups of the form] and whether that holds an integer form."""
    if format.kind != "int" or form.permuted or form.bits > format.bits:
        return form.q, None, False
    half = 1 << (form.bits - 1)
    if form.minimum is not None:
        return form.q, form.minimum, format.offset == "minimum" and form.bits < 8
    assert form.zero is not None
    symmetric = bool((form.zero == half).all())
    if format.offset == "none":
        base = 8 - half if format.bits == 4 else -half
        return form.q.astype(np.int16) + base, None, symmetric
    if format.offset == "minimum" and format.bits == 4:
        return form.q, -(form.zero * form.scale), True
    if format.offset == "minimum":
        return form.q.astype(np.int16) - half, np.zeros_like(form.scale), symmetric
    base = half if form.bits == 8 else 0
    return form.q.astype(np.int16) - base, form.zero - np.int16(base), True


def _poisoned(codes: np.ndarray, scale: np.ndarray, group: int) -> np.ndarray:
    """Scales [N, groups] of e4m3 codes [N, K], NaN where any code of the group is."""
    wrong = (codes & NAN) == NAN
    if not wrong.any():
        return scale
    rows, columns = np.nonzero(wrong)
    scale = scale.copy()
    scale[rows, columns // group] = np.nan
    return scale


def _table_scale(form: Table) -> np.ndarray:
    """The scales with the divisor applied, as the form itself does."""
    return np.asarray(form.scale / np.float32(form.divisor))


def _group(group: int, columns: int) -> int:
    """0 where a group is the whole row."""
    return 0 if group >= columns else group


def _scale_type(scale: np.ndarray, offset: np.ndarray | None = None) -> ScaleType:
    """The first type that holds all scales, and offsets, exactly."""
    if offset is None:
        return next(type for type in _ALONE if _holds(type, scale))
    return next(type for type in _WITH_OFFSETS if _holds(type, scale) and _holds(type, offset))


def _holds(type: ScaleType, values: np.ndarray) -> bool:
    """Whether a type has all of these values (float32, or small integers); float32 has."""
    wanted = values.astype(np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        return np.array_equal(wanted.astype(SCALES[type]).astype(np.float32), wanted, equal_nan=True)
