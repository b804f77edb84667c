"""The build cache: content addressed, shared by processes, never half made."""

from __future__ import annotations

import multiprocessing
import time
from pathlib import Path

import pytest

from flashformer.build import Cache, Produce, cached_build
from flashformer.errors import BuildError


def write(text: str, log: Path | None = None) -> Produce:
    """A producer of one file that notes each time it runs."""

    def produce(folder: Path) -> None:
        (folder / "out").write_text(text)
        if log is not None:
            with log.open("a") as file:
                file.write("made\n")

    return produce


def test_what_is_there_is_not_made_again(tmp_path: Path) -> None:
    cache, log = Cache(tmp_path / "cache"), tmp_path / "log"
    first = cache.build("kernel", {"source": "x"}, write("1", log))
    assert cache.build("kernel", {"source": "x"}, write("2", log)) == first
    assert (first / "out").read_text() == "1" and log.read_text() == "made\n"


def test_any_part_changes_the_key(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    keys: list[dict[str, str | bytes]] = [{"a": "x"}, {"a": "y"}, {"b": "x"}, {"a": "x", "b": ""}, {"a": b"x"}, {"ab": ""}, {"a": "xb"}]
    assert len({cache.build("kernel", parts, write("1")) for parts in keys}) == len(keys)


def test_a_failing_producer_leaves_nothing(tmp_path: Path) -> None:
    cache = Cache(tmp_path)

    def fail(folder: Path) -> None:
        (folder / "half").write_text("done")
        raise BuildError("no compiler")

    with pytest.raises(BuildError, match="no compiler"):
        cache.build("kernel", {"a": "x"}, fail)
    assert cache.entries() == [] and list((tmp_path / "kernel").iterdir()) == []


def test_a_lost_file_is_made_again(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    path = cache.build("kernel", {"a": "x"}, write("whole"))
    (path / "out").write_text("")  # as after a power failure
    assert (cache.build("kernel", {"a": "x"}, write("whole")) / "out").read_text() == "whole"


@pytest.mark.parametrize("where", ["file", "file/below"])
def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    (tmp_path / "file").write_text("in the way")  # not a mode: root may write anywhere
    monkeypatch.setenv("FF_CACHE_DIR", str(tmp_path / where))
    with pytest.raises(BuildError, match=r"cache folder .*file.* FF_CACHE_DIR"):
        cached_build("kernel", {"a": "x"}, write("1"))


def test_clear_leaves_what_is_not_ours(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    cache.build("kernel", {"a": "x"}, write("12345"))
    (tmp_path / "kernel" / "notes.txt").write_text("mine")
    assert [entry.kind for entry in cache.entries()] == ["kernel"]
    assert cache.clear() > 5
    assert cache.entries() == [] and (tmp_path / "kernel" / "notes.txt").exists()


def _slow_build(root: Path, log: Path) -> None:
    def produce(folder: Path) -> None:
        time.sleep(0.3)
        with log.open("a") as file:
            file.write("made\n")
        (folder / "out").write_text("1")

    path = Cache(root).build("kernel", {"a": "x"}, produce)
    assert (path / "out").read_text() == "1"


def test_two_processes_build_once(tmp_path: Path) -> None:
    log = tmp_path / "log"
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=_slow_build, args=(tmp_path / "cache", log)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert log.read_text() == "made\n"


def _die_building(root: Path) -> None:
    import os

    Cache(root).build("kernel", {"a": "x"}, lambda folder: os._exit(1))


def test_a_builder_that_dies_blocks_nobody(tmp_path: Path) -> None:
    process = multiprocessing.get_context("spawn").Process(target=_die_building, args=(tmp_path,))
    process.start()
    process.join(60)
    assert process.exitcode == 1
    assert (Cache(tmp_path).build("kernel", {"a": "x"}, write("1")) / "out").read_text() == "1"
