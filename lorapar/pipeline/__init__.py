"""The order of the stages, their records, and resuming."""
