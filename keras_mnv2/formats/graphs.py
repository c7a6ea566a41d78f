"""A Keras model as a graph of its backend: a SavedModel of TensorFlow or an exported program of PyTorch.

Each function needs its own backend to be the active one; `python -m keras_mnv2.formats.graphs` runs it in a process
with that backend, on a model in a `.keras` file.
"""

import importlib
import inspect
import json
import re
import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import keras

from keras_mnv2.annotations import Tensor
from keras_mnv2.formats.converters import APART, CONVERTERS

# Pixels of a side that is free, for tracing; the graph keeps it free.
TRACED_SIDE = 64


def write_saved_model(
    model: keras.Model, path: Path, labels: Sequence[str] | None = None, apart: str | None = None
) -> None:
    """Writes a SavedModel, on TensorFlow.

    The signature `serving_default`, and the function `serve`, take a batch of any size and give a dict with the
    model's output names.

    Args:
        model: built, with one input.
        path: folder to write.
        labels: names of the classes, written one a line as the asset `labels`.
        apart: name of the model's last layer, which is then a SavedModel of its own beside the other
            (`converters.APART`). Its inputs, the outputs of the other, are called by their order.
    """

    def whole(x: Tensor) -> dict[str, Tensor]:
        return named(model, model(x, training=False))

    if apart is None:
        _save(path, whole, {input_name(model): model.inputs[0]}, model.variables, labels)
        return
    layer = model.get_layer(apart)
    between = {f"part_{i}": x for i, x in enumerate(layer.input)}
    network = keras.Model(model.inputs[0], list(between.values()))

    def parts(x: Tensor) -> dict[str, Tensor]:
        return dict(zip(between, network(x, training=False), strict=True))

    _save(path, parts, {input_name(model): model.inputs[0]}, network.variables, labels)
    beside = path.with_name(path.name + APART)
    _save(beside, lambda *given: named(model, layer(list(given))), between, layer.variables, None)


def _save(
    path: Path,
    serve: Callable[..., dict[str, Tensor]],
    inputs: dict[str, keras.KerasTensor],
    variables: Sequence[Any],
    labels: Sequence[str] | None,
) -> None:
    import tensorflow as tf

    module = tf.Module()
    module.weights = [variable.value for variable in variables]
    given = [tf.TensorSpec(x.shape, x.dtype, name=name) for name, x in inputs.items()]
    module.serve = tf.function(serve, input_signature=given)
    signatures = {"serving_default": module.serve.get_concrete_function()}
    with tempfile.TemporaryDirectory() as folder:
        if labels is not None:
            # The asset keeps the file's name.
            listing = Path(folder) / "labels.txt"
            listing.write_text("".join(f"{label}\n" for label in labels), encoding="utf-8")
            module.labels = tf.saved_model.Asset(str(listing))
        tf.saved_model.save(module, str(path), signatures=signatures)


def write_exported_program(
    model: keras.Model, path: Path, batch: int | None = None, channels_first: bool = False
) -> None:
    """Writes a `.pt2` file of `torch.export`, on PyTorch: a batch in, a tensor or a dict of tensors out.

    The weights are constants as convolutions read them, (out, in, height, width), and images are NCHW between them.
    Input, and the one output, have the model's names in the graph; the extra file `outputs.json` lists the outputs'.

    Args:
        model: built, with one input.
        path: file to write.
        batch: how many images the program takes; any number by default.
        channels_first: whether it takes NCHW images where the model takes NHWC.
    """
    import torch

    from keras_mnv2.formats.exported_program import name_output, simplified

    class Program(torch.nn.Module):
        """The model with its weights as plain buffers: Keras's own would be written twice."""

        def __init__(self) -> None:
            super().__init__()
            # Two layers of nested models may have one path.
            self.names = [f"{_word(v.path)}_{i}" for i, v in enumerate(model.variables)]
            for name, variable in zip(self.names, model.variables, strict=True):
                self.register_buffer(name, variable.value.detach().clone().contiguous())

        def forward(self, x: torch.Tensor) -> Any:
            tensors = (getattr(self, name) for name in self.names)
            x = x.permute(0, 2, 3, 1) if channels_first else x
            with keras.StatelessScope(state_mapping=list(zip(model.variables, tensors, strict=True))):
                y = model(x, training=False)
            return named(model, y) if len(model.outputs) > 1 else next(iter(named(model, y).values()))

    # The program's input is called as the argument is.
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    parameters = [inspect.Parameter(name, kind) for name in ("self", _word(input_name(model)))]
    Program.forward.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    image = model.inputs[0]
    # A size of 1 would be taken as a constant.
    sample = torch.zeros([batch or 2, *(n or TRACED_SIDE for n in image.shape[1:])], dtype=getattr(torch, image.dtype))
    shape = [batch, *image.shape[1:]]
    if channels_first:
        sample, shape = sample.permute(0, 3, 1, 2).contiguous(), [shape[0], shape[3], *shape[1:3]]
    free = ({i: torch.export.Dim.DYNAMIC for i, n in enumerate(shape) if n is None},)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        program = torch.export.export(Program(), (sample,), dynamic_shapes=free, strict=False)
        module = simplified(program)
        program = torch.export.export(module, (sample,), dynamic_shapes=free, strict=False)
        names = output_names(model)
        if len(names) == 1:
            name_output(program, _word(names[0]))
        program.example_inputs = None
        torch.export.save(program, path, extra_files={"outputs.json": json.dumps(names)})


def _word(name: str) -> str:
    """A name as PyTorch's graphs have them."""
    return re.sub(r"\W", "_", name)


def named(model: keras.Model, outputs: Any) -> dict[str, Tensor]:
    """A model's outputs by name: its own keys, or the names of the layers that they come from."""
    if isinstance(outputs, dict):
        # In the order of the names: a file's outputs are numbered by it.
        return {name: outputs[name] for name in output_names(model)}
    outputs = outputs if isinstance(outputs, list | tuple) else [outputs]
    return dict(zip(output_names(model), outputs, strict=True))


def input_name(model: keras.Model) -> str:
    """The name of a model's one input: `image` where Keras gave it one by number, which another run would not."""
    name = model.inputs[0].name
    return "image" if re.fullmatch(r"(input_layer|keras_tensor)(_\d+)?", name) else name


def output_names(model: keras.Model) -> list[str]:
    """The names of a functional model's outputs in their order."""
    if isinstance(model.output, dict):
        return list(model.output)
    return model.output_names


def main() -> None:
    """`FORMAT MODEL.keras GRAPH ABOUT`, and `TARGET OPTIONS` of a converter to convert the graph in this process.

    `ABOUT` is JSON: the labels, a layer that is written apart, how a program of PyTorch is written, and the modules of
    the model's classes.
    """
    format, source, graph, about, *conversion = sys.argv[1:]
    about = json.loads(about)
    for module in about["modules"]:
        importlib.import_module(module)
    model = keras.models.load_model(source, compile=False)
    if keras.backend.backend() == "torch":
        write_exported_program(model, Path(graph), **about["program"])
    else:
        write_saved_model(model, Path(graph), about["labels"], about["apart"])
    if conversion:
        target, options = conversion
        CONVERTERS[format](Path(graph), Path(target), **json.loads(options))


if __name__ == "__main__":
    main()
