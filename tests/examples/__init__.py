"""The scripts of `examples`."""
