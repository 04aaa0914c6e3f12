"""Speed cases; `pytest bench/` runs them, `pytest tests/` does not collect them."""
