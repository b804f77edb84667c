"""How often the host looks for tokens."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from flashformer.backends.cuda import pace
from flashformer.backends.cuda.pace import GROWTH, LONGEST, SHORTEST, TOGETHER, Pace


class Played:
    """A launch after the other on a clock of its own, whose sleeps take longer than they are asked to. `late`: of each token, seconds."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, longer: float = 0.0) -> None:
        self.now, self.longer, self.looks, self.late = 0.0, longer, 0, list[float]()
        self.pace = Pace()
        monkeypatch.setattr(pace, "time", SimpleNamespace(perf_counter=lambda: self.now))

    def sleep(self, seconds: float, end: float) -> None:
        """Until then, or the end of the launch."""
        assert SHORTEST * 0.99 <= seconds <= LONGEST * 1.01
        self.now = min(self.now + seconds, max(self.now, end)) + self.longer

    def launch(self, comes: list[float], passes: float = 1) -> None:
        """Tokens that come so many seconds after the launch."""
        self.pace.begin(passes)
        began, made = self.now, 0
        while made < len(comes):
            while self.now < began + comes[made]:
                self.sleep(self.pace.next_look(), began + comes[-1])
                self.looks += 1
            there = sum(began + at <= self.now for at in comes[made:])
            self.late += [self.now - began - at for at in comes[made : made + there]]
            made += there
            self.pace.made(there, len(comes) - made)


@pytest.mark.parametrize(("interval", "most_looks"), [(100e-6, 1.5), (3.6e-3, 6), (30e-3, 20)])
def test_few_looks_find_tokens_soon(monkeypatch: pytest.MonkeyPatch, interval: float, most_looks: int) -> None:
    played = Played(monkeypatch)
    played.launch([interval * (i + 1) for i in range(3)])
    played.looks, played.late = 0, []
    played.launch([interval * (i + 1) for i in range(40)])
    assert played.looks <= most_looks * 40
    assert max(played.late) <= max(TOGETHER if interval < TOGETHER else 0, 1.5 * SHORTEST)
    assert played.late[0] <= 1.5 * SHORTEST and played.late[-1] <= 2.5 * SHORTEST  # nothing follows that it could be waited for with


@pytest.mark.parametrize("interval", [300e-6, 1.1e-3, 3.4e-3])
def test_one_look_finds_most_tokens(monkeypatch: pytest.MonkeyPatch, interval: float) -> None:
    """Where sleeps take 60 us longer than they are asked to, and tokens come a little irregularly."""
    played, random = Played(monkeypatch, 60e-6), np.random.default_rng(0)
    comes = [list(np.cumsum(interval + random.exponential(5e-6, 100))) for _ in range(3)]
    for launch in comes[:2]:
        played.launch(launch)
    played.looks, played.late = 0, []
    played.launch(comes[2])
    together = max(int(TOGETHER / interval), 1)
    first = GROWTH * np.log2(together)  # before as many are looked for at once
    assert played.looks <= 1.35 * 100 / together + first
    assert np.mean(played.late) < (100e-6 if together == 1 else 500e-6 + interval * (together - 1) / 2)
    assert max(played.late) < 16e-3
    assert all(late <= 150e-6 + interval * (1 + i // GROWTH) for i, late in enumerate(played.late))  # the first ones soon


def test_a_prompt_is_waited_for_as_long_as_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    played = Played(monkeypatch, 60e-6)
    played.launch([4e-3 * 16], passes=16)  # of which nothing was known
    played.looks, played.late = 0, []
    played.launch([4e-3 * 16], passes=16)
    assert played.looks <= 16 and played.late[0] < 200e-6


def test_a_part_of_a_pass_is_waited_for_no_longer_than_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    """And what follows is found where it was."""
    played = Played(monkeypatch, 60e-6)
    comes = [0.34e-3 + 3.4e-3 * i for i in range(40)]
    played.launch(comes, passes=0.1)  # of which nothing was known
    played.looks, played.late = 0, []
    played.launch(comes, passes=0.1)
    assert played.late[0] < 150e-6 and played.looks <= 20
    assert all(late <= 150e-6 + 3.4e-3 * (1 + i // GROWTH) for i, late in enumerate(played.late))


def test_who_takes_long_over_tokens_does_not_mistake_the_pace(monkeypatch: pytest.MonkeyPatch) -> None:
    played = Played(monkeypatch)
    played.launch([1e-3 * (i + 1) for i in range(20)])
    played.pace.begin(1)
    played.now += 5  # with the first tokens
    played.pace.made(20, 20)
    played.now += 5
    played.pace.made(20, 0)
    played.late = []
    played.launch([1e-3 * (i + 1) for i in range(20)])
    assert max(played.late) < TOGETHER
