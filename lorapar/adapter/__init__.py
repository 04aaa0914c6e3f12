"""How the LoRA layers are attached to a model, what they compute, and the proof that nothing else changed."""
