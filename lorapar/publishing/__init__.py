"""A finished run on the hub: adapter, partition, report and model card."""
