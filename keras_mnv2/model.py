"""The public builder."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import keras

from keras_mnv2.annotations import PathLike, Shape, Tensor
from keras_mnv2.architecture import MOST_CHANNELS, Row, plan
from keras_mnv2.arguments import activation_function, data_format_name, dtype_policy, norm_config
from keras_mnv2.build import apply_rows, classify, feature_names
from keras_mnv2.checks import check_choice, check_flag, check_positive, check_rate, check_whole
from keras_mnv2.cost import MOST_PARAMETERS, check_size
from keras_mnv2.layers.compact import NORM_EPSILON, NORM_MOMENTUM, InvertedResidual, NormLayer
from keras_mnv2.network import MobileNetV2Model
from keras_mnv2.ops.padding import PADDINGS
from keras_mnv2.preprocessing import MOST_SIDE, preprocessing_layer
from keras_mnv2.weights.load import load_source
from keras_mnv2.weights.rename import LAYOUTS
from keras_mnv2.weights.source import Source, check_channels, checkpoint_of, classes_of, read_source
from keras_mnv2.weights.table import HALF, Checkpoint, imagenet_checkpoint
from keras_mnv2.weights.widths import settings_of

MIN_SIZE = 32
# What a checkpoint decides, and what holds without one.
DEFAULTS: dict[str, Any] = {
    "alpha": 1.0,
    "depth_multiplier": 1.0,
    "fix_stem_head": False,
    "padding": "same",
    "norm_epsilon": NORM_EPSILON,
}


def MobileNetV2(
    input_shape: tuple[int | None, ...] | None = None,
    alpha: float | None = None,
    include_top: bool = True,
    weights: PathLike | None = "imagenet",
    input_tensor: Tensor | None = None,
    pooling: str | None = None,
    classes: int | None = None,
    classifier_activation: str | Callable[..., Any] | None = "softmax",
    name: str | None = None,
    *,
    averaged: bool | None = None,
    inverted_residual_setting: Sequence[Sequence[float]] | None = None,
    round_nearest: int = 8,
    block: Callable[..., keras.layers.Layer] | None = None,
    norm_layer: NormLayer = "batch_norm",
    dropout: float = 0.2,
    depth_multiplier: float | None = None,
    fix_stem_head: bool | None = None,
    activation: str | Callable[..., Any] | None = "relu6",
    padding: str | None = None,
    norm_momentum: float | None = None,
    norm_epsilon: float | None = None,
    stochastic_depth: float = 0.0,
    stem_stride: int = 2,
    output_stride: int = 32,
    include_preprocessing: bool = False,
    features: bool | Sequence[str] = False,
    data_format: str | None = None,
    dtype: str | keras.DTypePolicy | None = None,
) -> keras.Model:
    """Builds a MobileNetV2 (Sandler et al. 2018, arXiv 1801.04381).

    The positional arguments are those of `keras.applications.MobileNetV2`; the others have torchvision's
    and timm's names. Those that a checkpoint decides are None by default: `alpha`, `depth_multiplier`,
    `fix_stem_head`, `padding`, `norm_epsilon` and `classes` are then the checkpoint's, or as said below.

    Args:
        input_shape: (height, width, channels), or (channels, height, width) with
            `data_format="channels_first"`. Sides of at least 32, or None for any; any number of channels.
            By default the checkpoint's resolution or 224x224x3, without the top (None, None, 3).
        alpha: width multiplier of the paper; 1.0 by default.
        include_top: whether the classifier is part of the model.
        weights: what the model starts with; a checkpoint of `keras_mnv2.list_weights()` is downloaded once.
            `"imagenet"`, the default, is Keras's checkpoint for this width and resolution (that of 224 pixels
            where there is none, with a warning); a name such as `"torchvision/IMAGENET1K_V2"` is that one;
            `"hf://OWNER/REPOSITORY"` one of the Hugging Face Hub; a path is a file in any of their layouts, or
            one that this package wrote, see `keras_mnv2.load_weights`; also a transfer model's file, of which
            the MobileNetV2 inside is taken. The shapes in a file say its `alpha`, `depth_multiplier`,
            `fix_stem_head` and `classes`, its layout the padding and epsilon, unless they are given. None is
            random weights. Where the classifier has another width than `classes`, or there is none, it stays
            random, and a line says so.
        input_tensor: a Keras tensor to build on.
        pooling: without the top, `"avg"` or `"max"` over the image, or None for the 4D tensor.
        classes: of the classifier; by default the checkpoint's or 1000.
        classifier_activation: of the classifier; None gives logits.
        name: of the model.
        averaged: whether the running average of the weights is taken from a file that has both, see
            `keras_mnv2.load_weights`; None for the average where there is one.
        inverted_residual_setting: rows (t, c, n, s), expansion, channels, repeats and stride of each
            stage; by default Table 2 of the paper.
        round_nearest: what each width is a multiple of.
        block: what makes a block; called with the arguments of `keras_mnv2.layers.InvertedResidual`,
            which is the default.
        norm_layer: `"batch_norm"`, `"sync_batch_norm"`, `"group_norm"`, a Keras layer or layer class,
            or None; see `keras_mnv2.layers.ConvNormActivation`.
        dropout: rate before the classifier (torchvision's 0.2).
        depth_multiplier: factor on the number of blocks of each stage, rounded up (timm).
        fix_stem_head: keeps stem, head, and the depth of the first and last stage as they are whatever
            `alpha` and `depth_multiplier` (timm's 110d and 120d).
        activation: of the hidden layers.
        padding: `"same"` as TensorFlow pads, the default, or `"symmetric"` as PyTorch does: checkpoints need
            the one that they were trained with.
        norm_momentum: fraction of the old moving statistics that one step keeps, 1 minus PyTorch's momentum. None, the
            default, is that of the checkpoint's library: 0.999 for Keras, 0.9 (PyTorch's 0.1) for torchvision and
            timm, 0.997 for transformers, as the authors' TensorFlow code has it. From scratch it is 0.9: such a model
            validates within its first epochs, where 0.999 needs thousands of steps first.
        norm_epsilon: 1e-3 as in Keras by default; PyTorch's checkpoints need 1e-5.
        stochastic_depth: rate of the last block; it rises linearly from 0 (Huang et al. 2016).
        stem_stride: stride of the first convolution; 1 for images of 32x32.
        output_stride: 8, 16 or 32; later strides become dilations, with the same parameters.
        include_preprocessing: whether the model takes raw images of 0..255 and scales them itself, as the
            checkpoint expects; to -1..1 without one.
        features: True for a dict of the last tensor at each stride, `stride_2` to `stride_32`, or the
            names of those that are wanted; also `stem`, `block_N`, `block_N_expand` (the expanded input)
            and `head`. Needs `include_top=False`.
        data_format: `"channels_last"`, `"channels_first"`, or None for Keras's setting.
        dtype: a dtype policy such as `"mixed_bfloat16"`, or None for Keras's setting. In `"float64"` the pooling, a
            layer of Keras (3.15.1), still averages with float32's precision on JAX and PyTorch.

    Returns:
        A functional `keras.Model`. Its output is (batch, classes); without the top
        (batch, height / 32, width / 32, 1280), pooled (batch, 1280), or the dict of `features`.

    Raises:
        ValueError: on an argument out of range or one that contradicts the checkpoint, and on a file that does
            not fit; the message names it, its value and what is allowed.
        ConnectionError: where a checkpoint cannot be downloaded; it names the address and where to put the file.

    Examples:
        >>> model = MobileNetV2((96, 96, 3), alpha=0.35, weights=None, classes=10)
        >>> tuple(model(np.zeros((2, 96, 96, 3))).shape)
        (2, 10)
    """
    data_format = data_format_name(data_format)
    include_top = check_flag("include_top", include_top)
    include_preprocessing = check_flag("include_preprocessing", include_preprocessing)
    fix_stem_head = None if fix_stem_head is None else check_flag("fix_stem_head", fix_stem_head)
    given = {
        "alpha": alpha,
        "depth_multiplier": depth_multiplier,
        "fix_stem_head": fix_stem_head,
        "padding": padding,
        "norm_epsilon": norm_epsilon,
    }
    sides = _known_sides(input_shape, input_tensor, data_format)
    if weights is None and averaged is not None:
        raise ValueError(f"averaged must be left out where weights is None, got {averaged!r}.")
    source, settings = weights_and_settings(
        weights, averaged, given, sides, include_top, inverted_residual_setting, round_nearest
    )
    alpha, padding, norm_epsilon = settings["alpha"], settings["padding"], settings["norm_epsilon"]
    width = source.classes if isinstance(source, Checkpoint) else classes_of(source) if source else 0
    classes = (width or 1000) if classes is None else classes
    padding = check_choice("padding", padding, PADDINGS)
    pooling = check_choice("pooling", pooling, (None, "avg", "max"))
    classes = check_whole("classes", classes, most=MOST_PARAMETERS)
    dropout = check_rate("dropout", dropout)
    if norm_momentum is None:
        layout = LAYOUTS[source.layout] if isinstance(source, Checkpoint) else source.layout if source else None
        norm_momentum = layout.norm_momentum if layout else NORM_MOMENTUM
    norm_momentum = check_rate("norm_momentum", norm_momentum)
    stochastic_depth = check_rate("stochastic_depth", stochastic_depth)
    norm_epsilon = check_positive("norm_epsilon", norm_epsilon)
    no_layer = isinstance(block, type) and not issubclass(block, keras.layers.Layer)
    if no_layer or not (block is None or callable(block)):
        raise ValueError(f"block must be None or a callable that makes a Keras layer, got {block!r}.")
    policy = dtype_policy(dtype)
    side = source.resolution if isinstance(source, Checkpoint) else 224
    image = _image_input(input_shape, input_tensor, side if include_top else None, data_format)
    channel_axis, side_axis = (-1, 1) if data_format == "channels_last" else (1, 2)
    if source is not None:
        check_channels(source, image.shape[channel_axis])
    rows = plan(
        alpha=alpha,
        inverted_residual_setting=inverted_residual_setting,
        round_nearest=round_nearest,
        depth_multiplier=settings["depth_multiplier"],
        fix_stem_head=settings["fix_stem_head"],
        stem_stride=stem_stride,
        output_stride=output_stride,
        in_channels=image.shape[channel_axis],
    )
    names = _check_features(features, rows, include_top, pooling)
    check_size(rows, classes if include_top else 0)

    x = image
    if include_preprocessing:
        scaling = source.preprocessing if isinstance(source, Checkpoint) else source.layout if source else None
        mean, std = (scaling.mean, scaling.std) if scaling else (HALF, HALF)
        x = preprocessing_layer(policy, data_format, mean, std)(image)
    x, tensors = apply_rows(
        x,
        rows,
        block,
        stochastic_depth,
        names,
        padding=padding,
        activation=activation_function("activation", activation),
        norm_layer=norm_config(norm_layer),
        norm_momentum=norm_momentum,
        norm_epsilon=norm_epsilon,
        data_format=data_format,
        dtype=policy,
    )
    if names:
        x = tensors
    elif include_top:
        x = classify(x, classes, dropout, classifier_activation, data_format, policy)
    elif pooling == "avg":
        x = keras.layers.GlobalAveragePooling2D(data_format=data_format, dtype=policy)(x)
    elif pooling == "max":
        x = keras.layers.GlobalMaxPooling2D(data_format=data_format, dtype=policy)(x)

    # The model takes in what `input_tensor` was computed from.
    sources = keras.utils.get_source_inputs(image)
    inputs = sources[0] if len(sources) == 1 else sources
    # A block of the caller's may keep losses or states of its own, which a loop over chunks would lose.
    model_class = MobileNetV2Model if block in (None, InvertedResidual) else keras.Model
    model = model_class(inputs, x, name=name or f"mobilenetv2_{float(alpha):0.2f}_{image.shape[side_axis]}")
    if source is not None:
        # The classifier stays as it is where the file has one of another width, or none.
        load_source(model, read_source(source, averaged), skip_classifier=include_top and classes != width)
    return model


def weights_and_settings(
    weights: Any,
    averaged: bool | None,
    given: dict[str, Any],
    sides: Shape,
    include_top: bool,
    setting: Sequence[Sequence[float]] | None = None,
    round_nearest: int = 8,
) -> tuple[Checkpoint | Source | None, dict[str, Any]]:
    """What to load, a published checkpoint or a file that was read, and the settings that come with it.

    Args:
        weights: as in `MobileNetV2`, or a source that was read.
        averaged: as in `MobileNetV2`.
        given: the values of `DEFAULTS` that the caller gave, or None.
        sides: (height, width) of the image, as far as known.
        include_top: as in `MobileNetV2`.
        setting: rows of stages, or None.
        round_nearest: as in `MobileNetV2`.
    """
    given = {**dict.fromkeys(DEFAULTS), **given}
    if weights is None:
        return None, {**DEFAULTS, **_not_none(given)}
    checkpoint: Checkpoint | None = None
    if isinstance(weights, Source):
        pass  # Read already, for a network around this one.
    elif isinstance(weights, str) and weights == "imagenet":
        alpha = DEFAULTS["alpha"] if given["alpha"] is None else given["alpha"]
        checkpoint = imagenet_checkpoint(alpha, sides, include_top)
        if sides != (checkpoint.resolution,) * 2 and not (include_top and sides == (None, None)):
            warnings.warn(
                f'There are no weights of their own for images of {sides[0]}x{sides[1]}: weights="imagenet" loads '
                f"those of {checkpoint.resolution}x{checkpoint.resolution}.",
                stacklevel=3,
            )
    else:
        checkpoint = checkpoint_of(weights)
    if checkpoint is None:
        source = read_source(weights, averaged)
        conventions = {"padding": source.layout.padding, "norm_epsilon": source.layout.norm_epsilon}
        found = settings_of(source, given, setting, round_nearest)
        return source, {**DEFAULTS, **conventions, **_not_none(given), **found}
    for name, value in given.items():
        if value is not None and value != getattr(checkpoint, name):
            raise ValueError(
                f"{name} must be {getattr(checkpoint, name)!r} or left out with the weights {checkpoint.name!r}, "
                f"got {value!r}."
            )
    return checkpoint, {name: getattr(checkpoint, name) for name in DEFAULTS}


def _not_none(given: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in given.items() if value is not None}


def _known_sides(input_shape: Shape | None, input_tensor: Tensor | None, data_format: str) -> Shape:
    """(height, width) as far as given; `_image_input` checks the shape as a whole."""
    shape = input_shape if input_tensor is None else getattr(input_tensor, "shape", (None,))[1:]
    if isinstance(shape, str) or not isinstance(shape, Sequence) or len(shape) != 3:
        return None, None
    return tuple(shape[:2] if data_format == "channels_last" else shape[1:])


def _image_input(
    input_shape: Shape | None, input_tensor: Tensor | None, side: int | None, data_format: str
) -> keras.KerasTensor:
    if input_tensor is not None:
        if not keras.backend.is_keras_tensor(input_tensor):
            raise ValueError(f"input_tensor must be a Keras tensor, got a value of type {type(input_tensor).__name__}.")
        shape = tuple(input_tensor.shape[1:])
        _check_image_shape("input_tensor", shape, data_format)
        if input_shape is not None:
            input_shape = _check_image_shape("input_shape", input_shape, data_format)
            if any(a != b for a, b in zip(input_shape, shape, strict=True) if None not in (a, b)):
                raise ValueError(f"input_shape must agree with input_tensor's {shape}, got {tuple(input_shape)}.")
        return input_tensor
    if input_shape is None:
        input_shape = (side, side, 3) if data_format == "channels_last" else (3, side, side)
    return keras.Input(_check_image_shape("input_shape", input_shape, data_format))


def _check_image_shape(name: str, shape: Any, data_format: str) -> Shape:
    """`shape` as a tuple of Python's integers and None."""
    layout = "(height, width, channels)" if data_format == "channels_last" else "(channels, height, width)"
    if isinstance(shape, str) or not isinstance(shape, Sequence) or len(shape) != 3:
        raise ValueError(f"{name} must have the shape {layout}, got {shape!r}.")
    *sides, channels = shape if data_format == "channels_last" else (*shape[1:], shape[0])
    try:
        channels = check_whole("channels", channels, most=MOST_CHANNELS)
        sides = [None if side is None else check_whole("side", side, MIN_SIZE, MOST_SIDE) for side in sides]
    except ValueError:
        raise ValueError(
            f"{name} must be {layout} with sides of {MIN_SIZE} to {MOST_SIDE} or None and 1 to {MOST_CHANNELS} "
            f"channels, got {tuple(shape)}."
        ) from None
    return (*sides, channels) if data_format == "channels_last" else (channels, *sides)


def _check_features(
    features: bool | Sequence[str], rows: Sequence[Row], include_top: bool, pooling: str | None
) -> tuple[str, ...]:
    if features is False:
        return ()
    names = feature_names(rows)
    if features is True:
        features = [row.endpoint for row in rows if row.endpoint]
    if isinstance(features, str) or not isinstance(features, Sequence) or not features:
        raise ValueError(f"features must be True, False or a sequence of names, got {features!r}.")
    if include_top or pooling is not None:
        raise ValueError(
            "features needs include_top=False and pooling=None, "
            f"got include_top={include_top!r} and pooling={pooling!r}."
        )
    for name in features:
        if name not in names:
            raise ValueError(f"features must be among {', '.join(names)}, got {name!r}.")
    return tuple(features)
