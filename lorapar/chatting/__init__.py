"""Asking the base and each stage's result of a finished run the same question, side by side."""
