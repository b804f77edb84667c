"""Chat templates: Jinja from the model, rendered in a sandbox with what templates on the hub expect.

A template is a program, so besides what it may touch, its steps and the sizes of its values are limited.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from datetime import datetime
from functools import lru_cache, wraps
from typing import TYPE_CHECKING, Any, NoReturn

from .errors import CheckpointError, FlashFormerError, InputError

if TYPE_CHECKING:
    from jinja2 import Template

_SIZE_LIMIT = 16 << 20  # characters or items of one value, and of the text made
_STEP_LIMIT = 100_000  # passes through loops, calls of macros
_COUNT_LIMIT = 10_000  # an integer passed to a function, such as a width
_WORK_LIMIT = 1 << 30  # product of the sizes of what an operation combines, such as joining or replacing

_steps: ContextVar[Iterator[int]] = ContextVar("steps")  # what a rendering has left


def render(template: str, variables: Mapping[str, Any]) -> str:
    """The text that a chat template makes of `variables` (messages, add_generation_prompt, special tokens).

    Raises InputError where the template itself refuses the messages, CheckpointError if it fails or exceeds a limit.
    """
    pieces, size = [], 0
    _steps.set(iter(range(_STEP_LIMIT)))
    try:
        # As in transformers, `tools` and `documents` are defined though there are none.
        for piece in _compile(template).generate(tools=None, documents=None, **variables):
            size += len(piece)
            if size > _SIZE_LIMIT:
                raise CheckpointError(f"The chat template makes more than {_SIZE_LIMIT} characters")
            pieces.append(piece)
    except FlashFormerError:
        raise
    except Exception as error:  # a template can fail like any program
        raise CheckpointError(f"The chat template failed: {type(error).__name__}: {str(error)[:200]}") from error
    return "".join(pieces)


@lru_cache(maxsize=4)
def _compile(template: str) -> Template:
    """A template, compiled in the environment that transformers documents for chat templates, within limits."""
    from jinja2 import nodes
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Environment(ImmutableSandboxedEnvironment):
        """A sandbox that counts steps and checks every value that an operation makes."""

        intercepted_binops = frozenset({"+", "*", "**", "%"})

        def _generate(self, source: nodes.Template, *arguments: Any, **options: Any) -> str:
            """Count a step in the body of every loop and macro; check what `~` and `{% set %}` blocks make, as a filter's."""

            def filtered(node: nodes.Expr | None, name: str) -> nodes.Filter:
                return nodes.Filter(node, name, [], [], None, None, lineno=source.lineno)

            for body in source.find_all((nodes.For, nodes.Macro, nodes.CallBlock)):
                assert isinstance(body, nodes.For | nodes.Macro | nodes.CallBlock)
                step = nodes.Call(nodes.EnvironmentAttribute("count_step"), [], [], None, None)
                body.body.insert(0, nodes.ExprStmt(step, lineno=body.lineno))
            for node in list(source.find_all(nodes.Concat)):
                node.nodes = [filtered(nodes.List(node.nodes), "join")]
            for block in source.find_all(nodes.AssignBlock):
                block.filter = filtered(block.filter, "string")
            source.set_environment(self)
            return super()._generate(source, *arguments, **options)

        def count_step(self) -> None:
            if next(_steps.get(), None) is None:
                raise CheckpointError(f"The chat template takes more than {_STEP_LIMIT} steps")

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            sequences = [x for x in (left, right) if isinstance(x, str | bytes | list | tuple)]
            counts = [x for x in (left, right) if isinstance(x, int)]
            if operator == "*" and sequences and counts:
                _limit(len(sequences[0]) * counts[0])
            if operator == "%" and isinstance(left, str):
                _refuse_widths(left, "%")
            if operator == "**" and any(abs(x) > 64 for x in counts):
                raise CheckpointError("The chat template raises a number to a large power")
            return _checked(super().call_binop(context, operator, left, right))

        # NOTE: as in the base class, unusual names keep clear of the keyword arguments of what is called.
        def call(__self, __context: Any, __object: Any, *arguments: Any, **options: Any) -> Any:
            if __object is not __self.globals["range"]:  # has a limit of its own
                _check_operands(getattr(__object, "__self__", None), *arguments, *options.values())
            return _checked(super().call(__context, __object, *arguments, **options))

        def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
            wrapped = super().wrap_str_format(value)
            if wrapped is not None:
                _refuse_widths(value.__self__, ":")
            return wrapped

    # Without the optimizer, which would compute constants at once, unlimited.
    environment = Environment(trim_blocks=True, lstrip_blocks=True, optimized=False, extensions=["jinja2.ext.loopcontrols"])
    environment.filters |= {"tojson": _to_json}
    del environment.filters["format"], environment.globals["lipsum"]
    environment.filters = {name: _limited(function) for name, function in environment.filters.items()}
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = lambda layout: datetime.now().strftime(layout)
    return environment.from_string(template)


def _limited(function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter whose operands and result are checked."""

    @wraps(function)  # with the attributes by which Jinja knows that a filter takes the environment first
    def checked(*arguments: Any, **options: Any) -> Any:
        _check_operands(*arguments, *options.values())
        return _checked(function(*arguments, **options))

    return checked


def _size(value: object) -> int:
    return max(1, len(value)) if isinstance(value, str | list | tuple | dict) else 1


def _limit(size: int) -> None:
    if size > _SIZE_LIMIT:
        raise CheckpointError(f"The chat template makes a value of more than {_SIZE_LIMIT} characters or items")


def _checked(value: Any) -> Any:
    """The value, if it is not too large."""
    _limit(_size(value))
    return value


def _check_operands(*operands: Any) -> None:
    if any(isinstance(x, int) and abs(x) > _COUNT_LIMIT for x in operands):
        raise CheckpointError(f"The chat template passes a number beyond {_COUNT_LIMIT} to a function")
    if math.prod(_size(x) for x in operands) > _WORK_LIMIT:
        raise CheckpointError("The chat template combines values that are too large")


def _refuse_widths(layout: str, sign: str) -> None:
    """Formatting may not name a width: it could be of any size."""
    if any(c.isdigit() or c == "*" for c in layout) if sign == "%" else sign in layout:
        raise CheckpointError("The chat template formats with a width, which is not supported")


def _refuse(message: object) -> NoReturn:
    raise InputError(f"The model's chat template refuses these messages: {str(message)[:500]}")


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, sort_keys: bool = False) -> str:
    """JSON as templates expect it: unlike Jinja's own filter, nothing is escaped for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, sort_keys=sort_keys)
