"""Stage 3: from two scores to which elements each stage trains."""
