"""Data: the sets, the batches made of them, and what changes images at random."""
