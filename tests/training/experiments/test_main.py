"""The command line of the experiments."""

import pytest

from training.experiments import manifold
from training.experiments.__main__ import main
from training.experiments.options import EXPERIMENTS


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([], "Name an experiment: manifold, cost, expansion, ablation."),
        (["spiral"], "The experiment must be one of manifold, cost, expansion, ablation, got 'spiral'."),
        (
            ["manifold", "--out", "x", "--matrices", "0"],
            "matrices must be a whole number of at least 1, got 0.",
        ),
        (
            ["ablation", "--out", "x", "--learning-rate", "0"],
            "learning_rate must be a finite number above 0, got 0.0.",
        ),
    ],
)
def test_a_mistake_is_one_line(words, told, capsys):
    with pytest.raises(SystemExit) as end:
        main(words)
    assert end.value.code == 2
    assert capsys.readouterr().err == f"{told}\n"


def test_out_is_needed(capsys):
    with pytest.raises(SystemExit) as end:
        main(["cost"])
    assert end.value.code == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert "--out" in told


def test_help_names_the_experiments(capsys):
    with pytest.raises(SystemExit) as end:
        main(["--help"])
    assert not end.value.code
    told = capsys.readouterr().out
    assert all(name in told for name in EXPERIMENTS)


def test_an_experiment_runs_and_an_interrupted_one_says_how_it_goes_on(tmp_path, capsys, monkeypatch):
    words = ["manifold", "--out", str(tmp_path), "--matrices", "3", "--points", "50"]
    main(words)
    assert capsys.readouterr().out.endswith(f"results.json, table.md and manifold.png are in {tmp_path}\n")

    def interrupt(options):
        raise KeyboardInterrupt

    monkeypatch.setattr(manifold, "run", interrupt)
    with pytest.raises(SystemExit) as end:
        main(words)
    assert end.value.code == 130
    assert "goes on" in capsys.readouterr().err
