"""SSDLite: torchvision's numbers and losses, the paper's sizes, targets, training, folding, files and weights."""

import pickle
import runpy
from collections import OrderedDict
from functools import partial

import keras
import numpy as np
import pytest
from PIL import Image
from skimage import data

import keras_mnv2
from keras_mnv2.formats import converters, graphs
from keras_mnv2.formats.comparison import _pairs
from keras_mnv2.formats.images import finish_litert
from keras_mnv2.formats.litert_file import operator_name, operators, read_file
from keras_mnv2.losses import BoxLoss, ClassLoss
from tests.conftest import marks, once, once_on
from tests.helpers import randomise, relative_difference
from tests.library.formats.test_export import kinds_that_run

SIDE, CLASSES, ALPHA = 96, 3, 0.35
SMALL = {"alpha": ALPHA, "weights_backbone": None, "classes": CLASSES}
SHAPE = (SIDE, SIDE, 3)
# Of three images, the second without any.
TRUTH = (
    [[[10, 20, 50, 60], [12, 18, 55, 66], [0, 0, 96, 90]], [], [[61, 3, 93.5, 20.5]]],
    [[0, 2, 1], [], [2]],
)


def torchvision_model():
    """An SSD of torchvision's parts around its own MobileNetV2, with random weights and statistics."""
    import torch
    from torchvision.models import mobilenet_v2
    from torchvision.models.detection.anchor_utils import DefaultBoxGenerator
    from torchvision.models.detection.ssd import SSD
    from torchvision.models.detection.ssdlite import SSDLiteHead, _extra_block

    norm = partial(torch.nn.BatchNorm2d, eps=1e-3)

    class Maps(torch.nn.Module):
        def __init__(self, widths):
            super().__init__()
            features = mobilenet_v2(width_mult=ALPHA).features
            expand, *rest = features[14].conv
            parts = [[*features[:14], expand], [*rest, *features[15:]]]
            ends = (1280, *widths[:-1])
            extra = [_extra_block(a, b, norm) for a, b in zip(ends, widths, strict=True)]
            self.parts = torch.nn.ModuleList([torch.nn.Sequential(*part) for part in parts] + extra)
            self.out_channels = [expand[0].out_channels, 1280, *widths]

        def forward(self, x):
            maps = OrderedDict()
            for i, part in enumerate(self.parts):
                x = maps[str(i)] = part(x)
            return maps

    torch.manual_seed(0)
    # 512, 256, 256 and 128 at this width, rounded as the paper rounds widths.
    maps = Maps((176, 88, 88, 48))
    boxes = DefaultBoxGenerator([[2, 3]] * 6, min_ratio=0.2, max_ratio=0.95)
    head = SSDLiteHead(maps.out_channels, boxes.num_anchors_per_location(), CLASSES + 1, norm)
    scaling = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    model = SSD(
        maps,
        boxes,
        (SIDE, SIDE),
        CLASSES + 1,
        head=head,
        score_thresh=0.05,
        topk_candidates=1000,
        detections_per_img=400,
        **scaling,
    )
    rng = np.random.default_rng(0)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.weight.copy_(torch.from_numpy(rng.uniform(0.8, 1.2, module.num_features)))
                module.bias.copy_(torch.from_numpy(rng.normal(0, 0.3, module.num_features)))
                # Statistics of the batch below, so that the signal lives.
                module.momentum = 1.0
            elif isinstance(module, torch.nn.Conv2d) and module.bias is not None:
                # Scores that differ.
                module.weight.copy_(torch.from_numpy(rng.normal(0, 0.2, module.weight.shape)))
                module.bias.copy_(torch.from_numpy(rng.normal(0, 0.5, module.bias.shape)))
        model.train()
        head(list(maps(torch.from_numpy(rng.uniform(-1, 1, (8, 3, SIDE, SIDE)).astype("float32"))).values()))
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                # Maps of one pixel have eight numbers: some hardly differ, and would show each rounding enlarged.
                module.running_var.clamp_(min=0.01)
    return model.eval()


def units(modules):
    """Convolutions of PyTorch, each with its batch norm or None."""
    import torch

    found = []
    for module in modules:
        if isinstance(module, torch.nn.Conv2d):
            found.append((module, None))
        elif isinstance(module, torch.nn.BatchNorm2d):
            found[-1] = (found[-1][0], module)
    return found


def copy(theirs, ours):
    """torchvision's weights, unit by unit."""
    heads = {"box": theirs.head.regression_head, "class": theirs.head.classification_head}
    found = units(theirs.backbone.modules())
    convs = [layer for layer in ours.layers if "kernel" in [w.name for w in layer.weights]]
    own = [layer.name for layer in convs if not layer.name.startswith(("extra", "box", "class"))]
    own += [f"extra_{i}_{part}" for i in range(1, 5) for part in ("reduce", "depthwise", "project")]
    for kind, head in heads.items():
        found += units(head.modules())
        own += [f"{kind}_{i}_{part}" for i in range(1, 7) for part in ("depthwise", "project")]
    assert len(own) == len(convs)
    for name, (conv, norm) in zip(own, found, strict=True):
        layer = ours.get_layer(name)
        depthwise = isinstance(layer, keras.layers.DepthwiseConv2D)
        kernel = conv.weight.detach().numpy().transpose((2, 3, 0, 1) if depthwise else (2, 3, 1, 0))
        layer.set_weights([kernel] if norm else [kernel, conv.bias.detach().numpy()])
        if norm:
            values = (norm.weight, norm.bias, norm.running_mean, norm.running_var)
            of = {"Conv1": "bn_Conv1", "Conv_1": "Conv_1_bn"}.get(name, f"{name}_BN")
            ours.get_layer(of).set_weights([value.detach().numpy() for value in values])


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(1).uniform(0, 1, (3, *SHAPE)).astype("float32")


@pytest.fixture(scope="module")
def theirs():
    return torchvision_model()


@pytest.fixture(scope="module")
def ours(theirs):
    model = keras_mnv2.SSDLite(SHAPE, **SMALL, padding="symmetric", norm_epsilon=1e-5, reduce_lowest=False)
    copy(theirs, model)
    return model


@pytest.fixture(scope="module")
def raw(ours, images):
    """What the network says of the images."""
    return ours.predict(2 * images - 1, verbose=0)


def head_outputs(theirs, images):
    import torch

    with torch.no_grad():
        x = torch.from_numpy((2 * images - 1).transpose(0, 3, 1, 2))
        return theirs.head(list(theirs.backbone(x).values()))


def test_the_network_says_what_torchvisions_says(theirs, raw, images):
    expected = head_outputs(theirs, images)
    for ours, key in (("boxes", "bbox_regression"), ("classes", "cls_logits")):
        assert raw[ours].shape == expected[key].shape
        assert np.abs(raw[ours] - expected[key].numpy()).max() < 1e-4
        assert np.abs(raw[ours]).max() > 1


def test_detections_are_those_of_torchvision(theirs, ours, images):
    import torch

    with torch.no_grad():
        expected = theirs([torch.from_numpy(image.transpose(2, 0, 1)) for image in images])
    model = keras_mnv2.detector(ours, score_threshold=0.05, candidates=1000, max_detections=400)
    found = model.predict(2 * images - 1, verbose=0)
    for i, theirs in enumerate(expected):
        count = len(theirs["scores"])
        assert 20 < count < 400
        assert (found["classes"][i, count:] == -1).all()
        assert not found["scores"][i, count:].any()
        rows = np.column_stack([found["boxes"][i], 100 * found["scores"][i], 1000 * found["classes"][i]])[:count]
        others = [
            theirs["boxes"].numpy(),
            100 * theirs["scores"].numpy()[:, None],
            1000 * theirs["labels"][:, None] - 1000,
        ]
        # Scores that are equal but for the last bit may change places.
        distance = np.abs(rows[:, None] - np.concatenate(others, axis=1)[None]).max(axis=-1)
        nearest = distance.argmin(axis=1)
        assert sorted(nearest) == list(range(count))
        # Beside the same networks in float64 both are up to 2.3e-5 pixels off, from the rounding of the offsets (3e-6)
        # and of the decoding (1.1e-5 each, of the same offsets), so that they are 3.1e-5 apart (3.2e-7 of the image).
        assert np.abs(found["boxes"][i, :count] - others[0][nearest]).max() < 1e-4
        assert np.abs(found["boxes"][i, :count] - others[0][nearest]).max() / SIDE < 1e-6
        np.testing.assert_array_equal(found["classes"][i, :count], others[2][nearest, 0] / 1000)
        np.testing.assert_allclose(found["scores"][i, :count], theirs["scores"], atol=1e-5)


def matched_by(theirs, anchors):
    """torchvision's own match of each image's boxes."""
    import torch
    from torchvision.ops import box_iou

    none = torch.full((len(anchors),), -1)
    boxes = [torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4) for boxes in TRUTH[0]]
    return boxes, [theirs.proposal_matcher(box_iou(b, anchors)) if len(b) else none for b in boxes]


def value_and_gradient(loss, y_true, y_pred):
    """Of the active backend."""
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        x = tf.constant(y_pred)
        with tf.GradientTape() as tape:
            tape.watch(x)
            value = loss(y_true, x)
        return float(value), tape.gradient(value, x).numpy()
    if keras.backend.backend() == "jax":
        import jax

        value, gradient = jax.value_and_grad(lambda x: loss(y_true, x))(y_pred)
        return float(value), np.asarray(gradient)
    x = keras.ops.convert_to_tensor(y_pred).requires_grad_()
    value = loss(y_true, x)
    value.backward()
    return float(value.detach()), x.grad.cpu().numpy()


def test_losses_and_gradients_are_those_of_torchvision(theirs, ours):
    import torch

    encoder = keras_mnv2.TargetEncoder(ours)
    anchors = torch.from_numpy(encoder.boxes)
    boxes, matched = matched_by(theirs, anchors)
    rng = np.random.default_rng(0)
    y_pred = {"boxes": rng.normal(0, 1, (3, 312, 4)), "classes": rng.normal(0, 2, (3, 312, CLASSES + 1))}
    y_pred = {name: y.astype("float32") for name, y in y_pred.items()}
    given = {name: torch.from_numpy(y).requires_grad_() for name, y in y_pred.items()}
    targets = [
        {"boxes": b, "labels": torch.tensor(c, dtype=torch.int64) + 1} for b, c in zip(boxes, TRUTH[1], strict=True)
    ]
    outputs = {"bbox_regression": given["boxes"], "cls_logits": given["classes"]}
    expected = theirs.compute_loss(targets, outputs, [anchors] * 3, matched)
    (expected["bbox_regression"] + expected["classification"]).backward()
    y_true = encoder(*TRUTH)
    for name, loss, key in (("boxes", BoxLoss(), "bbox_regression"), ("classes", ClassLoss(), "classification")):
        value, gradient = value_and_gradient(loss, y_true[name], y_pred[name])
        assert abs(value - float(expected[key].detach())) < 1e-4
        assert np.abs(gradient - given[name].grad.numpy()).max() < 1e-5
        assert np.abs(gradient).max() > 1e-3


def test_default_boxes_and_targets_are_those_of_torchvision(theirs, ours):
    import torch
    from torchvision.models.detection.image_list import ImageList

    maps = [torch.zeros(1, 1, *sides) for sides in ours.get_layer("boxes").map_sizes]
    (anchors,) = theirs.anchor_generator(ImageList(torch.zeros(1, 3, SIDE, SIDE), [(SIDE, SIDE)]), maps)
    encoder = pickle.loads(pickle.dumps(keras_mnv2.TargetEncoder(ours)))
    np.testing.assert_allclose(encoder.boxes, anchors.numpy(), atol=1e-5)
    found = encoder(*TRUTH)
    boxes, matched = matched_by(theirs, anchors)
    for i, indices in enumerate(matched):
        is_matched = (indices >= 0).numpy()
        np.testing.assert_array_equal(found["boxes"][i, :, 4], is_matched)
        labels = np.append(TRUTH[1][i], -1).astype(int)[indices] + 1
        np.testing.assert_array_equal(found["classes"][i], labels)
        coded = theirs.box_coder.encode_single(boxes[i][indices[is_matched]], anchors[is_matched])
        np.testing.assert_allclose(found["boxes"][i, is_matched, :4], coded, atol=1e-4)
    assert found["boxes"][0, :, 4].sum() > 3


def test_targets_of_filled_arrays_are_the_same(ours):
    encoder = keras_mnv2.TargetEncoder(ours)
    boxes, classes = np.zeros((3, 3, 4)), np.full((3, 3), -1)
    for i, (some, numbers) in enumerate(zip(*TRUTH, strict=True)):
        boxes[i, : len(some)] = np.reshape(some, (-1, 4))
        classes[i, : len(some)] = numbers
    for found, expected in zip(encoder(boxes, classes).values(), encoder(*TRUTH).values(), strict=True):
        np.testing.assert_array_equal(found, expected)
    assert {name: y.shape for name, y in encoder([], []).items()} == {"boxes": (0, 312, 5), "classes": (0, 312)}


@pytest.mark.parametrize(
    ("boxes", "classes", "match"),
    [
        ([[[10, 20, 10, 60]]], [[0]], r"width and a height above 0, got \[10.0, 20.0, 10.0, 60.0\] for image 0"),
        ([[[10, 20, float("nan"), 60]]], [[0]], "width and a height above 0"),
        ([[[1, 2, 3, 4]]], [[3]], "classes must be whole numbers from 0 to 2, or -1, got 3 for image 0"),
        ([[[1, 2, 3, 4]]], [[0.5]], "classes must be whole numbers"),
        ([[[1, 2, 3]]], [[0]], "boxes must have the shape"),
        ([[[1, 2, 3, 4]]], [[0, 1]], "boxes must have the shape"),
        ([[[1, 2, 3, 4]]], [["cat"]], "boxes must have the shape"),
        ([[]], [], "boxes and classes must be of as many images, got 1 and 0"),
    ],
)
def test_bad_targets(ours, boxes, classes, match):
    with pytest.raises(ValueError, match=match):
        keras_mnv2.TargetEncoder(ours)(boxes, classes)


@once
def test_files_and_another_number_of_classes(ours, tmp_path, capsys):
    path = tmp_path / "ours.keras"
    ours.save(path)
    own = {"reduce_lowest": False, "padding": "symmetric", "norm_epsilon": 1e-5}
    again = keras_mnv2.SSDLite(SHAPE, weights=path, **own)
    for found, expected in zip(again.get_weights(), ours.get_weights(), strict=True):
        np.testing.assert_array_equal(found, expected)
    assert not capsys.readouterr().out
    other = keras_mnv2.SSDLite((128, 96, 3), weights=path, classes=5, **own)
    assert "the classifier is left out" in capsys.readouterr().out
    for name in ("block_16_project", "extra_4_reduce", "box_3_project", "class_1_depthwise"):
        np.testing.assert_array_equal(*(model.get_layer(name).get_weights()[0] for model in (ours, other)))
    backbone = keras_mnv2.MobileNetV2((64, 64, 3), weights=path, include_top=False)
    np.testing.assert_array_equal(*(model.get_layer("Conv_1").get_weights()[0] for model in (ours, backbone)))
    with pytest.raises(ValueError, match="aspect_ratios and reduce_lowest must be those of the file"):
        keras_mnv2.SSDLite(SHAPE, weights=path)
    with pytest.raises(ValueError, match="weights must be of a segmentation network"):
        keras_mnv2.DeepLabV3(SHAPE, weights=path)


def test_it_folds(ours, raw, images):
    folded = keras_mnv2.fold_batch_norm(ours)
    assert not [layer for layer in folded.layers if isinstance(layer, keras.layers.BatchNormalization)]
    found = folded.predict(2 * images - 1, verbose=0)
    assert max(relative_difference(found[name], raw[name]) for name in raw) < 1e-4
    np.testing.assert_array_equal(keras_mnv2.TargetEncoder(folded).boxes, ours.get_layer("boxes").boxes)


@once
def test_a_detector_has_the_weights_of_its_network(ours, raw, images, tmp_path):
    model = keras_mnv2.detector(ours, score_threshold=0.2, max_detections=20)
    x = 2 * images - 1
    found = model.predict(x, verbose=0)
    assert {name: (y.shape, str(y.dtype)) for name, y in found.items()} == {
        "boxes": ((3, 20, 4), "float32"),
        "scores": ((3, 20), "float32"),
        "classes": ((3, 20), "int32"),
    }
    scores = found["scores"]
    assert (np.diff(scores) <= 0).all()
    assert (scores[found["classes"] >= 0] > 0.2).all()
    assert (found["boxes"].min(), found["boxes"].max()) == (0, SIDE)
    best = keras.ops.convert_to_numpy(keras.ops.softmax(raw["classes"]))[..., 1:].max(axis=(1, 2))
    np.testing.assert_allclose(scores[:, 0], best, atol=1e-5)
    assert model.get_layer(ours.name) is ours
    model.save(tmp_path / "detector.keras")
    again = keras.models.load_model(tmp_path / "detector.keras")
    assert again.get_layer("detections").get_config() == model.get_layer("detections").get_config()
    np.testing.assert_array_equal(keras_mnv2.TargetEncoder(again).boxes, keras_mnv2.TargetEncoder(ours).boxes)


@once
def test_it_trains_and_is_saved_compiled(tmp_path):
    keras.utils.set_random_seed(0)
    model = keras_mnv2.SSDLite((64, 64, 3), **SMALL)
    rng = np.random.default_rng(0)
    x = rng.uniform(-1, 1, (4, 64, 64, 3)).astype("float32")
    y = keras_mnv2.TargetEncoder(model)(
        [[[5, 5, 40, 40]], [[20, 10, 60, 60]], [], [[0, 0, 30, 60]]], [[0], [1], [], [2]]
    )
    model.compile(keras.optimizers.Adam(3e-3), loss={"boxes": BoxLoss(), "classes": ClassLoss()})
    losses = model.fit(x, y, batch_size=4, epochs=5, verbose=0).history
    assert {"loss", "boxes_loss", "classes_loss"} <= losses.keys()
    assert losses["loss"][-1] < 0.8 * losses["loss"][0]
    model.save(tmp_path / "trained.keras")
    again = keras.models.load_model(tmp_path / "trained.keras")
    expected = model.evaluate(x, y, verbose=0)
    np.testing.assert_allclose(again.evaluate(x, y, verbose=0), expected, rtol=1e-5)
    weighted = model.evaluate(x, y, sample_weight=np.zeros(4), verbose=0)
    assert weighted[0] == 0


@once_on("tensorflow")
def test_the_papers_sizes():
    # Table 6: 4.3 million parameters and 0.8 billion multiply-adds.
    model = keras_mnv2.SSDLite(weights_backbone=None)
    assert model.input_shape == (None, 320, 320, 3)
    assert {name: y.shape for name, y in model.output.items()} == {
        "boxes": (None, 2034, 4),
        "classes": (None, 2034, 81),
    }
    assert sum(int(np.prod(w.shape)) for w in model.trainable_weights) == 4_337_013
    first = model.get_layer("boxes").boxes[:3]
    sides = (first[:, 2:] - first[:, :2]) / 320
    half = 2**0.5 / 10
    np.testing.assert_allclose(sides, [[0.1, 0.1], [2 * half, half], [half, 2 * half]], atol=1e-6)


@once_on("tensorflow")
def test_channels_first():
    first = keras_mnv2.SSDLite((3, 64, 96), **SMALL, data_format="channels_first")
    last = keras_mnv2.SSDLite((64, 96, 3), **SMALL)
    first.set_weights(last.get_weights())
    x = np.random.default_rng(0).uniform(-1, 1, (1, 64, 96, 3)).astype("float32")
    found, expected = first.predict(x.transpose(0, 3, 1, 2), verbose=0), last.predict(x, verbose=0)
    for name in expected:
        np.testing.assert_allclose(found[name], expected[name], atol=1e-5)
    np.testing.assert_array_equal(*(keras_mnv2.TargetEncoder(model).boxes for model in (first, last)))


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"input_shape": (None, None, 3)}, "input_shape must have known sides"),
        ({"classes": 0}, "classes must be"),
        ({"classes": 10**7}, "at most"),
        ({"alpha": 0}, "alpha must be"),
        ({"weights": "no-such-file"}, "weights must be"),
        ({"averaged": True}, "averaged must be left out"),
        ({"scales": (0.2, 0.3)}, "scales must be a sequence of 7 numbers"),
        ({"scales": (0, 1, 1, 1, 1, 1, 1)}, "scales: a scale must be"),
        ({"aspect_ratios": ((2,),), "scales": (0.1, 1)}, "aspect_ratios must be of 6 maps"),
        ({"aspect_ratios": (2, 3)}, "aspect_ratios must have at most"),
        ({"reduce_lowest": 1}, "reduce_lowest must be True or False"),
    ],
)
def test_bad_arguments(arguments, match):
    with pytest.raises(ValueError, match=match):
        keras_mnv2.SSDLite(**{"input_shape": SHAPE, **SMALL, **arguments})


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"score_threshold": 1.0}, "score_threshold must be"),
        ({"iou_threshold": -0.1}, "iou_threshold must be"),
        ({"candidates": 0}, "candidates must be"),
        ({"max_detections": 401}, "max_detections must be"),
    ],
)
def test_bad_arguments_of_a_detector(ours, arguments, match):
    with pytest.raises(ValueError, match=match):
        keras_mnv2.detector(ours, **arguments)


def test_what_is_no_detector_is_refused(tmp_path):
    classifier = keras_mnv2.MobileNetV2((32, 32, 3), alpha=ALPHA, weights=None, classes=5)
    for function in (keras_mnv2.detector, keras_mnv2.TargetEncoder):
        with pytest.raises(ValueError, match=r"model must be of keras_mnv2\.SSDLite"):
            function(classifier)
    classifier.save(tmp_path / "classifier.keras")
    with pytest.raises(ValueError, match="has no predictions of boxes; weights_backbone takes"):
        keras_mnv2.SSDLite(SHAPE, weights=tmp_path / "classifier.keras")
    backbone = keras_mnv2.SSDLite(SHAPE, weights_backbone=tmp_path / "classifier.keras", classes=2)
    np.testing.assert_array_equal(*(model.get_layer("Conv1").get_weights()[0] for model in (classifier, backbone)))


@pytest.mark.parametrize(
    ("format", "file"),
    [
        pytest.param("litert", "model.tflite", marks=marks("tensorflow")),
        # That of the page of detection is run by `test_docs.py`.
        pytest.param("onnx", "model.onnx", marks=pytest.mark.slow),
        pytest.param("tf_saved_model", "model", marks=pytest.mark.slow),
        pytest.param("openvino", "model.xml", marks=pytest.mark.slow),
        pytest.param("torch", "model.pt2", marks=pytest.mark.slow),
    ],
)
def test_detections_leave_as_a_file(ours, images, tmp_path, format, file):
    model = keras_mnv2.detector(ours, score_threshold=0.2, max_detections=20)
    # It is compared with the model in its own runtime, whatever the order of scores that are nearly equal.
    keras_mnv2.export(model, tmp_path / file, format, sample=2 * images - 1, verbose=False)
    found = keras_mnv2.load_export(tmp_path / file)(2 * images[:2] - 1)
    shapes = {"boxes": (2, 20, 4), "scores": (2, 20), "classes": (2, 20)}
    assert {name: y.shape for name, y in found.items()} == shapes
    assert {1, 2} <= set(np.unique(found["classes"]))


@pytest.fixture(scope="module")
def small():
    """A small detector for pixels with random weights, and photographs."""
    keras.utils.set_random_seed(0)
    rng = np.random.default_rng(0)
    pictures = [Image.fromarray(getattr(data, name)()) for name in ("astronaut", "chelsea", "coffee", "rocket")]
    images = []
    for i in range(16):
        picture = pictures[i % 4]
        side = int(rng.integers(min(picture.size) // 2, min(picture.size)))
        left, top = (int(rng.integers(0, whole - side + 1)) for whole in picture.size)
        part = picture.resize((32, 32), Image.Resampling.BILINEAR, box=(left, top, left + side, top + side))
        images.append(np.asarray(part, "float32"))
    image = keras.Input((32, 32, 3))
    x = keras.layers.Rescaling(1 / 127.5, -1)(image)
    x = keras.layers.Conv2D(16, 3, strides=2, padding="same", activation="relu6")(x)
    x = keras.layers.DepthwiseConv2D(3, strides=2, padding="same", activation="relu6")(x)
    x = keras.layers.Conv2D(24, 3, strides=2, padding="same", activation="relu6")(x)
    shapes = {"image_size": (32, 32), "map_sizes": [(4, 4)], "scales": (0.3, 0.6), "aspect_ratios": ((2,),)}
    boxes = keras.layers.Conv2D(4 * 4, 1, name="offsets")(x)
    scores = keras.layers.Conv2D(4 * (CLASSES + 1), 1, name="logits")(x)
    found = [keras_mnv2.layers.DefaultBoxes(**shapes)([boxes]), keras_mnv2.layers.JoinMaps(CLASSES + 1)([scores])]
    last = keras_mnv2.layers.Detections(**shapes, score_threshold=0.4, max_detections=20)
    model = keras.Model(image, last(found))
    for layer in model.layers:
        if layer.weights:
            kernel, bias = layer.get_weights()
            inputs = 9 if isinstance(layer, keras.layers.DepthwiseConv2D) else np.prod(kernel.shape[:-1])
            gain = {"offsets": 0.5, "logits": 3}.get(layer.name, 2)
            layer.set_weights([rng.normal(0, gain / inputs**0.5, kernel.shape), bias])
    return model, np.stack(images)


def written(model, images, precision, path):
    """Writes a detector as `export` does, in this process."""
    np.save(path.with_suffix(".npy"), images)
    how = {"precision": precision, "calibration": str(path.with_suffix(".npy"))}
    if path.suffix == ".onnx":
        graphs.write_exported_program(model, path.with_suffix(".pt2"))
        names = graphs.output_names(model)
        onnx_file = runpy.run_path(converters.__file__.replace("converters", "onnx_file"))
        onnx_file["write_onnx"](path.with_suffix(".pt2"), path, "image", names, detects=True, **how)
        return
    graphs.write_saved_model(model, path.with_suffix(""), apart=model.layers[-1].name)
    converters.to_litert(path.with_suffix(""), path, **how)
    finish_litert(model, path, precision, keras_mnv2.Preprocessing(36, 32), None, images)


@pytest.mark.parametrize(
    ("precision", "file"),
    [
        pytest.param("int8", "model.tflite", marks=marks("tensorflow")),
        pytest.param("int8", "model.onnx", marks=pytest.mark.slow),
        pytest.param("float16", "model.onnx", marks=pytest.mark.slow),
        pytest.param("float16", "model.tflite", marks=pytest.mark.slow),
        pytest.param("dynamic_int8", "model.tflite", marks=pytest.mark.slow),
    ],
)
def test_detections_in_fewer_bits_are_decoded_in_float32(small, tmp_path, precision, file):
    model, images = small
    path = tmp_path / file
    format = {".onnx": "onnx", ".tflite": "litert"}[path.suffix]
    if keras.backend.backend() == {"onnx": "torch", "litert": "tensorflow"}[format]:
        written(model, images, precision, path)
    else:
        calibration = images if precision == "int8" else None
        how = {"precision": precision, "calibration": calibration, "sample": images, "verbose": False}
        report = keras_mnv2.export(model, path, format, **how)
        assert "agreement of the detections" in str(report)
    found, expected = keras_mnv2.load_export(path)(images), model.predict(images, verbose=0)
    assert {name: (y.shape, y.dtype) for name, y in found.items()} == {
        "boxes": ((16, 20, 4), np.float32),
        "scores": ((16, 20), np.float32),
        "classes": ((16, 20), np.int32),
    }
    assert (expected["scores"] > 0).sum() > 20
    *both, share = _pairs(expected, found)
    assert share > (0.97 if precision == "float16" else 0.8)
    assert np.abs(both[0]["boxes"] - both[1]["boxes"]).mean() < 1
    # Edges lie where no 8 bits, and no 16, would put them.
    edges = found["boxes"][found["scores"] > 0]
    assert len(np.unique(edges % 1)) > 50
    if format == "onnx":
        types = types_of(path)
        assert types["TopK"] == {"FLOAT"}
        assert types["Conv"] == {"float16": {"FLOAT16"}, "int8": {"FLOAT"}}[precision]
        assert precision != "int8" or kinds_that_run(path, tmp_path).count("QLinearConv") == 3
        return
    names = {name for name, _ in operators(path.read_bytes())}
    assert {"TOPK_V2", "SOFTMAX"} <= names
    kernels = kernels_of(path)
    assert kernels == {"float16": {"FLOAT16"}, "int8": {"INT8"}, "dynamic_int8": {"INT8", "FLOAT32"}}[precision]


def types_of(path):
    """The types of the first input of each kind of operation in an ONNX file."""
    import onnx

    model = onnx.shape_inference.infer_shapes(onnx.load(path))
    known = [*model.graph.value_info, *model.graph.input]
    types = {value.name: value.type.tensor_type.elem_type for value in known}
    found = {}
    for node in model.graph.node:
        if node.input and node.input[0] in types:
            found.setdefault(node.op_type, set()).add(onnx.TensorProto.DataType.Name(types[node.input[0]]))
    return found


def kernels_of(path):
    """The types of the kernels of convolutions in a `.tflite` file."""
    from ai_edge_litert import schema_py_generated as schema

    kinds = {value: name for name, value in vars(schema.TensorType).items() if isinstance(value, int)}
    model = read_file(path.read_bytes())
    graph = model.subgraphs[0]
    made = {int(o.outputs[0]): o for o in graph.operators}
    found = set()
    for operator in graph.operators:
        if operator_name(model, operator) in ("CONV_2D", "DEPTHWISE_CONV_2D"):
            number = int(operator.inputs[1])
            # Halves are widened by an operator.
            number = int(made[number].inputs[0]) if number in made else number
            found.add(kinds[graph.tensors[number].type])
    return found


@once
def test_half_precision_ends_at_the_last_convolution():
    import onnx
    from onnx import helper, numpy_helper

    onnx_file = runpy.run_path(converters.__file__.replace("converters", "onnx_file"))
    rng = np.random.default_rng(0)
    kernels = [rng.normal(0, 0.3, (4, channels, 3, 3)).astype("float32") for channels in (3, 4)]
    weights = {"a": kernels[0], "b": kernels[1], "sides": np.array(320, "float32"), "low": np.array(0, "float32")}
    nodes = [
        helper.make_node("Conv", ["image", "a"], ["first"]),
        # One constant for both parts.
        helper.make_node("Clip", ["first", "low"], ["clipped"]),
        helper.make_node("Conv", ["clipped", "b"], ["second"]),
        helper.make_node("Clip", ["second", "low"], ["positive"]),
        helper.make_node("Mul", ["positive", "sides"], ["pixels"]),
        helper.make_node("Mul", ["pixels", "pixels"], ["areas"]),
    ]
    real = onnx.TensorProto.FLOAT
    image = helper.make_tensor_value_info("image", real, [1, 3, 8, 8])
    areas = helper.make_tensor_value_info("areas", real, [1, 4, 4, 4])
    initializers = [numpy_helper.from_array(value, name) for name, value in weights.items()]
    model = helper.make_model(helper.make_graph(nodes, "g", [image], [areas], initializers), ir_version=8)
    model.opset_import[0].version = 13
    half = type(model).FromString(model.SerializeToString())
    onnx_file["_in_float16"](half, onnx_file["_network"](half.graph))
    onnx.checker.check_model(half, full_check=True)
    x = rng.uniform(-1, 1, (1, 3, 8, 8)).astype("float32")
    expected, found = (run_onnx(one, x) for one in (model, half))
    # More than half precision holds.
    assert expected.max() > 1e5
    np.testing.assert_allclose(found, expected, rtol=0.02, atol=2e-3 * expected.max())
    assert np.abs(found - expected).max() > 0
    types = {w.name: onnx.TensorProto.DataType.Name(w.data_type) for w in half.graph.initializer}
    assert types == {"a": "FLOAT16", "b": "FLOAT16", "sides": "FLOAT", "low": "FLOAT", "low_half": "FLOAT16"}


def run_onnx(model, x):
    import onnxruntime

    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"image": x})[0]


def test_a_detector_inside_another_model_is_one_sentence(small, tmp_path):
    image = keras.Input((32, 32, 3))
    outer = keras.Model(image, small[0](image))
    with pytest.raises(ValueError, match=r'precision must be "float32" in LiteRT for a detector inside another model'):
        keras_mnv2.export(outer, tmp_path / "m.tflite", "litert", precision="float16")
    assert not list(tmp_path.iterdir())


@once
def test_a_detector_is_trained_with_its_rounding(small):
    with pytest.raises(ValueError, match=r"give the model of SSDLite, and then the result to keras_mnv2\.detector"):
        keras_mnv2.quantize_aware(small[0])
    network = keras_mnv2.SSDLite((32, 32, 3), **SMALL, include_preprocessing=True)
    rng, images = np.random.default_rng(0), small[1]
    randomise(network, rng, images)
    aware = keras_mnv2.quantize_aware(network)
    aware.compile(keras.optimizers.SGD(0.0), {"boxes": BoxLoss(), "classes": ClassLoss()})
    encoder = keras_mnv2.TargetEncoder(aware)
    for layer in aware.layers:
        # The ranges alone are to be learnt.
        if hasattr(layer, "norm") and layer.norm is not None:
            layer.norm.trainable = False
    aware.fit(images, encoder([[[5, 5, 20, 20]]] * 16, [[0]] * 16), batch_size=8, verbose=0)
    found, expected = aware.predict(images, verbose=0), network.predict(images, verbose=0)
    for name in ("boxes", "classes"):
        assert found[name].shape == expected[name].shape
        # A list is rounded to 256 numbers.
        assert len(np.unique(found[name])) <= 256
        # Of random weights: 0.76 was found for the boxes.
        assert np.corrcoef(found[name].ravel(), expected[name].ravel())[0, 1] > 0.7
    detections = keras_mnv2.detector(aware).predict(images[:2], verbose=0)
    assert detections["boxes"].shape == (2, 100, 4)
