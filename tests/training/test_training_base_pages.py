"""Processes on one machine share a base's weights: they are pages of its file, not copies."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from milp_ray.data import EMBEDDED_BASE

_LOAD = """
import json, sys
from milp_ray.config.base import BaseSection
from milp_ray.training.base import load_base

def own():
    lines = open("/proc/self/smaps_rollup").read().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Pss_Anon:"))

section = BaseSection(model=sys.argv[1], device="cpu")
load_base(BaseSection(model="embedded", device="cpu"))  # imports, and what a first use allocates
before = own()
base = load_base(section)
total = sum(float(p.sum()) for p in base.model.parameters())  # every page is touched
print(json.dumps([own() - before, total]))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="Linux tells which pages are shared")
def test_a_base_in_its_files_own_precision_takes_next_to_no_memory_of_a_process(tmp_path: Path) -> None:
    model = LlamaForCausalLM(
        LlamaConfig(hidden_size=512, intermediate_size=2048, num_hidden_layers=6, vocab_size=4096)
    )
    model.save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((EMBEDDED_BASE / name).read_bytes())
    weights_kib = sum(p.numel() * p.element_size() for p in model.parameters()) / 1024
    assert weights_kib > 64 * 1024
    told = subprocess.run(
        [sys.executable, "-c", _LOAD, str(tmp_path)], capture_output=True, text=True, check=True, timeout=300
    )
    own_kib, _ = json.loads(told.stdout.splitlines()[-1])
    assert own_kib < 0.2 * weights_kib
