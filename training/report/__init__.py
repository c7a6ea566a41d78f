"""What a run shows: measures, the worst mistakes, the page and its summary."""
