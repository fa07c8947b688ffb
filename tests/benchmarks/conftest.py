"""The modules of experiments and benchmarks, which are scripts beside the package, can be imported here."""

from __future__ import annotations

import sys
from pathlib import Path

EXPERIMENTS = Path(__file__).parents[2] / "experiments"
sys.path[:0] = [str(EXPERIMENTS), str(EXPERIMENTS / "benchmarks")]
