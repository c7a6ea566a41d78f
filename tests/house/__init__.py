"""Tests of the project itself: layering, documentation, packages, random arguments."""
