"""Perplexity and distances: against figures worked out by hand, and the command end to end."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result

import flashformer
from flashformer.checkpoint import open_checkpoint
from flashformer.cli import main
from flashformer.errors import InputError
from flashformer.quality import cut_windows, measure
from model_files import make_config, write_folder, write_tokenizer

TEXT = "It was the best of times, it was the worst of times, it was the age of wisdom, it was the age of foolishness. " * 8


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(a) for a in arguments])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("model"), make_config(vocab_size=300))


def constant(probabilities: Sequence[float]):  # type: ignore[no-untyped-def]
    """A model that predicts the same distribution everywhere."""
    return lambda ids: np.tile(np.log(np.array(probabilities, np.float32)), (len(ids), 1))


def test_perplexity_is_that_of_the_tokens_predicted() -> None:
    windows = [([0, 1, 1, 2], 1), ([2, 0], 1)]
    found = measure(windows, constant((0.5, 0.25, 0.25)))
    assert found.tokens == 4
    assert found.perplexity == pytest.approx((4 * 4 * 4 * 2) ** (1 / 4))
    assert measure(windows, constant([1 / 7] * 7)).perplexity == pytest.approx(7)
    assert found.kl_mean is None and found.top1 is None


def test_a_window_may_begin_with_tokens_that_are_not_predicted() -> None:
    assert measure([([0, 2, 1], 2)], constant((0.5, 0.25, 0.25))).perplexity == pytest.approx(4)


def test_distances_are_those_of_the_distributions() -> None:
    p, q = np.array((0.5, 0.25, 0.25)), np.array((0.1, 0.6, 0.3))
    found = measure([([0, 1, 2, 2, 1], 1)], constant(q), constant(p))  # type: ignore[arg-type]
    kl = float((p * np.log(p / q)).sum())
    assert found.kl_mean == pytest.approx(kl, rel=1e-5) and found.kl_p99 == pytest.approx(kl, rel=1e-5)
    assert found.top1 == 0
    assert found.reference_perplexity == pytest.approx(4)
    same = measure([([0, 1, 2], 1)], constant(p), constant(p))  # type: ignore[arg-type]
    assert same.kl_mean == 0 and same.top1 == 1 and same.perplexity == same.reference_perplexity


def test_the_99th_percentile_is_over_positions() -> None:
    def mostly(ids: Sequence[int]) -> np.ndarray:
        logits = np.zeros((len(ids), 3), np.float32)
        logits[150:, 0] = 3  # of 200 positions
        return logits

    found = measure([(list(np.arange(201) % 3), 1)], mostly, constant([1 / 3] * 3))
    assert found.kl_p99 is not None and found.kl_mean is not None
    assert found.kl_mean == pytest.approx(found.kl_p99 / 4, rel=1e-5)


def test_windows_hold_all_tokens_once(folder: Path) -> None:
    with open_checkpoint(folder) as checkpoint:
        tokenizer = checkpoint.tokenizer()
    ids = tokenizer.encode(TEXT, add_special=False)
    windows = cut_windows(TEXT, tokenizer, 32, 100)
    assert [len(part) for part, _ in windows] == [32, 32, 32, 4] and {first for _, first in windows} == {1}
    assert [i for part, _ in windows for i in part] == ids[:100]
    with pytest.raises(InputError, match="nothing to predict"):
        cut_windows("", tokenizer, 32, 100)


def test_windows_begin_as_the_model_expects(folder: Path, tmp_path: Path) -> None:
    from tokenizers import Tokenizer, processors

    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    backend = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    begins = processors.TemplateProcessing(single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)])
    backend.post_processor = begins  # type: ignore[assignment]
    backend.save(str(tmp_path / "tokenizer.json"))
    with open_checkpoint(tmp_path) as checkpoint:
        tokenizer = checkpoint.tokenizer()
    windows = cut_windows(TEXT, tokenizer, 32, 62)
    assert [(len(part), part[0], first) for part, first in windows] == [(32, 0, 1), (32, 0, 1)]
    assert [i for part, _ in windows for i in part[1:]] == tokenizer.encode(TEXT, add_special=False)[:62]


def test_quality(folder: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    result = run("quality", folder, "--text", text, "--device", "cpu", "--tokens", "200", "--window", "100")
    assert result.exit_code == 0, result.output
    with flashformer.load(folder, "cpu", max_context=100) as engine:
        ids = engine.tokenizer.encode(TEXT)[:200]
        total = 0.0
        for part in (ids[:100], ids[100:]):
            scores = engine.logits(part).astype(np.float64)
            total += sum(np.log(np.exp(s).sum()) - s[t] for s, t in zip(scores, part[1:], strict=False))
    assert f"{np.exp(total / 198):.4f}" in result.output and "198" in result.output and "KL" not in result.output
    again = run("quality", folder, "--against", folder, "--text", text, "--device", "cpu", "--tokens", "60", "--window", "100")
    assert again.exit_code == 0, again.output
    assert "100.00%" in again.output and "0.000e+00 nats" in again.output


def test_mistakes_end_with_one_line(folder: Path, tmp_path: Path) -> None:
    def failed(*arguments: object) -> str:
        result = run("quality", *arguments, "--device", "cpu")
        assert result.exit_code == 2 and "Traceback" not in result.output, result.output
        return result.output

    text, empty = tmp_path / "text.txt", tmp_path / "empty.txt"
    text.write_text(TEXT)
    empty.write_text("")
    other = write_folder(tmp_path / "other", make_config(vocab_size=300))
    write_tokenizer(other, 260)  # without merges
    assert "holds no text" in failed(folder, "--text", empty, "--window", "100")
    assert "have different tokens" in failed(folder, "--against", other, "--text", text, "--window", "100")
    assert "supports 1 to 256" in failed(folder, "--text", text)
