"""What lm-evaluation-harness measures of the base and of each stage's result."""
