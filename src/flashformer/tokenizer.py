"""Text to token ids and back, and chat templates: what comes with a model, used but not trusted."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .config import ModelConfig, read_json
from .errors import CheckpointError, InputError

if TYPE_CHECKING:
    from collections.abc import Iterator

    import tokenizers

_TEMPLATE_LIMIT = 1 << 20  # characters of a chat template
_PENDING_LIMIT = 16  # tokens that a stream holds back while its text ends in an incomplete character
_CHARACTER = 4  # bytes of the longest character in UTF-8, and so tokens


class Tokenizer:
    """Encodes and decodes with a `tokenizers.Tokenizer`; ids are those of the model."""

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        bos_id: int | None,
        eos_ids: Iterable[int],
        chat_template: str | None = None,
        special_tokens: Mapping[str, str] | None = None,
        prefix: Sequence[int] = (),
        suffix: Sequence[int] = (),
    ) -> None:
        """`prefix` and `suffix` are the ids that `encode` adds itself, where the backend has no post-processor that does.

        `special_tokens` (bos_token, ...) are variables of the chat template.
        """
        self._backend = backend
        self.bos_id = bos_id
        self.eos_ids = tuple(dict.fromkeys(eos_ids))
        self.chat_template = chat_template
        self._special_tokens = dict(special_tokens or {})
        self._prefix, self._suffix = list(prefix), list(suffix)

    @property
    def has_chat_template(self) -> bool:
        """Whether `apply_chat_template` can be used."""
        return self.chat_template is not None

    def encode(self, text: str, add_special: bool = True) -> list[int]:
        """Token ids of a text; with `add_special`, as the model expects a text to begin (such as with its bos token).

        A text from `apply_chat_template` holds its special tokens already: use `add_special=False`. Raises InputError if
        the text is not valid Unicode.
        """
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise InputError(f"The text is not valid Unicode: {error.reason} at character {error.start}") from error
        with guard("the text cannot be encoded with this model's tokenizer"):
            ids = self._backend.encode(text, add_special_tokens=add_special).ids
        return [*self._prefix, *ids, *self._suffix] if add_special else list(ids)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids, without special tokens; ids that the model has but the tokenizer does not are passed over.

        Raises InputError for an id that no vocabulary can have.
        """
        if not all(0 <= i < 1 << 32 for i in ids):
            raise InputError("A token id is negative or too large")
        with guard("the ids cannot be decoded with this model's tokenizer"):
            return self._backend.decode(list(ids), skip_special_tokens=True)

    def stream_decoder(self) -> StreamDecoder:
        """A decoder of one sequence of ids as they are made."""
        added = self._backend.get_added_tokens_decoder()
        return StreamDecoder(self.decode, frozenset(i for i, token in added.items() if token.special))

    def apply_chat_template(self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True) -> str:
        """The prompt for a conversation ({"role": ..., "content": ...} each), special tokens written out as text.

        Raises InputError if there is no template or it refuses the messages, CheckpointError if the template is at fault.
        """
        if self.chat_template is None:
            raise InputError("This model has no chat template; give it a plain prompt")
        from .chat import render

        variables = {**self._special_tokens, "messages": [dict(message) for message in messages]}
        return render(self.chat_template, {**variables, "add_generation_prompt": add_generation_prompt})


class StreamDecoder:
    """Turns ids into text as they come, whole characters only. The pieces joined, with `finish`, are the text of all ids.

    A piece depends on the tokens before it (a leading space, a character of several tokens), so a window that begins with the
    tokens of the piece before is decoded again for each id; what the window adds is yielded once its characters are complete.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], skipped: frozenset[int]) -> None:
        """`decode` turns ids into text; it passes over the ids in `skipped`."""
        self._decode, self._skipped = decode, skipped
        self._window: list[int] = []
        self._known = 0  # ids of the window whose text has been yielded

    def push(self, token_id: int) -> str:
        """Take one id; returns the text that has become complete, often "" in the middle of a character."""
        if token_id in self._skipped:
            return ""
        self._window.append(token_id)
        text, end = self._new_text(), len(self._window)
        if not text or text.endswith("\N{REPLACEMENT CHARACTER}"):
            if end - self._known < _PENDING_LIMIT:
                return ""
            # So many tokens are no single character: all but the last few hold bytes that never make one.
            end -= _CHARACTER
            part = self._new_text(end)
            while end > self._known and not text.startswith(part):
                end -= 1
                part = self._new_text(end)
            if end == self._known:
                return ""
            text = part
        self._window, self._known = self._window[self._known :], end - self._known
        return text

    def finish(self) -> str:
        """The text still held back, incomplete characters as U+FFFD; the decoder is empty afterwards."""
        text = self._new_text()
        self._window, self._known = [], 0
        return text

    def _new_text(self, end: int | None = None) -> str:
        """The text of the window up to `end` that has not been yielded."""
        return self._decode(self._window[:end])[len(self._decode(self._window[: self._known])) :]


def from_folder(folder: Path, config: ModelConfig) -> Tokenizer:
    """The tokenizer of a Hugging Face folder: `tokenizer.json`, and the chat template beside it.

    Raises CheckpointError if a file is missing, malformed, or too large.
    """
    import tokenizers

    path = folder / "tokenizer.json"
    if not path.exists():
        raise CheckpointError(f"{folder}: no tokenizer.json here; save the tokenizer in this form with transformers first")
    read_json(path)  # bounds its size, and refuses what is not JSON with a message of ours
    with guard(f"{path}: not a valid tokenizer"):
        backend = tokenizers.Tokenizer.from_file(str(path))
        # Training leaves these in some files; they would cut or pad a prompt.
        backend.no_truncation()
        backend.no_padding()
    settings_path = folder / "tokenizer_config.json"
    settings = read_json(settings_path) if settings_path.exists() else {}
    special = {}
    for key in ("bos_token", "eos_token", "unk_token", "pad_token"):
        value = settings.get(key)
        value = value.get("content") if isinstance(value, dict) else value
        if isinstance(value, str):
            special[key] = value
    ids = {key: backend.token_to_id(token) for key, token in special.items()}
    bos = ids.get("bos_token") if config.bos_token_id is None else config.bos_token_id
    eos = ids.get("eos_token")
    eos_ids = (*config.eos_token_ids, *(() if eos is None else (eos,)))
    return Tokenizer(backend, bos, eos_ids, _folder_template(folder, settings), special)


def _folder_template(folder: Path, settings: Mapping[str, Any]) -> str | None:
    """The chat template of a folder: its own file (newer), or a text or list of named texts in the settings."""
    path = folder / "chat_template.jinja"
    if path.exists():
        try:
            if path.stat().st_size > 4 * _TEMPLATE_LIMIT:
                raise CheckpointError(f"{path}: too large for a chat template")
            return _template(path.read_text(encoding="utf-8"), str(path))
        except (OSError, UnicodeDecodeError) as error:
            raise CheckpointError(f"{path}: cannot be read ({error})") from error
    value = settings.get("chat_template")
    if isinstance(value, list):
        named = {str(entry.get("name")): entry.get("template") for entry in value if isinstance(entry, dict)}
        value = named.get("default")
    return _template(value, f"{folder / 'tokenizer_config.json'}: chat_template")


def _template(value: object, where: str) -> str | None:
    if value is None:
        return None
    if not isinstance(value, str) or len(value) > _TEMPLATE_LIMIT:
        raise CheckpointError(f"{where}: must be a text of at most {_TEMPLATE_LIMIT} characters")
    return value


def from_gguf(metadata: Mapping[str, Any], config: ModelConfig) -> Tokenizer:
    """The tokenizer in a GGUF file's metadata. Raises CheckpointError if it is missing, malformed, or of an unknown kind."""
    from .checkpoint.gguf_tokenizer import LLAMA3_NAMES, build_backend, flag

    backend = build_backend(metadata)
    bos, eos = config.bos_token_id, config.eos_token_ids
    # Where the file does not say, llama.cpp's defaults hold: SentencePiece and Llama 3 vocabularies begin with bos.
    begins = metadata["tokenizer.ggml.model"] == "llama" or metadata["tokenizer.ggml.pre"] in LLAMA3_NAMES
    add_bos = flag(metadata, "tokenizer.ggml.add_bos_token", begins)
    add_eos = flag(metadata, "tokenizer.ggml.add_eos_token", False)
    tokens = metadata["tokenizer.ggml.tokens"]
    special = {}
    for name, index in {"bos_token": bos, "eos_token": eos[0] if eos else None}.items():
        if index is not None and index < len(tokens):
            special[name] = tokens[index]
    return Tokenizer(
        backend,
        bos,
        eos,
        _template(metadata.get("tokenizer.chat_template"), "GGUF metadata: tokenizer.chat_template"),
        special,
        prefix=(bos,) if add_bos and bos is not None else (),
        suffix=(eos[0],) if add_eos and eos else (),
    )


@contextmanager
def guard(what: str) -> Iterator[None]:
    """Turns every failure of the tokenizers library within into a CheckpointError that begins with `what`.

    NOTE: a panic of the library arrives as an exception that derives from BaseException only.
    """
    try:
        yield
    except (KeyboardInterrupt, SystemExit, GeneratorExit, CheckpointError):
        raise
    except BaseException as error:
        raise CheckpointError(f"{what} ({str(error)[:200]})") from error
