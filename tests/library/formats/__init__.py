"""Tests of `keras_mnv2.export` and `keras_mnv2.formats`."""
