"""10,000 damaged models of each format: each gives a working reader or an error of ours, soon and in little memory."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import numpy as np
import pytest

from flashformer.checkpoint import Checkpoint, check_tensors, open_checkpoint
from flashformer.checkpoint.gguf_file import GGUFFile
from flashformer.checkpoint.safetensors import SafetensorsFile
from flashformer.errors import CheckpointError
from flashformer.models.decoder import build_decoder
from fuzzing import bounded_memory, mutations, survey
from model_files import make_config, write_folder, write_gguf

TINY = make_config(num_hidden_layers=1, hidden_size=32, head_dim=8, intermediate_size=32, vocab_size=270)
LLAMA3 = {
    **{"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    "original_max_position_embeddings": 8192,
}
MEMORY = 128 << 20  # bytes; the models have some 100 KB


def exercise(checkpoint: Checkpoint) -> None:
    """All that an engine does with a checkpoint: check and read every tensor."""
    check_tensors(checkpoint, build_decoder(checkpoint.config).weights())
    for name in checkpoint.names():
        read = checkpoint.read(name)
        assert read.shape == checkpoint.spec(name).shape and read.dtype.name in ("bfloat16", "float16", "float32")
        with np.errstate(all="ignore"):
            read.astype(np.float32).sum()  # touches every byte


def test_safetensors_file(tmp_path: Path) -> None:
    config = make_config(num_hidden_layers=1, hidden_size=8, head_dim=2, intermediate_size=8, vocab_size=16)
    data = (write_folder(tmp_path / "m", config) / "model.safetensors").read_bytes()
    header = 8 + int.from_bytes(data[:8], "little")

    def use(path: Path) -> None:
        file = SafetensorsFile(path)
        for name, spec in file.specs.items():
            try:
                with np.errstate(all="ignore"):
                    assert file.read(name).astype(np.float32).nbytes == 4 * np.prod(spec.shape)
            except CheckpointError:
                assert spec.dtype not in ("bfloat16", "float16", "float32")

    with bounded_memory(MEMORY):
        accepted, refused = survey(tmp_path / "f.safetensors", mutations(data, header, 10_000, seed=1), use)
    assert accepted + refused == 10_000 and accepted > 100 and refused > 5_000


def test_truncated_safetensors_are_refused(tmp_path: Path) -> None:
    """Cut anywhere in the header, and here and there behind it."""
    data = (write_folder(tmp_path / "m", TINY) / "model.safetensors").read_bytes()
    header = 8 + int.from_bytes(data[:8], "little")
    variants = (data[:cut] for cut in (*range(header + 16), *range(header + 16, len(data), 997), len(data) - 1))
    assert survey(tmp_path / "f.safetensors", variants, SafetensorsFile)[0] == 0


def test_truncated_gguf_is_refused(tmp_path: Path) -> None:
    data = write_gguf(tmp_path / "m.gguf", TINY).read_bytes()
    variants = (data[:cut] for cut in (*range(512), *range(512, len(data), 97), len(data) - 1))
    assert survey(tmp_path / "f.gguf", variants, GGUFFile)[0] == 0


@pytest.mark.parametrize(("quant", "count"), [("F32", 6_000), ("Q4_0", 4_000)])
def test_gguf_file(tmp_path: Path, quant: str, count: int) -> None:
    """With llama3 scaling, whose divisors are a tensor."""
    data = write_gguf(tmp_path / "m.gguf", {**TINY, "rope_scaling": LLAMA3}, quant=quant).read_bytes()
    header = len(data) - sum(t.n_bytes for t in gguf.GGUFReader(tmp_path / "m.gguf").tensors)

    def use(path: Path) -> None:
        with open_checkpoint(path) as checkpoint:
            exercise(checkpoint)

    use(tmp_path / "m.gguf")  # undamaged, all is well
    with bounded_memory(MEMORY):
        accepted, refused = survey(tmp_path / "f.gguf", mutations(data, header, count, seed=2), use)
    assert accepted + refused == count and accepted > count // 40 and refused > count // 4


def test_gguf_tokenizer(tmp_path: Path) -> None:
    """Damage behind the first keys, so that most files open and their tokenizers are built and used."""
    data = write_gguf(tmp_path / "m.gguf", TINY).read_bytes()
    header = data.index(b"output_norm")

    def use(path: Path) -> None:
        with open_checkpoint(path) as checkpoint:
            tokenizer = checkpoint.tokenizer()
            tokenizer.decode(tokenizer.encode("then he ran"))
            tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}])

    use(tmp_path / "m.gguf")  # undamaged, all is well
    with bounded_memory(MEMORY):
        accepted, refused = survey(tmp_path / "f.gguf", mutations(data, header, 1_000, seed=3), use)
    assert accepted > 50 and refused > 250


@pytest.mark.parametrize("name", ["model.safetensors.index.json", "config.json", "tokenizer.json", "tokenizer_config.json"])
def test_files_of_a_folder(tmp_path: Path, name: str) -> None:
    folder = write_folder(tmp_path, TINY, shards=2)
    data = (folder / name).read_bytes()
    json.loads(data)

    def use(path: Path) -> None:
        with open_checkpoint(path.parent) as checkpoint:
            exercise(checkpoint)
            tokenizer = checkpoint.tokenizer()
            tokenizer.decode(tokenizer.encode("then he ran"))

    use(folder / name)  # undamaged, all is well
    with bounded_memory(MEMORY):
        accepted, refused = survey(folder / name, mutations(data, len(data), 250, seed=4), use)
    assert accepted + refused == 250 and refused > 100
