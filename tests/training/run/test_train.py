import csv
import dataclasses
import json
import re
import subprocess
import sys

import keras
import numpy as np
import pytest
from PIL import Image

import keras_mnv2
from tests.conftest import ONCE, marks, once, once_on
from tests.golden import record_losses
from tests.helpers import hiding, note, relative_difference, run_python
from training import files, process
from training.__main__ import RECIPES, main, repeated
from training.config import Config
from training.data import sets
from training.data.batches import evaluation_batches, read_scores, training_batches
from training.data.inputs import balanced, read
from training.parallel import engines
from training.parallel.channel import Channel
from training.report.summary import duration
from training.run import optimizers, train, transfer
from training.state import run_folder
from training.state.checkpoints import Checkpoints
from training.state.signals import Stop

TINY = ["--epochs", "2", "--alpha", "0.1", "--stages", *["1", "8", "1", "1", "6", "16", "2", "2", "6", "24", "1", "1"]]
# Three stages, so that compiling is quick.
STAGES = ((1, 8, 1, 1), (6, 16, 2, 2), (6, 24, 1, 1))
COLOURS = {"blue": (20, 30, 200), "green": (30, 180, 40), "red": (210, 40, 30)}


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """Blocks of noisy colour, three classes of uneven size in `train`, `validation` and `test`."""
    folder, rng = tmp_path_factory.mktemp("photographs"), np.random.default_rng(0)
    for part, numbers in (("train", (12, 8, 4)), ("validation", (2, 2, 2)), ("test", (2, 2, 2))):
        for (name, colour), number in zip(COLOURS.items(), numbers, strict=True):
            (folder / part / name).mkdir(parents=True)
            for i in range(number):
                pixels = rng.normal(colour, 60, (36, 40, 3)).clip(0, 255).astype("uint8")
                Image.fromarray(pixels).save(folder / part / name / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A small network's weights as a file, with a classifier of other classes."""
    path = tmp_path_factory.mktemp("weights") / "small.weights.h5"
    small_model(classes=7).save_weights(path)
    return str(path)


def small_model(**arguments):
    keras.utils.set_random_seed(1)
    arguments = {"classes": 3, **arguments}
    return keras_mnv2.MobileNetV2((32, 32, 3), 0.35, weights=None, inverted_residual_setting=STAGES, **arguments)


def small(recipe, photographs, **changes):
    """A recipe at two steps of eight images of 32 pixels."""
    return dataclasses.replace(
        RECIPES[recipe].CONFIG,
        **{
            "dataset": str(photographs),
            "image_size": 32,
            "evaluation_size": None,
            "resize": 36,
            "alpha": 0.35,
            "stages": STAGES,
            "batch_size": 8,
            "epochs": 1,
            "steps_per_epoch": 2,
            "saved_model": False,
            **changes,
        },
    )


# Each has a module of its own, or runs as a command.
OTHERS = ("digits", "segmentation", "detection")


@once
@pytest.mark.parametrize("recipe", [n for n in RECIPES if n not in OTHERS])
def test_each_recipe_takes_two_steps(recipe, photographs, weights, tmp_path):
    changes = {"weights": weights, "unfreeze_from": "block_2", "head_epochs": 3} if recipe == "transfer" else {}
    if recipe == "torchvision_v2":
        changes = {"evaluation_size": 40}
    found = train.run(small(recipe, photographs, run_dir=tmp_path / "run", **changes), "the command")
    (row,) = csv.DictReader((tmp_path / "run" / "history.csv").read_text().splitlines())
    assert np.isfinite(float(row["loss"]))
    assert found["test_images"] == 6
    assert "<code>the command</code>" in (tmp_path / "run" / "report.html").read_text("utf-8")
    model = keras.models.load_model(tmp_path / "run" / "model.keras")
    side = changes.get("evaluation_size", 32)
    assert model.input_shape == (None, side, side, 3)
    assert all(np.isfinite(weight).all() for weight in model.get_weights())
    test = evaluation_batches(
        sets.load(str(photographs), side).test, 3, small(recipe, photographs, evaluation_size=side)
    )
    scores, labels = read_scores(model.predict_on_batch, test)
    assert (scores.argmax(1) == labels).mean() == pytest.approx(found["test_accuracy"])


# AdamW from scratch, and frozen batch norms; then SGD and RMSprop; the others compile the same steps again.
OFTEN = {"digits": [], "transfer": marks("tensorflow"), "cifar10": ONCE, "paper": ONCE}


@pytest.mark.parametrize(
    "recipe",
    [pytest.param(name, marks=OFTEN.get(name, pytest.mark.slow)) for name in record_losses.RECIPES],
)
def test_the_losses_of_twenty_steps_are_the_same_on_each_backend(recipe):
    recorded = json.loads(record_losses.PATH.read_text())[recipe]
    expected, untrained = np.array(recorded["trained"]), np.array(recorded["untrained"])
    found = np.array(record_losses.losses(record_losses.RECIPES[recipe]))
    note(f"{recipe}, largest difference of the losses of 20 steps from those recorded", np.abs(found - expected).max())
    assert found.shape == (20,)
    # What the steps do is more than what is tolerated.
    assert np.abs(expected - untrained).max() > 5e-3
    # Half of 1e-3, so that any two backends are within 1e-3.
    assert np.abs(found - expected).max() < 5e-4


@pytest.mark.parametrize("warmup", [0, 2])
@pytest.mark.parametrize("schedule", ["cosine", "exponential", "constant"])
def test_the_learning_rate_follows_its_formula(schedule, warmup, photographs):
    config = small("paper", photographs, schedule=schedule, warmup_epochs=warmup, learning_rate=0.3, epochs=12)
    rates = optimizers.learning_rates(config, steps_per_epoch=10)
    rise = 10 * warmup
    for step in (0, 1, 7, rise, rise + 9, rise + 10, rise + 35, 119):
        if step < rise:
            expected = 0.3 * step / rise
        elif schedule == "cosine":
            expected = 0.15 * (1 + np.cos(np.pi * (step - rise) / (120 - rise)))
        else:
            expected = 0.3 * (0.98 ** ((step - rise) // 10) if schedule == "exponential" else 1)
        assert float(keras.ops.convert_to_numpy(rates(step))) == pytest.approx(expected, abs=1e-5)


@once
def test_weight_decay_is_a_gradient_of_the_kernels_alone(photographs):
    images, labels = np.random.default_rng(0).uniform(0, 255, (4, 32, 32, 3)), np.eye(3)[[0, 1, 2, 0]]
    after = {}
    for decay in (0.0, 0.1):
        config = small("paper", photographs, weight_decay=decay, optimizer="sgd", learning_rate=0.5)
        model = small_model(dropout=0)
        before = [(variable.name, keras.ops.convert_to_numpy(variable)) for variable in model.trainable_variables]
        optimizers.compile_model(model, config, steps=10)
        model.train_on_batch(images, labels)
        after[decay] = [keras.ops.convert_to_numpy(variable) for variable in model.trainable_variables]
    for (name, start), without, decayed in zip(before, after[0.0], after[0.1], strict=True):
        # One step of SGD: -0.5 * 0.1 * start.
        expected = -0.05 * start if name == "kernel" else np.zeros_like(start)
        np.testing.assert_allclose(decayed - without, expected, atol=2e-5)


def test_the_average_of_the_weights_is_what_is_left(photographs):
    config = small("torchvision", photographs, ema=0.75, learning_rate=0.05, weight_decay=0.0)
    model = small_model()
    optimizers.compile_model(model, config, steps=4)
    dataset = sets.load(str(photographs), 32)
    batches = training_batches(dataset.train, 3, config)
    seen = []

    def keep(batch, logs):
        if keras.backend.backend() == "jax":
            model.jax_state_sync()
        seen.append([keras.ops.convert_to_numpy(variable) for variable in model.trainable_variables])

    model.fit(
        batches.for_fit(batches.stream()),
        steps_per_epoch=4,
        verbose=0,
        shuffle=False,
        callbacks=[
            keras.callbacks.SwapEMAWeights(swap_on_epoch=True),
            keras.callbacks.LambdaCallback(on_train_batch_end=keep),
        ],
    )
    # Keras's average starts with the weights after the first step.
    average = seen[0]
    for weights in seen[1:]:
        average = [0.75 * old + 0.25 * new for old, new in zip(average, weights, strict=True)]
    for found, expected in zip(model.trainable_variables, average, strict=True):
        assert relative_difference(keras.ops.convert_to_numpy(found), expected) < 1e-4


def backbone_weights(model):
    return [weight for layer in model.layers if layer.name != "predictions" for weight in layer.get_weights()]


@once
def test_the_head_gives_the_model_what_it_gave_on_its_features(photographs, weights, tmp_path):
    config = small("transfer", photographs, weights=weights, head_epochs=20, head_learning_rate=0.05)
    inputs = dataclasses.replace(read(config), class_weight=balanced(read(config).dataset.train.labels, 3))
    model = train.build_model(config, 3, 3, 32)
    before = backbone_weights(model)
    run = run_folder.Run(config, tmp_path, engines.alone(), Channel(), Stop(), Checkpoints(tmp_path))
    history = transfer.train_head(run, model, inputs)
    best = int(np.argmin(history["val_loss"]))
    scores, labels = read_scores(model.predict_on_batch, inputs.validation)
    assert (scores.argmax(1) == labels).mean() == pytest.approx(history["val_accuracy"][best])
    loss = -np.log(scores[np.arange(len(labels)), labels]).mean()
    assert loss == pytest.approx(history["val_loss"][best], rel=1e-3, abs=1e-5)
    for old, new in zip(before, backbone_weights(model), strict=True):
        np.testing.assert_array_equal(old, new)


@once
def test_fine_tuning_changes_the_last_blocks_alone_and_no_statistics(photographs, weights, tmp_path):
    config = small("transfer", photographs, weights=weights, head_epochs=1, unfreeze_from="block_2", run_dir=tmp_path)
    train.run(config)
    tuned = keras.models.load_model(tmp_path / "model.keras")
    original = train.build_model(config, 3, 3, 32)
    for old, new in zip(original.layers, tuned.layers, strict=True):
        for a, b in zip(old.weights, new.weights, strict=True):
            same = np.array_equal(keras.ops.convert_to_numpy(a), keras.ops.convert_to_numpy(b))
            before = old.name.startswith(("Conv1", "expanded_conv", "block_1_"))
            frozen = before or a.name not in ("kernel", "bias")
            assert same == frozen, (old.name, a.path)
    assert tuned.trainable
    with pytest.raises(ValueError, match=r"unfreeze_from must be None, .* a layer of the model, got 'block_99'"):
        transfer.freeze(original, "block_99")


@once
def test_the_head_can_see_changed_images(photographs, weights, tmp_path):
    config = small(
        "transfer",
        photographs,
        weights=weights,
        cache_features=False,
        head_epochs=2,
        epochs=0,
        unfreeze_from=None,
        run_dir=tmp_path,
    )
    found = train.run(config)
    assert found["head_test_accuracy"] == found["test_accuracy"]
    assert len((tmp_path / "head_history.csv").read_text().splitlines()) == 3


@pytest.mark.parametrize(
    "precision", [pytest.param("bfloat16", marks=ONCE), pytest.param("float16", marks=pytest.mark.slow)]
)
def test_mixed_precision_keeps_variables_and_scores_in_float32(precision, photographs, tmp_path):
    found = train.run(small("cifar10", photographs, precision=precision, run_dir=tmp_path))
    model = keras.models.load_model(tmp_path / "model.keras")
    assert model.get_layer("block_1_expand").compute_dtype == precision
    assert {weight.dtype for weight in model.weights} == {"float32"}
    assert np.isfinite(found["test_accuracy"])
    scores = model.predict_on_batch(np.zeros((1, 32, 32, 3), "float32"))
    assert scores.dtype == np.float32


@once_on("tensorflow")
def test_early_stopping_and_tensorboard(photographs, tmp_path):
    config = small(
        "torchvision", photographs, learning_rate=1e-9, epochs=9, early_stopping=2, tensorboard=True, run_dir=tmp_path
    )
    train.run(config)
    # Nothing is learnt: the first epoch stays the best.
    assert len((tmp_path / "history.csv").read_text().splitlines()) == 4
    assert list((tmp_path / "tensorboard").rglob("events.out.*"))


@once
def test_class_weights_count_in_the_loss_of_a_step(photographs, tmp_path):
    """One step of one batch: the loss is the mean of each image's loss times the weight of its class."""
    config = small("cifar10", photographs, class_weights=True, steps_per_epoch=1, weight_decay=0.0, dropout=0.0)
    train.run(dataclasses.replace(config, run_dir=tmp_path / "run"))
    (row,) = csv.DictReader((tmp_path / "run" / "history.csv").read_text().splitlines())
    keras.utils.set_random_seed(config.seed)
    dataset = sets.load(str(photographs), 32)
    model = train.build_model(config, 3, 3, 32)
    images, labels = training_batches(dataset.train, 3, config).batch(0, 0)
    scores = keras.ops.convert_to_numpy(model(images, training=True))
    weights = np.array([balanced(dataset.train.labels, 3)[i] for i in labels.argmax(1)])
    losses = -np.log((scores * labels).sum(1))
    assert float(row["loss"]) == pytest.approx((losses * weights).mean(), rel=1e-4)
    assert float(row["loss"]) != pytest.approx(losses.mean(), rel=1e-3)


def test_class_weights_are_the_mean_over_the_class():
    assert balanced(np.array([0, 0, 0, 1]), 2) == {0: 4 / 2 / 3, 1: 2.0}


def test_a_missing_package_is_named_before_the_training(photographs, monkeypatch, tmp_path):
    monkeypatch.setattr(train.importlib.util, "find_spec", lambda name: None)
    for changes, message in (
        ({"saved_model": True}, r"^saved_model needs tensorflow: pip install .* or pass --no-saved-model\.$"),
        ({"tensorboard": True}, "tensorboard needs tensorflow"),
    ):
        with pytest.raises(ImportError, match=message):
            train.run(small("paper", photographs, run_dir=tmp_path / "run", **changes))
    assert not (tmp_path / "run").exists()


def test_the_command_to_repeat_leaves_the_folder_out(monkeypatch):
    monkeypatch.setenv("KERAS_BACKEND", "jax")
    arguments = ["--dataset", "my photos", "--run-dir", "here", "--epochs", "3", "--run-dir=there"]
    assert repeated("transfer", arguments) == (
        "KERAS_BACKEND=jax python -m training transfer --dataset 'my photos' --epochs 3"
    )
    monkeypatch.setenv("KERAS_MNV2_LAUNCH", "python -m training.launch --processes 2")
    assert repeated("digits", []) == "KERAS_BACKEND=jax python -m training.launch --processes 2 digits"


def test_durations():
    assert [duration(seconds) for seconds in (12.4, 200, 3900)] == ["12 s", "3 min 20 s", "1 h 5 min"]


@pytest.mark.slow
def test_without_tensorflow_a_run_leaves_the_saved_model_out(tmp_path):
    hidden = f"{hiding('tensorflow')}\nfrom training.__main__ import main\nmain(sys.argv[1:])"
    out = run_python(hidden, "torch", *TINY[2:], "--epochs", "1", "--run-dir", tmp_path / "run")
    assert 'no SavedModel will be written, which needs pip install "keras_mnv2[tensorflow]"' in out
    assert (tmp_path / "run" / "report.html").is_file()
    assert not (tmp_path / "run" / "saved_model").exists()


def command(*arguments):
    return subprocess.run([sys.executable, "-m", "training", *arguments], capture_output=True, text=True)


@once
def test_the_command_leaves_a_complete_run_folder(tmp_path):
    done = command(*TINY, "--run-dir", str(tmp_path / "run"))
    assert done.returncode == 0, done.stderr
    assert "val_accuracy" in done.stdout
    assert "test accuracy" in done.stdout
    files = {p.name for p in (tmp_path / "run").iterdir()}
    reports = {"report.html", "report.md"}
    assert files == {"config.json", "history.csv", "metrics.json", "model.keras", "saved_model"} | reports
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["backend"] == keras.backend.backend()
    assert metrics["versions"]["keras"] == keras.__version__
    assert metrics["saved_model_largest_difference"] <= 1e-4
    assert 0 <= metrics["test_accuracy"] <= 1
    assert metrics["seconds"] >= metrics["fit_seconds"] > 0
    with open(tmp_path / "run" / "history.csv") as file:
        rows = list(csv.DictReader(file))
    assert [row["epoch"] for row in rows] == ["0", "1"]
    assert all(0 <= float(row["waiting"]) < 1 and float(row["images_per_second"]) > 0 for row in rows)
    assert "images/s" in done.stdout
    report = (tmp_path / "run" / "report.md").read_text()
    assert f"{metrics['test_accuracy']:.2%} of 360 images" in report
    assert re.findall(r"\[.*?\]\((.*?)\)", report) == ["report.html"]
    page = (tmp_path / "run" / "report.html").read_text("utf-8")
    assert f"{metrics['test_accuracy']:.2%} of 360 images" in page
    assert f"python -m training digits {' '.join(TINY)}</code>" in page
    (points,) = re.findall(r'<script type="application/json" id="points">(.*?)</script>', page)
    shown = [[float(row[key]) for row in rows] for key in ("loss", "val_loss")]
    assert [line["values"] for line in json.loads(points)[0]["lines"]] == [
        [f"{value:.4f}" for value in values] for values in shown
    ]
    assert json.loads((tmp_path / "run" / "config.json").read_text())["alpha"] == 0.1
    loaded = keras.models.load_model(tmp_path / "run" / "model.keras")
    assert not loaded.compiled
    test = sets.load("digits", 32).test
    found = (loaded.predict(test.images, verbose=0).argmax(1) == test.labels).mean()
    assert found == pytest.approx(metrics["test_accuracy"])


@pytest.mark.slow
def test_int8_after_quantisation_aware_training_is_within_half_a_point_of_float(tmp_path):
    done = command("digits", "--quantize-epochs", "5", "--run-dir", str(tmp_path / "run"))
    assert done.returncode == 0, done.stderr
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    found = {name: metrics[f"{name}_tflite_test_accuracy"] for name in ("float32", "int8", "int8_aware")}
    for name, accuracy in found.items():
        note(f"digits, test accuracy of the LiteRT file, {name}", accuracy)
    assert found["float32"] == pytest.approx(metrics["test_accuracy"], abs=0.003)
    assert found["float32"] >= 0.97
    assert found["int8_aware"] >= found["float32"] - 0.005


@pytest.mark.parametrize("own", [None, "glibc.malloc.arena_max=2"])
def test_the_command_starts_again_with_large_pages(own, monkeypatch):
    started = []
    monkeypatch.setattr(process.os, "execv", lambda *command: started.append(command))
    monkeypatch.setattr(process.sys, "orig_argv", ["python", "-m", "training", "digits", "--epochs", "1"])
    monkeypatch.setattr(process.sys, "platform", "linux")
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    if own:
        monkeypatch.setenv("GLIBC_TUNABLES", own)
    process.use_large_pages()
    if own:
        assert not started
        assert process.os.environ["GLIBC_TUNABLES"] == own
    else:
        assert started == [(sys.executable, [sys.executable, "-m", "training", "digits", "--epochs", "1"])]
        assert process.os.environ["GLIBC_TUNABLES"] == process.TUNABLES


@once_on("tensorflow")
def test_help_lists_the_recipes_and_every_field():
    shown = command("--help").stdout
    for recipe in RECIPES:
        assert f"{recipe}:" in shown
    for field in Config.__dataclass_fields__:
        assert f"--{field.replace('_', '-')}" in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["paper2"], "recipe must be one of"), (["--dataset", "cats"], "dataset must be"), (["--alpha", "0"], "alpha")],
)
def test_a_bad_command_ends_in_one_sentence(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["training", *arguments])
    with pytest.raises(SystemExit) as caught:
        main()
    told = capsys.readouterr().err
    assert caught.value.code == 2
    assert message in told
    assert told.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_run_folder_that_is_not_empty_is_refused(photographs, tmp_path):
    (tmp_path / "old.txt").write_text("old")
    with pytest.raises(ValueError, match="run_dir must be a new or empty folder"):
        train.run(small("paper", photographs, run_dir=tmp_path))
    assert [p.name for p in tmp_path.iterdir()] == ["old.txt"]


def test_a_checkpoint_that_cannot_be_had_ends_in_one_sentence(photographs, monkeypatch, capsys):
    def build(**arguments):
        raise ConnectionError("the file cannot be downloaded")

    monkeypatch.setattr(keras_mnv2, "MobileNetV2", build)
    monkeypatch.setattr("sys.argv", ["training", "transfer", "--dataset", str(photographs)])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 1
    assert "the file cannot be downloaded" in capsys.readouterr().err


def test_json_files_are_moved_into_place(tmp_path):
    files.write_json(tmp_path / "a.json", {"b": 1})
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]
    with pytest.raises(TypeError):
        files.write_json(tmp_path / "a.json", {("not", "a key"): 1})
    assert json.loads((tmp_path / "a.json").read_text()) == {"b": 1}
