"""Stage 5: accuracy on the rows that were held out."""
