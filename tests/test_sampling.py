"""Parameters of a generation, and stops that span tokens."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flashformer import SamplingParams
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
