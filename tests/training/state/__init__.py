"""Tests of `training.state`."""
