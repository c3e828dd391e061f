"""The loop, the engine under it, and what it leaves behind."""
