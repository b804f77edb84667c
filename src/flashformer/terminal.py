"""A conversation in the terminal: answers go to stdout as they are made, everything else to stderr."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from pathlib import Path

import click

from .config import read_json
from .engine import Engine
from .errors import FlashFormerError, InputError
from .sampling import SamplingParams
from .scheduler import Result

Message = dict[str, str]  # role, content

PROMPT = "> "


def describe_stats(engine: Engine) -> str:
    """Speed of the last generation, against what the memory could do."""
    s = engine.stats
    reused = f", {s.reused_tokens} of them reused" if s.reused_tokens else ""
    prompt = f"prompt: {s.reused_tokens + s.prompt_tokens} tokens{reused}, first token after {s.prompt_seconds * 1e3:.1f} ms"
    if s.generated_tokens < 2 or not s.generate_seconds:  # NOTE: the host may find all tokens at its first look
        return f"{prompt}\ntoo few tokens were made to measure a speed"
    ceiling = engine.runner.read_bandwidth()
    rate = s.bytes_read / s.generate_seconds / 1e9
    guessed = ""
    if s.drafted:
        pace = f"about {s.speedup:.2f} times the pace of its launches without guesses"
        guessed = f"\n{s.accepted} of {s.drafted} guessed tokens were right: {pace}"
    return (
        f"{prompt}\n{(s.generated_tokens - 1) / s.generate_seconds:.1f} tokens/s on {engine.device.name}: {rate:.1f} GB/s, "
        f"{rate / ceiling:.0%} of the {ceiling:.1f} GB/s that a plain read reaches{guessed}"
    )


def describe_logprobs(engine: Engine, results: Sequence[Result]) -> str:
    """The tokens of an answer with log probabilities, one a line: its own, then those of the most likely ones."""

    def one(token: int, logprob: float | None) -> str:
        return f"{engine.tokenizer.decode([token])!r} {logprob:.3f}"

    lines = [" | ".join(one(*pair) for pair in ((r.token, r.logprob), *(r.top_logprobs or ()))) for r in results]
    return "\n".join(lines)


class Chat:
    """A conversation with `engine`; `run` talks until the user leaves. Nothing leaves the history unless the user is told."""

    def __init__(self, engine: Engine, params: SamplingParams, system: str | None = None) -> None:
        """`system` is the system message, None for none. Raises InputError if the model has no chat template."""
        if not engine.tokenizer.has_chat_template:
            raise InputError("this model has no chat template, so it cannot chat; use flashformer generate")
        self.engine, self.params = engine, params
        self.messages: list[Message] = []
        self._set_system(system or "")
        self._commands: dict[str, tuple[Callable[[str], None], str]] = {
            "/help": (self._help, "show this"),
            "/reset": (self._reset, "forget the conversation, all but the system message"),
            "/system": (self._system, "TEXT: set the system message; without a text, remove it"),
            "/save": (self._save, "FILE: write the conversation to a new file"),
            "/load": (self._load, "FILE: go on with a conversation that was saved"),
            "/stats": (self._stats, "speed of the last answer"),
        }

    def run(self) -> None:
        """Read messages and commands and serve them, until the end of the input, /quit, or Ctrl-C twice at the prompt.

        Raises InputError if the input is no text.
        """
        if sys.stdin.isatty():
            with suppress(ImportError):
                import readline  # noqa: F401  (makes input() edit lines and remember them)
            _tell("/help shows the commands. Ctrl-C stops an answer, Ctrl-D leaves.")
        leaving = False
        while True:
            try:
                line = _read_line()
            except EOFError:
                return
            except KeyboardInterrupt:
                if leaving:
                    return
                leaving = True
                _tell("\nCtrl-C again or Ctrl-D leaves.")
                continue
            leaving = False
            if line.rstrip() == "/quit":
                return
            if line.startswith("/"):
                with _told():
                    self._command(line)
            elif line.strip():
                self._answer(line)

    def _answer(self, line: str) -> None:
        """Show the model's answer to a message; both join the history, even if it was stopped, unless there is no answer at all."""
        message = {"role": "user", "content": line}
        pieces: list[str] = []
        with _told():
            self._stream([*self.messages, message], pieces)
        if pieces:
            self.messages += [message, {"role": "assistant", "content": "".join(pieces)}]
        else:
            _tell("Your message was not answered and is not part of the conversation.")

    def _stream(self, messages: list[Message], pieces: list[str]) -> None:
        """Show the answer to `messages` as it is made and collect it in `pieces`, one a token."""
        ids = self.engine.chat_prompt(messages)
        room = self.engine.max_context - len(ids)
        if room < 0:
            raise InputError(
                f"with this message the conversation has {len(ids)} tokens; the context holds {self.engine.max_context}; "
                "/reset begins a new one (/save FILE keeps this one)"
            )
        finish, made = None, []
        with closing(self.engine.generate(ids, self.params)) as results:
            for result in results:
                pieces.append(result.text)
                made.append(result)
                finish = result.finish
                click.echo(result.text, nl=False)
                sys.stdout.flush()
        click.echo()
        if self.params.logprobs is not None:
            _tell(describe_logprobs(self.engine, made))
        if finish == "length" and len(pieces) > room:
            context = self.engine.max_context
            _tell(f"The context of {context} tokens is full: /reset begins a new conversation (/save FILE keeps this one).")
        elif finish == "length":
            _tell(f"The answer was cut after {len(pieces)} tokens; see --max-tokens.")

    def _command(self, line: str) -> None:
        """Do what a line that begins with / asks for."""
        name, *rest = line.split(maxsplit=1)
        if name not in self._commands:
            raise InputError(f"no such command: {name}; /help shows what there is (a message that begins with / needs a space before it)")
        self._commands[name][0](rest[0].strip() if rest else "")

    def _help(self, _: str) -> None:
        for name, (_function, meaning) in self._commands.items():
            _tell(f"{name:8} {meaning}")
        _tell("/quit    leave; so does Ctrl-D")

    def _reset(self, _: str) -> None:
        self.messages = [m for m in self.messages[:1] if m["role"] == "system"]
        _tell("A new conversation.")

    def _system(self, text: str) -> None:
        self._set_system(text)
        _tell("The system message is set." if text else "There is no system message.")

    def _set_system(self, text: str) -> None:
        """Put a system message, "" for none, in the place of the present one."""
        rest = self.messages[1:] if self.messages and self.messages[0]["role"] == "system" else self.messages
        self.messages = [{"role": "system", "content": text}, *rest] if text else rest

    def _save(self, name: str) -> None:
        path = _file("/save", name)
        try:
            with path.open("x", encoding="utf-8") as file:  # never over another file
                json.dump({"messages": self.messages}, file, ensure_ascii=False, indent=1)
        except (OSError, ValueError) as error:
            raise InputError(f"{path}: cannot be written ({getattr(error, 'strerror', None) or error})") from error
        _tell(f"{len(self.messages)} messages are in {path}")

    def _load(self, name: str) -> None:
        path = _file("/load", name)
        messages = read_json(path).get("messages")
        if not isinstance(messages, list) or not all(_is_message(m) for m in messages):
            raise InputError(f"{path}: not a conversation that /save has written")
        self.messages = messages
        _tell(f"{len(messages)} messages; the conversation before is forgotten.")

    def _stats(self, _: str) -> None:
        _tell(describe_stats(self.engine) if self.engine.stats.prompt_tokens else "There is no answer yet.")


def _read_line() -> str:
    """The next line, at a prompt if a person types it; EOFError at the end, InputError if what a pipe brings is no text."""
    typed = sys.stdin.isatty()
    try:
        line = input(PROMPT) + "\n" if typed else sys.stdin.readline()
    except UnicodeDecodeError as error:
        problem = f"the input is not text in {error.encoding}"
        if not typed:
            raise InputError(problem) from error
        _tell(f"error: {problem}")
        return ""
    if not line:
        raise EOFError
    return line.rstrip("\r\n")


@contextmanager
def _told() -> Iterator[None]:
    """What goes wrong within is told, and Ctrl-C ends no more than what is within."""
    try:
        yield
    except KeyboardInterrupt:
        _tell("\nStopped.")
    except FlashFormerError as error:
        _tell(f"error: {error}")


def _tell(text: str) -> None:
    """Say something that is no answer."""
    click.echo(text, err=True)


def _file(command: str, name: str) -> Path:
    """The file that a command names; InputError if it names none."""
    if not name:
        raise InputError(f"{command} needs the name of a file")
    return Path(name).expanduser()


def _is_message(value: object) -> bool:
    return isinstance(value, dict) and value.keys() == {"role", "content"} and all(isinstance(v, str) for v in value.values())
