"""Keras's layers as the network has them, one operation each, and as fast as a block that is one layer.

Each is the Keras class of its name: `isinstance`, arguments, variables and files are those. What differs is how it
computes: by `keras_mnv2.ops`, and in inference as part of the block around it (`keras_mnv2.layers.fusing`).
"""

from collections.abc import Sequence
from typing import Any

import keras

from keras_mnv2 import ops
from keras_mnv2.annotations import Tensor
from keras_mnv2.arguments import is_plain_batch_norm
from keras_mnv2.layers.fusing import (
    Cache,
    Call,
    Group,
    Part,
    is_plain,
    is_square,
    norm_values,
    normalize_by_batch,
    read_unit,
)


class _Direct(Part):
    """Calls `call` without Keras's bookkeeping where that finds nothing to do, or leaves it for later."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.cache = Cache()

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        if ops.is_compiling():
            return ops.uncompiled(self._call, *args, **kwargs)
        return self._call(*args, **kwargs)

    def _call(self, *args: Any, **kwargs: Any) -> Tensor:
        training = kwargs.get("training")
        # A graph of Keras hands down the mask that a batch norm takes.
        known = len(kwargs) == 1 or (len(kwargs) == 2 and kwargs.get("mask", 0) is None)
        if training is not None and known and len(args) == 1 and self.built:
            inputs = args[0]
            if ops.runs_directly(self, inputs) and is_plain(self):
                if not training:
                    later = ops.run_later(self._call_on(inputs))
                    if later is not None:
                        return later
                return self.call(inputs, training=training)
        return super().__call__(*args, **kwargs)

    def add_weight(self, *args: Any, autocast: bool = False, **kwargs: Any) -> keras.Variable:
        """As Keras's, but the variable has its own precision until it is used, so that folding has too."""
        variable = super().add_weight(*args, autocast=autocast, **kwargs)
        self.cache.variables.append(variable)
        return variable

    def _call_on(self, inputs: Any) -> Call:
        inputs = tuple(inputs) if isinstance(inputs, list) else (inputs,)
        first = inputs[0]
        known = ops.call_of(first)
        shape = tuple(first.shape) if known is None else known.shape
        device = first.device if known is None else known.device
        shapes = self.cache.shapes
        if shape not in shapes:
            shapes[shape] = self.compute_output_shape(shape if len(inputs) == 1 else [shape] * len(inputs))
        return Call(self, inputs, shapes[shape], device)


class _Convolution(_Direct):
    def call(self, inputs: Tensor, training: bool | None = None) -> Tensor:
        if not is_square(self):
            return super().call(ops.settled(inputs))
        y = Group(None, self, None, None, inputs).unit()(ops.settled(inputs))
        return y if training else ops.note(y, Call(self, (inputs,)))


@keras.saving.register_keras_serializable("keras_mnv2")
class Conv2D(_Convolution, keras.layers.Conv2D):
    """`keras.layers.Conv2D`, by this package's operations.

    Examples:
        >>> layer = Conv2D(32, 3, strides=2, padding="same")
        >>> isinstance(layer, keras.layers.Conv2D), tuple(layer(np.ones((1, 224, 224, 3))).shape)
        (True, (1, 112, 112, 32))
    """


@keras.saving.register_keras_serializable("keras_mnv2")
class DepthwiseConv2D(_Convolution, keras.layers.DepthwiseConv2D):
    """`keras.layers.DepthwiseConv2D`, by this package's operations.

    Examples:
        >>> layer = DepthwiseConv2D(3, padding="same")
        >>> isinstance(layer, keras.layers.DepthwiseConv2D), tuple(layer(np.ones((1, 56, 56, 24))).shape)
        (True, (1, 56, 56, 24))
    """


@keras.saving.register_keras_serializable("keras_mnv2")
class BatchNormalization(_Direct, keras.layers.BatchNormalization):
    """`keras.layers.BatchNormalization`, in one pass in training and folded into its convolution in inference.

    Args:
        synchronized: whether the statistics are those of all replicas; here on each backend.
        **kwargs: of Keras's layer.

    Examples:
        >>> layer = BatchNormalization(momentum=0.9)
        >>> isinstance(layer, keras.layers.BatchNormalization), tuple(layer(np.ones((1, 56, 56, 24))).shape)
        (True, (1, 56, 56, 24))
    """

    def __init__(self, *args: Any, synchronized: bool = False, **kwargs: Any) -> None:
        # Keras refuses it elsewhere; there it is `ops.batch_normalization` that looks at all replicas.
        super().__init__(*args, synchronized=synchronized and keras.backend.backend() == "tensorflow", **kwargs)
        self.synchronized = synchronized

    def call(self, inputs: Tensor, training: bool | None = None, mask: Tensor | None = None) -> Tensor:
        if mask is not None or not is_plain_batch_norm(self, self._data_format):
            return super().call(ops.numbers(inputs), training=training, mask=mask)
        if training and self.trainable:
            return normalize_by_batch(self, inputs, self._data_format)
        call = Call(self, (inputs,))
        group = read_unit(call, ops.call_of, lambda x: True) if ops.folds_noted(inputs) else None
        if group is not None and group.conv.bias is None:
            y = group.unit()(group.start, training=False)
        else:
            y = ops.normalize(ops.numbers(inputs), *norm_values(self), self.epsilon, self._data_format)
        return ops.note(y, call)

    @property
    def _data_format(self) -> str:
        return "channels_last" if self.axis in (-1, 3) else "channels_first"


@keras.saving.register_keras_serializable("keras_mnv2")
class ReLU(_Direct, keras.layers.ReLU):
    """`keras.layers.ReLU`, which can be computed with the convolution before it.

    Examples:
        >>> [float(y) for y in ReLU(6.0)(np.array([-1.0, 3.0, 9.0]))]
        [0.0, 3.0, 6.0]
    """

    def call(self, inputs: Tensor, training: bool | None = None) -> Tensor:
        y = super().call(ops.numbers(inputs))
        return y if training else ops.note(y, Call(self, (inputs,)))


@keras.saving.register_keras_serializable("keras_mnv2")
class ZeroPadding2D(_Direct, keras.layers.ZeroPadding2D):
    """`keras.layers.ZeroPadding2D`, which the convolution behind it can do itself.

    Examples:
        >>> tuple(ZeroPadding2D(((0, 1), (0, 1)))(np.ones((1, 56, 56, 24))).shape)
        (1, 57, 57, 24)
    """

    def call(self, inputs: Tensor, training: bool | None = None) -> Tensor:
        y = super().call(ops.numbers(inputs))
        return y if training else ops.note(y, Call(self, (inputs,)))


@keras.saving.register_keras_serializable("keras_mnv2")
class Add(_Direct, keras.layers.Add):
    """`keras.layers.Add`, which in inference computes the block whose shortcut it closes.

    Examples:
        >>> tuple(Add()([np.ones((1, 56, 56, 24)), np.ones((1, 56, 56, 24))]).shape)
        (1, 56, 56, 24)
    """

    def call(self, inputs: Sequence[Tensor], training: bool | None = None) -> Tensor:
        y = super().call([ops.known(x) for x in inputs])
        return y if training else ops.note(y, Call(self, tuple(inputs)))
