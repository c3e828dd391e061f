"""From text to batches: read, tokenize, pack, store; then order, mask and load."""
