"""The tokenizer in GGUF metadata, built as a `tokenizers.Tokenizer`.

Two kinds: `gpt2` is byte-level BPE with merges and a named pre-tokenizer; `llama` is SentencePiece BPE, whose merges follow
from the tokens' scores. The regular expressions are those of the models' own tokenizer.json files.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeGuard

import numpy as np

from ..errors import CheckpointError
from . import shown

if TYPE_CHECKING:
    import tokenizers

_TOKEN_LIMIT = 1024  # characters of one token; the longest of real vocabularies are runs of a few hundred spaces
_UNKNOWN, _CONTROL, _USER_DEFINED = 2, 3, 4  # tokenizer.ggml.token_type

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_DIGITS = r"\p{N}"  # every digit is a piece of its own
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", _DIGITS)

LLAMA3_NAMES = ("llama-bpe", "llama3", "llama-v3")

# tokenizer.ggml.pre -> the expressions that split a text, one after the other.
_SPLITS: dict[str, tuple[str, ...]] = {
    "default": (_GPT2,),
    "gpt-2": (_GPT2,),
    "smollm": (_DIGITS, _GPT2),
    **dict.fromkeys(LLAMA3_NAMES, (_LLAMA3,)),
    "qwen2": (_QWEN2,),
    "deepseek-r1-qwen": (_QWEN2,),
    "tekken": (_TEKKEN,),
}
_NORMALIZED = ("qwen2", "deepseek-r1-qwen")  # Unicode form NFC first
_WHOLE_WORDS_FIRST = (*LLAMA3_NAMES, "tekken")  # a piece that is a token is not built from merges


def build_backend(metadata: Mapping[str, Any]) -> tokenizers.Tokenizer:
    """The tokenizer that `tokenizer.ggml.*` describe, its special tokens added; CheckpointError if it cannot be built."""
    tokens = metadata.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, list) or not tokens:
        raise CheckpointError("GGUF metadata: no tokenizer.ggml.tokens: this file holds no tokenizer")
    longest = max(tokens, key=len)
    if len(longest) > _TOKEN_LIMIT:
        raise CheckpointError(f"GGUF metadata: the token {shown(longest)} is longer than {_TOKEN_LIMIT} characters")
    types = metadata.get("tokenizer.ggml.token_type")
    if types is not None and (not _numbers(types, "iu") or len(types) != len(tokens)):
        raise CheckpointError("GGUF metadata: tokenizer.ggml.token_type must be an integer for each token")
    kind = metadata.get("tokenizer.ggml.model")
    if not isinstance(kind, str) or kind not in ("gpt2", "llama"):
        raise CheckpointError(f"GGUF metadata: tokenizer.ggml.model = {shown(kind)} is not supported; gpt2 and llama are")
    vocab: dict[str, int] = {}
    for index, token in enumerate(tokens):
        vocab.setdefault(token, index)
    from ..tokenizer import guard

    with guard(f"GGUF metadata: the {kind} tokenizer cannot be built"):
        backend = _byte_level(metadata, vocab) if kind == "gpt2" else _sentencepiece(metadata, tokens, vocab, types)
        _add_special(backend, tokens, types)
    return backend


def _byte_level(metadata: Mapping[str, Any], vocab: dict[str, int]) -> tokenizers.Tokenizer:
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    pre = metadata.get("tokenizer.ggml.pre")
    if not isinstance(pre, str) or pre not in _SPLITS:
        raise CheckpointError(
            f"GGUF metadata: tokenizer.ggml.pre = {shown(pre)} is not supported; supported are {', '.join(_SPLITS)}"
            + ("; convert the model again with a current llama.cpp, which records it" if pre is None else "")
        )
    lines = metadata.get("tokenizer.ggml.merges")
    if not isinstance(lines, list):
        raise CheckpointError("GGUF metadata: tokenizer.ggml.merges is missing")
    merges = []
    for line in lines:
        left, space, right = line.partition(" ")
        if not space or not left or not right or " " in right:
            raise CheckpointError(f"GGUF metadata: tokenizer.ggml.merges: {shown(line)} is not a pair of tokens")
        merges.append((left, right))
    backend = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=pre in _WHOLE_WORDS_FIRST))
    if pre in _NORMALIZED:
        backend.normalizer = normalizers.NFC()
    splits = [pre_tokenizers.Split(Regex(split), behavior="isolated") for split in _SPLITS[pre]]
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([*splits, to_bytes])
    backend.decoder = decoders.ByteLevel()
    return backend


def _sentencepiece(
    metadata: Mapping[str, Any], tokens: list[str], vocab: dict[str, int], types: np.ndarray | None
) -> tokenizers.Tokenizer:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    scores = metadata.get("tokenizer.ggml.scores")
    if not _numbers(scores, "f") or len(scores) != len(tokens) or not np.isfinite(scores).all():
        raise CheckpointError("GGUF metadata: tokenizer.ggml.scores must be a finite number for each token")
    # SentencePiece merges the neighbours whose token has the best score, the leftmost of equals; as BPE, a merge's rank is
    # its token's place by score. Every way to cut a token into two tokens is a merge of that rank.
    merges = []
    for index in np.argsort(-scores, kind="stable").tolist():
        token = tokens[index]
        if vocab[token] != index or (types is not None and types[index] in (_UNKNOWN, _CONTROL)):
            continue
        pairs = [(token[:i], token[i:]) for i in range(1, len(token)) if token[:i] in vocab and token[i:] in vocab]
        merges += sorted(pairs, key=lambda pair: (vocab[pair[0]], vocab[pair[1]]))
    unknown = next((tokens[i] for i in np.flatnonzero(types == _UNKNOWN).tolist()), None)
    backend = Tokenizer(models.BPE(vocab=vocab, merges=merges, fuse_unk=True, byte_fallback=True, unk_token=unknown))
    add_space = flag(metadata, "tokenizer.ggml.add_space_prefix", True)
    scheme = "first" if add_space else "never"
    backend.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme=scheme, split=False)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*steps, decoders.Strip(content=" ", left=1)] if add_space else steps)
    return backend


def _add_special(backend: tokenizers.Tokenizer, tokens: list[str], types: np.ndarray | None) -> None:
    """Control tokens are special (and not shown); tokens defined by the user are matched whole like them, but shown."""
    from tokenizers import AddedToken

    if types is None:
        return
    # One call for each kind: every call builds the matcher of all added tokens again.
    for kind, add in ((_CONTROL, backend.add_special_tokens), (_USER_DEFINED, backend.add_tokens)):
        names = (tokens[index] for index in np.flatnonzero(types == kind).tolist())
        add([AddedToken(name, normalized=False, special=kind == _CONTROL) for name in names if name])


def flag(metadata: Mapping[str, Any], key: str, default: bool) -> bool:
    """A truth value of the metadata; CheckpointError if it is something else."""
    value = metadata.get(key, default)
    if not isinstance(value, bool):
        raise CheckpointError(f"GGUF metadata: {key} = {shown(value)} must be true or false")
    return value


def _numbers(value: object, kinds: str) -> TypeGuard[np.ndarray]:
    """Whether a metadata value is an array of numbers of these numpy kinds."""
    return isinstance(value, np.ndarray) and value.dtype.kind in kinds
