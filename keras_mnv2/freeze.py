"""Layers that do not train: up to a block, and the batch norms everywhere."""

from collections.abc import Sequence
from typing import Any

import keras

from keras_mnv2.arguments import check_model
from keras_mnv2.checks import check_flag
from keras_mnv2.layers.compact import ConvNormActivation, InvertedResidual
from keras_mnv2.norms import NORMALIZATIONS
from keras_mnv2.rewrite import layers_of


def freeze(model: keras.Model, before: str | None = None, norms: bool = True, verbose: bool = True) -> int:
    """Freezes a model's layers up to a block, for transfer learning; those from there on train.

    What is set is all that counts: after the call the layers before `before` do not train and the others do, whatever
    was set earlier, so that a second call changes nothing. A frozen batch norm works with its moving statistics, and
    the few images of a new task do not blur what the many of the old one have given (Keras's guide to transfer
    learning): so norms are frozen everywhere, unless `norms=False`. Compile the model afterwards, as Keras asks.

    Args:
        model: a model of `MobileNetV2` or `keras.applications`, or one that has such a model inside or around its
            tensors.
        before: a block such as `"block_12"`, or the name of a layer, also of one inside a nested model; None freezes
            all layers.
        norms: whether the normalisations behind it are frozen too.
        verbose: whether to print how many layers are frozen.

    Returns:
        How many layers with weights are frozen, parts of a block that is one layer counted one by one.

    Raises:
        ValueError: on another kind of argument, or where there is no such block or layer.

    Examples:
        >>> model = MobileNetV2((32, 32, 3), alpha=0.35, weights=None, classes=10)
        >>> freeze(model, before="block_16")
        100 of 105 layers with weights are frozen, 52 normalisations among them; block_16 and what follows train.
        100
    """
    norms, verbose = check_flag("norms", norms), check_flag("verbose", verbose)
    if not (before is None or isinstance(before, str)):
        raise ValueError(f"before must be None or the name of a block or layer, got {before!r}.")
    leaves = _leaves(check_model("model", model))
    first = len(leaves) if before is None else _index(leaves, before)
    _thaw(model)
    for number, layer in enumerate(leaves):
        if number < first:
            layer.trainable = False
        for part in _parts(layer) if norms else ():
            if isinstance(part, NORMALIZATIONS):
                part.trainable = False
    weighted, frozen, among = _count(leaves)
    if verbose:
        train = f"; {before} and what follows train" if before is not None else ""
        print(f"{frozen} of {weighted} layers with weights are frozen, {among} normalisations among them{train}.")
    return frozen


def unfreeze(model: keras.Model, norms: bool = False, verbose: bool = True) -> int:
    """Undoes `freeze`: all layers train again.

    Args:
        model: as for `freeze`.
        norms: False leaves the normalisations as they are; True lets them train too, with the statistics of batches.
        verbose: whether to print how many layers are still frozen.

    Returns:
        How many layers with weights are frozen.

    Examples:
        >>> model = MobileNetV2((32, 32, 3), alpha=0.35, weights=None, classes=10)
        >>> freeze(model, verbose=False)
        105
        >>> unfreeze(model, norms=True)
        0 of 105 layers with weights are frozen.
        0
    """
    norms, verbose = check_flag("norms", norms), check_flag("verbose", verbose)
    leaves = _leaves(check_model("model", model))
    parts = [part for layer in leaves for part in _parts(layer)]
    kept = [part for part in parts if isinstance(part, NORMALIZATIONS) and not part.trainable and not norms]
    _thaw(model)
    for part in kept:
        part.trainable = False
    weighted, frozen, _ = _count(leaves)
    if verbose:
        print(f"{frozen} of {weighted} layers with weights are frozen.")
    return frozen


# A block's layers, and those of stem and head, by the names that `features` and plans have for them.
_ALIASES = {"stem": ("Conv1",), "block_0": ("expanded_conv",), "head": ("Conv_1",)}


def _leaves(model: keras.Model) -> list[Any]:
    """The layers that are no models, in order."""
    return [layer for layer in layers_of(model, wrappers=False) if not isinstance(layer, keras.Model)]


def _thaw(model: keras.Model) -> None:
    # On TensorFlow Keras 3.15 passes the same value on to no layer; so another one first.
    model.trainable = False
    model.trainable = True


def _parts(layer: Any) -> list[Any]:
    """The layers that hold a layer's weights: itself, or the parts of a block."""
    if isinstance(layer, ConvNormActivation | InvertedResidual):
        inner = [part for name, part in layer._parts().items() if not name.endswith("kernel")]
        return [layer, *inner] if isinstance(layer, ConvNormActivation) else inner
    return [layer] if layer.weights else []


def _index(leaves: Sequence[Any], before: str) -> int:
    for number, layer in enumerate(leaves):
        for name in (before, *_ALIASES.get(before, ())):
            block = name.removeprefix("block_").isdigit() or name == "expanded_conv"
            if layer.name == name or (block and layer.name.startswith(f"{name}_")):
                return number
    blocks = sorted({layer.name.split("_")[1] for layer in leaves if layer.name.startswith("block_")}, key=int)
    known = f"'block_{blocks[0]}' to 'block_{blocks[-1]}', or " if blocks else ""
    raise ValueError(f"before must be None, {known}the name of a layer of the model, got {before!r}.")


def _count(leaves: Sequence[Any]) -> tuple[int, int, int]:
    parts = [part for layer in leaves for part in _parts(layer)]
    frozen = [part for part in parts if not part.trainable]
    return len(parts), len(frozen), sum(isinstance(part, NORMALIZATIONS) for part in frozen)
