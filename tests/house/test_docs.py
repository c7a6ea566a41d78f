"""The code of the documentation of training runs, on small photographs and weights."""

import re
from pathlib import Path

import keras
import numpy as np
from PIL import Image

import keras_mnv2
from tests.conftest import once

PAGE = Path(__file__).parents[2] / "docs" / "transfer_learning.md"


@once
def test_the_transfer_script_learns(tmp_path, monkeypatch, rng):
    for part, number in (("train", 8), ("validation", 4)):
        for name, colour in (("blue", (20, 30, 200)), ("red", (210, 40, 30))):
            (tmp_path / "photos" / part / name).mkdir(parents=True)
            for i in range(number):
                pixels = rng.normal(colour, 40, (36, 40, 3)).clip(0, 255).astype("uint8")
                Image.fromarray(pixels).save(tmp_path / "photos" / part / name / f"{i}.png")
    monkeypatch.chdir(tmp_path)
    keras_mnv2.save_weights(
        keras_mnv2.MobileNetV2((32, 32, 3), 0.35, weights=None, padding="symmetric"),
        "w.safetensors",
        layout="torchvision",
    )
    (block,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    line = 'FOLDER, WEIGHTS, SIZE = "photos", "torchvision/IMAGENET1K_V2", 224\n'
    assert line in block
    # The file's preprocessing is that of the checkpoint.
    block = block.replace(line, 'FOLDER, WEIGHTS, SIZE = "photos", "torchvision/IMAGENET1K_V2", 32\n')
    block = block.replace("(SIZE, SIZE, 3), weights=WEIGHTS", '(SIZE, SIZE, 3), 0.35, weights="w.safetensors"')
    names: dict = {}
    exec(compile(block, str(PAGE), "exec"), names)
    model = keras.models.load_model("photos.keras", compile=False)
    scores = model.predict(names["validation"], verbose=0)
    assert scores.shape == (8, 2)
    np.testing.assert_allclose(scores.sum(1), 1, atol=1e-5)
    # The statistics are still those that the file has.
    statistics = [weight for weight in names["backbone"].weights if weight.name.startswith("moving_")]
    assert len(statistics) == 104
    for weight in statistics:
        kept = keras.ops.convert_to_numpy(weight)
        np.testing.assert_array_equal(kept, np.full(kept.shape, float(weight.name == "moving_variance")))
    trained = {layer.name for layer in names["backbone"].layers if layer.trainable and layer.weights}
    parts = ("expand", "depthwise", "project")
    assert trained == {"Conv_1", *(f"block_{i}_{part}" for i in range(12, 17) for part in parts)}
