"""Grids of runs: objectives x initialisations x tasks x seeds, run side by side, with one table at the end."""
