"""Accuracy on the rows that were held out, after label, score, partition and training."""
