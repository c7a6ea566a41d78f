"""Tests of `keras_mnv2`, in its rooms."""
