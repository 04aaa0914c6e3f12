"""From two scores to which elements each stage trains: `Partition` in partition.py, `partition()` in choose.py."""
