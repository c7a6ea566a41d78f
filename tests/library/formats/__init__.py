"""Tests of `keras_mnv2.formats`."""
