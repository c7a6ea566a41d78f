"""From photographs to logits as torchvision, timm, transformers and keras.applications do it, and names of classes."""

import functools
import struct
import zlib
from dataclasses import dataclass, field
from typing import Any

import keras
import numpy as np
import pytest
import safetensors.torch
import skimage.data
import sklearn.datasets
import timm.data
import torch
import torchvision
import transformers
from PIL import Image, ImageOps
from torchvision.datasets.folder import pil_loader
from torchvision.transforms import Compose
from torchvision.transforms import functional as F
from transformers.models.mobilenet_v2.image_processing_pil_mobilenet_v2 import MobileNetV2ImageProcessorPil

import keras_mnv2
from keras_mnv2 import decode_predictions, list_weights, preprocess_input, resize_and_crop
from tests.conftest import marks, once_on
from tests.helpers import note, randomise, relative_difference

# The other backends have more to do.
once = once_on("jax")
ONCE = marks("torch")

# One record of each library, the ones whose models run end to end below.
ONE_OF_EACH = (
    "torchvision/IMAGENET1K_V2",
    "timm/mobilenetv2_050.lamb_in1k",
    "transformers/google/mobilenet_v2_0.35_96",
    "keras/mobilenet_v2_0.35_96",
)
# size and crop_size of the preprocessor_config.json in each repository.
TRANSFORMERS = {"0.35_96": (128, 96), "0.75_160": (192, 160), "1.0_224": (256, 224), "1.4_224": (256, 224)}
# The shorter side of which each resolution is the central 87.5 %.
KERAS_RESIZE = {96: 109, 128: 146, 160: 182, 192: 219, 224: 256}


@functools.cache
def photographs():
    china, flower = sklearn.datasets.load_sample_images().images
    chelsea = skimage.data.chelsea()
    return {
        "astronaut": skimage.data.astronaut(),
        "chelsea": chelsea,
        "chelsea upright": np.rot90(chelsea).copy(),
        "coffee": skimage.data.coffee()[50:283, 100:331].copy(),
        "rocket": skimage.data.rocket(),
        "flower": flower[3:],
        "china, to be enlarged": china[200:240, 300:360].copy(),
    }


def with_exact_sizes(resize):
    """The photographs, and two whose shorter side needs no resizing, one with an odd rest at half of an odd number."""
    return {
        **photographs(),
        "square of the size": skimage.data.astronaut()[:resize, :resize].copy(),
        "height of the size": skimage.data.astronaut()[:resize, : resize + 79].copy(),
    }


def test_the_photographs_have_sizes_of_every_kind():
    shapes = [photo.shape[:2] for photo in photographs().values()]
    assert shapes == [(512, 512), (300, 451), (451, 300), (233, 231), (427, 640), (424, 640), (40, 60)]


# What each library gives for a photograph: bytes (height, width, 3) and floats of the same shape.


def of_torchvision(name, photo, tmp_path):
    transform = torchvision.models.MobileNet_V2_Weights[name].transforms()
    picture = Image.fromarray(photo)
    resized = F.resize(
        picture, transform.resize_size, interpolation=transform.interpolation, antialias=transform.antialias
    )
    return F.center_crop(resized, transform.crop_size), channels_last(transform(picture))


@functools.cache
def timm_transform(name):
    model = timm.create_model(name)
    return timm.data.create_transform(**timm.data.resolve_data_config({}, model=model), is_training=False)


def of_timm(name, photo, tmp_path):
    transform = timm_transform(name)
    resize_crop = Compose(transform.transforms[:2])
    picture = Image.fromarray(photo)
    return resize_crop(picture), channels_last(transform(picture))


def transformers_processor(name, processor=MobileNetV2ImageProcessorPil):
    size, crop = TRANSFORMERS[name.removeprefix("google/mobilenet_v2_")]
    return processor(size={"shortest_edge": size}, crop_size={"height": crop, "width": crop})


def of_transformers(name, photo, tmp_path):
    processor = transformers_processor(name)
    pixels = processor(Image.fromarray(photo), do_rescale=False, do_normalize=False)["pixel_values"][0]
    return channels_last(pixels), channels_last(processor(Image.fromarray(photo))["pixel_values"][0])


def of_keras(name, photo, tmp_path):
    Image.fromarray(photo).save(tmp_path / "photo.png")
    size = int(name.removesuffix("_no_top").rpartition("_")[2])
    shorter = KERAS_RESIZE[size]
    target = [shorter * side // min(photo.shape[:2]) for side in photo.shape[:2]]
    picture = keras.utils.load_img(tmp_path / "photo.png", target_size=target, interpolation="bilinear")
    pixels = keras.layers.CenterCrop(size, size, data_format="channels_last")(keras.utils.img_to_array(picture))
    pixels = keras.ops.convert_to_numpy(pixels)
    return pixels, keras.applications.mobilenet_v2.preprocess_input(pixels.copy())


def channels_last(pixels):
    return np.moveaxis(np.asarray(pixels), 0, -1)


def of_library(name, photo, tmp_path):
    library, _, inner = name.partition("/")
    find = {"torchvision": of_torchvision, "timm": of_timm, "transformers": of_transformers, "keras": of_keras}
    return tuple(np.asarray(pixels) for pixels in find[library](inner, photo, tmp_path))


RECORDS = [
    *(c.name for c in list_weights() if c.library != "keras"),
    *(f"keras/mobilenet_v2_0.35_{size}" for size in KERAS_RESIZE),
]


@once
@pytest.mark.parametrize("name", RECORDS)
def test_bytes_and_floats_are_those_of_the_library(name, tmp_path):
    largest = 0.0
    for title, photo in with_exact_sizes(list_weights(name)[0].preprocessing.resize).items():
        pixels, floats = of_library(name, photo, tmp_path)
        found = resize_and_crop(photo, name)
        assert found.dtype == np.uint8
        assert found.shape == pixels.shape
        assert np.array_equal(found, pixels), title
        prepared = keras.ops.convert_to_numpy(preprocess_input(found[None], "channels_last", weights=name))[0]
        assert prepared.dtype == "float32"
        largest = max(largest, float(np.abs(prepared - floats).max()))
    note(f"input of {name}: largest difference", largest)
    assert largest <= 1e-6


def test_every_record_of_keras_has_the_preprocessing_of_its_resolution():
    for checkpoint in list_weights(library="keras"):
        assert checkpoint.preprocessing.resize == KERAS_RESIZE[checkpoint.resolution]
        assert checkpoint.preprocessing == list_weights(f"keras/*_0.35_{checkpoint.resolution}")[0].preprocessing


def test_transformers_resizing_of_tensors_differs_by_a_grey_level():
    largest, share = 0, 0.0
    for name in TRANSFORMERS:
        processor = transformers_processor(name, transformers.MobileNetV2ImageProcessor)
        for photo in photographs().values():
            pixels = processor(Image.fromarray(photo), do_rescale=False, do_normalize=False)["pixel_values"][0]
            found = resize_and_crop(photo, f"transformers/google/mobilenet_v2_{name}")
            difference = np.abs(channels_last(pixels).astype(int) - found)
            largest, share = max(largest, difference.max()), max(share, (difference > 0).mean())
    note("transformers' default processor: largest difference in grey levels", largest)
    note("transformers' default processor: largest share of values that differ", share)
    assert largest <= 1


@pytest.mark.parametrize("size", [64, 160, 288])
def test_another_size_scales_the_resizing_as_timm_does(size):
    name = "mobilenetv2_100.ra_in1k"
    settings = {**timm.data.resolve_data_config({}, model=timm.create_model(name)), "input_size": (3, size, size)}
    resize_crop = Compose(timm.data.create_transform(**settings, is_training=False).transforms[:2])
    for photo in photographs().values():
        assert np.array_equal(resize_and_crop(photo, f"timm/{name}", size), resize_crop(Image.fromarray(photo)))


def test_a_record_may_be_a_name_a_checkpoint_its_preprocessing_or_the_default():
    photo = photographs()["chelsea"]
    checkpoint = list_weights("timm/mobilenetv2_140.ra_in1k")[0]
    expected = resize_and_crop(photo, checkpoint.name)
    assert np.array_equal(resize_and_crop(photo, checkpoint), expected)
    assert np.array_equal(resize_and_crop(photo, checkpoint.preprocessing), expected)
    default = resize_and_crop(photo, "keras/mobilenet_v2_1.0_224")
    assert np.array_equal(resize_and_crop(photo), default)
    assert np.array_equal(resize_and_crop(photo, "imagenet"), default)
    with pytest.raises(ValueError, match=r"weights must be .*got 'timm/mobilenetv2_150'"):
        resize_and_crop(photo, "timm/mobilenetv2_150")


@pytest.mark.parametrize("size", [0, -1, 2.5, True, "224"])
def test_a_bad_size_is_named(size):
    with pytest.raises(ValueError, match=f"size must be a whole number of at least 1 and at most 65536, got {size!r}"):
        resize_and_crop(photographs()["chelsea"], size=size)


def test_the_result_is_the_callers_own():
    for photo in (skimage.data.astronaut()[:224, :224].copy(), photographs()["chelsea"]):
        before = photo.copy()
        found = resize_and_crop(photo, keras_mnv2.Preprocessing(224, 224))
        found += 1
        assert np.array_equal(photo, before)


@pytest.mark.parametrize("name", ONE_OF_EACH)
@pytest.mark.parametrize("dtype", ["uint8", "float32", "float64"])
def test_types_and_data_formats(dtype, name, tmp_path):
    photos = list(photographs().values())
    floats = np.stack([of_library(name, photo, tmp_path)[1] for photo in photos])
    x = np.stack([resize_and_crop(photo, name) for photo in photos]).astype(dtype)
    before = x.copy()
    last = keras.ops.convert_to_numpy(preprocess_input(x, "channels_last", weights=name))
    first = keras.ops.convert_to_numpy(preprocess_input(np.moveaxis(x, 3, 1), "channels_first", weights=name))
    assert np.array_equal(x, before)
    assert first.shape == (len(x), 3, *x.shape[1:3])
    assert np.array_equal(np.moveaxis(first, 1, 3), last)
    assert np.abs(last - floats).max() <= 1e-6
    # An array of NumPy stays one, on JAX too.
    assert last.dtype == ("float64" if dtype == "float64" else "float32")


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_the_data_format_of_the_settings_is_the_default(name):
    x = np.moveaxis(photographs()["chelsea"], 2, 0)
    expected = keras.ops.convert_to_numpy(preprocess_input(x, "channels_first", weights=name))
    keras.config.set_image_data_format("channels_first")
    try:
        found = keras.ops.convert_to_numpy(preprocess_input(x, weights=name))
    finally:
        keras.config.set_image_data_format("channels_last")
    assert np.array_equal(found, expected)


def test_preprocess_input_names_what_is_wrong():
    x = photographs()["chelsea"]
    with pytest.raises(ValueError, match=r"data_format must be one of .*got 'NCHW'"):
        preprocess_input(x, "NCHW")
    with pytest.raises(ValueError, match=r"weights must be .*got 'timm/mobilenetv2_150'"):
        preprocess_input(x, weights="timm/mobilenetv2_150")
    for wrong, data_format in ((x[..., :1], "channels_last"), (x[..., 0], "channels_last"), (x, "channels_first")):
        with pytest.raises(ValueError, match=r"x must be images of the shape .*3.*, got"):
            preprocess_input(wrong, data_format, weights="torchvision/IMAGENET1K_V1")


def test_preprocess_input_takes_symbolic_tensors():
    x = keras.Input((None, None, 3))
    for name in ONE_OF_EACH:
        assert preprocess_input(x, weights=name).shape == x.shape


@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="tf.data maps tensors of TensorFlow")
def test_preprocess_input_runs_in_tf_data():
    import tensorflow as tf

    photo = photographs()["chelsea"]
    for name in ONE_OF_EACH:
        # A decoded file has no known rank.
        files = tf.data.Dataset.from_tensors(tf.io.encode_png(photo)).map(tf.io.decode_image)
        found = next(iter(files.map(functools.partial(preprocess_input, weights=name))))
        assert np.array_equal(found, preprocess_input(photo, weights=name))


# Whole models: the library's own preprocessing and network, saved by it, against this package's.


@dataclass
class Peer:
    """A library's model on the photographs.

    `outputs` are its logits, pooled features and last feature map, channels last; `path` the file that it saved.
    """

    record: str
    path: Any
    outputs: dict[str, np.ndarray]
    arguments: dict[str, Any]
    inputs: np.ndarray = field(init=False)

    def __post_init__(self):
        self.inputs = np.stack([resize_and_crop(photo, self.record) for photo in photographs().values()])

    def model(self, **arguments):
        """This package's model out of the file."""
        side = self.inputs.shape[1]
        shape = (3, side, side) if arguments.get("data_format") == "channels_first" else (side, side, 3)
        return keras_mnv2.MobileNetV2(
            shape, weights=self.path, classifier_activation=None, **{**self.arguments, **arguments}
        )

    def assert_equal(self, found, name, title):
        difference = relative_difference(found, self.outputs[name])
        note(f"{self.record}, {title}: largest relative difference", difference)
        assert difference <= 1e-4, title


def randomise_torch(model, x, rng):
    """`tests.helpers.randomise` for a model of PyTorch."""
    norms = [module for module in model.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    momentum = [norm.momentum for norm in norms]
    for norm in norms:
        norm.weight.data.copy_(torch.from_numpy(rng.uniform(0.8, 1.2, norm.num_features)))
        norm.bias.data.copy_(torch.from_numpy(rng.normal(0, 0.3, norm.num_features)))
        norm.momentum = 1.0
    with torch.no_grad():
        model.train()(x)
    for norm, value in zip(norms, momentum, strict=True):
        norm.momentum = value
        norm.running_mean += norm.running_var.sqrt() * torch.from_numpy(rng.normal(0, 0.1, norm.num_features)).float()
        norm.running_var *= torch.from_numpy(rng.uniform(0.8, 1.2, norm.num_features)).float()
    model.eval()


def torch_outputs(logits, pooled, features):
    outputs = {"logits": logits, "pooled": pooled, "features": features.permute(0, 2, 3, 1)}
    return {name: value.numpy() for name, value in outputs.items()}


def torchvision_peer(tmp_path, rng):
    source = torchvision.models.mobilenet_v2(width_mult=0.35)
    transform = torchvision.models.MobileNet_V2_Weights.IMAGENET1K_V2.transforms()
    x = torch.stack([transform(Image.fromarray(photo)) for photo in photographs().values()])
    randomise_torch(source, x, rng)
    torch.save(source.state_dict(), tmp_path / "model.pth")
    with torch.no_grad():
        features = source.features(x)
        outputs = torch_outputs(source(x), features.mean((2, 3)), features)
    return Peer("torchvision/IMAGENET1K_V2", tmp_path / "model.pth", outputs, {"alpha": 0.35})


def timm_peer(tmp_path, rng):
    source = timm.create_model("mobilenetv2_050.lamb_in1k")
    transform = timm_transform("mobilenetv2_050.lamb_in1k")
    x = torch.stack([transform(Image.fromarray(photo)) for photo in photographs().values()])
    randomise_torch(source, x, rng)
    safetensors.torch.save_model(source, tmp_path / "model.safetensors")
    with torch.no_grad():
        features = source.forward_features(x)
        outputs = torch_outputs(source(x), source.forward_head(features, pre_logits=True), features)
    return Peer("timm/mobilenetv2_050.lamb_in1k", tmp_path / "model.safetensors", outputs, {"alpha": 0.5})


def transformers_peer(tmp_path, rng):
    config = transformers.MobileNetV2Config(depth_multiplier=0.35, image_size=96, num_labels=1001)
    source = transformers.MobileNetV2ForImageClassification(config)
    pictures = [Image.fromarray(photo) for photo in photographs().values()]
    x = transformers_processor("0.35_96")(pictures, return_tensors="pt")["pixel_values"]
    randomise_torch(source, x, rng)
    source.save_pretrained(tmp_path)
    with torch.no_grad():
        inner = source.mobilenet_v2(x)
        outputs = torch_outputs(source(x).logits, inner.pooler_output, inner.last_hidden_state)
    record = "transformers/google/mobilenet_v2_0.35_96"
    return Peer(record, tmp_path / "model.safetensors", outputs, {"alpha": 0.35})


def keras_peer(tmp_path, rng):
    source = keras.applications.MobileNetV2((96, 96, 3), alpha=0.35, weights=None, classifier_activation=None)
    x = np.stack([of_keras("mobilenet_v2_0.35_96", photo, tmp_path)[1] for photo in photographs().values()])
    randomise(source, rng, x)
    # The form in which Keras publishes its files.
    source.save(tmp_path / "model.h5")
    features = source.get_layer("out_relu").output
    whole = keras.Model(source.input, [source.output, source.layers[-2].output, features])
    outputs = dict(zip(("logits", "pooled", "features"), whole.predict(x, verbose=0), strict=True))
    return Peer("keras/mobilenet_v2_0.35_96", tmp_path / "model.h5", outputs, {"alpha": 0.35})


PEERS = {
    "torchvision": torchvision_peer,
    "timm": timm_peer,
    "transformers": transformers_peer,
    "keras": keras_peer,
}


# Each on one backend, and one on the others: the peers run there as they run here.
@pytest.fixture(scope="module", params=[pytest.param(n, marks=[] if n == "torchvision" else ONCE) for n in PEERS])
def peer(request, tmp_path_factory):
    torch.manual_seed(0)
    keras.utils.set_random_seed(0)
    return PEERS[request.param](tmp_path_factory.mktemp(request.param), np.random.default_rng(0))


@once_on("torch")
def test_the_peers_tell_photographs_apart(peer):
    for name, values in peer.outputs.items():
        assert np.ptp(values, axis=0).max() > 0.3 * np.abs(values).max(), name


@once
def test_logits_of_photographs(peer):
    x = keras.ops.convert_to_numpy(preprocess_input(peer.inputs, weights=peer.record))
    peer.assert_equal(peer.model().predict(x, verbose=0), "logits", "logits")


@once
def test_features_of_photographs(peer):
    x = keras.ops.convert_to_numpy(preprocess_input(peer.inputs, weights=peer.record))
    model = peer.model(include_top=False, pooling="avg")
    both = keras.Model(model.input, [model.layers[-1].input, model.output])
    features, pooled = both.predict(x, verbose=0)
    peer.assert_equal(features, "features", "last feature map")
    peer.assert_equal(pooled, "pooled", "pooled features")


@pytest.mark.parametrize("data_format", ["channels_last", pytest.param("channels_first", marks=ONCE)])
def test_logits_with_preprocessing_in_the_model(data_format, peer):
    model = peer.model(include_preprocessing=True, data_format=data_format)
    x = peer.inputs.astype("float32")
    x = x if data_format == "channels_last" else np.moveaxis(x, 3, 1).copy()
    peer.assert_equal(model.predict(x, verbose=0), "logits", f"logits of raw pixels, {data_format}")


@functools.cache
def timm_labels():
    """(WordNet id, first lemma) of each class, from timm's copies of ImageNet's list and WordNet."""
    info = timm.data.ImageNetInfo()
    lemmas = [info.label_name_to_description(wnid).partition(",")[0] for wnid in info.label_names()]
    return [(wnid, lemma.replace(" ", "_")) for wnid, lemma in zip(info.label_names(), lemmas, strict=True)]


FACTS = {
    0: ("n01440764", "tench"),
    134: ("n02012849", "crane"),
    282: ("n02123159", "tiger_cat"),
    517: ("n03126707", "crane"),
    607: ("n03590841", "jack-o'-lantern"),
    638: ("n03710637", "maillot"),
    639: ("n03710721", "maillot"),
    999: ("n15075141", "toilet_tissue"),
}


def test_labels_are_imagenets():
    everything = decode_predictions(-np.arange(1000.0)[None], top=1000)[0]
    assert [(wnid, name) for wnid, name, _ in everything] == timm_labels()
    for number, fact in FACTS.items():
        assert everything[number] == (*fact, -number)


@pytest.mark.parametrize("top", [1, 5, 1000])
def test_decode_predictions_is_keras_own(top, rng, monkeypatch):
    # What Keras would download.
    index = {str(number): list(label) for number, label in enumerate(timm_labels())}
    module = keras.applications.imagenet_utils.decode_predictions.__globals__
    monkeypatch.setitem(module, "CLASS_INDEX", index)
    for scores in (rng.uniform(size=(3, 1000)).astype("float32"), rng.normal(size=(3, 1000))):
        assert decode_predictions(scores, top) == keras.applications.mobilenet_v2.decode_predictions(scores, top)


def test_decode_predictions_takes_tensors_and_low_precision(rng):
    scores = rng.permutation(1000)[None].astype("float32") / 1000
    expected = [entry[:2] for entry in decode_predictions(scores)[0]]
    assert expected == [timm_labels()[i] for i in np.argsort(-scores[0])[:5]]
    tensor = keras.ops.convert_to_tensor(scores)
    assert [entry[:2] for entry in decode_predictions(tensor)[0]] == expected
    low = decode_predictions(keras.ops.cast(tensor, "bfloat16"), top=1)[0][0]
    # bfloat16 has eight bits: neighbours of the best have its score.
    assert float(low[2]) == pytest.approx(scores.max(), rel=0.01)


@pytest.mark.parametrize(
    "dtype",
    ["bool", "int8", "uint8", "int32", "uint32", "int64", "uint64", "float16", "float32", "float64", "longdouble"],
)
def test_decode_predictions_takes_every_type_of_number(dtype):
    scores = np.zeros((2, 1000), dtype)
    scores[0, 283] = scores[1, 2] = scores[1, 7] = 1
    if dtype.startswith("int"):
        # Whose negative is itself.
        scores[:, 0] = np.iinfo(dtype).min
    expected = [[283, 1 if dtype.startswith("int") else 0], [2, 7]]
    found = [[entry[:2] for entry in row] for row in decode_predictions(scores, top=2)]
    assert found == [[timm_labels()[i] for i in row] for row in expected]


def test_whole_numbers_are_compared_without_rounding():
    scores = np.full((1, 1000), 2**53, "int64")
    scores[0, 9] += 1
    assert decode_predictions(scores, top=1)[0][0][:2] == timm_labels()[9]


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        (np.where(np.arange(1000) == 7, np.nan, 0.1)[None], "preds must be numbers, got NaN for 1 of 1 images"),
        (np.zeros((1, 1000), "complex64"), "preds must be real numbers, got values of type complex64"),
        (np.zeros((1, 1000), "str"), "preds must be real numbers, got values of type <U1"),
        (np.zeros((1, 1000), object), "preds must be real numbers, got values of type object"),
    ],
)
def test_scores_that_are_no_numbers_are_named(scores, message):
    with pytest.raises(ValueError, match=message):
        decode_predictions(scores)


def test_the_first_of_1001_classes_is_the_background():
    scores = np.zeros((2, 1001))
    scores[0, [0, 1, 283]] = 3, 2, 1
    scores[1, 1000] = 1
    found = decode_predictions(scores, top=3)
    assert found[0] == [("", "background", 3), (*FACTS[0], 2), (*FACTS[282], 1)]
    assert found[1][0] == (*FACTS[999], 1)


@pytest.mark.parametrize("shape", [(1000,), (2, 999), (2, 1002), (1, 1, 1000), (1000, 2)])
def test_scores_of_another_shape_are_named(shape):
    with pytest.raises(ValueError, match=r"preds must have the shape .* got \("):
        decode_predictions(np.zeros(shape))


@pytest.mark.parametrize("top", [0, -1, 2.5, True, None])
def test_a_bad_top_is_named(top):
    with pytest.raises(ValueError, match=f"top must be a whole number of at least 1, got {top!r}"):
        decode_predictions(np.zeros((1, 1000)), top)


# Files of every kind.


def picture_of(mode):
    picture = Image.fromarray(photographs()["chelsea"])
    if mode == "RGBA":
        ramp = np.tile(np.linspace(0, 255, picture.width).astype("uint8"), (picture.height, 1))
        picture.putalpha(Image.fromarray(ramp))
        return picture
    return picture.quantize(64) if mode == "P" else picture.convert(mode)


@pytest.mark.parametrize(
    ("mode", "suffix"),
    [
        ("RGB", ".png"),
        ("RGB", ".jpg"),
        ("RGB", ".bmp"),
        ("RGB", ".webp"),
        ("L", ".png"),
        ("L", ".jpg"),
        ("1", ".png"),
        ("LA", ".png"),
        ("RGBA", ".png"),
        ("P", ".png"),
        ("P", ".gif"),
        ("CMYK", ".jpg"),
        ("CMYK", ".tif"),
    ],
)
def test_files_are_read_as_the_libraries_read_them(mode, suffix, tmp_path):
    path = tmp_path / f"photo{suffix}"
    picture_of(mode).save(path)
    with Image.open(path) as picture:
        assert picture.mode == mode
        read = np.asarray(picture.copy())
    for name in ONE_OF_EACH:
        found = resize_and_crop(path, name)
        assert np.array_equal(resize_and_crop(str(path), name), found)
        with Image.open(path) as picture:
            assert np.array_equal(resize_and_crop(picture, name), found)
        for loaded in (pil_loader(path), keras.utils.load_img(path)):
            assert np.array_equal(resize_and_crop(np.asarray(loaded), name), found)
        if mode == "RGBA":
            assert np.array_equal(resize_and_crop(photographs()["chelsea"], name), found)
        if mode == "L":
            assert np.array_equal(resize_and_crop(read, name), found)
            assert (found == found[..., :1]).all()


def write_png_of_16_bits(path, pixels):
    """Pillow writes no RGB of 16 bits."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    height, width = pixels.shape[:2]
    header = struct.pack(">IIBBBBB", width, height, 16, 0 if pixels.ndim == 2 else 2, 0, 0, 0)
    rows = zlib.compress(b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels), 1)
    parts = ((b"IHDR", header), (b"IDAT", rows[:10]), (b"IDAT", rows[10:]), (b"IEND", b""))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts))


def test_grey_of_16_bits_is_as_bright_as_colour_of_16_bits(tmp_path, rng):
    grey = np.asarray(picture_of("L")).astype("uint16")
    deep = grey * 256 + rng.integers(0, 256, grey.shape).astype("uint16")
    write_png_of_16_bits(tmp_path / "grey.png", deep)
    write_png_of_16_bits(tmp_path / "colour.png", np.stack([deep] * 3, -1))
    Image.fromarray(deep).save(tmp_path / "grey.tif")
    with Image.open(tmp_path / "grey.png") as picture:
        assert picture.mode == "I;16"
        # What Pillow would make of it, and the libraries with it.
        assert np.asarray(picture.convert("RGB")).min() == 255
    expected = resize_and_crop(grey.astype("uint8"))
    for name in ("grey.png", "colour.png", "grey.tif"):
        assert np.array_equal(resize_and_crop(tmp_path / name), expected), name
    big_endian = Image.frombytes("I;16B", deep.shape[::-1], deep.astype(">u2").tobytes())
    assert np.array_equal(resize_and_crop(big_endian), expected)


@pytest.mark.parametrize("mode", ["I", "F"])
def test_pixels_of_unknown_range_are_refused(mode, tmp_path):
    picture = picture_of("L").convert(mode)
    with pytest.raises(ValueError, match=f"32-bit pixels .*mode {mode}.*scale them to bytes"):
        resize_and_crop(picture)
    picture.save(tmp_path / "deep.tif")
    with pytest.raises(ValueError, match=f"deep.tif' cannot be read as an image: .*mode {mode}"):
        resize_and_crop(tmp_path / "deep.tif")


def test_the_orientation_in_exif_is_ignored_as_the_libraries_do(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    path = tmp_path / "turned.jpg"
    Image.fromarray(photographs()["chelsea"]).save(path, exif=exif)
    Image.fromarray(photographs()["chelsea"]).save(tmp_path / "plain.jpg")
    for name in ONE_OF_EACH:
        found = resize_and_crop(path, name)
        assert np.array_equal(found, resize_and_crop(tmp_path / "plain.jpg", name))
        for loaded in (pil_loader(path), keras.utils.load_img(path)):
            assert np.array_equal(resize_and_crop(loaded, name), found)
        with Image.open(path) as picture:
            assert not np.array_equal(resize_and_crop(ImageOps.exif_transpose(picture), name), found)


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_one_pixel_fills_the_crop(name, tmp_path):
    Image.new("RGB", (1, 1), (10, 20, 30)).save(tmp_path / "pixel.png")
    found = resize_and_crop(tmp_path / "pixel.png", name)
    assert found.shape == of_library(name, photographs()["coffee"], tmp_path)[0].shape
    assert (found == (10, 20, 30)).all()


def write_broken(folder, kind):
    path = folder / f"broken.{kind}"
    if kind in ("jpg", "png", "gif", "webp", "tif", "bmp"):
        Image.fromarray(photographs()["coffee"]).save(path)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    elif kind == "chunk.png":
        # A spoilt name between the chunks of pixels, which Pillow reports as SyntaxError.
        write_png_of_16_bits(path, np.arange(64, dtype="uint16").reshape(8, 8) * 997)
        path.write_bytes(b"\x08\x11F\xc1".join(path.read_bytes().rsplit(b"IDAT", 1)))
    elif kind == "number.ppm":
        path.write_bytes(b"P6\n12 1x\n255\n" + bytes(36))
    elif kind == "huge.png":
        write_png_of_16_bits(path, np.zeros((1, 1), "uint16"))
        start = path.read_bytes()
        header = struct.pack(">IIBBBBB", 10**5, 10**5, 8, 2, 0, 0, 0)
        header = b"IHDR" + header
        path.write_bytes(start[:12] + header + struct.pack(">I", zlib.crc32(header)) + start[33:])
    else:
        path.write_bytes({"txt": b"Not an image at all.\n", "empty": b"", "zero": bytes(1000)}[kind])
    return path


BROKEN = ("jpg", "png", "gif", "webp", "tif", "bmp", "chunk.png", "number.ppm", "huge.png", "txt", "empty", "zero")


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_file_is_one_clear_sentence(kind, tmp_path):
    path = write_broken(tmp_path, kind)
    with pytest.raises(ValueError, match=rf"^The file '.*broken\.{kind}' cannot be read as an image: \S") as error:
        resize_and_crop(path)
    message = str(error.value)
    assert message.endswith(".")
    assert not message.endswith("..")
    assert "\n" not in message


def test_a_missing_file_is_named(tmp_path):
    for path in (tmp_path / "none.jpg", tmp_path, str(tmp_path / "none.jpg")):
        with pytest.raises(FileNotFoundError, match=f"no image at '{path}'"):
            resize_and_crop(path)


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((40, 60, 3)),
        np.zeros((40, 60, 3), "int64"),
        np.zeros((40, 60), "uint16"),
        np.zeros((40, 60), bool),
        np.zeros((40, 60, 4), "uint8"),
        np.zeros((40, 60, 1), "uint8"),
        np.zeros((3, 40, 60), "uint8"),
        np.zeros((2, 40, 60, 3), "uint8"),
        np.zeros(40, "uint8"),
        None,
        b"photo.jpg",
        7,
    ],
    ids=lambda array: f"{array.dtype}{array.shape}" if isinstance(array, np.ndarray) else repr(array),
)
def test_what_is_no_image_is_named(array):
    found = np.asarray(array)
    with pytest.raises(ValueError, match="image must be a path, a Pillow image or an array of bytes") as error:
        resize_and_crop(array)
    assert f"got {found.dtype} of shape {found.shape}" in str(error.value)


@pytest.mark.parametrize("shape", [(0, 5, 3), (5, 0, 3), (0, 0), (0, 5)])
def test_an_image_without_pixels_is_named(shape):
    with pytest.raises(ValueError, match=f"image must have pixels, got one of height {shape[0]} and width {shape[1]}"):
        resize_and_crop(np.zeros(shape, "uint8"))
    with pytest.raises(ValueError, match="image must have pixels"):
        resize_and_crop(Image.new("RGB", shape[1::-1]))


def test_arrays_may_lie_in_memory_in_any_way():
    photo = photographs()["chelsea"]
    found = resize_and_crop(photo[::-1, ::-2], "timm/mobilenetv2_140.ra_in1k")
    assert np.array_equal(found, resize_and_crop(photo[::-1, ::-2].copy(), "timm/mobilenetv2_140.ra_in1k"))
    turned = np.asfortranarray(photo)
    assert np.array_equal(resize_and_crop(turned), resize_and_crop(photo))


def test_probabilities_are_the_softmax_of_logits_alone():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(20, 10)) * 100
    found = keras_mnv2.probabilities(logits)
    assert found.sum(axis=1) == pytest.approx(1)
    assert np.array_equal(found.argmax(1), logits.argmax(1))
    assert np.array_equal(keras_mnv2.probabilities(found), found)
    eighth_bits = np.round(found * 256).clip(0, 255) / 256
    assert np.array_equal(keras_mnv2.probabilities(eighth_bits), eighth_bits)
    assert keras_mnv2.probabilities(np.ones((1, 4))) == pytest.approx(0.25)
    with pytest.raises(ValueError, match=r"scores must have the shape \(images, classes\), got \(3,\)"):
        keras_mnv2.probabilities([0, 0, 1])
