"""Stage 4: SFT and GRPO of one system's elements on that system's rows."""
