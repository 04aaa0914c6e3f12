"""The importance of every LoRA element for each system: `Scores` in scores.py, `score()` in score.py."""
