"""What importing the package costs."""

from __future__ import annotations

import subprocess
import sys


def test_import_is_light() -> None:
    """No torch, no CUDA, no tokenizer, no terminal library: those are imported by whoever needs them."""
    program = (
        "import sys, time; began = time.perf_counter(); import flashformer; took = time.perf_counter() - began\n"
        "heavy = {'torch', 'cuda', 'transformers', 'tokenizers', 'jinja2', 'huggingface_hub', 'rich', 'click'} & set(sys.modules)\n"
        "print(sorted(heavy), took)"
    )
    runs = [subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout for _ in range(3)]
    assert all(run.startswith("[]") for run in runs)
    assert min(float(run.split()[-1]) for run in runs) < 0.5
