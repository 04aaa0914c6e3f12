"""The report of one run: a page and its pictures."""
