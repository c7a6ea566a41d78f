"""One module a recipe, each with a docstring and a `CONFIG`."""
