"""`python -m training.benchmark`: what each contender costs, in interleaved rounds."""
