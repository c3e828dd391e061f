"""What a run is told: the recipe and the DeepSpeed JSON."""
