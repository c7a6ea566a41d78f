"""What a run shows: measures, pictures and the report."""
