"""The networks of the ablation and of the expansion factors, and their training."""

import dataclasses

import keras
import numpy as np
import pytest

import keras_mnv2
from tests import runs, twins
from tests.conftest import once_on
from training.experiments import ablation, expansion, variants
from training.experiments.options import Ablation, Expansion
from training.experiments.results import Results
from training.recipes import cifar10

ALPHA, CLASSES = 0.35, 4


@pytest.fixture(scope="module")
def library():
    """`MobileNetV2` itself, and its weights as a file can hold them."""
    return keras_mnv2.MobileNetV2(
        (32, 32, 3), ALPHA, weights=None, classes=CLASSES, stem_stride=1, include_preprocessing=True
    )


@pytest.fixture(scope="module")
def built(library, tmp_path_factory):
    """The variants of the ablation with equal weights, in which the norms differ from the identity."""
    twins.enliven(library)
    path = tmp_path_factory.mktemp("weights") / "w.h5"
    keras_mnv2.save_weights(library, path)
    models = {}
    for variant in ablation.VARIANTS:
        models[variant.name] = variant.build(ALPHA, CLASSES)
        keras_mnv2.load_weights(models[variant.name], path)
    return models


@once_on("torch")
def test_the_papers_choice_is_the_librarys_network(library, built, rng):
    x = rng.uniform(0, 255, (2, 32, 32, 3)).astype("float32")
    # Not `predict`, which would compile each.
    expected = keras.ops.convert_to_numpy(library(x, training=False))
    found = {name: keras.ops.convert_to_numpy(model(x, training=False)) for name, model in built.items()}
    np.testing.assert_allclose(found[ablation.PAPER.name], expected, rtol=1e-4, atol=1e-6)
    # The others have its parameters, and another function of them.
    for name, scores in found.items():
        assert built[name].count_params() == library.count_params()
        if name != ablation.PAPER.name:
            assert np.abs(scores - expected).max() > 1e-3, name


@once_on("torch")
def test_each_variant_has_what_its_name_says(built):
    for variant in ablation.VARIANTS:
        blocks = [layer for layer in built[variant.name].layers if layer.name.startswith("block_")]
        assert len(blocks) == 17
        assert {block.linear_bottleneck for block in blocks} == {variant.linear_bottleneck}
        assert sum(block.residual for block in blocks) == (10 if variant.shortcut else 0)
        assert {block.shortcut for block in blocks} == {variant.shortcut}


def test_the_cost_is_that_of_the_papers_table():
    own = keras_mnv2.cost_profile((32, 32, 3), CLASSES, alpha=ALPHA, stem_stride=1, print_fn=None)
    costs = {one.name: one.cost(ALPHA, CLASSES) for one in expansion.VARIANTS}
    assert costs["t = 6"] == {"parameters": own.parameters, "multiply_adds": own.multiply_adds}
    assert [name for name, _ in sorted(costs.items(), key=lambda pair: pair[1]["multiply_adds"])] == [
        "t = 1",
        "t = 3",
        "t = 6",
        "t = 9",
    ]


@pytest.fixture
def small(monkeypatch):
    """Networks of three blocks."""
    config = dataclasses.replace(cifar10.CONFIG, stages=runs.SETTINGS["stages"])
    monkeypatch.setattr(cifar10, "CONFIG", config)


@once_on("tensorflow")
def test_an_interrupted_comparison_goes_on_and_learns(small, dataset, tmp_path, monkeypatch):
    options = Ablation(out=tmp_path, dataset=dataset, epochs=3, images=256, seeds=1, batch_size=32)
    chosen = (ablation.PAPER, ablation.RELU)
    original, trained = variants.train, []

    def train(variant, *rest):
        if trained and interrupted:
            raise KeyboardInterrupt
        trained.append(variant.name)
        # One training is enough to see that it learns.
        return original(variant, *rest) if len(trained) == 1 else {"accuracy": [0.5], "seconds": 0.0}

    monkeypatch.setattr(variants, "train", train)
    interrupted = True
    with pytest.raises(KeyboardInterrupt):
        variants.compare(Results("ablation", options), chosen, options)
    interrupted = False
    found = variants.compare(Results("ablation", options), chosen, options)
    assert trained == [one.name for one in chosen]
    (row,) = found[ablation.PAPER.name]
    assert row["steps"] == 8
    assert row["loss"][-1] < row["loss"][0]
    assert len(row["accuracy"]) == 3
    assert all(0 <= accuracy <= 1 for accuracy in row["accuracy"])


def test_bad_budgets_are_told(small, dataset, tmp_path):
    common = {"out": tmp_path, "dataset": dataset}
    with pytest.raises(
        ValueError, match=r"^images must be at most the 512 training images of the data set, got 513\.$"
    ):
        variants.read(Ablation(**common, images=513))
    with pytest.raises(ValueError, match=r"^batch_size must be at most the 8 images, got 64\.$"):
        variants.read(Ablation(**common, images=8))
    with pytest.raises(ValueError, match=r"^epochs must be a whole number of at least 1, got 0\.$"):
        Ablation(**common, epochs=0)
    assert len(variants.read(Ablation(**common, images=100)).train) == 100


@pytest.mark.parametrize(
    ("experiment", "options"), [(ablation, Ablation), (expansion, Expansion)], ids=["ablation", "expansion"]
)
def test_tables_and_pictures(experiment, options, tmp_path, capsys, monkeypatch):
    def train(variant, data, options, seed):
        best = {ablation.NONE.name: 0.3, "t = 9": 0.3}.get(variant.name, 0.5)
        accuracy = [0.2, best + 0.05 * seed]
        return {"accuracy": accuracy, "loss": [2.0, 1.0], "steps": 5, "seconds": 1.0, **variant.cost(0.35, 10)}

    monkeypatch.setattr(variants, "train", train)
    monkeypatch.setattr(variants, "read", lambda options: None)
    experiment.run(options(out=tmp_path, epochs=2, seeds=1))
    # One seed says nothing of others.
    assert " yes |" not in capsys.readouterr().out
    # More seeds go on from those.
    experiment.run(options(out=tmp_path, epochs=2, seeds=2))
    lines = {line.split("|")[1].strip(): line for line in capsys.readouterr().out.splitlines() if line[:1] == "|"}
    worse = lines["no shortcut" if experiment is ablation else "t = 9"]
    assert "32.50% | 30.00% to 35.00% |     -20.00 |                  yes" in worse
    same = lines["ReLU6 in the bottleneck" if experiment is ablation else "t = 3"]
    assert "52.50% | 50.00% to 55.00% |      +0.00 |                   no" in same
    name = experiment.__name__.rpartition(".")[2]
    assert (tmp_path / f"{name}.png").read_bytes()[:4] == b"\x89PNG"
