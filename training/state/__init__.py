"""What a run keeps: its folder and lock, its checkpoints, and what a signal does."""
