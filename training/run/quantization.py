"""Quantisation-aware training after the other, and its files for LiteRT."""

import dataclasses
import functools

import keras
import numpy as np

import keras_mnv2

from ..data.batches import read_scores
from ..data.inputs import inputs_of
from ..data.sets import Dataset
from ..parallel import engines
from ..parallel.channel import Channel
from ..report import metrics
from ..state.run_folder import Run
from .fitting import fit

# Images on which exported files are compared with the model.
SAMPLE = 64


def quantize(run: Run, model: keras.Model, dataset: Dataset) -> dict[str, float]:
    """Writes `model` as LiteRT files in float32, in int8, and in int8 after quantisation-aware training.

    That training runs on one device of the first process, however many there are.

    Returns:
        The test accuracy of each file, run by LiteRT.
    """
    config = run.config
    run = dataclasses.replace(run, engine=engines.alone(), channel=Channel())
    inputs = inputs_of(dataset, config)
    ordered, test = inputs.ordered, inputs.test
    # Some hundred images give the ranges of the activations.
    calibration = np.concatenate([ordered[i][0] for i in range(min(len(ordered), -(-500 // config.batch_size)))])
    aware = keras_mnv2.quantize_aware(model)
    again = dataclasses.replace(
        config,
        learning_rate=config.quantize_learning_rate,
        epochs=config.quantize_epochs,
        schedule="cosine",
        ema=None,
        early_stopping=0,
    )
    equal = dataclasses.replace(inputs, class_weight=None)
    fit(run, again, "quantize_history", aware, equal, beside=model.get_weights())
    sample, accuracies = test[0][0][:SAMPLE], {}
    for name, source, options in (
        ("float32", model, {}),
        ("int8", model, {"precision": "int8", "calibration": calibration, "io_dtype": "uint8"}),
        ("int8_aware", aware, {"precision": "int8", "io_dtype": "uint8"}),
    ):
        path = run.folder / f"model_{name}.tflite"
        keras_mnv2.export(source, path, "litert", sample=sample, **options)
        read = keras_mnv2.load_export(path)
        scores, labels = read_scores(functools.partial(_only_output, read), test)
        accuracies[f"{name}_tflite_test_accuracy"] = metrics.top_k(scores, labels, 1)
        print(f"{path.name}: test accuracy {accuracies[f'{name}_tflite_test_accuracy']:.2%} in LiteRT")
    return accuracies


def _only_output(read, images):
    (scores,) = read(images).values()
    return scores
