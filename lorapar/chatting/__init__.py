"""The base and each stage's result, asked the same question side by side in a terminal."""
