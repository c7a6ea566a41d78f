"""Initial weights, drawn by NumPy."""

import random
from typing import Any

import keras
import numpy as np

from keras_mnv2.annotations import Shape, Tensor


@keras.saving.register_keras_serializable("keras_mnv2")
class Normal(keras.initializers.Initializer):
    """Normal distribution around 0, the same numbers on every backend for one seed.

    Keras's own `RandomNormal` gives other numbers on each backend, and on JAX it compiles one program a
    shape, which is most of the time that building takes there.

    Args:
        stddev: standard deviation.
        seed: a whole number for the same numbers at each call. None takes the seed from Python's
            generator, which `keras.utils.set_random_seed` sets, as Keras's initializers do.

    Examples:
        >>> tuple(Normal(0.01, seed=1)((2, 3)).shape)
        (2, 3)
    """

    def __init__(self, stddev: float, seed: int | None = None) -> None:
        self.stddev = stddev
        self.seed = seed

    def __call__(self, shape: Shape, dtype: Any = None) -> Tensor:
        seed = random.randint(0, 2**31) if self.seed is None else self.seed
        draw = np.random.default_rng(seed).standard_normal(shape, np.float32)
        return keras.ops.convert_to_tensor(draw * np.float32(self.stddev), dtype=dtype)

    def get_config(self) -> dict[str, Any]:
        return {"stddev": self.stddev, "seed": self.seed}
