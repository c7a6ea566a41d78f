"""Published checkpoints: what they are, and how their files are fetched, read, renamed and loaded."""
