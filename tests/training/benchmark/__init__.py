"""Tests of `training.benchmark`."""
