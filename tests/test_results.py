"""What the repository says about speed is what was measured."""

from __future__ import annotations

import importlib.util
import json
import statistics
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flashformer.backends.cuda import RandomWeights
from flashformer.errors import ConfigError, InputError
from flashformer.formats import NAMED
from flashformer.models import build_graph
from flashformer.plan import make_plan
from flashformer.records import Record, load_records, newest, save
from flashformer.shapes import SHAPES, shape
from flashformer.targets import get

ROOT = Path(__file__).parent.parent
RESULTS = sorted((ROOT / "benchmarks" / "results").glob("decode-*.json"))
LOADS = sorted((ROOT / "benchmarks" / "results").glob("load-*.json"))


def script(name: str) -> Any:
    """A program of benchmarks/ as a module."""
    spec = importlib.util.spec_from_file_location(f"benchmarks_{name}", ROOT / "benchmarks" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_readme_shows_the_records() -> None:
    done = subprocess.run([sys.executable, "benchmarks/table.py", "--check"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_records_are_complete_and_consistent(path: Path) -> None:
    for record in load_records(path, Record):
        ms = record.ms_per_token
        assert 0 < ms["min"] <= ms["median"] <= ms["max"]
        assert record.spread == pytest.approx((ms["max"] - ms["min"]) / ms["median"])
        assert record.tokens_timed >= 128 and record.repeats >= 5
        reached = record.bytes_per_token / record.ms / 1e6
        assert record.fraction_of_ceiling == pytest.approx(reached / record.read_ceiling_gb_s)
        assert record.checked is not None and record.checked["top1"] == 1
        assert not record.tuned  # what the README says holds with the defaults
        assert set(record.baselines) == set(record.baseline_versions)
        name, *parts = record.weights.split(", ")
        if name in NAMED:
            config = shape(record.model)
            formats = RandomWeights(config, format=NAMED[name], plain_head="16-bit head" in parts).formats
            kv = next((part.removeprefix("KV cache in ") for part in parts if part.startswith("KV")), "native")
            plan = make_plan(config, build_graph(config), get("sm_90"), formats=formats, kv_type=kv)
            assert record.bytes_per_token == plan.token_bytes(record.context + record.tokens_timed // 2)


@pytest.mark.parametrize("path", LOADS, ids=lambda path: path.stem)
def test_records_of_loads_are_complete_and_consistent(path: Path) -> None:
    load = script("load")
    records = [load.LoadRecord(**record) for record in json.loads(path.read_text())]
    assert len({record.model for record in records}) == len(records)
    for record in records:
        sizes = [2 * int(np.prod(w.shape)) for w in build_graph(shape(record.model)).weights().values()]
        assert record.bytes == sum(sizes) and record.host_limit_bytes == 2 * max(sizes) + 100e6
        assert all(list(parts) == list(load.PARTS) and min(parts.values()) >= 0 for parts in (record.first, *record.cached))
        packing = statistics.median(parts["pack"] for parts in record.cached)
        assert record.pack_gb_s == pytest.approx(sum(sizes) / packing / 1e9)
        assert record.fraction_of_copy == pytest.approx(record.pack_gb_s / record.copy_gb_s)


def test_unknown_shapes_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"unknown shape 'nothing'.*llama-3.1-8b"):
        shape("nothing")


# --- How records become tables and pictures --------------------------------------------------------------------------------


@pytest.fixture
def records() -> list[Record]:
    """Round numbers, of three models at three contexts: ours at the ceiling of 4,000 GB/s, theirs at half of it."""
    made = []
    for name, size in (("qwen3-14b", 32), ("llama-3.2-1b", 4), ("llama-3.1-8b", 16)):
        for context in (128, 1024, 30000):
            nbytes = size * 10**9 + context * 10**5
            ms = nbytes / 4e9
            theirs = {"torch.compile": 2 * ms, "vllm": 2 * ms} if context < 30000 else {"torch.compile": 2 * ms}
            record = Record(
                name, "bf16", 1, context, 128, 5, {"min": ms, "median": ms, "max": ms}, 0.0, nbytes, 4000.0, 1.0, None, "all",
                theirs, {n: f"{n} 1.0" for n in theirs},
                gpu="NVIDIA Test", driver="1", date=f"2026-01-{context % 20 + 1:02d}", commit="abc",
            )  # fmt: skip
            made.append(record)
    return made


def test_the_table(records: list[Record]) -> None:
    text = script("table").tables([*records, replace(records[0], gpu="Other GPU", baselines={}, baseline_versions={})])
    assert script("table").tables([]) == ""
    lines = text.splitlines()
    assert lines[0].startswith("NVIDIA Test, bf16, batch 1, greedy, 2026-01-01 to 2026-01-09:")
    assert "| model | 128 | 1,024 | 30,000 |" in lines
    assert "| llama-3.1-8b | 250 (100.0%) | 248 (100.0%) | 211 (100.0%) |" in lines
    rows = [line.split("|")[1].strip() for line in lines if line.startswith("| ")]
    assert rows == ["model", "llama-3.2-1b", "llama-3.1-8b", "qwen3-14b"] * 2 + ["model", "qwen3-14b"]  # by size
    assert "| llama-3.1-8b | 4.026 | 8.051 (2.00x) | 8.051 (2.00x) |" in lines
    assert "torch.compile: torch.compile 1.0; vllm: vllm 1.0." in lines


def test_what_was_measured_beside_others_stays(records: list[Record], tmp_path: Path) -> None:
    """A newer measurement of ours alone is the one that is shown, but for the comparison, which is of one process."""
    path, compared = tmp_path / "decode.json", records[4]  # llama-3.2-1b at 1,024
    alone = replace(compared, ms_per_token={"min": 0.5, "median": 0.5, "max": 0.5}, baselines={}, baseline_versions={}, first_token_ms=7.0)
    save(records, path)
    save([alone], path)
    kept = load_records(path, Record)
    assert kept == [*records, alone] and newest(kept) == [*records[:4], alone, *records[5:]]
    lines = script("table").tables(kept).splitlines()
    assert "| llama-3.2-1b | 997 (100.0%) | 2,000 (100.0%) | 571 (100.0%) |" in lines
    assert f"| llama-3.2-1b | {compared.ms:.3f} | {2 * compared.ms:.3f} (2.00x) | {2 * compared.ms:.3f} (2.00x) |" in lines
    save([replace(compared, date="2026-02-01")], path)
    assert [r.date for r in load_records(path, Record) if r.of == compared.of] == [alone.date, "2026-02-01"]


def test_the_table_of_first_tokens(records: list[Record]) -> None:
    table = script("table")
    assert table.first_tokens(records) == ""
    timed = [replace(r, first_token_ms=r.context / 4) for r in records if (r.model, r.context) != ("qwen3-14b", 128)]
    lines = table.first_tokens([*records, *timed, *(replace(r, weights="int4", bytes_per_token=1) for r in timed[:1])]).splitlines()
    assert lines[0].startswith("NVIDIA Test, 2026-01-01 to 2026-01-09: milliseconds")
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[4:] if line.startswith("|")]
    assert rows[0][:2] == [timed[0].model, "int4"] and len(rows) == 4
    by_model = {row[0]: row[1:] for row in rows[1:]}
    assert by_model["llama-3.1-8b"] == ["bf16", "32.0", "256.0", "7,500.0"]
    assert by_model["qwen3-14b"][1] == ""  # not timed


def formats(records: list[Record]) -> list[Record]:
    """Two of the models in fewer bytes: at the ceiling, but int4 at half of it."""
    made = []
    for r in records:
        for weights, part, ceiling in (("int4", 0.25, 0.5), ("int8", 0.5, 1.0), ("int4, KV cache in fp8", 0.2, 1.0)):
            nbytes = int(r.bytes_per_token * part)
            ms = nbytes / 4e9 / ceiling
            theirs = {"tinygemm": 3 * ms} if weights == "int4" else {}
            if (r.model, r.context) != ("llama-3.2-1b", 1024) and r.context != 128:
                made.append(
                    replace(
                        r, weights=weights, bytes_per_token=nbytes, ms_per_token={"min": ms, "median": ms, "max": ms}, baselines=theirs,
                        fraction_of_ceiling=ceiling, baseline_versions={n: "torch 9" for n in theirs},
                    )
                )  # fmt: skip
    return [r for r in made if r.model != "qwen3-14b"] + [replace(made[0], model="llama-3.1-70b", bytes_per_token=10**11)]


def test_the_table_of_formats(records: list[Record]) -> None:
    table = script("table")
    assert table.formats_tables(records) == "" and table.tables([*records, *formats(records)]) == table.tables(records)
    lines = table.formats_tables([*formats(records), *records]).splitlines()
    assert lines[0] == "NVIDIA Test, batch 1, greedy, 2026-01-01 to 2026-01-05:"
    assert lines[2] == "| model | weights | context | ms per token | tokens/s | of the ceiling | beside bf16 | tinygemm |"
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[4:] if line.startswith("|")]
    assert all(len(row) == 8 for row in rows)
    eight = [row[1:3] for row in rows if row[0] == "llama-3.1-8b"]
    assert eight == [[w, c] for c in ("1,024", "30,000") for w in ("int8", "int4", "int4, KV cache in fp8")]
    assert [*dict.fromkeys(row[0] for row in rows)] == ["llama-3.2-1b", "llama-3.1-8b", "llama-3.1-70b"]
    assert ["llama-3.1-8b", "int4", "1,024", "2.013", "497", "50.0%", "2.00x", "3.00x"] in rows
    assert ["llama-3.1-8b", "int8", "1,024", "2.013", "497", "100.0%", "2.00x", ""] in rows
    assert [row[-2:] for row in rows if row[0] == "llama-3.1-70b"] == [["", "3.00x"]]  # no record in bf16
    assert "tinygemm: torch 9." in lines


def test_the_pictures(records: list[Record], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plot = script("plot")
    plot.main(tmp_path, tmp_path)
    assert "no records yet" in capsys.readouterr().out and not list(tmp_path.iterdir())
    pytest.importorskip("matplotlib", reason="matplotlib is not installed (extra: plots)")
    save(records, tmp_path / "decode-test.json")
    plot.main(tmp_path, tmp_path)
    assert not (tmp_path / "speed-by-format.svg").exists()
    save(formats(records), tmp_path / "decode-test.json")
    plot.main(tmp_path, tmp_path)
    for name in ("speed-by-size.svg", "speed-by-context.svg"):
        text = (tmp_path / name).read_text()
        for word in ("FlashFormer", "torch.compile", "vllm", "llama-3.2-1b", "% of the read ceiling", "tokens/s"):
            assert word in text
        assert "int4" not in text
    text = (tmp_path / "speed-by-format.svg").read_text()
    for word in ("NVIDIA Test", "llama-3.1-8b", "llama-3.1-70b", "bf16", "int4", "KV cache in fp8", "tokens/s", "497", "50%"):
        assert word in text
    assert "qwen3-14b" not in text  # known in one format alone


def test_what_is_drawn_is_what_was_measured(records: list[Record]) -> None:
    plot = script("plot")
    (_, rate), (_, share) = plot.READINGS
    assert rate(records[0], records[0].ms) == pytest.approx(1e3 / records[0].ms)
    assert share(records[0], records[0].ms) == pytest.approx(100)
    assert share(records[0], records[0].baselines["vllm"]) == pytest.approx(50)


def test_decode_passes_over_contexts_that_a_model_does_not_have(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    decode = script("decode")
    assert all(name in SHAPES for name in decode.MODELS.split(","))
    asked: list[Any] = []

    class Refuse:
        def __init__(self, subject: Any, contexts: list[int], *rest: Any, kv: str, prompts: bool) -> None:
            asked.append((subject.name, contexts, kv, prompts))
            raise InputError("no GPU in this test")

    monkeypatch.setattr(decode, "Bench", Refuse)
    arguments = ["--models", "qwen3-0.6b", "--kv", "fp8,native", "--baselines", "none", "--first-token", "--results", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["decode.py", *arguments])
    with pytest.raises(SystemExit, match="error: no GPU in this test"):
        decode.main()
    assert asked == [("qwen3-0.6b", [128, 1024, 4096, 32768], "fp8", True)]
