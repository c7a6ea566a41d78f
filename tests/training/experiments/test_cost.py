"""The costs, against what is printed."""

import keras
import pytest

from training.experiments import cost
from training.experiments.options import Cost

KINDS = (cost.SEPARABLE, cost.BOTTLENECK, cost.INVERTED)


def test_the_count_is_what_is_printed_of_each_checkpoint():
    assert set(cost.PRINTED) == set(cost.accuracies())
    for (alpha, size), (multiply_adds, parameters) in cost.PRINTED.items():
        found = cost.profile(alpha, size)
        # They are cut off, and the parameters are without the norms' scales and shifts.
        assert int(found.multiply_adds / 1e6) == multiply_adds, (alpha, size)
        assert abs((found.parameters - found.statistics) / 1e6 - parameters) < 0.01, (alpha, size)


def test_a_block_of_stride_1_costs_what_section_3_3_says():
    rows = [row for row in cost.profile(1.0, 224).rows if row.name.startswith("block") and row.name != "block_0"]
    same = [row for row in rows if row.input_shape[:2] == row.output_shape[:2]]
    assert len(same) == 12
    for row in same:
        (height, width, before), after = row.input_shape, row.output_shape[2]
        assert row.multiply_adds == height * width * before * 6 * (before + 9 + after)


def test_the_inverted_block_costs_what_the_profile_says():
    rows = {(row.input_shape, row.output_shape): row for row in cost.profile(1.0, 224).rows}
    assert len(cost.residual_shapes()) == 5
    for side, channels in cost.residual_shapes():
        row, found = (
            rows[(side, side, channels), (side, side, channels)],
            cost.block_cost(cost.INVERTED, side, channels),
        )
        assert found["parameters"] == row.parameters
        assert found["multiply_adds"] == row.multiply_adds
        assert found["memory_as_one"] == row.memory
        # The input, and the two wide tensors around the depthwise convolution.
        assert found["memory"] == cost.BYTES * side**2 * channels * 13


@pytest.mark.parametrize("kind", KINDS)
def test_a_block_has_the_parameters_that_are_counted(kind):
    model = cost.build_block(kind, 7, 16)
    # A bias each channel in the place of a scale and a shift.
    biases = sum(out for _, out in cost.convolutions(kind, 16))
    assert model.count_params() == cost.block_cost(kind, 7, 16)["parameters"] - biases
    assert model.output_shape == (None, 7, 7, 16)
    assert not [layer for layer in model.layers if isinstance(layer, keras.layers.BatchNormalization)]


def test_more_parts_need_less_memory_down_to_inputs_and_outputs():
    found = cost.profile(1.0, 224)
    peaks = [cost.split_memory(found, parts) for parts in (*cost.PARTS, 10**9)]
    assert peaks == sorted(peaks, reverse=True)
    # The second block: 16 channels in, 96 before and behind the stride, 24 out.
    assert peaks[0] == 2 * (112**2 * (16 + 96) + 56**2 * (96 + 24))
    assert peaks[-1] == found.peak_memory


def test_a_run_measures_blocks_and_draws(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(cost, "residual_shapes", lambda: [(7, 16)])
    # What the process computes with is not this test's to change.
    monkeypatch.setattr(cost.frameworks, "set_threads", lambda framework, threads: None)
    cost.run(Cost(out=tmp_path, batch=2, rounds=2, seconds=0))
    told = capsys.readouterr().out
    assert told.count("7x7x16, ") == 3
    assert f"images: 2, on {keras.backend.backend()}" in told
    assert (tmp_path / "cost.png").read_bytes()[:4] == b"\x89PNG"
