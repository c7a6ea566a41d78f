"""Exported files in the programs that read them: `python -m tests.consumers`, long and outside the test run."""

import tests.conftest  # noqa: F401 - PyTorch has to come before TensorFlow in one process.
