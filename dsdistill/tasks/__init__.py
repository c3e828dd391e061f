"""Labelled tasks: read, check, tokenize, batch; then score and write predictions."""
