"""A model's configuration: what `config.json` says, read strictly (GGUF metadata: `checkpoint/gguf_config.py`).

A key that changes the mathematics and is not understood is an error; keys known to be harmless are listed as such.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn

from .errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from .quant.scheme import Quantization


@dataclass(frozen=True)
class RopeScaling:
    """Frequency scaling of rotary embeddings (`linear`, or `llama3` as in Llama 3.1)."""

    kind: Literal["linear", "llama3"]
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 8192


@dataclass(frozen=True)
class ModelConfig:
    """Everything that the graph, the plan and the kernels need to know about a decoder-only transformer."""

    architecture: str  # Hugging Face class name, such as "LlamaForCausalLM"; chooses the file in models/
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    ffn_size: int
    vocab_size: int
    norm_eps: float
    rope_theta: float
    max_positions: int
    rope_scaling: RopeScaling | None = None
    tied_embeddings: bool = False
    qkv_bias: bool = False  # q, k and v projections have a bias
    output_bias: bool = False  # the attention's output projection has a bias
    mlp_bias: bool = False  # gate, up and down projections have a bias
    qk_norm: bool = False  # RMSNorm on each head of q and k before the rotation
    dtype: Literal["bfloat16", "float16"] = "bfloat16"  # what the kernel computes in; sums are float32
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    quantization: Quantization | None = None  # how the matrices of a Hugging Face folder are stored; None: plainly
    notes: tuple[str, ...] = ()  # what a user should know, such as a context limited to a sliding window


# --- Limits ----------------------------------------------------------------------------------------------------------------
# Bounds that every model must keep, by field: generous for real models, small enough that no size derived from them overflows.
LIMITS: dict[str, tuple[int, int]] = {
    "hidden_size": (1, 65_536),
    "num_layers": (1, 1_000),
    "num_heads": (1, 1_024),
    "num_kv_heads": (1, 1_024),
    "head_dim": (2, 1_024),
    "ffn_size": (1, 1_048_576),
    "vocab_size": (1, 1_048_576),
    "max_positions": (1, 16_777_216),
}

# --- config.json -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Family:
    """What a Hugging Face class fixes, or leaves to its configuration; defaults are those of the class in transformers."""

    model_type: str
    max_positions: int
    default_kv_heads: bool = False  # num_key_value_heads may be absent and is then num_attention_heads
    default_head_dim: int | None = None  # None: hidden_size / num_attention_heads
    qkv_bias: bool = False  # always there, whatever the configuration says
    bias_keys: bool = False  # attention_bias (q, k, v and output) is read
    mlp_bias_key: bool = False
    qk_norm: bool = False
    window: Literal["never", "always", "flag"] = "never"  # sliding_window: not read, read, read if use_sliding_window


FAMILIES = {
    "LlamaForCausalLM": _Family("llama", 2048, default_kv_heads=True, bias_keys=True, mlp_bias_key=True),
    "MistralForCausalLM": _Family("mistral", 131_072, window="always"),
    "Qwen2ForCausalLM": _Family("qwen2", 32_768, qkv_bias=True, window="flag"),
    "Qwen3ForCausalLM": _Family("qwen3", 32_768, default_head_dim=128, bias_keys=True, qk_norm=True, window="flag"),
}

# Keys that do not change the result: training, bookkeeping of other software, options of calls that we do not offer.
# fmt: off
_HARMLESS = frozenset({
    "_attn_implementation", "_attn_implementation_autoset", "_commit_hash", "_name_or_path", "attention_dropout",
    "attn_implementation", "classifier_dropout", "dtype", "id2label", "initializer_range", "is_llama_config",
    "keys_to_ignore_at_inference", "label2id", "max_window_layers", "model_type", "output_attentions",
    "output_hidden_states", "pad_token_id", "pretraining_tp", "problem_type", "return_dict", "torch_dtype",
    "transformers.js_config", "transformers_version", "unsloth_fixed", "unsloth_version", "use_cache",
})
# fmt: on

# Keys that change the result, with the only values at which they do not.
_NEUTRAL: dict[str, tuple[object, ...]] = {
    "attention_bias": (False, None),
    "auto_map": (None, {}),
    "chunk_size_feed_forward": (0,),
    "hidden_act": ("silu",),
    "is_decoder": (False, True),
    "is_encoder_decoder": (False,),
    "mlp_bias": (False, None),
    "partial_rotary_factor": (1.0, None),
    "rope_interleaved": (False, None),
    "sliding_window": (None,),
    "use_mrope": (False, None),
    "use_sliding_window": (False, None),
}

_ROPE_HARMLESS = frozenset({"rope_type", "type", "rope_theta"})
_MISSING = object()


class Keys:
    """Reads a mapping key by key and remembers which keys are still unread, so that none is ignored silently."""

    def __init__(self, mapping: Mapping[str, Any], where: str, prefix: str = "") -> None:
        self.mapping, self.where, self.prefix = mapping, where, prefix
        self.unread = set(mapping)

    def fail(self, key: str, reason: str) -> NoReturn:
        """Raise a ConfigError that names the key and its value."""
        value = self.mapping.get(self.prefix + key, _MISSING)
        shown = "" if value is _MISSING else f" = {repr(value)[:120]}"
        name = f"{self.prefix}{key}"[:120]
        raise ConfigError(f"{self.where}: {name if name.isprintable() else ascii(name)}{shown}: {reason}")

    def get(self, key: str, default: Any = _MISSING) -> Any:
        """The value of `key`, marked as read; `default` if the key is absent or null."""
        self.unread.discard(self.prefix + key)
        value = self.mapping.get(self.prefix + key)
        if value is None and default is _MISSING:
            self.fail(key, "the key is required")
        return default if value is None else value

    def integer(self, key: str, low: int, high: int, default: Any = _MISSING) -> Any:
        """An integer within [low, high] (or the default)."""
        value = self.get(key, default)
        if value is default and default is not _MISSING:
            return value
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            self.fail(key, f"must be an integer from {low} to {high}")
        return value

    def size(self, key: str, field: str, default: Any = _MISSING) -> Any:
        """An integer within the limits of the named `ModelConfig` field."""
        return self.integer(key, *LIMITS[field], default=default)

    def number(self, key: str, low: float, high: float, default: Any = _MISSING) -> float:
        """A finite number within [low, high]."""
        value = self.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
            self.fail(key, f"must be a number from {low:g} to {high:g}")
        return float(value)

    def flag(self, key: str, default: bool = False) -> bool:
        """A truth value."""
        value = self.get(key, default)
        if not isinstance(value, bool):
            self.fail(key, "must be true or false")
        return value

    def finish(self, harmless: Collection[str], neutral: Mapping[str, tuple[object, ...]]) -> None:
        """Refuse every key that was not read, unless it is harmless or at a neutral value."""
        for full in sorted(self.unread):
            key = full.removeprefix(self.prefix)
            if key in harmless:
                continue
            if key not in neutral:
                self.fail(key, "this key is not known; it may change the model's mathematics, so the model is refused")
            value = self.mapping[full]
            if not any(value == v and isinstance(value, bool) == isinstance(v, bool) for v in neutral[key]):
                allowed = " or ".join(repr(v) for v in neutral[key])
                self.fail(key, f"is supported only as {allowed}")


def parse_config(mapping: Mapping[str, Any]) -> ModelConfig:
    """The configuration that the content of a `config.json` describes, in the spelling of transformers 4 or 5.

    Raises ConfigError, naming key and value, for anything that is unsupported, out of range, contradictory, or not known.
    """
    keys = Keys(mapping, "config.json")
    architecture = _architecture(keys)
    family = FAMILIES[architecture]
    heads: int = keys.size("num_attention_heads", "num_heads")
    hidden: int = keys.size("hidden_size", "hidden_size")
    layers: int = keys.size("num_hidden_layers", "num_layers")
    default_kv_heads = heads if family.default_kv_heads or "num_key_value_heads" in mapping else _MISSING
    head_dim = keys.size("head_dim", "head_dim", default=family.default_head_dim)
    if head_dim is None:
        if hidden % heads:
            keys.fail("hidden_size", f"is not a multiple of num_attention_heads = {heads}, and head_dim is not given")
        head_dim = hidden // heads
    notes: list[str] = []
    max_positions: int = keys.size("max_position_embeddings", "max_positions", default=family.max_positions)
    window = _window(keys, family, layers)
    if window is not None and window < max_positions:
        notes.append(f"The context is limited to {window} tokens, the sliding window of this model, of {max_positions}.")
        max_positions = window
    rope_theta, scaling = _rope(keys)
    attention_bias = keys.flag("attention_bias") if family.bias_keys else False
    if family.qkv_bias and mapping.get("attention_bias") is True:
        keys.get("attention_bias")  # says what the family does anyway
    vocab: int = keys.size("vocab_size", "vocab_size")
    quantization = _quantization(keys)
    if quantization is not None:
        notes.extend(quantization.notes)
    config = ModelConfig(
        architecture=architecture,
        hidden_size=hidden,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=keys.size("num_key_value_heads", "num_kv_heads", default=default_kv_heads),
        head_dim=head_dim,
        ffn_size=keys.size("intermediate_size", "ffn_size"),
        vocab_size=vocab,
        norm_eps=keys.number("rms_norm_eps", 0.0, 1.0, default=1e-6),
        rope_theta=rope_theta,
        max_positions=max_positions,
        rope_scaling=scaling,
        tied_embeddings=keys.flag("tie_word_embeddings"),
        qkv_bias=family.qkv_bias or attention_bias,
        output_bias=attention_bias,
        mlp_bias=keys.flag("mlp_bias") if family.mlp_bias_key else False,
        qk_norm=family.qk_norm,
        dtype=_dtype(keys, notes),
        bos_token_id=keys.integer("bos_token_id", 0, vocab - 1, default=None),
        eos_token_ids=_token_ids(keys, "eos_token_id", vocab),
        quantization=quantization,
        notes=tuple(notes),
    )
    keys.finish(_HARMLESS, _NEUTRAL)
    return checked(config, keys.where)


def read_config(folder: Path) -> ModelConfig:
    """The configuration of a Hugging Face model folder; ids in `generation_config.json` also end a text.

    Raises CheckpointError if `config.json` is missing or is not JSON, ConfigError as `parse_config` does.
    """
    config = parse_config(read_json(folder / "config.json"))
    path = folder / "generation_config.json"
    if not path.exists():
        return config
    more = _token_ids(Keys(read_json(path), path.name), "eos_token_id", config.vocab_size)
    return replace(config, eos_token_ids=tuple(dict.fromkeys(config.eos_token_ids + more)))


def read_json(path: Path, limit: int = 64 << 20) -> dict[str, Any]:
    """The object in a JSON file of at most `limit` bytes; CheckpointError if it cannot be read or is something else."""
    try:
        if path.stat().st_size > limit:
            raise CheckpointError(f"{path}: larger than {limit >> 20} MB, which no file of this kind is")
        return parse_json(path.read_bytes(), str(path))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror or error})") from error


def parse_json(text: bytes, where: str) -> dict[str, Any]:
    """The JSON object in `text`; CheckpointError if it is malformed, nested too deeply, not an object, or repeats a key."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            raise ValueError("a key occurs twice")
        return found

    try:
        content = json.loads(text.decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{where}: not valid JSON ({error})") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{where}: must hold a JSON object")
    return content


def _architecture(keys: Keys) -> str:
    """The Hugging Face class name, from `architectures` or, where that is absent, from `model_type`."""
    names = keys.get("architectures", None)
    supported = ", ".join(FAMILIES)
    model_type = keys.get("model_type", None)
    if names is None:
        for name, family in FAMILIES.items():
            if family.model_type == model_type:
                return name
        keys.fail("architectures", f"the key is required; supported are {supported}")
    if not isinstance(names, list) or len(names) != 1 or names[0] not in list(FAMILIES):
        keys.fail("architectures", f"this architecture is not supported; supported are {supported}")
    name = str(names[0])
    if model_type not in (None, FAMILIES[name].model_type):
        keys.fail("model_type", f"contradicts architectures = {name}")
    return name


def _window(keys: Keys, family: _Family, layers: int) -> int | None:
    """The smallest span of positions that any layer's attention sees, or None if every layer sees all of them."""
    kinds = keys.get("layer_types", None)
    if kinds is not None:
        known = ("full_attention",) if family.window == "never" else ("full_attention", "sliding_attention")
        if not isinstance(kinds, list) or len(kinds) != layers or any(kind not in known for kind in kinds):
            keys.fail("layer_types", f"must name one of {', '.join(known)} for each of {layers} layers")
    if family.window == "never":
        return None
    window: int | None = keys.integer("sliding_window", 1, LIMITS["max_positions"][1], default=None)
    slides = kinds is None or "sliding_attention" in kinds
    if family.window == "flag":
        if not keys.flag("use_sliding_window"):
            window = None
        first = keys.integer("max_window_layers", 0, LIMITS["num_layers"][1], default=28)  # the default in transformers
        slides = slides and (kinds is not None or first < layers)
    if window is None and kinds is not None and slides:
        keys.fail("layer_types", "has sliding_attention, but no sliding_window is in use")
    return window if slides else None


def _rope(keys: Keys) -> tuple[float, RopeScaling | None]:
    """Base and scaling of the rotary embedding, from `rope_theta` and `rope_scaling` or from the newer `rope_parameters`."""
    found: list[tuple[float | None, RopeScaling | None]] = []
    for key in ("rope_parameters", "rope_scaling"):
        value = keys.get(key, None)
        if value is None:
            continue
        if not isinstance(value, dict):
            keys.fail(key, "must be an object")
        rope = Keys(value, f"{keys.where}: {key}")
        theta = rope.number("rope_theta", 1.0, 1e15) if value.get("rope_theta") is not None else None
        found.append((theta, _rope_scaling(rope)))
    bases = {theta for theta, _ in found if theta is not None}
    if keys.mapping.get("rope_theta") is not None:
        bases.add(keys.number("rope_theta", 1.0, 1e15))
    keys.get("rope_theta", None)
    if len(bases) > 1 or len({scaling for _, scaling in found}) > 1:
        keys.fail("rope_theta", "contradicts another rope_theta or rope_scaling in rope_parameters")
    return next(iter(bases), 10_000.0), found[0][1] if found else None


def _rope_scaling(rope: Keys) -> RopeScaling | None:
    """The scaling that one rope dictionary describes; both the old spelling `type` and the new `rope_type` are read."""
    names = {str(rope.mapping[key]) for key in ("type", "rope_type") if rope.mapping.get(key) is not None}
    kind = next(iter(names), "default")
    scaling: RopeScaling | None
    if len(names) > 1:
        rope.fail("rope_type", f"contradicts type = {rope.mapping['type']!r}")
    if kind in ("default", "none"):
        scaling = None
    elif kind == "linear":
        scaling = RopeScaling("linear", rope.number("factor", 1.0, 1e6))
    elif kind == "llama3":
        scaling = RopeScaling(
            "llama3",
            rope.number("factor", 1.0, 1e6),
            rope.number("low_freq_factor", 1e-6, 1e6),
            rope.number("high_freq_factor", 1e-6, 1e6),
            rope.integer("original_max_position_embeddings", *LIMITS["max_positions"]),
        )
        if scaling.high_freq_factor <= scaling.low_freq_factor:
            rope.fail("high_freq_factor", "must be larger than low_freq_factor")
    else:
        key = "rope_type" if "rope_type" in rope.mapping else "type"
        rope.fail(key, "is not supported; supported are default, linear, llama3")
    rope.finish(_ROPE_HARMLESS, {"partial_rotary_factor": (1.0, None)})
    return scaling


def _quantization(keys: Keys) -> Quantization | None:
    """How matrices are stored, from `quantization_config`."""
    from .quant import read_quantization  # whose files read their keys with `Keys`

    value = keys.get("quantization_config", None)
    return None if value is None else read_quantization(value, f"{keys.where}: quantization_config")


def _dtype(keys: Keys, notes: list[str]) -> Literal["bfloat16", "float16"]:
    """The type to compute in: the checkpoint's, or bfloat16 for float32 (noted) and where nothing is said."""
    names = {str(keys.mapping[key]).removeprefix("torch.") for key in ("dtype", "torch_dtype") if keys.mapping.get(key)}
    if len(names) > 1 or names - {"bfloat16", "float16", "float32"}:
        keys.fail("dtype" if keys.mapping.get("dtype") else "torch_dtype", "must be one of bfloat16, float16, float32")
    if names == {"float32"}:
        notes.append("The float32 weights of this model are rounded to bfloat16.")
    return "float16" if names == {"float16"} else "bfloat16"


def _token_ids(keys: Keys, key: str, vocab: int) -> tuple[int, ...]:
    """Token ids given as one integer, a list, or not at all."""
    value = keys.get(key, ())
    ids = tuple(value) if isinstance(value, list | tuple) else (value,)
    if len(ids) > 256 or any(isinstance(i, bool) or not isinstance(i, int) or not 0 <= i < vocab for i in ids):
        keys.fail(key, f"must hold token ids from 0 to {vocab - 1}")
    return ids


def checked(config: ModelConfig, where: str) -> ModelConfig:
    """The configuration, if its fields agree with one another."""
    if config.num_heads % config.num_kv_heads:
        raise ConfigError(f"{where}: {config.num_heads} heads are not a multiple of {config.num_kv_heads} key/value heads")
    if config.head_dim % 2:
        raise ConfigError(f"{where}: the head size {config.head_dim} is odd, so rotary embeddings cannot pair its values")
    return config
