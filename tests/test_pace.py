"""How often the host looks for tokens."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from flashformer.backends.cuda import pace
from flashformer.backends.cuda.pace import LONGEST, SHORTEST, SLACK, Pace


@pytest.mark.parametrize(("interval", "most_looks"), [(100e-6, 5), (3.6e-3, 6), (30e-3, 20)])
def test_few_looks_find_a_token_soon(monkeypatch: pytest.MonkeyPatch, interval: float, most_looks: int) -> None:
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(pace.time, "perf_counter", lambda: clock.now)
    monkeypatch.setattr(pace.time, "sleep", lambda seconds: setattr(clock, "now", clock.now + seconds))
    waits, comes = Pace(), interval
    for token in range(10):
        looks = 0
        while clock.now < comes:
            before = clock.now
            waits.wait()
            assert SHORTEST * 0.99 <= clock.now - before <= LONGEST * 1.01
            looks += 1
        waits.made()
        if token > 1:
            assert looks <= most_looks and clock.now - comes <= 1.5 * SHORTEST
        comes += interval


@pytest.mark.parametrize("interval", [300e-6, 1.1e-3, 3.4e-3])
def test_one_look_finds_most_tokens(monkeypatch: pytest.MonkeyPatch, interval: float) -> None:
    """Where sleeps take longer than they are asked to, and tokens come a little irregularly."""
    clock, random = SimpleNamespace(now=0.0), np.random.default_rng(0)
    monkeypatch.setattr(pace.time, "perf_counter", lambda: clock.now)
    monkeypatch.setattr(pace.time, "sleep", lambda seconds: setattr(clock, "now", clock.now + seconds + 60e-6))
    waits, comes, looks, late = Pace(), 0.0, 0, []
    for token in range(300):
        comes += interval + random.exponential(5e-6)
        while clock.now < comes:
            waits.wait()
            looks += token >= 100
        waits.made()
        late.append(clock.now - comes)
    assert looks <= 1.3 * 200 and np.mean(late[100:]) < 100e-6


def test_nobody_asks_for_more_than_tokens_while_they_come(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(pace.time, "perf_counter", lambda: clock.now)
    waits = Pace()
    assert waits.overdue  # nothing is known yet
    for _ in range(3):
        clock.now += 3e-3
        waits.made()
    clock.now += 3.1e-3
    assert not waits.overdue
    clock.now += 1.5e-3 + SLACK
    assert waits.overdue
