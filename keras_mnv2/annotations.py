"""The words of the annotations for what Keras has no type for."""

import os
from typing import Any

# A tensor of the active backend, a Keras tensor, or an array that becomes one: they have no type in common, and to a
# type checker all of Keras's own are `Any`. Docstrings say the layout.
Tensor = Any
# Sides, of which None stands for one that is not known yet. The channels always are, which no type can say.
Shape = tuple[Any, ...]
PathLike = str | os.PathLike[str]
