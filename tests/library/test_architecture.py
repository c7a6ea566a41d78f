import math

import pytest
import timm
from hypothesis import given
from hypothesis import strategies as st

from keras_mnv2.architecture import PAPER_SETTING, make_divisible, plan


def test_the_plan_of_the_paper():
    rows = plan()
    assert [row.name for row in rows] == ["stem", *(f"block_{i}" for i in range(17)), "head"]
    assert [row.channels for row in rows] == [
        *(32, 16, 24, 24, 32, 32, 32, 64, 64, 64, 64, 96, 96, 96, 160, 160, 160, 320, 1280)
    ]
    assert {row.endpoint: row.name for row in rows if row.endpoint} == {
        "stride_2": "block_0",
        "stride_4": "block_2",
        "stride_8": "block_5",
        "stride_16": "block_12",
        "stride_32": "block_16",
    }
    assert [row.name for row in rows if row.residual] == [f"block_{i}" for i in (2, 4, 5, 7, 8, 9, 11, 12, 14, 15)]


@given(value=st.floats(1, 5000), divisor=st.integers(1, 32))
def test_make_divisible_never_falls_below_nine_tenths(value, divisor):
    rounded = make_divisible(value, divisor)
    assert rounded % divisor == 0
    assert rounded >= 0.9 * value
    assert rounded <= max(1.1 * value + divisor, divisor)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("mobilenetv2_035", {"alpha": 0.35}),
        ("mobilenetv2_140", {"alpha": 1.4}),
        ("mobilenetv2_110d", {"alpha": 1.1, "depth_multiplier": 1.2, "fix_stem_head": True}),
        ("mobilenetv2_120d", {"alpha": 1.2, "depth_multiplier": 1.4, "fix_stem_head": True}),
    ],
)
def test_widths_and_depths_are_those_of_timm(name, arguments):
    peer = timm.create_model(name)
    blocks = [block for stage in peer.blocks for block in stage]
    out = [getattr(block, "conv_pwl", None) or block.conv_pw for block in blocks]
    expected = [peer.conv_stem.out_channels, *(conv.out_channels for conv in out), peer.num_features]
    assert [row.channels for row in plan(**arguments)] == expected


@pytest.mark.parametrize(("output_stride", "dilations"), [(32, {1}), (16, {1, 2}), (8, {1, 2, 4})])
def test_output_stride_turns_later_strides_into_dilations(output_stride, dilations):
    rows = plan(output_stride=output_stride)
    assert {row.dilation for row in rows if row.kind == "block"} == dilations
    assert math.prod(row.stride for row in rows) == rows[-1].output_stride == output_stride
    assert [row.channels for row in rows] == [row.channels for row in plan()]
    assert [row.residual for row in rows] == [row.residual for row in plan()]


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("alpha", 0),
        ("alpha", -1),
        ("alpha", math.nan),
        ("alpha", math.inf),
        ("alpha", "1"),
        ("depth_multiplier", 0),
        ("round_nearest", 0),
        ("round_nearest", 8.5),
        ("stem_stride", 3),
        ("output_stride", 4),
        ("output_stride", True),
        ("inverted_residual_setting", []),
        ("inverted_residual_setting", "paper"),
        ("inverted_residual_setting", [(6, 24, 2)]),
        ("inverted_residual_setting", [(6, 24, 2, 3)]),
        ("inverted_residual_setting", [(0, 24, 2, 2)]),
        ("inverted_residual_setting", [(6, 24, 0, 2)]),
        ("inverted_residual_setting", [(6, 24.5, 1, 2)]),
        ("alpha", 1e9),
        ("round_nearest", 10**7),
        ("depth_multiplier", 100),
        ("inverted_residual_setting", [(1e300, 24, 1, 2)]),
        ("inverted_residual_setting", [(6, 10**400, 1, 2)]),
        ("inverted_residual_setting", [(6, 24, 10**9, 2)]),
        ("inverted_residual_setting", [(0.001, 24, 1, 2)]),
    ],
)
def test_a_bad_argument_is_named_with_its_value(argument, value):
    with pytest.raises(ValueError, match=argument) as error:
        plan(**{argument: value})
    shown = value[0] if isinstance(value, list) and value else value
    assert str(shown) in str(error.value)


def test_the_default_setting_is_torchvisions():
    assert [tuple(stage) for stage in PAPER_SETTING] == [
        (1, 16, 1, 1),
        (6, 24, 2, 2),
        (6, 32, 3, 2),
        (6, 64, 4, 2),
        (6, 96, 3, 1),
        (6, 160, 3, 2),
        (6, 320, 1, 1),
    ]
