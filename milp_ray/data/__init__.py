"""What the package ships beside code: the embedded base."""

from pathlib import Path

EMBEDDED_BASE = Path(__file__).parent / "tiny_base"
