"""The graph of a `.pt2` file; on PyTorch alone, where no process has imported TensorFlow first."""

import collections
import json

import keras
import numpy as np
import pytest

import keras_mnv2
from tests.conftest import once
from tests.exports import small


def calls_of(program):
    """How often each operation is called."""
    return collections.Counter(str(node.target) for node in program.graph.nodes if node.op == "call_function")


@once
def test_the_graph_has_convolutions_of_constants_and_little_else(exported):
    import torch

    program = torch.export.load(exported("torch").path)
    calls = calls_of(program)
    convolutions = 1 + 2 + 2 * 3 + 1
    assert calls["aten.conv2d.default"] == convolutions
    # NHWC to NCHW once; the preprocessing, the shortcut, the mean, the classifier's product and sum, the scores.
    assert calls["aten.permute.default"] == 1
    assert set(calls) <= {
        *("aten.conv2d.default", "aten.hardtanh_.default", "aten.permute.default", "aten.mul.Tensor"),
        *("aten.add.Tensor", "aten.mean.dim", "aten.matmul.default", "aten.softmax.int"),
    }
    assert sum(calls.values()) <= 2 * convolutions + 8
    assert program.graph_signature.user_inputs == ("image",)
    assert program.graph_signature.user_outputs == ("predictions",)
    weights = program.graph_signature.inputs_to_buffers
    for node in program.graph.nodes:
        if str(node.target) == "aten.conv2d.default":
            kernel = program.state_dict[weights[node.args[1].name]]
            assert kernel.shape[0] == node.meta["val"].shape[1]
            assert kernel.is_contiguous()
    # Each weight once, the preprocessing's two numbers, and none that nobody reads.
    assert len(program.state_dict) == len(weights) == 2 * convolutions + 4


@once
def test_what_was_written_before_still_loads(tmp_path):
    import torch

    class Twice(torch.nn.Module):
        def forward(self, x):
            return 2 * x

    sample = torch.zeros(2, 8, 8, 3)
    program = torch.export.export(Twice(), (sample,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
    torch.export.save(program, tmp_path / "old.pt2")
    images = np.ones((3, 8, 8, 3), "float32")
    assert keras_mnv2.load_export(tmp_path / "old.pt2")(images)["output"].shape == images.shape


@once
@pytest.mark.parametrize(
    "kind",
    ["around", pytest.param("unfolded", marks=pytest.mark.slow), pytest.param("quantized", marks=pytest.mark.slow)],
)
def test_other_graphs_keep_their_numbers(kind, tmp_path, rng):
    import torch

    fold = None
    if kind == "around":
        # The network inside a user's model, with layers that care for the order of the axes, and two outputs.
        image = keras.Input((32, 32, 3), name="my photo")
        features = small(include_top=False)(keras.layers.Rescaling([1.0, 2.0, 0.5])(image))
        wide = keras.layers.UpSampling2D(2)(features)
        joined = keras.layers.Concatenate()([wide, keras.layers.AveragePooling2D(2)(image)])
        mean = keras.layers.GlobalAveragePooling2D(keepdims=True)(joined)
        model = keras.Model(image, {"a/b": keras.layers.Conv2D(4, 3, name="out")(joined), "mean": mean})
    elif kind == "quantized":
        model = keras_mnv2.quantize_aware(small())
        model(rng.uniform(-1, 1, (4, 32, 32, 3)).astype("float32"), training=True)
    else:
        model, fold = small(input_shape=(3, 32, 32), data_format="channels_first"), False
    report = keras_mnv2.export(model, tmp_path / "a.pt2", "torch", fold=fold, verbose=False)
    assert report.largest_difference <= (0.05 if kind == "quantized" else 1e-5)
    calls = calls_of(torch.export.load(tmp_path / "a.pt2"))
    assert not [name for name in calls if "assert" in name]
    if kind == "around":
        found = keras_mnv2.load_export(tmp_path / "a.pt2")(rng.uniform(size=(3, 32, 32, 3)))
        assert {name: y.shape[0] for name, y in found.items()} == {"a/b": 3, "mean": 3}
    if kind == "unfolded":
        # Batch norms were folded while it was traced: they are constants, too.
        assert "aten.rsqrt.default" not in calls
        files = {"outputs.json": ""}
        torch.export.load(tmp_path / "a.pt2", extra_files=files)
        assert json.loads(files["outputs.json"]) == ["predictions"]
