"""Stage 2: the importance of every LoRA element for each system."""
