"""What a stage needs, what this machine has, and what would lower the need."""
