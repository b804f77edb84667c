"""Environment variables."""

from __future__ import annotations

from pathlib import Path

import pytest

from flashformer import env
from flashformer.errors import InputError


def test_defaults(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("FF_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert env.cache_dir() == tmp_path / "flashformer"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert env.cache_dir() == tmp_path / ".cache" / "flashformer"
    assert env.debug_level() == 0
    assert env.threads() >= 1


@pytest.mark.parametrize(
    ("name", "value"), [("FF_DEBUG", "7"), ("FF_DEBUG", "yes"), ("FF_THREADS", "0"), ("FF_THREADS", "-2"), ("FF_THREADS", "9" * 50)]
)
def test_wrong_values_are_refused(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=name):
        env.debug_level() if name == "FF_DEBUG" else env.threads()


def test_values_are_read(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("FF_THREADS", "3")
    monkeypatch.setenv("FF_DEBUG", "2")
    assert env.threads() == 3
    env.debug(2, lambda: "told")
    env.debug(3, "not told")
    assert capsys.readouterr().err == "told\n"
