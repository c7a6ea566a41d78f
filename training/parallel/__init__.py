"""Many devices: an engine for each backend, and what the processes tell each other."""
