"""Between this package's layers and Keras's own: models that load without it, and models that were made without it."""

import re
from typing import Any

import keras

from keras_mnv2.annotations import Tensor
from keras_mnv2.build import apply_layer
from keras_mnv2.initializers import Normal
from keras_mnv2.layers import parts
from keras_mnv2.layers.compact import ConvNormActivation, InvertedResidual, ScaleShift
from keras_mnv2.network import MobileNetV2Model
from keras_mnv2.quantize import is_quantized
from keras_mnv2.rewrite import layers_of, rewrite

# The classes of this package by the class of Keras that each one is.
_OURS = {
    keras.layers.Conv2D: parts.Conv2D,
    keras.layers.DepthwiseConv2D: parts.DepthwiseConv2D,
    keras.layers.BatchNormalization: parts.BatchNormalization,
    keras.layers.ReLU: parts.ReLU,
    keras.layers.ZeroPadding2D: parts.ZeroPadding2D,
    keras.layers.Add: parts.Add,
}
_STOCK = {ours: stock for stock, ours in _OURS.items()}
_NAMES = re.compile(r"(bn_)?Conv1(_relu|_pad)?|Conv_1(_bn)?|out_relu|(expanded_conv|block_\d+)_\w+")


def from_keras(model: keras.Model) -> keras.Model:
    """Gives a model that `keras.applications` made, or that has one inside, with this package's layers in its place.

    It computes the same, and trains and predicts at this package's speed. Names, weights, what is frozen, the layers
    around the backbone and the compile settings are kept; the optimiser starts anew.

    Args:
        model: a functional or sequential model with a MobileNetV2 of `keras.applications` in it, as a nested model or
            with its layers among the others. It stays as it is.

    Returns:
        The new model.

    Raises:
        ValueError: where `model` is no such model.

    Examples:
        >>> theirs = keras.applications.MobileNetV2((96, 96, 3), alpha=0.35, weights=None, classes=10)
        >>> ours = from_keras(theirs)
        >>> type(ours.get_layer("block_1_expand")).__module__
        'keras_mnv2.layers.parts'
    """
    if not isinstance(model, keras.Model) or not getattr(model, "inputs", None):
        raise ValueError(f"model must be a built functional or sequential Keras model, got {model!r}.")
    if not any(layer.name == "Conv1" and type(layer) is keras.layers.Conv2D for layer in layers_of(model)):
        raise ValueError(
            f"model must have the layers of keras.applications.MobileNetV2, such as Conv1 and block_1_expand, got "
            f"{model.name!r}, which has none."
        )

    def clone(layer: Any) -> Any:
        kind = _OURS.get(type(layer)) if _NAMES.fullmatch(layer.name) else None
        return (kind or type(layer)).from_config(layer.get_config())

    def finish(old: Any, new: Any) -> Any:
        names = {layer.name for layer in new.layers}
        return _as_class(MobileNetV2Model, new) if type(old) is _functional() and "Conv1" in names else new

    new, pairs, _ = rewrite(model, clone, finish=finish)
    for layer, copy in pairs:
        _copy(layer, copy)
    return new


def to_stock(model: keras.Model) -> keras.Model:
    """Gives a model of Keras's own classes that computes the same, with the same weights.

    Raises:
        ValueError: where a layer has no counterpart in Keras.
    """
    if is_quantized(model):
        raise ValueError(f"model must not be quantised for format='keras', got {model.name!r}, which is.")

    def clone(layer: Any) -> Any:
        if isinstance(layer, ConvNormActivation | InvertedResidual):
            return _Opened(layer)
        config = {key: _stock_initializer(value) for key, value in layer.get_config().items()}
        if isinstance(layer, ScaleShift):
            common = {key: config[key] for key in ("name", "trainable", "dtype")}
            return keras.layers.BatchNormalization(axis=layer.axis, **common)
        if isinstance(layer, parts.BatchNormalization) and config["synchronized"]:
            print(f"{layer.name}: Keras synchronises batch norms on TensorFlow alone; the file's is not synchronised.")
            config["synchronized"] = False
        kind = _STOCK.get(type(layer), type(layer))
        if not kind.__module__.startswith("keras."):
            raise ValueError(
                f"model must have layers of Keras or keras_mnv2 for format='keras', got {layer.name!r} of type "
                f"{kind.__module__}.{kind.__name__}."
            )
        return kind.from_config(config)

    def finish(old: Any, new: Any) -> Any:
        return _as_class(keras.Model, new) if isinstance(old, MobileNetV2Model) else new

    new, pairs, _ = rewrite(model, clone, finish=finish)
    for layer, copy in pairs:
        if isinstance(copy, _Opened):
            for source, target in zip(layer.weights, copy.weights, strict=True):
                target.assign(keras.ops.convert_to_numpy(source))
            copy.freeze_as(layer)
        elif isinstance(layer, ScaleShift):
            # With a variance of 1 - epsilon a batch norm divides by 1.
            scale, shift = (keras.ops.convert_to_numpy(v) for v in (layer.scale, layer.shift))
            copy.set_weights([scale, shift, 0 * shift, 0 * shift + 1 - copy.epsilon])
        else:
            _copy(layer, copy)
    return new


class _Opened:
    """A layer of several operations as layers of one operation each, made when it is called."""

    def __init__(self, layer: Any) -> None:
        self.layer = layer
        self.layers: list[Any] = []

    def __call__(self, x: Tensor, **kwargs: Any) -> Any:
        def make(kind: Any, *args: Any, **arguments: Any) -> Any:
            config = kind(*args, **arguments).get_config()
            stock = _STOCK.get(kind, kind)
            self.layers.append(stock.from_config({key: _stock_initializer(value) for key, value in config.items()}))
            return self.layers[-1]

        return apply_layer(x, self.layer, make)

    @property
    def weights(self) -> list[keras.Variable]:
        return [weight for layer in self.layers for weight in layer.weights]

    def freeze_as(self, layer: Any) -> None:
        frozen = {id(v) for v in layer.weights} - {id(v) for v in layer.trainable_weights}
        pairs = dict(zip(map(id, self.weights), layer.weights, strict=True))
        for new in self.layers:
            own = [pairs[id(v)] for v in new.weights if v.trainable]
            if own and all(id(v) in frozen for v in own):
                new.trainable = False


def _copy(layer: Any, copy: Any) -> None:
    if not isinstance(layer, keras.Layer):
        return
    copy.set_weights(layer.get_weights())
    # A layer may derive values from its weights when it loads them, as `Normalization` does.
    store: dict[str, Any] = {}
    layer.save_own_variables(store)
    copy.load_own_variables({key: keras.ops.convert_to_numpy(value) for key, value in store.items()})


def _stock_initializer(value: Any) -> Any:
    """The configuration of an initial distribution that Keras has, in the place of this package's own."""
    if isinstance(value, dict) and value.get("registered_name") == f"keras_mnv2>{Normal.__name__}":
        own = value["config"]
        stock = keras.initializers.RandomNormal(stddev=own["stddev"], seed=own["seed"])
        return keras.saving.serialize_keras_object(stock)
    return value


def _functional() -> type:
    x = keras.Input((1,))
    return type(keras.Model(x, x))


def _as_class(kind: Any, model: keras.Model) -> keras.Model:
    new = kind(model.input, model.output, name=model.name)
    if model.compiled:
        new.compile_from_config(model.get_compile_config())
    return new
