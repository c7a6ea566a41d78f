"""A model built again with other layers in the place of some, or of whole units of a convolution and what follows."""

from collections.abc import Callable, Iterator
from typing import Any

import keras

from keras_mnv2.layers.fusing import Call, Group, read_unit, role_of

# A new layer for a unit's convolution, and those of its layers that it makes superfluous.
Merged = tuple[Any, tuple]


class _Shared(Exception):
    """A convolution was to be merged with a layer that does not follow it each time."""

    def __init__(self, conv: Any) -> None:
        self.conv = conv


class _LeftOut:
    """Stands for a layer that a merged one makes superfluous."""

    def __init__(self, conv: Any) -> None:
        self.conv = conv


def layers_of(model: Any) -> Iterator[Any]:
    """The layers of a model, and those of models and wrappers among them."""
    for layer in [model.layer] if isinstance(model, keras.layers.Wrapper) else getattr(model, "layers", ()):
        yield layer
        yield from layers_of(layer)


def same_input(x: keras.KerasTensor) -> keras.KerasTensor:
    """A new input of a model like `x`, whose layer has the same name: Keras's clone has that of the tensor."""
    name = x._keras_history.operation.name
    return keras.Input(batch_shape=x.shape, dtype=x.dtype, sparse=x.sparse, name=name)


def units_of(model: keras.Model) -> list[Group]:
    """The units of a functional model, those of models inside it too; each layer is in one of them at most."""
    found: list[Group] = []
    for inner in (model, *layers_of(model)):
        if (
            isinstance(inner, keras.Model)
            and not isinstance(inner, keras.Sequential)
            and getattr(inner, "inputs", None)
        ):
            found += _units_of_graph(inner)
    return found


def _units_of_graph(model: keras.Model) -> list[Group]:
    calls: dict[int, Call] = {}
    readers: dict[int, int] = {}
    for layer in model.layers:
        if isinstance(layer, keras.layers.InputLayer):
            continue
        inputs = tuple(keras.tree.flatten(layer.input))
        if isinstance(layer.output, keras.KerasTensor):
            calls[id(layer.output)] = Call(layer, inputs)
        for x in inputs:
            readers[id(x)] = readers.get(id(x), 0) + 1
    for operation in model.operations:
        if not isinstance(operation, keras.Layer):
            for x in keras.tree.flatten(operation.input):
                readers[id(x)] = readers.get(id(x), 0) + 1
    for x in model.outputs:
        readers[id(x)] = readers.get(id(x), 0) + 1

    units: dict[int, Group] = {}
    # From the ends: what an activation or a batch norm takes with it is no unit of its own.
    for role in ("activation", "norm", "conv"):
        for call in calls.values():
            if role_of(call.layer) != role:
                continue
            unit = read_unit(call, lambda x: calls.get(id(x)), lambda x: readers[id(x)] == 1)
            if unit is not None and id(unit.conv) not in units:
                units[id(unit.conv)] = unit
    return list(units.values())


def rewrite(
    model: keras.Model,
    clone: Callable[[Any], Any],
    merge: Callable[[Group], Merged | None] = lambda unit: None,
    inputs: Any = None,
    call: Callable[..., Any] = lambda layer, *args, **kwargs: layer(*args, **kwargs),
    finish: Callable[[Any, Any], Any] = lambda old, new: new,
) -> tuple[keras.Model, list[tuple[Any, Any]], list[tuple[Group, Any]]]:
    """Builds a functional or sequential model again, compiled in the same way if it was.

    Args:
        model: the model.
        clone: gives the new layer for a layer.
        merge: gives the new layer for a unit's convolution and the layers of the unit that are left out, or None where
            each is to be cloned.
        inputs: Keras tensors to build on, in the structure of `model.input`.
        call: calls a new layer.
        finish: gives what takes the place of a new model, the nested ones too, from the old one and the new.

    Returns:
        The new model; the pairs of a layer and its clone; the pairs of a unit and its new layer.
    """
    shared: set[int] = set()
    while True:
        merged: dict[int, Any] = {}
        left_out: dict[int, Any] = {}
        for unit in units_of(model):
            found = merge(unit) if id(unit.conv) not in shared else None
            if found is not None:
                merged[id(unit.conv)] = (unit, found[0])
                left_out |= {id(layer): unit.conv for layer in found[1]}
        try:
            return _build(model, clone, merged, left_out, inputs, call, finish)
        except _Shared as error:
            shared.add(id(error.conv))


def _build(
    model: keras.Model,
    clone: Callable[[Any], Any],
    merged: dict[int, Any],
    left_out: dict[int, Any],
    inputs: Any,
    call: Callable[..., Any],
    finish: Callable[[Any, Any], Any],
) -> tuple[keras.Model, list[tuple[Any, Any]], list[tuple[Group, Any]]]:
    pairs: list[tuple[Any, Any]] = []
    # Tensors of a merged convolution, until the layer that it makes superfluous has passed them on.
    open_ends: dict[int, tuple] = {}

    cache: dict[int, Any] = {}

    def clone_layer(layer: Any) -> Any:
        if id(layer) not in cache:
            cache[id(layer)] = new_layer(layer)
        return cache[id(layer)]

    def new_layer(layer: Any) -> Any:
        if id(layer) in merged:
            return merged[id(layer)][1]
        if id(layer) in left_out:
            return _LeftOut(left_out[id(layer)])
        if isinstance(layer, keras.Model) and getattr(layer, "inputs", None):
            return clone_model(layer)
        pairs.append((layer, clone(layer)))
        return pairs[-1][1]

    def clone_model(model: keras.Model, inputs: Any = None) -> Any:
        # In a sequential model layers are listed, not called: there none can be left out.
        how = {} if isinstance(model, keras.Sequential) else {"call_function": call_layer}
        if how and inputs is None:
            inputs = keras.tree.map_structure(same_input, model.input)
        new = finish(model, keras.models.clone_model(model, input_tensors=inputs, clone_function=clone_layer, **how))
        if not model.trainable:
            new.trainable = False
        return new

    convs = {id(new): unit.conv for unit, new in merged.values()}
    behind = {
        id(unit.conv): sum(id(layer) in left_out for layer in (unit.norm, unit.activation) if layer is not None)
        for unit, _ in merged.values()
    }

    def call_layer(layer: Any, *args: Any, **kwargs: Any) -> Any:
        tensors = [x for x in keras.tree.flatten((args, kwargs)) if isinstance(x, keras.KerasTensor)]
        if isinstance(layer, _LeftOut):
            x = tensors[0]
            if id(x) in open_ends and open_ends[id(x)][0] is layer.conv:
                _, left, kept = open_ends.pop(id(x))
                if left > 1:
                    open_ends[id(x)] = (layer.conv, left - 1, kept)
            elif id(x) in open_ends:
                raise _Shared(open_ends[id(x)][0])
            return x
        for x in tensors:
            if id(x) in open_ends:
                raise _Shared(open_ends[id(x)][0])
        y = call(layer, *args, **kwargs)
        if id(layer) in convs:
            conv = convs[id(layer)]
            if behind[id(conv)]:
                open_ends[id(y)] = (conv, behind[id(conv)], y)
        return y

    new = clone_model(model, inputs)
    if open_ends:
        raise _Shared(next(iter(open_ends.values()))[0])
    return new, pairs, [(unit, layer) for unit, layer in merged.values()]
