"""A decoding step as one CUDA graph, timed by the device: what the PyTorch baselines share."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

from . import telling

WARM_UP = 3  # runs before the capture: compilation and tuning happen in them


def capture(step: Callable[[], None], what: str) -> Any:
    """A `torch.cuda.CUDAGraph` of `step`, which works in place on tensors that stay where they are; `what` is said to be compiled."""
    import torch

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with telling(f"compiling {what}"), torch.cuda.stream(side):
        for _ in range(WARM_UP):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph


def time_replays(graph: Any, reset: Callable[[], None], tokens: int, repeats: int) -> float:
    """Median milliseconds of one replay over `repeats` runs of `tokens` replays, each begun with `reset`; one more warms up."""
    import torch

    times = []
    for _ in range(repeats + 1):
        reset()
        first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        first.record()
        for _ in range(tokens):
            graph.replay()
        last.record()
        torch.cuda.synchronize()
        times.append(first.elapsed_time(last) / tokens)
    return statistics.median(times[1:])
