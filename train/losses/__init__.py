"""Losses: pure functions on tensors and small states; no trainer, no I/O."""
