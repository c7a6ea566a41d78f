"""A batch is a function of (seed, epoch, index); unreadable images are skipped and named; changes of the images."""

import dataclasses
import itertools

import keras
import numpy as np
import pytest
from PIL import Image

from tests.training.parallel.test_channel import connected
from training.__main__ import RECIPES
from training.data import augment, sets
from training.data.batches import Batches, evaluation_batches, preprocessing, read_scores, training_batches

CONFIG = dataclasses.replace(RECIPES["torchvision"].CONFIG, image_size=32, batch_size=4)


def numbered(count=10):
    """Images that tell their number."""
    images = np.arange(count, dtype="uint8")[:, None, None, None] * np.ones((1, 8, 8, 1), "uint8")
    return sets.ArraySplit(images, np.arange(count) % 3)


def numbers(batch):
    return batch[0][:, 0, 0, 0].astype(int).tolist()


def batches_of(split, **arguments):
    return Batches(split, **{"classes": 3, "batch_size": 4, "prepare": lambda image, rng: image, **arguments})


def test_an_ordered_reading_has_every_image_once():
    batches = batches_of(numbered())
    assert len(batches) == 3
    assert [numbers(batches[i]) for i in range(3)] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    np.testing.assert_array_equal(batches[2][1], [[0, 0, 1], [1, 0, 0]])
    assert [numbers(batch) for batch in batches.stream(epochs=1)] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]


def test_the_order_is_new_each_epoch_and_the_seeds_own():
    batches, again, other = (batches_of(numbered(12), seed=seed) for seed in (3, 3, 4))
    orders = [[numbers(batches.batch(epoch, i)) for i in range(3)] for epoch in range(4)]
    assert all(sorted(itertools.chain(*order)) == list(range(12)) for order in orders)
    assert len({str(order) for order in orders}) == 4
    # Whatever was asked for before.
    assert numbers(again.batch(2, 1)) == orders[2][1]
    assert [numbers(other.batch(0, i)) for i in range(3)] != orders[0]


def test_images_that_fill_no_whole_batch_are_left_out_in_turn():
    batches = batches_of(numbered(), seed=0)
    assert len(batches) == 2
    left = [set(range(10)) - {*numbers(batches.batch(e, 0)), *numbers(batches.batch(e, 1))} for e in range(8)]
    assert all(len(out) == 2 for out in left)
    assert len(set.union(*left)) > 4
    assert len(batches_of(numbered(3), seed=0)) == 1


def test_workers_share_the_rows_of_a_batch_as_one_would_have_them(rng):
    images = rng.integers(0, 256, (24, 36, 40, 3), "uint8")
    split = sets.ArraySplit(images, np.arange(24) % 3)
    config = dataclasses.replace(CONFIG, batch_size=12, pad=2, trivial_augment=True)
    whole = training_batches(split, 3, config)
    parts = [training_batches(split, 3, config, (number, 3)) for number in range(3)]
    for epoch, index in ((0, 0), (0, 1), (5, 1)):
        for expected, *found in zip(
            whole.batch(epoch, index), *(part.batch(epoch, index) for part in parts), strict=True
        ):
            assert [len(rows) for rows in found] == [4, 4, 4]
            np.testing.assert_array_equal(np.concatenate(found), expected)
    # What Keras's layers draw is a worker's own.
    erased = dataclasses.replace(config, trivial_augment=False, crop_area=None, flip=False, pad=0, erase=1.0, resize=32)
    first, second = (training_batches(sets.ArraySplit(images * 0, split.labels), 3, erased, (n, 2)) for n in range(2))
    assert not np.array_equal(first.batch(0, 0)[0], second.batch(0, 0)[0])


def test_workers_share_an_ordered_reading_batch_by_batch():
    shards = [batches_of(numbered(), shard=(number, 2)) for number in range(2)]
    assert [numbers(batch) for batch in shards[0].stream(epochs=1)] == [[0, 1, 2, 3], [8, 9]]
    assert [numbers(batch) for batch in shards[1].stream(epochs=1)] == [[4, 5, 6, 7]]
    assert [i for i, _ in shards[0].numbered_stream(epochs=1, step=1)] == [2]
    assert [i for i, _ in shards[0].numbered_stream(epochs=1, until=2)] == [0]


def test_the_first_worker_gets_all_scores_in_order(tmp_path):
    split = numbered()
    shards = [batches_of(split, shard=(number, 2)) for number in range(2)]
    shards[1].unreadable["image 5"] = "torn"

    def run(images):
        return images[:, 0, 0, :]

    def task(worker):
        return read_scores(run, shards[worker.number], worker)

    (scores, labels), (own, _) = connected(2, task)
    np.testing.assert_array_equal(scores[:, 0], np.arange(10))
    np.testing.assert_array_equal(labels, split.labels)
    np.testing.assert_array_equal(own[:, 0], np.arange(4, 8))
    assert shards[0].unreadable == {"image 5": "torn"}


@pytest.mark.parametrize("workers", [1, 5])
def test_the_stream_goes_on_over_epochs_from_any_place(workers):
    config = dataclasses.replace(CONFIG, flip=True, pad=2, crop_area=None, image_size=32, workers=workers)
    batches = training_batches(numbered(12), 3, config)
    places = [(1, 2), (2, 0), (2, 1), (2, 2), (3, 0)]
    for place, found in zip(places, batches.stream(1, 2), strict=False):
        for a, b in zip(found, batches.batch(*place), strict=True):
            np.testing.assert_array_equal(a, b)


def test_fit_reads_the_stream_in_its_order():
    batches = batches_of(numbered(12), seed=1)
    seen = []

    class Keep(keras.layers.Layer):
        def call(self, inputs):
            return keras.ops.mean(inputs, axis=(1, 2))

    original = batches.batch

    def noted(epoch, index):
        seen.append((epoch, index))
        return original(epoch, index)

    batches.batch = noted
    model = keras.Sequential([keras.Input((8, 8, 1)), Keep(), keras.layers.Dense(3, activation="softmax")])
    model.compile("sgd", "categorical_crossentropy")
    model.fit(batches.for_fit(batches.stream()), steps_per_epoch=3, epochs=3, verbose=0, shuffle=False)
    asked = sorted({place for place in seen if place != (0, 0)} | {(0, 0)})
    assert asked[:9] == list(itertools.product(range(3), range(3)))


@pytest.fixture
def folder(tmp_path):
    """Eight images, two of which cannot be read."""
    for label in ("a", "b"):
        (tmp_path / label).mkdir()
        for i in range(4):
            Image.new("RGB", (32, 32), (40 * i, 0, 0)).save(tmp_path / label / f"{i}.png")
    whole = (tmp_path / "a" / "1.png").read_bytes()
    (tmp_path / "a" / "1.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "b" / "3.png").write_text("no image")
    return sets.read(str(tmp_path), 32)[0]["train"]


def test_unreadable_images_are_left_out_of_an_evaluation_and_named(folder):
    for size in (1, 3, 8):
        batches = evaluation_batches(folder, 2, dataclasses.replace(CONFIG, batch_size=size))
        scores, labels = read_scores(lambda images: images[:, 0, 0, :1], batches)
        assert labels.tolist() == [0, 0, 0, 1, 1, 1]
        assert scores[:, 0].tolist() == [0, 80, 120, 0, 40, 80]
        assert "2 images could not be read and were skipped" in batches.told()
        assert all(name in batches.told() for name in ("1.png", "3.png"))
    # Keras asks for each batch by number.
    images, labels = evaluation_batches(folder, 2, dataclasses.replace(CONFIG, batch_size=1))[1]
    assert images.shape == (1, 32, 32, 3)
    assert not labels.any()


def test_unreadable_images_have_stand_ins_in_training(folder):
    batches = training_batches(folder, 2, CONFIG)
    assert not batches.told()
    for epoch, index in itertools.product(range(3), range(2)):
        images, labels = batches.batch(epoch, index)
        assert images.shape == (4, 32, 32, 3)
        assert labels.shape == (4, 2)
    assert len(batches.unreadable) == 2


def test_a_data_set_of_unreadable_images_is_one_sentence(tmp_path):
    for label in ("a", "b"):
        (tmp_path / label).mkdir()
        (tmp_path / label / "0.png").write_text("no image")
    split = sets.read(str(tmp_path), 32)[0]["train"]
    for make in (training_batches, evaluation_batches):
        with pytest.raises(ValueError, match=r"must have images that can be read\. 2 images could not be read.*0\.png"):
            make(split, 2, CONFIG).batch(0, 0)


def test_the_evaluation_is_the_checkpoints_own_scaled_to_the_size():
    how = preprocessing(dataclasses.replace(CONFIG, weights="torchvision/IMAGENET1K_V2", image_size=112))
    assert (how.resize, how.crop, how.crop_rounding) == (116, 112, "round")
    how = preprocessing(dataclasses.replace(CONFIG, weights=None, image_size=176, evaluation_size=224, resize=232))
    assert (how.resize, how.crop) == (232, 224)
    assert preprocessing(dataclasses.replace(CONFIG, weights=None, image_size=224)).resize == 256


@pytest.mark.parametrize("channels", [1, 3])
def test_arrays_of_another_size_are_resized_with_their_channels(channels):
    split = sets.ArraySplit(np.full((4, 28, 28, channels), 90, "uint8"), np.arange(4) % 2)
    images, _ = evaluation_batches(split, 2, CONFIG)[0]
    assert images.shape == (4, 32, 32, channels)
    assert (images == 90).all()


@pytest.mark.parametrize("channels", [1, 3])
def test_photographs_changes_keep_an_arrays_channels(channels):
    config = dataclasses.replace(CONFIG, crop_area=0.5, trivial_augment=True)
    split = sets.ArraySplit(np.full((4, 28, 28, channels), 90, "uint8"), np.arange(4) % 2)
    batches = training_batches(split, 2, config)
    assert batches[0][0].shape == (4, 32, 32, channels)
    assert batches.image_shape == (32, 32, channels)
    assert not batches.unreadable


@pytest.mark.parametrize(
    "changes",
    [
        {"shift": 0.1},
        {"flip": True},
        {"erase": 1.0},
        {"mixup": 0.4},
        {"cutmix": 1.0},
        {"pad": 3},
        {"mixup": 0.4, "cutmix": 1.0, "erase": 0.5, "flip": True},
    ],
    ids=lambda changes: "+".join(changes),
)
def test_changes_of_a_batch_depend_on_the_seed_alone(changes, rng):
    config = dataclasses.replace(CONFIG, **{"flip": False, **changes})
    images = rng.uniform(0, 255, (6, 16, 16, 3)).astype("float32")
    labels = np.eye(3, dtype="float32")[[0, 1, 2, 0, 1, 2]]
    kept = images.copy()
    x, y = augment.change_batch(images, labels, config, 5)
    again, _ = augment.change_batch(images, labels, config, 5)
    other, other_labels = augment.change_batch(images, labels, config, 6)
    np.testing.assert_array_equal(x, again)
    assert not np.array_equal(x, other)
    np.testing.assert_array_equal(images, kept)
    assert x.shape == images.shape
    assert -1 <= x.min() < x.max() <= 256
    np.testing.assert_allclose(y.sum(1), 1, atol=1e-5)
    mixes = "mixup" in changes or "cutmix" in changes
    # A window may be empty by chance, but not for each seed.
    tries = [y, other_labels, augment.change_batch(images, labels, config, 7)[1]]
    assert any(not np.array_equal(mixed, labels) for mixed in tries) == mixes


def test_half_of_the_images_are_mirrored_whatever_else_is_done(rng):
    images = rng.uniform(0, 255, (200, 4, 4, 1)).astype("float32")
    config = dataclasses.replace(CONFIG, flip=True, erase=0.5)
    x, _ = augment.change_batch(images, np.ones((200, 1), "float32"), config, 0)
    # Erased pixels are grey and equal: compare where neither is.
    mirrored, erased = [], []
    for found, original in zip(x[..., 0], images[..., 0], strict=True):
        erased.append(bool((found == 127.5).any()))
        free = found != 127.5
        mirrored.append(bool(np.array_equal(found[free], original[:, ::-1][free])))
    assert 70 < sum(mirrored) < 130
    assert 60 < sum(erased) < 140
    both = np.corrcoef(mirrored, erased)[0, 1]
    assert abs(both) < 0.25


def test_a_padded_crop_is_a_shift_by_whole_pixels(rng):
    images = rng.integers(1, 256, (50, 6, 6, 1)).astype("uint8")
    found = augment.pad_and_crop(images, 2, *rng.integers(0, 4, (2, len(images)), endpoint=True))
    shifts = []
    for image, original in zip(found, images, strict=True):
        padded = np.pad(original, ((2, 2), (2, 2), (0, 0)))
        places = [
            (top, left)
            for top, left in itertools.product(range(5), range(5))
            if np.array_equal(image, padded[top : top + 6, left : left + 6])
        ]
        shifts += places
    assert len(shifts) == 50
    assert len(set(shifts)) > 15


def test_a_random_crop_covers_the_share_that_is_asked_for():
    # A picture whose colours are the place: red is x, green is y.
    x, y = np.meshgrid(np.linspace(0, 255, 120), np.linspace(0, 255, 90))
    picture = Image.fromarray(np.stack([x, y, 0 * x], -1).astype("uint8"))
    rng, areas = np.random.default_rng(0), []
    for _ in range(200):
        found = np.asarray(augment.random_crop(picture, 32, 0.25, rng), "float64")
        assert found.shape == (32, 32, 3)
        # The middles of the outer pixels are 31/32 of the window apart.
        width, height = (np.ptp(found[..., c]) / 255 * 32 / 31 for c in (0, 1))
        areas.append(width * height)
    assert min(areas) > 0.2
    assert max(areas) > 0.85
    assert abs(np.mean(areas) - 0.6) < 0.08


@pytest.mark.parametrize("size", [(400, 4), (4, 400), (1, 1)])
def test_narrow_pictures_are_cropped_too(size):
    found = augment.random_crop(Image.new("RGB", size, (9, 9, 9)), 32, 0.9, np.random.default_rng(0))
    assert found.size == (32, 32)
    assert (np.asarray(found) == 9).all()


def test_trivial_augment_has_all_its_operations():
    noise = np.random.default_rng(0).integers(0, 256, (24, 24, 3)).astype("uint8")
    picture = Image.fromarray(noise)
    seen = set()

    class Recorded(np.random.Generator):
        def integers(self, *arguments, **options):
            value = super().integers(*arguments, **options)
            if arguments == (len(augment.OPERATIONS),):
                seen.add(augment.OPERATIONS[value])
            return value

    changed = 0
    for seed in range(150):
        found = augment.trivial_augment(picture, Recorded(np.random.PCG64(seed)))
        again = augment.trivial_augment(picture, Recorded(np.random.PCG64(seed)))
        assert (found.size, found.mode) == ((24, 24), "RGB")
        np.testing.assert_array_equal(np.asarray(found), np.asarray(again))
        changed += not np.array_equal(np.asarray(found), noise)
    assert seen == set(augment.OPERATIONS)
    assert changed > 100
