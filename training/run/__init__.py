"""The training itself: one run from its settings to its results, one step, and what happens around it."""
