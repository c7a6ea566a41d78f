"""Tests of `training`, in its rooms."""
