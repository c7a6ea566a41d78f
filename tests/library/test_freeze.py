"""Freezing up to a block, in models of this package and of keras.applications, whole, nested and flattened."""

import keras
import pytest

import keras_mnv2
from keras_mnv2.layers import InvertedResidual
from tests import twins
from tests.conftest import once


def compact():
    return keras_mnv2.MobileNetV2(twins.SIZE, 0.35, weights=None, classes=3, block=InvertedResidual, dropout=0.0)


def nested():
    return keras.Sequential([twins.ours(include_top=False, pooling="avg"), keras.layers.Dense(3)])


def flattened():
    base = twins.ours(include_top=False, pooling="avg")
    return keras.Model(base.input, keras.layers.Dense(3)(base.output))


MODELS = {"ours": twins.ours, "theirs": twins.theirs, "compact": compact, "nested": nested, "flattened": flattened}


@once
@pytest.mark.parametrize("name", MODELS)
def test_what_is_before_a_block_is_frozen_and_norms_everywhere(name, capsys):
    model = MODELS[name]()
    # block_15 has three kernels, block_16 three, the head one, the classifier two.
    assert keras_mnv2.freeze(model, before="block_15") == 97
    said = "97 of 105 layers with weights are frozen, 52 normalisations among them; block_15 and what follows train.\n"
    assert capsys.readouterr().out == said
    assert len(model.trainable_weights) == 9
    assert keras_mnv2.freeze(model, before="block_15", verbose=False) == 97
    assert len(model.trainable_weights) == 9
    assert keras_mnv2.freeze(model, before="block_15", norms=False, verbose=False) == 90
    assert len(model.trainable_weights) == 9 + 14
    assert keras_mnv2.freeze(model, verbose=False) == 105
    assert not model.trainable_weights
    assert keras_mnv2.unfreeze(model, verbose=False) == 52
    assert len(model.trainable_weights) == 54
    assert keras_mnv2.unfreeze(model, norms=True) == 0
    assert capsys.readouterr().out == "0 of 105 layers with weights are frozen.\n"
    assert len(model.trainable_weights) == 158


@once
@pytest.mark.parametrize("name", ["ours", "compact", "nested"])
def test_what_is_frozen_stays_so_in_files_and_copies(name, tmp_path):
    model = MODELS[name]()
    keras_mnv2.freeze(model, before="block_15", verbose=False)
    model.save(tmp_path / "model.keras")
    assert len(keras.models.load_model(tmp_path / "model.keras").trainable_weights) == 9
    assert len(keras.models.clone_model(model).trainable_weights) == 9
    assert len(keras_mnv2.quantize_aware(model).trainable_weights) == 9
    # A folded convolution has a bias, which trains with it.
    assert len(keras_mnv2.fold_batch_norm(model).trainable_weights) == 9 + 7


def test_a_layer_may_be_named_and_an_unknown_one_is_an_error():
    model = twins.ours()
    assert keras_mnv2.freeze(model, before="predictions", verbose=False) == 104
    assert keras_mnv2.freeze(model, before="head", norms=False, verbose=False) == 102
    assert keras_mnv2.freeze(model, before="stem", norms=False, verbose=False) == 0
    with pytest.raises(ValueError, match=r"before must be None, 'block_1' to 'block_16', or the name .*got 'block_99'"):
        keras_mnv2.freeze(model, before="block_99")
