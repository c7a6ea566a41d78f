import numpy as np
import pytest

import keras_mnv2
from tests.conftest import once


def trainable(model):
    return sum(int(np.prod(v.shape)) for v in model.trainable_variables)


def test_the_published_numbers_of_width_1():
    profile = keras_mnv2.cost_profile(print_fn=None)
    assert profile.parameters == 3_504_872
    assert profile.multiply_adds == 300_774_272
    assert profile.parameters + profile.statistics == 3_538_984


def test_the_papers_numbers_of_width_1_4():
    profile = keras_mnv2.cost_profile(alpha=1.4, print_fn=None)
    # Table 4 of the paper: 6.9 million parameters, 585 million multiply-adds.
    assert abs(profile.parameters / 6.9e6 - 1) < 0.15
    assert abs(profile.multiply_adds / 585e6 - 1) < 0.01


@pytest.mark.parametrize(
    "architecture",
    [
        {},
        {"alpha": 0.35},
        {"alpha": 1.2, "depth_multiplier": 1.4, "fix_stem_head": True},
        {"alpha": 0.5, "stem_stride": 1, "inverted_residual_setting": [(1, 16, 1, 1), (3.5, 24, 2, 2)]},
    ],
)
def test_parameters_equal_those_of_the_built_model(architecture):
    profile = keras_mnv2.cost_profile((64, 64, 1), classes=7, print_fn=None, **architecture)
    model = keras_mnv2.MobileNetV2((64, 64, 1), weights=None, classes=7, **architecture)
    assert profile.parameters == trainable(model)
    assert profile.parameters + profile.statistics == model.count_params()
    shapes = {row.name: row.output_shape for row in profile.rows}
    for layer in model.layers:
        if layer.name in shapes:
            assert layer.output.shape[1:] == shapes[layer.name]


def test_the_papers_memory_table():
    profile = keras_mnv2.cost_profile(print_fn=None)
    # Table 3, MobileNetV2: 16 channels and 400 KB at 112x112, 320 and 32 KB at 7x7, 1280 and 2 KB at 1x1; max 400 KB.
    tensors = profile.largest_tensors
    assert tensors[112, 112] == (16, 401_408)
    assert tensors[7, 7] == (320, 31_360)
    assert tensors[1, 1] == (1280, 2_560)
    assert max(size for _, size in tensors.values()) == 401_408
    # Section 5.1: the first block's input and output, 112x112x32 and 112x112x16, of two bytes.
    assert profile.peak_memory == 2 * 112 * 112 * (32 + 16)


def test_the_table_is_printed(capsys):
    keras_mnv2.cost_profile(alpha=0.35, input_shape=(96, 96, 3), classes=10)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["row", "output", "parameters", "multiply-adds", "activations", "memory,", "KiB"]
    assert lines[2].startswith("stem")
    assert lines[-1].startswith("total")
    assert len({len(line) for line in lines}) == 1


def test_multiply_adds_grow_with_the_pixels():
    small, large = (keras_mnv2.cost_profile((side, side, 3), include_top=False, print_fn=None) for side in (96, 192))
    assert large.multiply_adds == 4 * small.multiply_adds


def test_the_papers_numbers_of_detection_and_segmentation():
    def numbers(side, classes, network, **arguments):
        profile = keras_mnv2.cost_profile((side, side, 3), classes, network=network, print_fn=None, **arguments)
        return round(profile.parameters / 1e6, 2), round(profile.multiply_adds / 1e9, 2)

    # Table 6: 4.3 million and 0.8 billion. Table 7: 2.11 and 2.75, with the dilated branches 4.52 and 5.8.
    assert numbers(320, 80, "SSDLite") == (4.34, 0.79)
    assert numbers(513, 21, "DeepLabV3", output_stride=16) == (2.11, 2.74)
    assert numbers(513, 21, "DeepLabV3", output_stride=16, aspp=True) == (4.52, 5.36)


@once
@pytest.mark.parametrize("reduce_lowest", [True, False])
def test_a_detector_costs_what_is_built(reduce_lowest):
    own = {"alpha": 0.5, "reduce_lowest": reduce_lowest}
    profile = keras_mnv2.cost_profile((64, 96, 3), 7, network="SSDLite", print_fn=None, **own)
    model = keras_mnv2.SSDLite((64, 96, 3), classes=7, weights_backbone=None, **own)
    assert profile.parameters == trainable(model)
    assert profile.parameters + profile.statistics == model.count_params()
    shapes = {row.name: row.output_shape for row in profile.rows}
    for name in ("extra_1", "extra_4", "box_1", "class_2", "class_6"):
        assert model.get_layer(f"{name}_project").output.shape[1:] == shapes[name]


@once
@pytest.mark.parametrize("aspp", [True, False])
def test_a_segmentation_network_costs_what_is_built(aspp):
    own = {"alpha": 0.5, "output_stride": 16, "aspp": aspp}
    profile = keras_mnv2.cost_profile((65, 97, 3), 7, network="DeepLabV3", print_fn=None, **own)
    model = keras_mnv2.DeepLabV3((65, 97, 3), classes=7, weights_backbone=None, upsample=False, **own)
    assert profile.parameters == trainable(model)
    assert profile.parameters + profile.statistics == model.count_params()
    assert model.output_shape[1:] == profile.rows[-1].output_shape


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("input_shape", (16, 64, 3)),
        ("input_shape", (64, 64)),
        ("classes", 0),
        ("alpha", 0),
        ("bytes_per_value", 0),
        ("network", "SSD"),
    ],
)
def test_a_bad_argument_is_named(argument, value):
    with pytest.raises(ValueError, match=argument):
        keras_mnv2.cost_profile(**{argument: value}, print_fn=None)
