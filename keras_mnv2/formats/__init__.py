"""The steps of an export: a graph of the model, its conversion, and its run in the format's own runtime."""
