"""The spiral through ReLU, against the paper's lemma and theorem."""

import numpy as np
import pytest

from training.experiments import manifold, results
from training.experiments.options import Manifold


@pytest.mark.parametrize("n", manifold.DIMENSIONS)
def test_the_theorems_share_of_the_plane(n):
    # Fewer than two of n units: none, or one of n.
    assert manifold.collapsed_share(2, n) == (n + 1) / 2**n


def test_what_is_measured_agrees_with_the_theorem(tmp_path):
    options = Manifold(out=tmp_path, matrices=400, points=200)
    for n in (2, 3, 5):
        row = manifold.measure_spiral(n, options)
        error = row["lost_spread"] / 400**0.5
        assert abs(row["lost"] - manifold.collapsed_share(2, n)) <= 4 * error + 1e-9
        assert abs(row["origin"] - 0.5**n) <= 4 * row["origin_spread"] / 400**0.5
    row = manifold.measure_block(4, 2, options)
    assert abs(row["lost"] - manifold.collapsed_share(4, 8)) <= 4 * row["lost_spread"] / 400**0.5


def test_lost_points_have_the_image_of_others_and_kept_ones_come_back(rng):
    # Lemma 2, point by point.
    x = manifold.spiral(200)
    lost = 0
    for n in (2, 3, 5):
        matrix = rng.standard_normal((n, 2))
        hidden = x @ matrix.T
        _, active = manifold.project(x, matrix)
        for point, units, count in zip(x, hidden, active, strict=True):
            rows = matrix[units > 0]
            if count >= 2:
                np.testing.assert_allclose(np.linalg.lstsq(rows, units[units > 0])[0], point, atol=1e-9)
                continue
            # Along what no active unit sees, as long as none of the others becomes active.
            direction = np.array([-rows[0, 1], rows[0, 0]]) if count else np.array([1.0, 0.0])
            other = point + 1e-3 * np.abs(units).min() * direction
            np.testing.assert_allclose(np.maximum(matrix @ other, 0), np.maximum(units, 0), atol=1e-12)
            lost += 1
    assert lost


def test_a_linear_image_has_no_curved_share(rng):
    x = manifold.spiral(100)
    assert manifold.curved_share(x, x @ rng.standard_normal((2, 2))) < 1e-12
    assert manifold.curved_share(x, np.abs(x)) > 0.5


def test_a_run_writes_its_tables_and_picture_and_measures_once(tmp_path, capsys, monkeypatch):
    options = Manifold(out=tmp_path / "new", matrices=20, points=100)
    manifold.run(options)
    first = capsys.readouterr().out
    assert first.count("\n| ") == 1 + 5 + 2 + 12
    assert (options.out / "manifold.png").read_bytes()[:4] == b"\x89PNG"
    assert (options.out / "table.md").read_text() == first

    def never(*arguments):
        raise AssertionError("measured again")

    monkeypatch.setattr(manifold, "measure_spiral", never)
    monkeypatch.setattr(manifold, "measure_block", never)
    manifold.run(options)
    assert capsys.readouterr().out == first


def test_the_results_of_other_settings_are_refused(tmp_path):
    options = Manifold(out=tmp_path, matrices=20, points=100)
    results.Results("manifold", options).row("spiral 2", lambda: {"lost": 0.5})
    with pytest.raises(
        ValueError, match=r"^out must be a new folder, or one of a run with the same matrices, 21, got "
    ):
        results.Results("manifold", Manifold(out=tmp_path, matrices=21, points=100))
    for damaged in ("", "[]", '{"rows": 1}', '{"rows": {"a": 1}}'):
        (tmp_path / "results.json").write_text(damaged)
        with pytest.raises(ValueError, match=r"^out must be a folder whose results\.json an experiment wrote, got "):
            results.Results("manifold", options)
