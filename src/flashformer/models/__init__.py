"""Model families: one file each, found by what it declares. A new family needs no edit here."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from functools import cache

from ..config import ModelConfig
from ..errors import ConfigError
from ..graph import Graph


@cache
def families() -> dict[str, Callable[[ModelConfig], Graph]]:
    """What builds the graph of each architecture (a Hugging Face class name), from every file of this folder that has ARCHITECTURES."""
    found: dict[str, Callable[[ModelConfig], Graph]] = {}
    for info in pkgutil.iter_modules(__path__):
        module = importlib.import_module(f"{__name__}.{info.name}")
        found.update(dict.fromkeys(getattr(module, "ARCHITECTURES", ()), getattr(module, "build", None)))
    return found


def build_graph(config: ModelConfig) -> Graph:
    """The operators of one token of a model. Raises ConfigError for an architecture that no family here implements."""
    known = families()
    if config.architecture not in known:
        raise ConfigError(f"architecture {config.architecture!r} is not supported; supported are {', '.join(sorted(known))}")
    return known[config.architecture](config)
