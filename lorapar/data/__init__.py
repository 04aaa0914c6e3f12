"""From a recipe's sources to rows, and from rows to tokens."""
