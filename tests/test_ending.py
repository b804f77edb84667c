"""Who waits for the end of a launch."""

from __future__ import annotations

import gc
import threading
import time
from typing import Any

import pytest

from flashformer.backends.cuda.ending import Endings
from flashformer.errors import DeviceError


class Played:
    """A context whose launches end when they are told to, perhaps with an error."""

    def __init__(self) -> None:
        self.launched: list[threading.Event] = []
        self.error: Exception | None = None

    def use(self) -> None:
        pass

    def event(self, stream: Any = None, sleeping: bool = False) -> threading.Event:
        assert sleeping
        self.launched.append(threading.Event())
        return self.launched[-1]

    def finish(self, event: threading.Event) -> None:
        event.wait()
        if self.error:
            raise self.error


@pytest.fixture
def played() -> Played:
    return Played()


def make_endings(played: Played) -> Endings:
    return Endings(played)  # type: ignore[arg-type]


def test_it_wakes_who_waits(played: Played) -> None:
    ending = make_endings(played).next()
    assert not ending.wait(0.01) and not ending.over
    threading.Timer(0.05, played.launched[0].set).start()
    began = time.perf_counter()
    assert ending.wait(30) and ending.over
    assert time.perf_counter() - began < 10
    assert ending.wait(30)  # again


def test_one_launch_after_another(played: Played) -> None:
    endings = make_endings(played)
    first, second = endings.next(), endings.next()
    played.launched[1].set()
    assert not second.wait(0.01)  # the stream's work is done in order
    played.launched[0].set()
    assert first.wait(30) and second.wait(30)


def test_a_kernel_that_fails_has_ended(played: Played) -> None:
    endings = make_endings(played)
    played.error = DeviceError("the kernel failed")
    for _ in range(2):  # the thread goes on
        ending = endings.next()
        played.launched[-1].set()
        assert ending.wait(30)


def test_the_thread_ends_with_its_user(played: Played) -> None:
    endings = make_endings(played)
    endings.close()  # without a launch
    endings = make_endings(played)
    endings.next()
    thread = next(t for t in threading.enumerate() if t.name == "flashformer-ending" and t is endings._thread)
    played.launched[0].set()
    endings.close()
    endings.close()
    assert not thread.is_alive()


def test_who_forgets_it_leaves_no_thread(played: Played) -> None:
    endings = make_endings(played)
    ending = endings.next()
    thread = endings._thread
    played.launched[0].set()
    assert thread is not None and ending.wait(30)
    del endings, ending
    gc.collect()
    thread.join(30)
    assert not thread.is_alive()
