"""Recipes that train MobileNetV2 with `model.fit`: `python -m training --help`."""
