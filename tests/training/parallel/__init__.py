"""Tests of `training.parallel`."""
