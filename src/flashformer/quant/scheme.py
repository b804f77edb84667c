"""What a `quantization_config` says: how matrices are stored, and which modules are not quantised."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from ..config import Keys

WEIGHTS_ONLY = "The checkpoint asks for quantised activations; only its weights are quantised here, which is more accurate."

GROUP_LIMIT = 1 << 20  # rows or columns; bounds what a configuration may ask for
EXPRESSION_LIMIT = 100  # in a list of targets: each is tried on every module


@dataclass(frozen=True)
class Scheme:
    """How one kind of matrix is stored."""

    format: str  # the method's name for the layout, such as "gemm" or "pack-quantized"
    bits: int
    scope: Literal["tensor", "channel", "group", "block"]  # what shares a scale; a channel is a row
    group: int | None = None  # columns that share a scale (scope group; None there: each matrix says it itself)
    symmetric: bool = True
    block: tuple[int, int] | None = None  # rows and columns that share a scale (scope block)
    indexed: bool = False  # an index tensor must say which group each column is in
    floating: bool = False  # the codes are small floating-point numbers or a table, not integers

    def columns(self, size: int) -> int:
        """How many of `size` columns share a scale: all of them, except in scope group."""
        return size if self.group is None else self.group

    def describe(self) -> str:
        """Codes and what shares a scale, such as "int4 g128", "fp8 128x128" or "nf4"."""
        codes = f"int{self.bits}"
        if self.floating:
            codes = self.format.removesuffix("-pack-quantized") if self.bits == 4 else f"fp{self.bits}"
        if self.scope in ("tensor", "channel"):
            return f"{codes} per {self.scope}"
        if self.block is not None:
            return f"{codes} {self.block[0]}x{self.block[1]}"
        return codes if self.group is None else f"{codes} g{self.group}"


@dataclass(frozen=True)
class Quantization:
    """The schemes of a model by the modules that they are for, and the modules that keep plain weights.

    Targets and `ignored` are module names, classes ("Linear"), or "re:" and an expression that a name begins with.
    """

    method: str
    schemes: tuple[tuple[tuple[str, ...], Scheme], ...]
    ignored: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()  # what a user should know

    def scheme_of(self, module: str, kind: str = "Linear") -> Scheme | None:
        """The scheme of a module, a specific target before that of a class; None if the module is not quantised."""
        if _means(self.ignored, module) or kind in self.ignored:
            return None
        found = [scheme for targets, scheme in self.schemes if _means(targets, module)]
        found += [scheme for targets, scheme in self.schemes if kind in targets]
        return found[0] if found else None


def _means(targets: tuple[str, ...], module: str) -> bool:
    """Whether one of the targets is this module's name or an expression that it begins with."""
    return module in targets or any(expression.match(module[:256]) for expression in _expressions(targets))


@lru_cache(maxsize=64)
def _expressions(targets: tuple[str, ...]) -> tuple[re.Pattern[str], ...]:
    """The expressions among targets, compiled."""
    return tuple(re.compile(target[3:]) for target in targets if target.startswith("re:"))


# NOTE: expressions come from the file. Only what module names need is allowed: no nested repetition, few `.*`, so that matching is fast.
_PIECE = r"[\w\-]|\\[.d]\+?|\[[0-9a-z\-]{1,20}\]\+?|\.\*|\."
_SAFE = re.compile(rf"\^?(?:{_PIECE}|\((?:\?:)?[\w\-.|]+\))*\$?")


def names(keys: Keys, key: str) -> tuple[str, ...]:
    """A list of targets; ConfigError if it is something else or holds an expression that is not allowed."""
    value = keys.get(key, ())
    if not isinstance(value, list | tuple) or len(value) > 10_000 or any(not isinstance(x, str) or len(x) > 256 for x in value):
        keys.fail(key, "must be a list of module names")
    expressions = [target for target in value if target.startswith("re:")]
    if len(expressions) > EXPRESSION_LIMIT:
        keys.fail(key, f"holds {len(expressions)} expressions; at most {EXPRESSION_LIMIT} are supported")
    for target in expressions:
        if not _is_safe(target[3:]):
            keys.fail(key, f"the expression {ascii(target)[:100]} is not supported; supported are names, classes, and simple ones")
    return tuple(value)


def _is_safe(expression: str) -> bool:
    """Whether an expression is one that `re` compiles and matches in bounded time."""
    if not _SAFE.fullmatch(expression) or expression.count("*") + expression.count("+") > 3:
        return False
    try:
        re.compile(expression)
    except re.error:  # such as a reversed range
        return False
    return True


def group_size(keys: Keys, key: str = "group_size") -> tuple[Literal["group", "channel"], int | None]:
    """Scope and group: -1 means that a whole row shares a scale."""
    group: int = keys.integer(key, -1, GROUP_LIMIT)
    if group == 0:
        keys.fail(key, "must be -1 or positive")
    return ("channel", None) if group == -1 else ("group", group)


def block_size(keys: Keys, key: str) -> tuple[int, int] | None:
    """Rows and columns of a block, or None where the key is absent or null."""
    value = keys.get(key, None)
    if value is None:
        return None
    if not isinstance(value, list | tuple) or len(value) != 2 or any(type(x) is not int or not 0 < x <= GROUP_LIMIT for x in value):
        keys.fail(key, "must be two sizes, rows and columns")
    return value[0], value[1]


def choice(keys: Keys, key: str, allowed: tuple[str, ...], default: str | None = None) -> str:
    """A text that must be one of a few, in small letters."""
    value = keys.get(key) if default is None else keys.get(key, default)
    if not isinstance(value, str) or value.lower() not in allowed:
        keys.fail(key, f"is not supported; supported are {', '.join(allowed)}")
    return value.lower()
