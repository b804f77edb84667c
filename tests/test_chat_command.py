"""The terminal chat: what is said, what is remembered, what every command and every Ctrl-C does."""

from __future__ import annotations

import json
import os
import pty
import select
import subprocess
import sys
import time
from collections.abc import Generator, Sequence
from pathlib import Path

import pytest
from click.testing import CliRunner

import flashformer
from flashformer import SamplingParams
from flashformer.cli import main
from flashformer.engine import Engine
from flashformer.errors import DeviceError, InputError
from flashformer.scheduler import Result
from flashformer.terminal import Chat
from model_files import make_config, write_folder

NOT_PART = "not part of the conversation"
GREEDY = ("--temperature", "0")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("model"), make_config(vocab_size=300))


@pytest.fixture
def engine(folder: Path) -> Generator[Engine, None, None]:
    with flashformer.load(folder, "cpu") as loaded:
        yield loaded


class Lines:
    """A standard input that is no terminal; a line may be an exception to raise instead."""

    encoding = "utf-8"

    def __init__(self, lines: Sequence[str | BaseException]) -> None:
        self.lines = list(lines)

    def isatty(self) -> bool:
        return False

    def readline(self) -> str:
        line = self.lines.pop(0) if self.lines else ""
        if isinstance(line, BaseException):
            raise line
        return f"{line}\n" if self.lines or line else ""


Answer = Sequence[str | BaseException]


class Talk:
    """Runs conversations with an engine whose answers are written down: texts, and exceptions raised in their midst."""

    def __init__(self, engine: Engine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self.engine, self.monkeypatch, self.capsys = engine, monkeypatch, capsys
        self.prompts: list[str] = []
        self.chat = Chat(engine, SamplingParams(max_tokens=5))

    def __call__(self, *lines: str | BaseException, answers: Sequence[Answer] = ()) -> tuple[str, str]:
        """What the two streams show for these lines."""
        waiting = list(answers)

        def generate(ids: list[int], params: SamplingParams) -> Generator[Result, None, None]:
            self.prompts.append(self.engine.tokenizer.decode(ids))
            for piece in waiting.pop(0):
                if isinstance(piece, BaseException):
                    raise piece
                yield Result(5, piece)

        self.monkeypatch.setattr(self.engine, "generate", generate)
        self.monkeypatch.setattr("sys.stdin", Lines(lines))
        self.chat.run()
        assert waiting == []
        shown = self.capsys.readouterr()
        return shown.out, shown.err


@pytest.fixture
def talk(engine: Engine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Talk:
    return Talk(engine, monkeypatch, capsys)


def said(*contents: str) -> list[dict[str, str]]:
    """Messages of user and assistant in turn."""
    return [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]


def test_answers_are_shown_and_remembered(talk: Talk) -> None:
    out, err = talk("Hello", "", "   ", "And you?", answers=[["Good ", "day"], ["Fine"]])
    assert (out, err) == ("Good day\nFine\n", "")
    assert talk.chat.messages == said("Hello", "Good day", "And you?", "Fine")
    assert [talk.prompts[1].count(text) for text in ("Hello", "Good day", "And you?")] == [1, 1, 1]


def test_ctrl_c_stops_the_answer_and_not_the_program(talk: Talk) -> None:
    out, err = talk("Hello", "More", answers=[["Good ", KeyboardInterrupt()], ["Yes"]])
    assert out == "Good Yes\n" and "Stopped." in err and NOT_PART not in err
    assert talk.chat.messages == said("Hello", "Good ", "More", "Yes")


def test_ctrl_c_before_an_answer_begins_takes_the_message_back(talk: Talk) -> None:
    out, err = talk("Hello", "Hello again", answers=[[KeyboardInterrupt()], ["Yes"]])
    assert out == "Yes\n" and NOT_PART in err
    assert talk.chat.messages == said("Hello again", "Yes")


def test_ctrl_c_twice_at_the_prompt_leaves(talk: Talk) -> None:
    _, err = talk(KeyboardInterrupt(), "Hello", KeyboardInterrupt(), KeyboardInterrupt(), "never read", answers=[["Yes"]])
    assert err.count("Ctrl-C again or Ctrl-D leaves.") == 2
    assert talk.chat.messages == said("Hello", "Yes")


def test_an_error_is_told_and_the_conversation_goes_on(talk: Talk) -> None:
    out, err = talk("One", "Two", answers=[[DeviceError("the kernel gave up")], ["Yes"]])
    assert out == "Yes\n" and "error: the kernel gave up" in err and NOT_PART in err
    assert talk.chat.messages == said("Two", "Yes")


def test_commands(talk: Talk) -> None:
    _, err = talk("/help")
    for name in ("/help", "/reset", "/system TEXT", "/save", "/load", "/stats", "/quit", "Ctrl-D"):
        assert name.split()[0] in err
    _, err = talk("/stats")
    assert "no answer yet" in err
    out, err = talk("/halp", "/", "/helpless me", " /etc is a folder", "/quit ", "never read", answers=[["Yes"]])
    assert out == "Yes\n"
    for name in ("/halp", "/", "/helpless"):
        assert f"error: no such command: {name}; /help" in err
    assert talk.chat.messages[0]["content"] == " /etc is a folder"


def test_system_and_reset(talk: Talk) -> None:
    talk("/system Be  brief.", "Hi", answers=[["Yes"]])
    system = {"role": "system", "content": "Be  brief."}
    assert talk.chat.messages == [system, *said("Hi", "Yes")] and "Be  brief." in talk.prompts[0]
    talk("/system Be long.", "/reset", "Ho", answers=[["No"]])
    assert talk.chat.messages == [{"role": "system", "content": "Be long."}, *said("Ho", "No")]
    talk("/system")
    assert talk.chat.messages == said("Ho", "No")
    talk("/reset")
    assert talk.chat.messages == []
    assert Chat(talk.engine, SamplingParams(), "Be kind.").messages == [{"role": "system", "content": "Be kind."}]


def test_save_and_load(talk: Talk, tmp_path: Path) -> None:
    file = tmp_path / "a conversation.json"
    talk("/system Be brief.", "Où?", f"/save {file}", answers=[["Là ✓"]])
    saved = list(talk.chat.messages)
    _, err = talk("/reset", f"/load {file}")
    assert talk.chat.messages == saved and saved[1:] == said("Où?", "Là ✓") and "3 messages" in err
    before = file.read_bytes()
    _, err = talk(f"/save {file}", f"/save {tmp_path}", f"/save {tmp_path}/no/folder", "/save", "/load", f"/load {tmp_path}/none")
    assert file.read_bytes() == before
    assert [line.startswith("error: ") for line in err.splitlines()] == [True] * 6
    assert "File exists" in err and "/save needs the name of a file" in err
    for wrong in ("[]", "{", "{}", '{"messages": [{"role": "user"}]}', '{"messages": [{"role": "user", "content": 1}]}'):
        file.write_text(wrong)
        _, err = talk(f"/load {file}")
        assert err.startswith("error: ") and talk.chat.messages == saved


def test_what_is_no_text_ends_with_an_error(talk: Talk) -> None:
    with pytest.raises(InputError, match="not text in utf-8"):
        talk(UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"))


def chat(folder: Path, lines: str, *options: str) -> tuple[int, str, str]:
    """The command itself with the real kernel: exit status and both streams. NOTE: by itself it samples, each time something else."""
    result = CliRunner().invoke(main, ["chat", str(folder), "--device", "cpu", *options], input=lines)
    return result.exit_code, result.stdout, result.stderr


def test_the_command_says_what_the_engine_says(folder: Path, engine: Engine) -> None:
    """Every turn is what a fresh computation of the whole conversation gives, though the cache serves most of it."""
    code, out, err = chat(folder, "Hello\nAnd then?\n/stats\n", "--system", "Be brief.", "--max-tokens", "9", "--temperature", "0")
    assert code == 0
    messages, expected = [{"role": "system", "content": "Be brief."}], ""
    for text in ("Hello", "And then?"):
        messages.append({"role": "user", "content": text})
        with flashformer.load(folder, "cpu") as fresh:
            answer = "".join(r.text for r in fresh.generate(fresh.chat_prompt(messages), SamplingParams(max_tokens=9)))
        messages.append({"role": "assistant", "content": answer})
        expected += answer + "\n"
    assert out == expected
    reused = int(err.split(" of them reused")[0].split()[-1])
    assert reused >= len(engine.chat_prompt(messages[:2]))  # the whole first turn


def test_answers_are_sampled(folder: Path) -> None:
    """By default, with a seed, and with the log probabilities of each token."""
    options = ("--max-tokens", "5", "--seed", "3")
    code, out, err = chat(folder, "Hello\n", *options, "--logprobs", "2")
    assert code == 0 and out != chat(folder, "Hello\n", "--max-tokens", "5", "--temperature", "0")[1]
    lines = [line for line in err.splitlines() if line.count(" | ") == 2]
    assert len(lines) == 5 and all(" -" in part for line in lines for part in line.split(" | "))
    assert chat(folder, "Hello\n", *options)[1] == out
    code, _, err = chat(folder, "Hello\n", "--top-p", "2")
    assert code == 2 and "error: top_p is 2.0; it must be a number from 0 to 1" in err


def test_a_full_context_is_said_and_nothing_is_lost(folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "kept.json"
    lines = f"Hello\n{'long ' * 40}\n/save {file}\n/reset\nHello\n"
    code, _, err = chat(folder, lines, *GREEDY, "--max-context", "60", "--max-tokens", "4")
    assert code == 0
    assert "The answer was cut after 4 tokens; see --max-tokens." in err
    assert "the context holds 60; /reset begins a new one" in err and NOT_PART in err
    kept = json.loads(file.read_text())["messages"]
    assert len(kept) == 2 and kept[0]["content"] == "Hello"  # the answered turn whole, of the other one nothing
    code, _, err = chat(folder, "Hello\n", *GREEDY, "--max-context", "60")
    assert "The context of 60 tokens is full: /reset begins a new conversation" in err and "--max-tokens" not in err


def test_a_model_without_chat_template(tmp_path: Path) -> None:
    folder = write_folder(tmp_path, make_config(vocab_size=300))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    del settings["chat_template"]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    code, _, err = chat(folder, "Hello\n")
    assert code == 2 and "error: this model has no chat template" in err and "flashformer generate" in err


# NOTE: where the tests run in the background, SIGINT is ignored, and children inherit that.
IN_TERMINAL = """
import fcntl, signal, termios
signal.signal(signal.SIGINT, signal.default_int_handler)
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
from flashformer.cli import main
main()
"""


def test_a_person_at_a_terminal(folder: Path) -> None:
    """In a real terminal: the prompt, an answer, lines remembered, Ctrl-C twice."""
    ours, theirs = pty.openpty()
    command = [sys.executable, "-c", IN_TERMINAL, "chat", str(folder), "--device", "cpu", *GREEDY, "--max-tokens", "3"]
    process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True)
    os.close(theirs)
    try:
        for typed, shown in (
            ("", "> "),
            ("Hello\n", "--max-tokens.\r\n> "),
            ("\x1b[A", "Hello"),  # the arrow that goes back in the history
            ("\x03", "Ctrl-C again or Ctrl-D leaves.\r\n> "),
        ):
            press(process.pid, ours, typed)
            until(ours, shown)
        press(process.pid, ours, "\x03")
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait()
        os.close(ours)


def press(process: int, terminal: int, keys: str) -> None:
    """Type as a person would, once the program sleeps: a Ctrl-C while readline is still busy with the key before waits for the next key."""
    while Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] not in "SZ":
        time.sleep(1e-3)
    os.write(terminal, keys.encode())


def until(terminal: int, text: str, seconds: float = 60.0) -> None:
    """Read what a terminal shows until `text` has appeared."""
    shown, end = "", time.monotonic() + seconds
    while text not in shown:
        assert time.monotonic() < end, f"{text!r} did not come: {shown!r}"
        if select.select([terminal], [], [], 0.1)[0]:
            shown += os.read(terminal, 4096).decode(errors="replace")
