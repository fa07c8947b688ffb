"""The report of a run: figures (PNG) and one HTML page, out of plain lists and dicts."""
