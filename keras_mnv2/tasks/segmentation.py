"""DeepLabV3 on MobileNetV2: a class for each pixel (paper, section 6.3)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import keras

from keras_mnv2.annotations import PathLike, Tensor
from keras_mnv2.arguments import activation_function, data_format_name, dtype_policy
from keras_mnv2.build import unit
from keras_mnv2.checks import check_choice, check_flag, check_rate, check_whole
from keras_mnv2.cost import MOST_PARAMETERS, SEGMENTATION_CHANNELS
from keras_mnv2.initializers import Normal
from keras_mnv2.layers.parts import Conv2D
from keras_mnv2.layers.resize import ResizeLike
from keras_mnv2.model import MobileNetV2
from keras_mnv2.network import MobileNetV2Model
from keras_mnv2.weights.load import load_source
from keras_mnv2.weights.rename import file_names, head_names
from keras_mnv2.weights.source import Source, checkpoint_of, read_source, segmentation_classes_of, without
from keras_mnv2.weights.table import segmentation_checkpoint

# The authors' DeepLab code (research/deeplab, model.py): rates of the head, and the epsilon of its norms.
HEAD_EPSILON = 1e-5
ATROUS_RATES = {16: (6, 12, 18), 8: (12, 24, 36)}
# Of the authors' checkpoint, and of the paper's fastest network (Table 7).
OUTPUT_STRIDES = (8, 16)


def DeepLabV3(
    input_shape: tuple[int | None, ...] | None = None,
    alpha: float | None = None,
    weights: PathLike | None = None,
    weights_backbone: PathLike | None = "imagenet",
    classes: int | None = None,
    classifier_activation: str | Callable[..., Any] | None = "softmax",
    name: str | None = None,
    *,
    output_stride: int | None = None,
    aspp: bool | Sequence[int] | None = None,
    head_channels: int = SEGMENTATION_CHANNELS,
    dropout: float = 0.1,
    upsample: bool = True,
    averaged: bool | None = None,
    padding: str | None = None,
    norm_momentum: float | None = None,
    norm_epsilon: float | None = None,
    include_preprocessing: bool = False,
    data_format: str | None = None,
    dtype: str | keras.DTypePolicy | None = None,
) -> keras.Model:
    """Builds a DeepLabV3 (Chen et al. 2017, arXiv 1706.05587) on MobileNetV2 (Sandler et al. 2018, section 6.3).

    The backbone ends at its last bottleneck, whose 320 channels the head reads; later strides are dilations. The
    paper's head is reduced: a branch that pools the whole image and one of 1x1, joined and projected. `aspp` adds the
    three dilated 3x3 branches of the whole head. With 21 classes and alpha 1.0 the network has 2.11 million
    parameters, and 4.52 million with them, as in the paper's Table 7.

    Args:
        input_shape: (height, width, channels), or (channels, height, width) with `data_format="channels_first"`. Any
            side of at least 32, or None for any, which is the default.
        alpha: width multiplier of the backbone; 1.0 by default.
        weights: what the whole network starts with: `"transformers/google/deeplabv3_mobilenet_v2_1.0_513"` (Pascal
            VOC, 21 classes; `keras_mnv2.list_weights(task="segmentation")`), an `hf://` address, or the path of a file
            in the layout of transformers' `MobileNetV2ForSemanticSegmentation` or one that this package wrote. The
            file says `alpha` and `classes`, its layout padding and epsilon, unless they are given. With another number
            of classes the last convolution stays random, and a line says so.
        weights_backbone: without `weights`, what the backbone starts with, as `weights` of `MobileNetV2`; by default
            Keras's ImageNet checkpoint of this width. None is random weights.
        classes: of a pixel; by default the file's or 21 (Pascal VOC with its background).
        classifier_activation: over the classes of each pixel; None gives logits.
        name: of the model.
        output_stride: pixels of the image per pixel of the head, along one side, 8 or 16; by default the published
            checkpoint's (8), or 16. The parameters are the same.
        aspp: whether the head has the dilated branches, with the rates of the authors' code (6, 12, 18 at output
            stride 16, twice these at 8); or the rates. None is what the file has, or the paper's reduced head.
        head_channels: of each branch.
        dropout: rate before the last convolution, of whole channels.
        upsample: whether the scores are resized to the image, bilinearly and without aligned corners.
        averaged: as in `MobileNetV2`.
        padding: likewise.
        norm_momentum: likewise.
        norm_epsilon: likewise, of the backbone; the head has 1e-5, as in the authors' code.
        include_preprocessing: likewise.
        data_format: likewise.
        dtype: likewise; the last convolution and what follows compute in float32 under mixed precision.

    Returns:
        A functional `keras.Model`. Its output `mask` is (batch, height, width, classes), or with `upsample=False` of
        the head's size, height and width by `output_stride`, rounded up.

    Raises:
        ValueError: on an argument out of range or one that contradicts the file, and on a file that does not fit.
        ConnectionError: where a checkpoint cannot be downloaded.

    Examples:
        >>> model = DeepLabV3((65, 97, 3), alpha=0.35, weights_backbone=None, classes=5)
        >>> tuple(model(np.zeros((2, 65, 97, 3))).shape)
        (2, 65, 97, 5)
    """
    data_format = data_format_name(data_format)
    upsample = check_flag("upsample", upsample)
    dropout = check_rate("dropout", dropout)
    head_channels = check_whole("head_channels", head_channels, most=MOST_PARAMETERS)
    activation = activation_function("classifier_activation", classifier_activation)
    policy = dtype_policy(dtype)
    published = segmentation_checkpoint(weights)
    source, width = None, 0
    if weights is not None:
        source = read_source(published or checkpoint_of(weights) or weights, averaged)
        width = segmentation_classes_of(source)
        if not width:
            raise ValueError(
                f"weights must be of a segmentation network, got {str(source.path)!r}, which has no segmentation head; "
                "weights_backbone takes a classifier's."
            )
        if aspp is None and _branches(source):
            # The shapes in a file do not say its rates: other ones would give other scores.
            print(f"{source.path.name}: its dilated branches get the rates of the authors' code; aspp has others.")
            aspp = True
    elif averaged is not None and weights_backbone is None:
        raise ValueError(f"averaged must be left out where there are no weights, got {averaged!r}.")
    classes = check_whole("classes", (width or 21) if classes is None else classes, most=MOST_PARAMETERS)
    if output_stride is None:
        output_stride = published.output_stride if published else 16
    output_stride = check_choice("output_stride", output_stride, OUTPUT_STRIDES)
    rates = _rates(aspp, output_stride)
    backbone_weights: Any = weights_backbone
    if source is not None:
        # A classifier's last convolution, which its file may have, is read by no head of these.
        last = file_names(source.layout, [], True, True, source.arrays)
        source = without(source, last)
        backbone_weights = without(source, head_names(source.layout, source.arrays))

    backbone = MobileNetV2(
        input_shape,
        alpha,
        include_top=False,
        weights=backbone_weights,
        averaged=None if source else averaged,
        padding=padding,
        norm_momentum=norm_momentum,
        norm_epsilon=norm_epsilon,
        output_stride=output_stride,
        include_preprocessing=include_preprocessing,
        features=True,
        data_format=data_format,
        dtype=policy,
    )
    image = backbone.input
    features = list(backbone.output.values())[-1]
    momentum = backbone.get_layer("bn_Conv1").momentum
    common: dict[str, Any] = {"padding": "same", "activation": keras.activations.relu, "norm_layer": "batch_norm"}
    common |= {"norm_momentum": momentum, "norm_epsilon": HEAD_EPSILON, "data_format": data_format, "dtype": policy}
    x = _head(features, rates, head_channels, common)
    if dropout:
        x = keras.layers.SpatialDropout2D(dropout, data_format=data_format, dtype=policy)(x)
    scores = {"data_format": data_format, "dtype": policy.variable_dtype}
    x = Conv2D(classes, 1, kernel_initializer=Normal(0.01), name="logits", **scores)(x)
    if upsample:
        x = ResizeLike(name="upsample", **scores)([x, image])
    if activation is keras.activations.softmax and data_format == "channels_first":
        x = keras.layers.Softmax(axis=1, name="mask", dtype=policy.variable_dtype)(x)
    else:
        x = keras.layers.Activation(activation, name="mask", dtype=policy.variable_dtype)(x)
    side_axis = 1 if data_format == "channels_last" else 2
    label = f"deeplabv3_{backbone.name.split('_')[1]}_{image.shape[side_axis]}"
    model = MobileNetV2Model(image, x, name=name or label)
    if source is not None:
        load_source(model, source, skip_classifier=classes != width)
    return model


def _head(x: Tensor, rates: Sequence[int], channels: int, common: dict[str, Any]) -> Tensor:
    """The branches of the head, joined and projected (Chen et al. 2017, figure 5)."""
    own = {"data_format": common["data_format"], "dtype": common["dtype"]}
    pooled = keras.layers.GlobalAveragePooling2D(keepdims=True, name="image_pool", **own)(x)
    pooled = unit(pooled, "image_pooling", channels, **common)
    branches = [ResizeLike(name="image_pooling_resize", **own)([pooled, x]), unit(x, "aspp0", channels, **common)]
    branches += [
        unit(x, f"aspp{i + 1}", channels, kernel_size=3, dilation=rate, **common) for i, rate in enumerate(rates)
    ]
    axis = -1 if common["data_format"] == "channels_last" else 1
    joined = keras.layers.Concatenate(axis=axis, name="concat", dtype=common["dtype"])(branches)
    return unit(joined, "projection", channels, **common)


def _rates(aspp: Any, output_stride: int) -> tuple[int, ...]:
    if aspp is None or isinstance(aspp, bool):
        return ATROUS_RATES[output_stride] if aspp else ()
    if isinstance(aspp, str) or not isinstance(aspp, Sequence) or len(aspp) != 3:
        raise ValueError(f"aspp must be None, True, False or a sequence of three rates, got {aspp!r}.")
    return tuple(check_whole("aspp: a rate", rate, most=2**16) for rate in aspp)


def _branches(source: Source) -> bool:
    """Whether a file's head has the dilated branches."""
    return any(key.startswith("aspp1") for key in source.arrays)
