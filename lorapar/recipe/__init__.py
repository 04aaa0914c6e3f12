"""What a run is told: the recipe's sections, how they are read, and what is checked."""
