"""Quantised weights: the formats that checkpoints use, one file each, read strictly into a few internal forms (`forms.py`).

A file that declares METHOD, the `quant_method` of a configuration, is found by that. It has `parse(keys) -> Quantization`,
`decode(source, shape, scheme, rows) -> Form`, and PARTS, what follows a module's name in the names of the tensors that it decodes.
GGUF, which has no such configuration, is in `gguf_blocks.py`.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from functools import cache
from typing import Any

import numpy as np

from ..config import Keys
from .forms import Form
from .scheme import Quantization, Scheme
from .source import Source


@cache
def methods() -> dict[str, Any]:
    """The module of each method, by `quant_method`."""
    modules = [importlib.import_module(f"{__name__}.{info.name}") for info in pkgutil.iter_modules(__path__)]
    return {module.METHOD: module for module in modules if hasattr(module, "METHOD")}


def read_quantization(mapping: object, where: str = "quantization_config") -> Quantization:
    """What a `quantization_config` says. Raises ConfigError for a method, format or key that is not supported or not known."""
    keys = Keys(mapping if isinstance(mapping, Mapping) else {}, where)
    method = keys.get("quant_method")
    if not isinstance(method, str) or method not in methods():
        keys.fail("quant_method", f"is not supported; supported are {', '.join(sorted(methods()))}")
    found: Quantization = methods()[method].parse(keys)
    return found


def decode(
    method: str, module: str, parts: Mapping[str, np.ndarray], shape: tuple[int, int], scheme: Scheme, rows: slice = slice(None)
) -> Form:
    """A quantised matrix of `shape` [N, K], or some of its rows, from the stored tensors of a module.

    `parts` holds the tensors by what follows the module's name. Raises CheckpointError that names the tensor for anything
    missing, misshapen, of another type, or impossible, such as a scale of zero.
    """
    form: Form = methods()[method].decode(Source(module, parts), shape, scheme, rows)
    return form
