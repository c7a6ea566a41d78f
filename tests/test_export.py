import sys

import keras
import numpy as np
import pytest

import keras_mnv2
from tests.helpers import note, randomise


def small(**arguments):
    return keras_mnv2.MobileNetV2(
        **{"input_shape": (32, 32, 3), "alpha": 0.35, "weights": None, "classes": 5, **arguments}
    )


def test_a_saved_model_gives_the_models_numbers_without_keras(tmp_path, rng, capsys):
    model = small(include_preprocessing=True)
    randomise(model, rng, rng.uniform(0, 255, (4, 32, 32, 3)).astype("float32"))
    sample = rng.uniform(0, 255, (7, 32, 32, 3)).astype("float32")
    difference = keras_mnv2.export(model, tmp_path / "out" / "model", sample=sample)
    note("SavedModel: largest difference", difference)
    assert difference <= 1e-5
    assert (tmp_path / "out" / "model" / "saved_model.pb").is_file()
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["model"]
    assert "7 images" in capsys.readouterr().out


def test_a_dict_of_features_is_exported_and_a_saved_model_replaced(tmp_path):
    path = tmp_path / "model"
    keras_mnv2.export(small(), path, verbose=False)
    before = (path / "saved_model.pb").read_bytes()
    features = small(include_top=False, features=True, input_shape=(None, None, 3))
    assert keras_mnv2.export(features, path, verbose=False) <= 1e-4
    assert (path / "saved_model.pb").read_bytes() != before
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_a_path_that_holds_something_else_is_kept(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="path must be new"):
        keras_mnv2.export(small(), tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize(
    ("argument", "value"),
    [("format", "caffe"), ("sample", np.zeros((1, 16, 16, 3))), ("sample", np.zeros((0, 32, 32, 3)))],
)
def test_a_bad_argument_is_named(argument, value, tmp_path):
    with pytest.raises(ValueError, match=argument):
        keras_mnv2.export(small(), tmp_path / "model", **{argument: value})
    assert not list(tmp_path.iterdir())


def test_an_export_that_differs_leaves_nothing(tmp_path, monkeypatch):
    model = small(classifier_activation=None)
    answer = model.predict
    monkeypatch.setattr(model, "predict", lambda *args, **kwargs: answer(*args, **kwargs) + 0.01)
    with pytest.raises(RuntimeError, match=r"differs from the model by 0\.01"):
        keras_mnv2.export(model, tmp_path / "model")
    assert not list(tmp_path.iterdir())


def test_a_failing_export_is_one_sentence_and_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules["keras_mnv2.export"], "_RUN", "raise SystemExit('the runtime broke')")
    with pytest.raises(RuntimeError, match="the runtime broke"):
        keras_mnv2.export(small(), tmp_path / "model")
    assert not list(tmp_path.iterdir())


def test_a_model_of_two_inputs_is_refused(tmp_path):
    inputs = [keras.Input((32, 32, 3)) for _ in range(2)]
    model = keras.Model(inputs, keras.layers.add(inputs))
    with pytest.raises(ValueError, match="one input"):
        keras_mnv2.export(model, tmp_path / "model")
