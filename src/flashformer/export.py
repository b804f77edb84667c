"""A model folder's files beside its weights: `config.json` and the tokenizer, from a Hugging Face folder or a GGUF file."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from .checkpoint import Checkpoint
from .config import FAMILIES, ModelConfig, parse_config, read_json
from .errors import ConfigError
from .tokenizer import Tokenizer

# What belongs to a tokenizer, or says how a model is to be used.
_COPIED = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt",
    "tokenizer.model", "chat_template.jinja", "generation_config.json",
)  # fmt: skip


def write_beside(checkpoint: Checkpoint, folder: Path, changes: dict[str, Any]) -> None:
    """Write everything but weights into `folder`; `changes` are keys of config.json.

    Raises ConfigError where config.json cannot express the model, CheckpointError where a GGUF file has no usable tokenizer.
    """
    if checkpoint.path.is_dir():
        config = read_json(checkpoint.path / "config.json")
        for name in _COPIED:
            if (checkpoint.path / name).exists():
                shutil.copyfile(checkpoint.path / name, folder / name)
    else:
        config = config_mapping(checkpoint.config)
        _write_gguf_tokenizer(checkpoint, folder)
    config.pop("dtype", None)
    config |= {"torch_dtype": checkpoint.config.dtype, **changes}
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")


def config_mapping(config: ModelConfig) -> dict[str, Any]:
    """The content of the config.json of an unquantised model. Raises ConfigError where its keys cannot express the model."""
    scaling = config.rope_scaling
    rope: dict[str, Any] | None = None
    if scaling is not None:
        rope = {"rope_type": scaling.kind, "factor": scaling.factor}
        if scaling.kind == "llama3":
            rope |= {
                "low_freq_factor": scaling.low_freq_factor,
                "high_freq_factor": scaling.high_freq_factor,
                "original_max_position_embeddings": scaling.original_max_positions,
            }
    family = FAMILIES[config.architecture]
    mapping: dict[str, Any] = {
        "architectures": [config.architecture],
        "model_type": family.model_type,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.ffn_size,
        "vocab_size": config.vocab_size,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": rope,
        "max_position_embeddings": config.max_positions,
        "hidden_act": "silu",
        "tie_word_embeddings": config.tied_embeddings,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": list(config.eos_token_ids),
        "torch_dtype": config.dtype,
    }
    if family.bias_keys:
        mapping["attention_bias"] = config.output_bias
    if family.mlp_bias_key:
        mapping["mlp_bias"] = config.mlp_bias
    read = parse_config(mapping)
    wrong = [name for name, value in vars(replace(config, notes=read.notes)).items() if value != getattr(read, name)]
    if wrong:
        raise ConfigError(f"config.json of {config.architecture} cannot express this model's {', '.join(wrong)}")
    return mapping


def added_ids(tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """The ids that `encode` puts before and behind those of a text."""
    text = tokenizer.encode("a", add_special=False)
    whole = tokenizer.encode("a")
    before = next((i for i in range(len(whole)) if whole[i : i + len(text)] == text), 0)
    return whole[:before], whole[before + len(text) :]


def _write_gguf_tokenizer(checkpoint: Checkpoint, folder: Path) -> None:
    """Write `tokenizer.json` and `tokenizer_config.json` from the metadata of a GGUF file."""
    from tokenizers import processors

    from .checkpoint.gguf_file import GGUFFile
    from .checkpoint.gguf_tokenizer import build_backend

    tokenizer = checkpoint.tokenizer()
    file = GGUFFile(checkpoint.path)
    backend = build_backend(file.metadata)
    file.file.close()
    before, behind = added_ids(tokenizer)
    names = {i: backend.id_to_token(i) for i in (*before, *behind, tokenizer.bos_id, *tokenizer.eos_ids) if i is not None}
    if before or behind:
        single = [names[i] for i in before] + ["$A"] + [names[i] for i in behind]
        special = [(names[i], i) for i in dict.fromkeys(before + behind)]
        backend.post_processor = processors.TemplateProcessing(single=single, special_tokens=special)
    backend.save(str(folder / "tokenizer.json"))
    settings: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": tokenizer.chat_template}
    if tokenizer.bos_id is not None:
        settings["bos_token"] = names[tokenizer.bos_id]
    if tokenizer.eos_ids:
        settings["eos_token"] = names[tokenizer.eos_ids[0]]
    settings = {key: value for key, value in settings.items() if value is not None}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
