"""How tokens are chosen and when a text ends."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .errors import InputError


@dataclass(frozen=True)
class SamplingParams:
    """What a caller asks of one generation. Tokens are chosen greedily.

    max_tokens: most tokens to make. stop: texts that end the generation (they are not part of the result) or token ids that
    do. ignore_eos: go on after the model's own end-of-text tokens. Raises InputError for a value that makes no sense.
    """

    max_tokens: int = 128
    stop: Sequence[str | int] = ()
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.max_tokens, bool) or not isinstance(self.max_tokens, int) or self.max_tokens < 1:
            raise InputError(f"max_tokens is {self.max_tokens!r}; it must be a whole number, at least 1")
        if isinstance(self.stop, str):
            raise InputError(f"stop is the text {self.stop!r}; give a list of texts or token ids, such as [{self.stop!r}]")
        for stop in self.stop:
            if isinstance(stop, bool) or not isinstance(stop, str | int):
                raise InputError(f"stop holds {stop!r}, which is neither a text nor a token id")
            if stop == "":
                raise InputError("stop holds an empty text, which would end every generation before it begins")

    @property
    def stop_texts(self) -> tuple[str, ...]:
        """The texts of `stop`."""
        return tuple(s for s in self.stop if isinstance(s, str))

    @property
    def stop_ids(self) -> frozenset[int]:
        """The token ids of `stop`."""
        return frozenset(s for s in self.stop if isinstance(s, int))


class StopMatcher:
    """Passes text on until one of `texts` appears, which may begin in one piece and end in another.

    Text that could be the beginning of a stop is held back until it is known not to be one.
    """

    def __init__(self, texts: Sequence[str]) -> None:
        self._texts = tuple(texts)
        self._held = ""
        self.stopped = False

    def push(self, piece: str) -> str:
        """Take a piece; returns what may be shown. Sets `stopped` once a stop is complete; what follows is dropped."""
        if self.stopped:
            return ""
        text = self._held + piece
        found = [at for at in (text.find(s) for s in self._texts) if at >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        keep = max((self._overlap(text, s) for s in self._texts), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def finish(self) -> str:
        """What is still held back when the generation ends."""
        held, self._held = self._held, ""
        return held

    @staticmethod
    def _overlap(text: str, stop: str) -> int:
        """Length of the longest end of `text` that `stop` begins with."""
        return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if stop.startswith(text[-n:])), 0)
