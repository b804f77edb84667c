"""Parameters of a generation, and stops that span tokens."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flashformer import SamplingParams
from flashformer.backends.sampling import PROMPT_BIT, Flag
from flashformer.errors import InputError
from flashformer.sampling import StopMatcher


@pytest.mark.parametrize("max_tokens", [0, -1, True, 1.5, "3"])
def test_wrong_max_tokens_is_refused(max_tokens: object) -> None:
    with pytest.raises(InputError, match="max_tokens"):
        SamplingParams(max_tokens=max_tokens)  # type: ignore[arg-type]


@pytest.mark.parametrize("stop", ["text", [""], [1.5], [None], [True]])
def test_wrong_stop_is_refused(stop: object) -> None:
    with pytest.raises(InputError, match="stop"):
        SamplingParams(stop=stop)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("temperature", [-1, math.nan, math.inf, 1e-9, "1", True, None]),
        ("top_k", [-1, 1.5, True, None]),
        ("top_p", [-0.1, 1.1, math.nan, "1", True, None]),
        ("min_p", [-0.1, 1.1, math.nan, "1", True]),
        ("repetition_penalty", [0, -1, math.inf, math.nan, 1e9, True]),
        ("presence_penalty", [math.inf, math.nan, 1e9, "1", True]),
        ("frequency_penalty", [math.inf, math.nan, -1e9, "1", True]),
        ("logit_bias", [[1], None, {"1": 1.0}, {-1: 1.0}, {True: 1.0}, {1: math.nan}, {1: "x"}, {1: True}, {1: 1e30}]),
        ("seed", [-1, 1 << 64, 1.5, True, "x"]),
        ("logprobs", [-1, 21, 1.5, True]),
    ],
)
def test_wrong_sampling_is_refused(name: str, values: list[Any]) -> None:
    for value in values:
        with pytest.raises(InputError, match=name):
            SamplingParams(**{name: value})


def test_what_is_not_used_is_not_asked_for() -> None:
    assert SamplingParams().lower(10, [1]).flags == Flag(0)
    assert SamplingParams(top_k=3, top_p=0.5, min_p=0.5).lower(10, [1]).flags == Flag(0)  # greedily they make no difference
    assert SamplingParams(temperature=1, top_p=1.0, top_k=0, min_p=0, repetition_penalty=1).lower(10, [1]).flags == Flag.SAMPLED
    every = SamplingParams(temperature=1, top_k=3, top_p=0.5, min_p=0.1, presence_penalty=1, logit_bias={1: 2}, logprobs=0).lower(10, [1])
    assert every.flags == Flag(sum(Flag))


def test_what_is_counted() -> None:
    seen = SamplingParams(presence_penalty=1).lower(6, [1, 1, 2], [2, 4, 4]).seen
    assert seen is not None and seen.tolist() == [0, PROMPT_BIT, PROMPT_BIT + 1, 0, 2, 0]


def test_biases() -> None:
    def bias(values: dict[int, float]) -> list[float]:
        lowered = SamplingParams(logit_bias=values).lower(4, [1]).bias
        assert lowered is not None and lowered.dtype == np.float32
        return lowered.tolist()

    no = -math.inf
    assert bias({1: 2, 3: no}) == [0, 2, 0, no]
    assert bias({1: math.inf, 2: math.inf, 3: 5, 0: no}) == [no, 0, 0, no]
    with pytest.raises(InputError, match="bans every token"):
        bias(dict.fromkeys(range(4), no))
    with pytest.raises(InputError, match="names token 4; the vocabulary has 4"):
        bias({4: 1})


def test_seeds() -> None:
    assert SamplingParams(seed=5).lower(4, [1]).seed == 5
    assert len({SamplingParams().lower(4, [1]).seed for _ in range(4)}) == 4


def test_stops_are_sorted_by_kind() -> None:
    params = SamplingParams(stop=["end", 7, "\n"])
    assert params.stop_texts == ("end", "\n")
    assert params.stop_ids == {7}


def test_a_stop_that_spans_pieces_is_never_shown() -> None:
    matcher = StopMatcher(["</end>"])
    shown = [matcher.push(piece) for piece in ["Hello <", "/", "en", "d", "> tail"]]
    assert "".join(shown) == "Hello " and matcher.stopped
    assert matcher.push("more") == "" and matcher.finish() == ""


def test_what_only_looks_like_a_stop_is_shown_late_but_whole() -> None:
    matcher = StopMatcher(["</end>"])
    assert matcher.push("a </e") == "a "
    assert matcher.push("x") == "</ex"
    assert matcher.push("</") == ""
    assert matcher.finish() == "</"
    assert not matcher.stopped


@given(st.lists(st.text("ab", max_size=4), max_size=8), st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=3))
def test_pieces_make_no_difference(pieces: list[str], stops: list[str]) -> None:
    """However a text is cut, what is shown ends where the first completed stop begins."""
    matcher = StopMatcher(stops)
    shown = "".join(matcher.push(piece) for piece in pieces) + matcher.finish()
    whole = "".join(pieces)
    if not any(stop in whole for stop in stops):
        assert shown == whole and not matcher.stopped
    else:
        assert matcher.stopped and whole.startswith(shown)
        assert not any(stop in shown for stop in stops)
