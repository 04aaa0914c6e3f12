"""A model by its name: where it is, how it is loaded, how it answers."""
