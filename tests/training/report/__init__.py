"""Tests of `training.report`."""
