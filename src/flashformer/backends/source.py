"""What generated sources are written with: names, literals, and structs that C++ and Python lay out alike."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ..ops.attention import CODES
from ..plan import LEAST_SCALE, KvLayout

# One field of a struct that host and kernel share: (name, C++ type, ctypes type, what it is).
Field = tuple[str, str, type, str]


def struct(name: str, fields: Iterable[Field]) -> list[str]:
    """The lines of a C++ struct; a `ctypes.Structure` with the same fields has the same layout."""
    return [f"struct {name} {{", *(f"  {kind} {field};{'  // ' + note if note else ''}" for field, kind, _, note in fields), "};", ""]


def cache_facts(kv: KvLayout) -> list[tuple[str, str, object]]:
    """What any kernel must know of a KV cache of 8 bits, for `constants`; of a native one the same, but for the codes."""
    largest = [("float", "kKvLargest[]", CODES[kv.type][1])] if kv.type in CODES else []
    return [("float", "kKvLeastScale", LEAST_SCALE), ("int", "kKvMixed", kv.mixed), *largest]


def constants(facts: Iterable[tuple[str, str, object]]) -> list[str]:
    """The lines of (type, name, value) as constants of a struct."""
    return [f"  static constexpr {kind} {name} = {literal(value)};" for kind, name, value in facts]


def literal(value: object) -> str:
    """A C++ literal; floats are single. A tuple is what an array holds, whose name ends in []."""
    if isinstance(value, tuple):
        return f"{{{', '.join(map(literal, value))}}}"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        return f"{value!r}f" if "." in repr(value) else f"{value:.9e}f"
    return str(value)


def camel(name: str) -> str:
    """attention_output -> AttentionOutput."""
    return "".join(part.capitalize() for part in name.split("_"))


def ctypes_fields(fields: Sequence[Field]) -> list[tuple[str, type]]:
    """`_fields_` of the `ctypes.Structure` that belongs to `struct`."""
    return [(name, kind) for name, _, kind, _ in fields]
