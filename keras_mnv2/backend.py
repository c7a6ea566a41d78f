"""Keras's backend, where the one that it would start is not installed. Imported before Keras, which starts it."""

import importlib.util
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path

# As Keras names them, and as Python does.
BACKENDS = ("tensorflow", "jax", "torch")


def other_backend(environment: Mapping[str, str]) -> str | None:
    """The backend to take instead of Keras's own choice, or None where that is installed.

    Keras starts the one that `KERAS_BACKEND` names, or its file `keras.json`, which it writes itself, or TensorFlow.
    A variable that somebody has set counts; the file does not where what it names is missing.

    Args:
        environment: the process's variables.

    Raises:
        ImportError: where `KERAS_BACKEND` names one that is not installed, or none is.

    Examples:
        >>> other_backend({"KERAS_BACKEND": "numpy"}) is None  # Keras's own affair.
        True
    """
    installed = [name for name in BACKENDS if importlib.util.find_spec(name) is not None]
    named = environment.get("KERAS_BACKEND")
    wanted = named or _configured(environment)
    if wanted in installed or wanted not in BACKENDS:
        return None
    if not installed:
        raise ImportError('keras_mnv2 needs TensorFlow, JAX or PyTorch: pip install "keras_mnv2[tensorflow]".')
    if named:
        raise ImportError(f"KERAS_BACKEND must be {' or '.join(installed)}, which is installed, got {named!r}.")
    return installed[0]


def _configured(environment: Mapping[str, str]) -> str:
    """What Keras's file names."""
    folder = Path(environment.get("KERAS_HOME") or Path("~").expanduser() / ".keras")
    try:
        return json.loads((folder / "keras.json").read_text()).get("backend", BACKENDS[0])
    except (OSError, ValueError, AttributeError):
        return BACKENDS[0]


if "keras" not in sys.modules and (found := other_backend(os.environ)):
    os.environ["KERAS_BACKEND"] = found
