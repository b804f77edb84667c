"""Where a token's time goes: the kernel's timestamps as spans, as losses against the floor, and as a Chrome/Perfetto trace.

The consumers of an SM pass the stages one after another. Each *visit* begins with a wait for the input (until it is gathered)
and goes on with the stream of weights or KV cache, until the next visit begins. Meanwhile a finisher publishes what is done.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .errors import DeviceError
from .plan import Plan, Stage

if TYPE_CHECKING:
    from rich.table import Table

CONSUMER, FINISHER = 0, 1  # the roles axis of the timestamps
TICK = 0.05  # us: the least that a visit is taken to last; the timer may be coarser than that
FIRST, SECOND = 0, 1  # their events: begins to wait, input gathered; enters the stage, done


@dataclass(frozen=True)
class Visits:
    """All SMs' visits to one stage of one layer; times are float64 [workers] in us, nan where an SM had nothing to do."""

    stage: Stage
    nbytes: np.ndarray  # float64 [workers] that each SM streams in it
    complete: float  # the last SM has published its part of the input (nan: not marked)
    begin: np.ndarray  # waits for its input
    ready: np.ndarray  # has its input
    end: np.ndarray  # has multiplied its last chunk
    enter: np.ndarray  # the finisher is through with the stage before
    done: np.ndarray  # its results are published


@dataclass(frozen=True)
class StageTimes:
    """One stage over all SMs and layers, in us (nan: no marks for it).

    Bytes arrive while an SM waits, so the work of a stage may be shorter than its floor.
    """

    name: str
    times: int  # how often a token runs it
    wait_mean: float  # for the input
    wait_max: float
    work_mean: float  # from the input to the last chunk
    work_max: float
    finish_mean: float  # from the last chunk (where none is its own: of the slowest SM of the stage before) to the published result
    finish_max: float
    exchange: float  # mean from the last SM's publication of the input to having gathered it: the wait without the skew
    floor: float  # of one: its bytes at the read ceiling
    loss: float  # of all of a token's: (wait + work - floor) x times


@dataclass(frozen=True)
class Trace:
    """One token of one model."""

    name: str
    position: int  # of the token: so many came before it
    ceiling_gb_s: float
    visits: tuple[Visits, ...]  # in the order of the plan

    @property
    def duration(self) -> float:
        """Microseconds from the first mark to the last: all stages from the first layer to the head."""
        return float(np.nanmax([v.done for v in self.visits] + [v.end for v in self.visits]))

    def floor(self, nbytes: float) -> float:
        """Microseconds that reading `nbytes` takes at the ceiling."""
        return nbytes / (self.ceiling_gb_s * 1e3)

    @property
    def workers(self) -> int:
        """SMs."""
        return len(self.visits[0].begin)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the stages, in order."""
        return tuple(dict.fromkeys(v.stage.name for v in self.visits))


def make_trace(name: str, plan: Plan, stage_names: tuple[str, ...], stamps: np.ndarray, position: int, ceiling_gb_s: float) -> Trace:
    """Timestamps of one token, uint64 [2 roles, workers, layers + 1, stages, 2] in ns (0: not marked), as visits.

    stage_names: along the stages axis. Raises DeviceError where nothing was marked.
    """
    marked = stamps > 0
    if not marked.any():
        raise DeviceError("the kernel wrote no timestamps; was it generated with trace=True?")
    # NOTE: relative to the first one as integers: nanoseconds since the epoch of the timer do not fit into a double.
    times = np.where(marked, (stamps - stamps[marked].min()).astype(np.float64) / 1e3, np.nan)
    found = []
    for stage in plan.stages:
        if stage.name in stage_names:
            layer = stage.layer if stage.layer >= 0 else plan.config.num_layers
            at = times[:, :, layer, stage_names.index(stage.name)]  # [roles, workers, events]
            if not np.isnan(at).all():
                found.append((stage, at))
    ends = []
    after = np.full(stamps.shape[1], np.nan)  # when each SM's consumers go on to the next stage
    for _, at in reversed(found):
        begin = at[CONSUMER, :, FIRST]
        visited = ~np.isnan(begin)
        ends.append(np.where(visited, np.fmin(after, at[FINISHER, :, SECOND]), np.nan))
        after = np.where(visited, begin, after)
    visits = []
    published: dict[str, float] = {}  # buffer -> when the last SM had published its part
    for (stage, at), end in zip(found, reversed(ends), strict=True):
        begin, ready, enter, done = at[CONSUMER, :, FIRST], at[CONSUMER, :, SECOND], at[FINISHER, :, FIRST], at[FINISHER, :, SECOND]
        nbytes = _bytes(plan, stage, position, ~np.isnan(begin))
        visits.append(Visits(stage, nbytes, published.get(stage.reads[0], np.nan), begin, ready, end, enter, done))
        published[stage.writes] = float(np.nanmax(done)) if _any(done) else np.nan
    return Trace(name, position, ceiling_gb_s, tuple(visits))


def _bytes(plan: Plan, stage: Stage, position: int, visited: np.ndarray) -> np.ndarray:
    """Bytes of weights (no padding) or KV cache that each SM reads in a stage, float64 [workers].

    The shares of the KV cache are taken as even: they are, up to the rounding to one head.
    """
    if stage.kind == "attention":
        return np.where(visited, plan.kv.bytes_read(position) / max(int(visited.sum()), 1), 0.0)
    if stage.linear is None or stage.geometry is None:
        return np.zeros(len(visited))
    return stage.linear.rows_used * stage.geometry.format.row_bytes(stage.linear.columns_used) * np.array(stage.count) / stage.tiles


def summarize(trace: Trace) -> list[StageTimes]:
    """What each stage takes and loses, in the order of the plan."""
    out = []
    for name in trace.names:
        mine = [v for v in trace.visits if v.stage.name == name]
        wait = np.array([v.ready - v.begin for v in mine])  # [times, workers]
        work = np.array([v.end - v.ready for v in mine])
        finish = np.array([v.done - (v.end if _any(v.end) else v.complete) for v in mine])
        exchange = np.array([v.ready - v.complete for v in mine])
        floor = trace.floor(sum(float(v.nbytes.sum()) for v in mine))
        # An SM that does not visit a stage spends no time in it: it counts as zero, so that the losses of all stages add up.
        spent = float(np.nansum(wait + work)) / trace.workers
        means = (*_mean_max(wait), *_mean_max(work), *_mean_max(finish), _mean_max(exchange)[0])
        out.append(StageTimes(name, len(mine), *means, floor / len(mine), spent - floor))
    return out


def _any(values: np.ndarray) -> bool:
    """Whether there is a number among them."""
    return bool((~np.isnan(values)).any())


def _mean_max(values: np.ndarray) -> tuple[float, float]:
    """Mean and largest of what is a number; nan where nothing is."""
    return (float(np.nanmean(values)), float(np.nanmax(values))) if _any(values) else (np.nan, np.nan)


def utilisation(trace: Trace, edges: np.ndarray, first: int = 0, last: int | None = None) -> dict[str, np.ndarray]:
    """GB/s at which the SMs take bytes from their rings, by stage, float64 [len(edges) - 1] each.

    Each visit's bytes are spread evenly over its work, in us bins; `first` and `last` choose visits. What the memory delivers
    is smoother: the rings even out what they hold.
    """
    rates = {name: np.zeros(len(edges) - 1) for name in trace.names}
    for v in trace.visits[first:last]:
        real = ~np.isnan(v.end) & (v.nbytes > 0)
        length = np.maximum(v.end - v.ready, TICK)[real, None]
        speed = v.nbytes[real, None] / length
        passed = np.clip(edges[None, :] - v.ready[real, None], 0.0, length)  # us of each visit before each edge
        rates[v.stage.name] += np.diff((passed * speed).sum(axis=0)) / np.diff(edges) / 1e3
    return rates


def table(trace: Trace, token_us: float | None = None) -> Table:
    """The summary for people; `token_us` is what a token takes without timestamps, to account for what no mark covers.

    The first wait holds the embedding; "other" is what lies between an SM's visits, and the skew at both ends.
    """
    from rich.table import Table

    shown = Table(title=f"{trace.name}, one token after {trace.position:,} positions, us (over SMs and layers)", title_justify="left")
    for column in ("stage", "times", "wait mean", "max", "work mean", "max", "finish mean", "max", "exchange", "floor", "loss/token"):
        shown.add_column(column, justify="left" if column == "stage" else "right")
    stages = summarize(trace)
    for s in stages:
        numbers = (s.wait_mean, s.wait_max, s.work_mean, s.work_max, s.finish_mean, s.finish_max, s.exchange, s.floor)
        shown.add_row(s.name, str(s.times), *(_number(x) for x in numbers), f"{s.loss:+.1f}")
    floor, loss = sum(s.floor * s.times for s in stages), sum(s.loss for s in stages)
    blank = [""] * 7
    shown.add_section()
    shown.add_row("other", "", *blank, "", f"{trace.duration - floor - loss:+.1f}")
    if token_us is not None:
        shown.add_row("choice of token", "", *blank, "", f"{token_us - trace.duration:+.1f}")
    total = trace.duration if token_us is None else token_us
    shown.add_row("token", "", *blank, f"{floor:.1f}", f"{total - floor:+.1f}", style="bold")
    return shown


def _number(x: float) -> str:
    """Two digits, or nothing where there is no number."""
    return "" if np.isnan(x) else f"{x:.2f}"


def write_chrome(trace: Trace, path: Path) -> None:
    """Write the trace for https://ui.perfetto.dev or chrome://tracing: a process for each SM with its consumers and its finisher."""
    content = {
        "displayTimeUnit": "ns",
        "otherData": {"model": trace.name, "position": trace.position, "read_ceiling_gb_s": trace.ceiling_gb_s},
        "traceEvents": list(chrome_events(trace)),
    }
    path.write_text(json.dumps(content, separators=(",", ":")))


def chrome_events(trace: Trace) -> Iterator[dict[str, Any]]:
    """Events of the Chrome trace format, times in us: spans named after their stage, `wait`, `stream` and `finish` inside them."""
    gpu = trace.workers  # a process of its own for what concerns all SMs
    yield {"ph": "M", "pid": gpu, "name": "process_name", "args": {"name": "all SMs"}}
    yield {"ph": "M", "pid": gpu, "name": "process_sort_index", "args": {"sort_index": -1}}
    edges = np.arange(0.0, trace.duration + 1.0, 1.0)
    rates = utilisation(trace, edges)
    for i, edge in enumerate(edges[:-1]):
        percent = {name: round(float(r[i]) / trace.ceiling_gb_s * 100, 1) for name, r in rates.items()}
        yield {"ph": "C", "pid": gpu, "name": "stream, % of the read ceiling", "ts": float(edge), "args": percent}
    for sm in range(trace.workers):
        yield {"ph": "M", "pid": sm, "name": "process_name", "args": {"name": f"SM {sm}"}}
        for thread, name in ((CONSUMER, "consumers"), (FINISHER, "finisher")):
            yield {"ph": "M", "pid": sm, "tid": thread, "name": "thread_name", "args": {"name": name}}
    for v in trace.visits:
        layer = {"layer": v.stage.layer} if v.stage.layer >= 0 else {}
        for sm in range(trace.workers):
            spans: tuple[tuple[int, str, float, float, dict[str, int]], ...] = (
                (CONSUMER, v.stage.name, v.begin[sm], v.end[sm], {**layer, "bytes": round(float(v.nbytes[sm]))}),
                (CONSUMER, "wait", v.begin[sm], v.ready[sm], {}),
                (CONSUMER, "stream", v.ready[sm], v.end[sm], {}),
                (FINISHER, v.stage.name, v.enter[sm], v.done[sm], layer),
                (FINISHER, "finish", np.maximum(v.enter[sm], v.end[sm]), v.done[sm], {}),
            )
            for thread, name, begin, end, details in spans:
                if not np.isnan(begin + end):
                    span = {"ph": "X", "pid": sm, "tid": thread, "name": name, "ts": round(float(begin), 3)}
                    yield {**span, "dur": round(max(float(end - begin), 0.0), 3), **({"args": details} if details else {})}
