"""Fused GPU implementations of what the objectives compute; `selection` tells where they can be used."""
