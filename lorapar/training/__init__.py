"""SFT of one system's elements on its rows (the paper's stage 1), then GRPO of the other's (stage 2)."""
