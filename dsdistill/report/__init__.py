"""A run, or several beside each other, on one page: what a person shows to a colleague."""
