"""Tokenizers from folders and GGUF files, decoding of streams, and chat templates that may be hostile."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from flashformer.chat import render
from flashformer.checkpoint import open_checkpoint
from flashformer.checkpoint.gguf_file import GGUFFile
from flashformer.checkpoint.gguf_tokenizer import build_backend
from flashformer.config import ModelConfig, parse_config
from flashformer.errors import CheckpointError, FlashFormerError, InputError
from flashformer.tokenizer import Tokenizer, from_folder, from_gguf
from fuzzing import bounded_memory
from model_files import byte_alphabet, make_config, vocabulary, write_folder, write_gguf

CONFIG = parse_config(make_config())
TEXTS = (
    "",
    " ",
    "The capital of France is Paris.",
    "  two  spaces\n\n\n\ttab \r\n end  ",
    "It's 2024; we've 1,234.5 reasons, don't we?",
    "naïve café, Ångström, e\u0301 (not composed)",
    "漢字かな交じり文 한국어 עברית العربية हिन्दी ไทย",
    "🙂👩‍👩‍👧‍👦🏳️‍🌈🇫🇷",
    "def f(x):\n    return {'a': [x ** 2]}  # code\n",
    "a\0b\x01\x7f\u00a0\u200b\ufeff\U0010ffff",
    "<|not_special|> <s> </s> <unk>",
    "x" * 3000,
)


def random_texts(count: int, seed: int) -> Iterator[str]:
    """Texts of characters from all planes of Unicode, and of plain ones."""
    rng = random.Random(seed)
    for _ in range(count):
        limit = rng.choice((0x80, 0x800, 0x10000, 0x110000))
        points = (rng.randrange(limit) for _ in range(rng.randrange(40)))
        yield "".join(chr(p) for p in points if not 0xD800 <= p < 0xE000)


@pytest.fixture(scope="session")
def smollm2(demo_model: Path) -> Tokenizer:
    with open_checkpoint(demo_model) as checkpoint:
        return checkpoint.tokenizer()


@pytest.fixture(scope="session")
def whole_texts(demo_model: Path) -> list[str]:
    """Texts whose bytes SmolLM2's vocabulary has: it lacks some, rare ones, and passes over them like the original."""
    from tokenizers.pre_tokenizers import ByteLevel

    known = set(GGUFFile(demo_model).metadata["tokenizer.ggml.tokens"])
    to_bytes = ByteLevel(add_prefix_space=False, use_regex=False)
    candidates = [*TEXTS, *random_texts(1_000, seed=1)]
    return [text for text in candidates if known.issuperset("".join(piece for piece, _ in to_bytes.pre_tokenize_str(text)))]


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("model"), make_config())


# --- SmolLM2, whose ids are published ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("The capital of France is", [504, 3575, 282, 4649, 314]),
        ("Hello, world!", [19556, 28, 905, 17]),
        ("<|im_start|>user\nHi<|im_end|>\n", [1, 4093, 198, 26843, 2, 198]),
        ("2024 was 365 days", [34, 32, 34, 36, 436, 216, 35, 38, 37, 2009]),  # a token for each digit
    ],
)
def test_smollm2_ids(smollm2: Tokenizer, text: str, ids: list[int]) -> None:
    assert smollm2.encode(text) == ids


def test_smollm2_round_trip(smollm2: Tokenizer, whole_texts: list[str]) -> None:
    assert len(whole_texts) > 500
    for text in whole_texts:
        assert smollm2.decode(smollm2.encode(text)) == text
    assert (smollm2.bos_id, smollm2.eos_ids) == (1, (2,))


def test_smollm2_equals_the_library(smollm2: Tokenizer, demo_model: Path) -> None:
    """The same vocabulary and merges with the pre-tokenizer that the model's own tokenizer.json names."""
    from tokenizers import AddedToken, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as Backend

    fields = gguf.GGUFReader(demo_model).fields
    tokens, merges = (fields[f"tokenizer.ggml.{key}"].contents() for key in ("tokens", "merges"))
    kinds = fields["tokenizer.ggml.token_type"].contents()
    theirs = Backend(models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=[tuple(m.split(" ")) for m in merges]))
    digits = pre_tokenizers.Digits(individual_digits=True)
    theirs.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)])
    theirs.decoder = decoders.ByteLevel()
    control = [t for t, kind in zip(tokens, kinds, strict=True) if kind == gguf.TokenType.CONTROL]
    theirs.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in control])
    for text in (*TEXTS, *random_texts(300, seed=2), f"a{control[0]}b {control[-1]}"):
        ids = smollm2.encode(text)
        assert ids == theirs.encode(text).ids
        assert smollm2.decode(ids) == theirs.decode(ids)


def test_smollm2_chat(smollm2: Tokenizer) -> None:
    prompt = smollm2.apply_chat_template([{"role": "user", "content": "What is the capital of France?"}])
    assert prompt == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
    )
    ids = smollm2.encode(prompt, add_special=False)
    assert ids[:3] == [1, 9690, 198] and ids[-4:] == [1, 520, 9531, 198] and ids.count(2) == 2


# --- Streams ----------------------------------------------------------------------------------------------------------------


def stream(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    decoder = tokenizer.stream_decoder()
    return [*(decoder.push(i) for i in ids), decoder.finish()]


def test_stream_yields_whole_characters(smollm2: Tokenizer, whole_texts: list[str]) -> None:
    for text in whole_texts:
        pieces = stream(smollm2, smollm2.encode(text))
        assert "".join(pieces) == text
        assert "\N{REPLACEMENT CHARACTER}" in text or not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)
    family = smollm2.encode("👩‍👩‍👧‍👦")
    assert len(family) > len([piece for piece in stream(smollm2, family) if piece])  # some tokens end within a character


def test_stream_of_any_ids(smollm2: Tokenizer) -> None:
    """Random ids, from which bytes arise that are no characters, at length too."""
    rng = random.Random(4)
    for most in (49152, 400) * 60:
        ids = [rng.randrange(most) for _ in range(rng.randrange(120))]
        pieces = stream(smollm2, ids)
        assert "".join(pieces) == smollm2.decode(ids)
    alone = smollm2.encode("🙂")  # four bytes; its first two never become a character
    pieces = stream(smollm2, [*alone[:-1] * 40, *smollm2.encode("ok")])
    assert "".join(pieces[:-2]), "a stream of broken characters is not held back for ever"
    assert "".join(pieces).endswith("ok")


def test_stream_passes_over_special_tokens(smollm2: Tokenizer) -> None:
    first, second = smollm2.encode("é")[:1], smollm2.encode("Hi")
    assert "".join(stream(smollm2, [1, *second, 2, 0])) == "Hi"
    assert stream(smollm2, []) == [""]
    assert "".join(stream(smollm2, [*first, *second])) == smollm2.decode([*first, *second])


# --- Folders ----------------------------------------------------------------------------------------------------------------


def test_folder(folder: Path, tmp_path: Path) -> None:
    """The tokenizer of a folder is that of a GGUF file of the same model."""
    tokenizer = from_folder(folder, CONFIG)
    assert (tokenizer.bos_id, tokenizer.eos_ids, tokenizer.has_chat_template) == (0, (2,), True)
    with open_checkpoint(write_gguf(tmp_path / "m.gguf", make_config())) as checkpoint:
        other = checkpoint.tokenizer()
    messages = [{"role": "user", "content": "then he ran in the rain"}]
    prompt = tokenizer.apply_chat_template(messages)
    assert prompt == other.apply_chat_template(messages) == "<|start|>user\nthen he ran in the rain<|end|>\n<|start|>assistant\n"
    for text in (prompt, *TEXTS, *random_texts(50, seed=5)):
        ids = tokenizer.encode(text)
        assert ids == other.encode(text)
        assert tokenizer.decode(ids) == other.decode(ids)
    assert tokenizer.encode(prompt)[0] == 1 and tokenizer.encode(prompt).count(1) == 2  # special tokens, matched whole


def test_truncation_and_padding_left_in_a_file_are_ignored(tmp_path: Path) -> None:
    import tokenizers

    path = write_folder(tmp_path, make_config()) / "tokenizer.json"
    backend = tokenizers.Tokenizer.from_file(str(path))
    backend.enable_truncation(4)
    backend.enable_padding(length=1000)
    backend.save(str(path))
    assert len(from_folder(tmp_path, CONFIG).encode("abcdefgh")) == 8


def test_ends_of_text_come_from_both_files(tmp_path: Path) -> None:
    write_folder(tmp_path, make_config(eos_token_id=5))
    assert from_folder(tmp_path, parse_config(make_config(eos_token_id=5))).eos_ids == (5, 2)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("tokenizer.json", None, r"no tokenizer\.json here"),
        ("tokenizer.json", "{}", "not a valid tokenizer"),
        ("tokenizer.json", "nonsense", "not valid JSON"),
        ("tokenizer_config.json", "[]", "must hold a JSON object"),
        ("tokenizer_config.json", '{"chat_template": 5}', "chat_template: must be a text"),
        ("tokenizer_config.json", json.dumps({"chat_template": "x" * (1 << 21)}), "chat_template: must be a text of at most"),
        ("chat_template.jinja", "x" * (1 << 23), "too large for a chat template"),
        ("chat_template.jinja", b"\xff", "cannot be read"),
    ],
)
def test_bad_files_are_refused(tmp_path: Path, file: str, content: str | bytes | None, message: str) -> None:
    path = write_folder(tmp_path, make_config()) / file
    if content is None:
        path.unlink()
    else:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(CheckpointError, match=message):
        from_folder(tmp_path, CONFIG)


def test_places_of_chat_templates(tmp_path: Path) -> None:
    settings = write_folder(tmp_path, make_config()) / "tokenizer_config.json"
    named = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "{{ bos_token }}{{ messages[0].content }}"}]
    settings.write_text(json.dumps({"chat_template": named, "bos_token": {"content": "<|start|>"}}))
    assert from_folder(tmp_path, CONFIG).apply_chat_template([{"role": "user", "content": "x"}]) == "<|start|>x"
    (tmp_path / "chat_template.jinja").write_text("newer")
    assert from_folder(tmp_path, CONFIG).apply_chat_template([]) == "newer"
    (tmp_path / "chat_template.jinja").unlink()
    settings.write_text("{}")
    without = from_folder(tmp_path, CONFIG)
    assert not without.has_chat_template
    with pytest.raises(InputError, match="no chat template"):
        without.apply_chat_template([])


def test_input_that_cannot_be_served(folder: Path) -> None:
    tokenizer = from_folder(folder, CONFIG)
    with pytest.raises(InputError, match="not valid Unicode"):
        tokenizer.encode("a\ud800")
    for ids in ([-1], [1 << 32]):
        with pytest.raises(InputError, match="negative or too large"):
            tokenizer.decode(ids)
    assert tokenizer.decode([3, 1_000_000]) == tokenizer.decode([3])


# --- GGUF metadata ----------------------------------------------------------------------------------------------------------


def byte_level(**changes: Any) -> dict[str, Any]:
    """Metadata of a byte-level tokenizer; None removes a key (without its prefix)."""
    tokens, merges = vocabulary(288)
    keys = {"model": "gpt2", "pre": "gpt-2", "tokens": tokens, "merges": merges, "token_type": np.ones(288, np.int32), **changes}
    return {f"tokenizer.ggml.{key}": value for key, value in keys.items() if value is not None}


@pytest.mark.parametrize(
    ("pre", "pieces"),
    [
        ("gpt-2", ["It", "'s", " 1234", " CAN", "'", "T", "  ", " x", ".", "\n\n"]),
        ("smollm", ["It", "'s", " ", "1", "2", "3", "4", " CAN", "'", "T", "  ", " x", ".", "\n\n"]),
        ("llama-bpe", ["It", "'s", " ", "123", "4", " CAN", "'T", "  ", " x", ".\n\n"]),
        ("qwen2", ["It", "'s", " ", "1", "2", "3", "4", " CAN", "'T", "  ", " x", ".\n\n"]),
        ("tekken", ["It", "'s", " ", "1", "2", "3", "4", " CAN", "'T", "  ", " x", ".\n\n"]),
    ],
)
def test_pre_tokenizers_split_as_their_models_do(pre: str, pieces: list[str]) -> None:
    text = "It's 1234 CAN'T   x.\n\n"
    found = build_backend(byte_level(pre=pre)).pre_tokenizer.pre_tokenize_str(text)
    assert [text[begin:end] for _, (begin, end) in found] == pieces


def test_qwen2_composes_characters() -> None:
    tokenizer = from_gguf(byte_level(pre="qwen2"), CONFIG)
    assert tokenizer.decode(tokenizer.encode("e\u0301")) == "é"


@pytest.mark.parametrize(
    ("pre", "changes", "begins", "ends"),
    [
        ("gpt-2", {}, False, False),
        ("llama-bpe", {}, True, False),  # the default of llama.cpp for this vocabulary
        ("llama-bpe", {"add_bos_token": False}, False, False),
        ("gpt-2", {"add_bos_token": True, "add_eos_token": True}, True, True),
    ],
)
def test_bos_and_eos_are_added_as_the_file_says(pre: str, changes: dict[str, Any], begins: bool, ends: bool) -> None:
    tokenizer = from_gguf(byte_level(pre=pre, **changes), CONFIG)
    plain = tokenizer.encode("he", add_special=False)
    assert tokenizer.encode("he") == [*([0] if begins else []), *plain, *([2] if ends else [])]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens": None}, r"no tokenizer\.ggml\.tokens"),
        ({"tokens": []}, r"no tokenizer\.ggml\.tokens"),
        ({"model": "bert"}, "'bert' is not supported"),
        ({"model": None}, "None is not supported"),
        ({"pre": "dbrx"}, "'dbrx' is not supported; supported are"),
        ({"pre": None}, "convert the model again"),
        ({"merges": None}, "merges is missing"),
        ({"merges": ["a"]}, "not a pair of tokens"),
        ({"merges": ["nothing here"]}, "cannot be built"),
        ({"token_type": np.ones(3, np.int32)}, "an integer for each token"),
        ({"token_type": np.ones(288, np.float32)}, "an integer for each token"),
        ({"tokens": ["x" * 2000] * 288}, "longer than 1024 characters"),
        ({"add_bos_token": "yes"}, "must be true or false"),
        ({"model": "llama", "scores": None}, "scores must be a finite number"),
        ({"model": "llama", "scores": np.full(288, np.nan, np.float32)}, "scores must be a finite number"),
    ],
)
def test_bad_metadata_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        from_gguf(byte_level(**changes), CONFIG)


def test_only_control_tokens_are_hidden() -> None:
    kinds = np.ones(288, np.int32)
    kinds[:2] = gguf.TokenType.CONTROL, gguf.TokenType.USER_DEFINED
    tokenizer = from_gguf(byte_level(token_type=kinds), CONFIG)
    ids = tokenizer.encode("a<|start|>b<|endoftext|>c<|end|>")
    assert ids[1] == 1 and ids[3] == 0 and 2 not in ids
    assert tokenizer.decode(ids) == "a<|start|>bc<|end|>"


def test_many_control_tokens_are_added_quickly() -> None:
    tokens = [*byte_alphabet(), *(f"<|{i}|>" for i in range(20_000))]
    kinds = np.full(len(tokens), gguf.TokenType.CONTROL, np.int32)
    kinds[:256] = gguf.TokenType.NORMAL
    start = time.process_time()
    tokenizer = from_gguf(byte_level(tokens=tokens, merges=[], token_type=kinds), CONFIG)
    assert tokenizer.encode("<|19999|>") == [20_255]
    assert time.process_time() - start < 5


SPACE = "\N{LOWER ONE EIGHTH BLOCK}"


def sentencepiece(**changes: Any) -> dict[str, Any]:
    """Metadata of a SentencePiece tokenizer: unknown, bos, eos, the bytes, and pieces with random scores."""
    rng = random.Random(6)
    letters = ["a", "b", "c", "t", "h", "e", SPACE]
    pieces = {"".join(rng.choices(letters, k=rng.choice((2, 2, 3, 4)))) for _ in range(150)} | {"th", "the", SPACE + "the"}
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *sorted(pieces), *letters]
    scores = [0.0] * 259 + [-float(i) for i in rng.sample(range(len(tokens) - 259), len(tokens) - 259)]
    kinds = [2, 3, 3, *[6] * 256, *[1] * (len(tokens) - 259)]
    keys = {"model": "llama", "tokens": tokens, "scores": np.array(scores, np.float32), "token_type": np.array(kinds, np.int32)}
    return {f"tokenizer.ggml.{key}": value for key, value in {**keys, **changes}.items()}


def merge_by_score(text: str, metadata: dict[str, Any]) -> list[int]:
    """SentencePiece's BPE, said directly: join the neighbours whose token scores best, the leftmost of equals, until none do."""
    tokens = metadata["tokenizer.ggml.tokens"]
    ids = {token: i for i, token in enumerate(tokens)}
    scores, parts = metadata["tokenizer.ggml.scores"], list(text)
    while True:
        joined = [(-scores[ids[a + b]], i) for i, (a, b) in enumerate(pairwise(parts)) if a + b in ids]
        if not joined:
            break
        i = min(joined)[1]
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    found: list[int] = []
    for part in parts:
        found += [ids[part]] if part in ids else [ids[f"<0x{byte:02X}>"] for byte in part.encode()]
    return found


def test_sentencepiece_merges_by_score() -> None:
    metadata = sentencepiece()
    config = ModelConfig(**{**vars(CONFIG), "bos_token_id": 1, "eos_token_ids": (2,)})
    tokenizer = from_gguf(metadata, config)
    rng = random.Random(7)
    for _ in range(300):
        text = rng.choice("abcthe漢") + "".join(rng.choices("abcthe  é漢", k=rng.randrange(25)))
        expected = merge_by_score(SPACE + text.replace(" ", SPACE), metadata)
        assert tokenizer.encode(text) == [1, *expected]  # bos is the default of this kind
        assert tokenizer.decode(expected) == text
        assert "".join(stream(tokenizer, expected)) == text
    assert tokenizer.encode(" the") == tokenizer.encode("the")  # as in these models' tokenizer.json: one space leads, not two
    plain = from_gguf({**metadata, "tokenizer.ggml.add_space_prefix": False}, config)
    assert plain.encode("the", add_special=False) == merge_by_score("the", metadata)


# --- Chat templates ---------------------------------------------------------------------------------------------------------


def test_template_features() -> None:
    """What templates on the hub use, as transformers renders it."""
    template = (
        "{% for m in messages if m.role != 'skip' %}\n{{ loop.index ~ ':' ~ m['role'] | upper }}{% if not loop.last %},{% endif %}\n"
        "{% if m.stop is defined %}{% break %}{% endif %}\n{% endfor %}\n"
        "{% set ns = namespace(n=0) %}{% for i in range(3) %}{% set ns.n = ns.n + i * 2 %}{% endfor %}\n"
        "{% macro twice(x) %}{{ x }}{{ x * 2 }}{% endmacro %}{{ twice('a') }} {{ ns.n }} {{ {'k': '<é>'} | tojson(indent=1) }}\n"
        "{% set block %}{{ 'a,b'.split(',')[-1].strip() }}{% endset %}{{ block }}{{ none ~ 1 }}{{ tools is none }}\n"
        "{{ '%s and {}' % 'x' }}{{ '{}-{}'.format(1, 'y') }}{{ messages | map(attribute='role') | join('+') }}{{ 7 % 4 }}"
    )
    messages = [{"role": "system"}, {"role": "skip"}, {"role": "user", "stop": 1}, {"role": "never"}]
    assert render(template, {"messages": messages}) == (
        '1:SYSTEM,2:USER,aaa 6 {\n "k": "<é>"\n}\nbNone1True\nx and {}1-ysystem+skip+user+never3'
    )
    assert len(render("{{ strftime_now('%Y') }}", {})) == 4


def test_template_may_refuse_messages() -> None:
    with pytest.raises(InputError, match="refuses these messages: roles must alternate"):
        render("{{ raise_exception('roles must alternate') }}", {})


HOSTILE = {
    "loops in loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "calls in calls": "{% macro f(n) %}{% if n > 1 %}{{ f(n - 1) }}{{ f(n - 2) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "endless recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "recursive loop": "{% for m in [[1]] recursive %}{{ loop([[1]]) }}{{ loop([[1]]) }}{% endfor %}",
    "large range": "{{ range(10 ** 9) | list }}",
    "doubling by ~": "{% set n = namespace(x='a') %}{% for i in range(64) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
    "doubling by +": "{% set n = namespace(x='a') %}{% for i in range(64) %}{% set n.x = n.x + n.x %}{% endfor %}",
    "doubling a list": "{% set n = namespace(x=[1]) %}{% for i in range(64) %}{% set n.x = n.x + n.x %}{% endfor %}",
    "doubling by capture": "{% set n = namespace(x='a') %}{% for i in range(64) %}{% set y %}{{ n.x }}{{ n.x }}{% endset %}"
    "{% set n.x = y %}{% endfor %}",
    "doubling by macro": "{% macro f(x) %}{{ x }}{{ x }}{% endmacro %}{% set n = namespace(x='a') %}"
    "{% for i in range(64) %}{% set n.x = f(n.x) %}{% endfor %}",
    "replacing": "{% set x = 'a' * 1000000 %}{{ x.replace('a', x) | length }}",
    "replacing by filter": "{% set x = 'a' * 1000000 %}{{ x | replace('a', x) | length }}",
    "joining": "{% set x = 'a' * 1000000 %}{{ x.join(x) | length }}",
    "repeating": "{{ 'a' * 10 ** 9 * 10 ** 9 }}",
    "repeating a list": "{{ 10 ** 10 * [1] }}",
    "power": "{{ 9 ** 9 ** 9 }}",
    "width of a filter": "{{ 'a' | center(10 ** 10) }}",
    "width of a method": "{{ 'a'.ljust(10 ** 10) }}",
    "width in format": "{{ '{:9999999999}'.format(1) }}",
    "width in a value": "{{ '{:{}}'.format(1, '9999999999') }}",
    "width in %": "{{ '%9999999999d' % 1 }}",
    "width in *": "{{ '%*d' % (10 ** 10, 1) }}",
    "width in the filter": "{{ '%9999999999d' | format(1) }}",
    "constants": "{{ ('a' * 9999 ~ 'b') | replace('a', 'a' * 999999) }}",
    "much text": "{% set x = 'a' * 1000000 %}{% for i in range(10000) %}{{ x }}{% endfor %}",
    "attributes": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "attributes by filter": "{{ (messages | attr('__class__')).mro() }}",
    "attributes in format": "{{ '{0.__class__.__mro__}'.format('') }}",
    "attributes by map": "{{ [''] | map(attribute='__class__') | list | first | string | length }}{{ cycler.__init__.__globals__.os }}",
    "change of an argument": "{{ messages.append(1) }}",
    "include": "{% include '/etc/passwd' %}",
    "import": "{% import 'os' as os %}{{ os }}",
    "nesting": "{{ " + "(" * 50_000 + "1" + ")" * 50_000 + " }}",
    "syntax": "{% for %}",
    "random text": "{{ lipsum(n=10000, max=10000) }}",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_template_is_stopped(name: str) -> None:
    """Soon, and within memory: a gigabyte is what one of these could take at the most."""
    messages = [{"role": "user", "content": "x"}]
    start = time.process_time()
    with bounded_memory(1 << 30), pytest.raises(FlashFormerError, match="chat template"):
        render(HOSTILE[name], {"messages": messages})
    assert time.process_time() - start < 10
    assert messages == [{"role": "user", "content": "x"}]
