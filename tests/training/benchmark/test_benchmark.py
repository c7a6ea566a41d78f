import io
import json
import os
import subprocess
import sys
from dataclasses import replace

import keras
import numpy as np
import pytest

from tests.conftest import ONCE, once
from tests.helpers import randomise, relative_difference
from training.benchmark import charts, contenders, exports, frameworks, modes, peers, rounds
from training.benchmark.contenders import PEERS
from training.benchmark.peers import Spec

BACKEND = keras.backend.backend()
TINY = ["--backend", BACKEND, "--alpha", "0.35", "--size", "32", "--rounds", "1", "--seconds", "0.05"]
# One backend stands for all where the backend makes no difference to the code: each run takes seconds.
MODES = {"tensorflow": ["inference", "build"], "jax": ["inference"], "torch": ["training", "fit"]}[BACKEND]
PEERS_HERE = {"tensorflow": ["litert"], "jax": ["openvino", "onnxruntime"], "torch": ["torchvision-folded"]}[BACKEND]
PNG = b"\x89PNG\r\n\x1a\n"


@pytest.mark.slow
def test_the_command_measures_and_leaves_table_json_and_chart(tmp_path):
    arguments = ["--against", "keras.applications", "--mode", *MODES, "--batch", "2", "--out", str(tmp_path)]
    command = [sys.executable, "-m", "training.benchmark", *TINY, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=rounds.ROOT)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "results.json").read_text())
    names = [f"keras_mnv2, {BACKEND}", f"keras.applications, {BACKEND}"]
    expected = [(mode, name) for mode in MODES for name in names]
    assert [(row["mode"], row["contender"]) for row in results["rows"]] == expected
    ours, theirs = results["rows"][:2]
    assert ours["batch"] == 2
    assert ours["images_per_second"] == pytest.approx(2 / ours["seconds"])
    assert ours["ratios"] == {"keras": pytest.approx(theirs["seconds"] / ours["seconds"])}
    assert theirs["ratios"]["keras"] == 1
    assert 0 < ours["fraction_of_peak"] < 1
    assert 50 < ours["peak_memory_mib"] < 20000
    assert results["peak_flops"][MODES[0]] > 1e9
    assert results["options"]["alpha"] == 0.35
    assert results["versions"]["keras"] == keras.__version__
    assert (results["missing"], results["failed"], results["growth"]) == ({}, [], [])
    for word in (*names, "x keras", "of peak", "GFLOP/s", f"{ours['milliseconds']:.1f}"):
        assert word in done.stdout
    assert "x torchvision" not in done.stdout
    assert (tmp_path / "chart.png").read_bytes().startswith(PNG)
    assert {path.name for path in tmp_path.iterdir()} == {"results.json", "chart.png"}
    for row in results["rows"][2:]:
        if row["mode"] == "build":
            assert row["seconds"] == pytest.approx(row["import_seconds"] + row["build_seconds"])
            assert 0 < row["import_seconds"] < row["build_seconds"]
        else:
            assert row["ratios"]["train_on_batch"] > 0


def test_a_training_step_gives_no_number_that_could_be_taken_for_its_seconds(tmp_path):
    spec = Spec("keras_mnv2", BACKEND, "training", 0.35, 32, 2, fold=False, folder=str(tmp_path))
    model = keras.Sequential([keras.Input((32, 32, 3)), keras.layers.Flatten(), keras.layers.Dense(1000)])
    assert contenders.keras_call(model, spec)() is None


def served(spec, monkeypatch, lines="0\n"):
    """The answers of a contender in this process."""
    answers = []
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    contenders.serve(spec, lambda **content: answers.append(content))
    return answers


def test_what_a_call_gives_is_not_taken_for_its_seconds(monkeypatch):
    monkeypatch.setattr(contenders, "PEERS", {"torchvision": (lambda spec: lambda: 1000.0, ())})
    start, measured = served(Spec("torchvision", "", "training", 0.35, 32, 2, True, ""), monkeypatch)
    assert 0 < max(measured["times"]) < 1
    assert 0 < start["first_step_seconds"] < start["start_seconds"]


def test_tensors_on_the_device_give_what_arrays_give(rng):
    model = keras.Sequential([keras.Input((32, 32, 3)), keras.layers.BatchNormalization(), keras.layers.Flatten()])
    model.layers[0].set_weights([rng.uniform(1, 2, 3) for _ in range(4)])
    spec = Spec("keras_mnv2", BACKEND, "inference", 0.35, 32, 2, False, "")
    found = contenders.keras_call(model, replace(spec, on_device=True))()
    assert keras.ops.is_tensor(found)
    expected = contenders.keras_call(model, spec)()
    assert relative_difference(keras.ops.convert_to_numpy(found), expected) < 1e-5


def test_a_step_of_training_and_of_fit_takes_tensors_on_the_device():
    classifier = keras.layers.Dense(1000, activation="softmax")
    model = keras.Sequential([keras.Input((32, 32, 3)), keras.layers.Flatten(), classifier])
    spec = Spec("keras_mnv2", BACKEND, "training", 0.35, 32, 2, False, "", on_device=True)
    before = model.get_weights()[0]
    contenders.keras_call(model, spec)()
    between = model.get_weights()[0]
    assert contenders.keras_call(model, replace(spec, mode="fit"))() > 0
    assert (before != between).any()
    assert (between != model.get_weights()[0]).any()


@pytest.mark.slow
def test_in_bfloat16_the_layers_compute_in_it_and_the_weights_stay_in_float32():
    import torch

    spec = Spec("keras_mnv2", "torch", "inference", 0.35, 32, 2, True, "", precision="bfloat16", on_device=True)
    try:
        contenders.keras_contender(spec)[0]()
        model = contenders.keras_model(spec)
    finally:
        keras.config.set_dtype_policy("float32")
    # The classifier is in float32.
    assert {layer.compute_dtype for layer in model.layers[:-1]} == {"bfloat16"}
    assert {weight.dtype for weight in model.weights} == {"float32"}
    for contender in (peers.torchvision_eager, peers.torchvision_folded, peers.matrix_product):
        assert contender(spec)().dtype == torch.bfloat16
    assert peers.torchvision_eager(replace(spec, on_device=False))().dtype == np.float32


@once
def test_the_steps_of_host_are_counted_in_operators_of_pytorch(monkeypatch):
    import torch

    threads = torch.get_num_threads()
    options = modes.Options(backend="torch", alpha=0.35, against=("torchvision",))
    try:
        found = {spec.label: served(spec, monkeypatch) for spec in options.specs("host", "")}
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(threads)
    assert list(found) == ["keras_mnv2, torch", "keras_mnv2 fit, torch", "torchvision"]
    calls = {name: start["aten_calls"] for name, (start, _) in found.items()}
    # 158 weights, each with its gradient.
    assert all(count > 2 * 158 for count in calls.values())
    assert calls["keras_mnv2 fit, torch"] == pytest.approx(calls["keras_mnv2, torch"], rel=0.1)


def test_the_steps_of_host_are_tiny_unless_asked_otherwise():
    spec = modes.Options(backend="torch").specs("host", "")[0]
    assert (spec.size, spec.batch, spec.threads) == (32, 2, 1)
    spec = modes.Options(backend="torch", size=64, batch=8, threads=2).specs("host", "")[0]
    assert (spec.size, spec.batch, spec.threads) == (64, 8, 2)
    spec = modes.Options(backend="torch").specs("training", "")[0]
    assert (spec.size, spec.batch, spec.threads) == (224, 16, None)


def test_tf32_is_told_where_there_is_a_gpu(monkeypatch):
    import torch

    assert frameworks.tf32("torch") is None
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    # PyTorch's defaults.
    assert frameworks.tf32("torch") == "convolutions"
    facts = {"gpu": "a GPU", "tf32": "convolutions"}
    expected = "peak: 50000 GFLOP/s (float32, 8192x8192 matrices, a GPU, TF32: convolutions)"
    assert charts.peak_line(5e13, "float32", facts) == expected
    expected = "peak: 400 GFLOP/s (bfloat16, 2048x2048 matrices)"
    assert charts.peak_line(4e11, "bfloat16", {"gpu": None, "tf32": None}) == expected


@pytest.mark.slow
def test_growth_is_measured_in_a_process_a_point(monkeypatch):
    monkeypatch.setattr(modes, "GROWTH_BATCHES", (64,))
    monkeypatch.setattr(modes, "GROWTH_SIZES", ())
    bench = rounds.Bench()
    options = modes.Options(backend=BACKEND, alpha=0.35, size=64, seconds=0.05)
    (point,) = modes.measure_growth(options, bench, "")
    assert not bench.failed
    assert (point["backend"], point["axis"], point["batch"], point["pixels"]) == (BACKEND, "batch", 64, 64**2)
    assert point["seconds"] > 0
    # At least the batch and its largest activations; less than a framework takes.
    assert 64 * 64 * 64 * 3 * 4 / 2**20 < point["memory_mib"] < 400


SHADOWS = {
    "openvino": "raise ModuleNotFoundError('No module named openvino', name='openvino')",
    "torch": "raise ModuleNotFoundError('No module named torch', name='torch')",
    "ai_edge_litert": "raise RuntimeError('broken on purpose')",
    "onnxruntime": "import os; print('last words', file=__import__('sys').stderr, flush=True); os._exit(3)",
}


@pytest.mark.slow
def test_missing_and_failing_contenders_are_named_and_the_others_go_on(tmp_path, monkeypatch, capsys):
    for name, code in SHADOWS.items():
        (tmp_path / f"{name}.py").write_text(code)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(modes, "KERAS", ())
    wanted = ["--against", "torchvision", "onnxruntime", "openvino", "litert", "--mode", "inference"]
    monkeypatch.setattr(sys, "argv", ["benchmark", *TINY, *wanted, "--out", str(tmp_path / "out")])
    with pytest.raises(SystemExit) as ended:
        modes.main()
    assert ended.value.code == 1
    printed = capsys.readouterr().out
    assert printed.count("torchvision is missing: it needs the package torch\n") == 1
    assert printed.count("openvino is missing: it needs the package openvino\n") == 1
    assert "litert failed (inference, batch 32, size 32): RuntimeError: broken on purpose\n" in printed
    assert "onnxruntime failed (inference, batch 32, size 32): the process ended with status 3. last words\n" in printed
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["missing"] == {"torchvision": "torch", "openvino": "openvino"}
    assert [(problem["contender"], problem["mode"]) for problem in results["failed"]] == [
        ("onnxruntime", "inference"),
        ("litert", "inference"),
    ]
    # Without PyTorch, NumPy's product is the peak.
    assert set(results["peak_flops"]) == {"inference"}


@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n == "torchvision-folded" else ONCE) for n in PEERS_HERE])
def test_a_peer_computes_the_network_that_it_stands_for(name, tmp_path, monkeypatch, rng):
    spec = Spec(name, "", "inference", 0.35, 64, 2, True, str(tmp_path))
    if name == "litert":
        # Untrained, it gives 0.001 for each class whatever the image.
        model = keras.applications.MobileNetV2((64, 64, 3), alpha=0.35, weights=None)
        randomise(model, rng)
        monkeypatch.setattr(keras.applications, "MobileNetV2", lambda shape, alpha, weights: model)
        monkeypatch.setattr(peers, "_convert", lambda export, spec: export(spec))
        expected = model.predict_on_batch(peers.images(spec))
    else:
        expected = peers.torchvision_eager(spec)()
    assert expected.std() > 0.1 * np.abs(expected.mean())
    found = PEERS[name][0](spec)()
    assert found.shape == (2, 1000)
    assert relative_difference(found, expected) < 1e-4


def test_the_runtimes_take_part_in_forward_passes_only():
    options = modes.Options(backend=BACKEND)
    forward = {f"{name}, {BACKEND}" for name in modes.KERAS} | set(PEERS)
    assert {spec.label for spec in options.specs("inference", "")} == forward
    runtimes = {"torchvision-folded", "onnxruntime", "openvino", "litert"}
    assert {spec.label for spec in options.specs("training", "")} == forward - runtimes
    assert {spec.label for spec in options.specs("fit", "")} == forward - runtimes - {"torchvision"}
    assert {spec.batch for spec in options.specs("training", "")} == {16}
    assert {spec.batch for spec in modes.Options(batch=8).specs("latency", "")} == {1}


def test_what_knows_no_bfloat16_is_left_out_and_said_to_be(monkeypatch, capsys, tmp_path):
    options = modes.Options(backend=BACKEND, precision="bfloat16", against=("litert", "torchvision"))
    labels = {spec.label for spec in options.specs("inference", "")}
    assert labels == {f"keras_mnv2, {BACKEND}", "torchvision", "matrix product"}
    monkeypatch.setattr(rounds.Bench, "run_rounds", lambda *arguments: [])
    assert modes.run(replace(options, out=tmp_path))
    assert "not measured in bfloat16, which they do not have: litert\n" in capsys.readouterr().out
    assert json.loads((tmp_path / "results.json").read_text())["left_out"] == ["litert"]
    assert modes.Options(mode=("training",), precision="bfloat16").left_out == []


def stand_in(tmp_path, monkeypatch, script):
    """Contenders' processes run this shell script instead."""
    path = tmp_path / "stand_in.sh"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(path))


def test_a_turn_that_exceeds_the_limit_is_ended_and_told(tmp_path, monkeypatch, capsys):
    start = r"""printf '{"a"'; sleep 0.1; printf ': 1}\n'"""
    measured = r"""printf '{"times": [1.0, 3.0'; sleep 0.1; printf ', 2.0]}\n{"ti'"""
    stand_in(tmp_path, monkeypatch, f"{start}; {measured}; exec sleep 60")
    processes, medians = [], []

    def keep(running):
        processes.extend(contender.process for contender in running)
        medians.append([contender.medians[:] for contender in running])

    bench = rounds.Bench()
    spec = Spec("torchvision", "", "inference", 0.35, 32, 2, True, "", limit=2.0)
    assert bench.run_rounds([spec], 3, 0.1, keep) == []
    assert medians == [[[]], [[2.0]], []]
    assert (bench.exceeded, bench.failed) == ({spec: "round 2"}, {})
    assert bench.run_rounds([spec], 3, 0.1) == []
    said = "torchvision exceeded the limit of 2 s in round 2 (inference, batch 2, size 32)\n"
    assert capsys.readouterr().out == said
    with pytest.raises(ProcessLookupError):
        os.killpg(processes[0].pid, 0)


def test_an_exceeded_limit_is_no_failure(tmp_path, monkeypatch, capsys):
    stand_in(tmp_path, monkeypatch, "exec sleep 60")
    monkeypatch.setattr(modes, "KERAS", ())
    wanted = ["--against", "torchvision", "--mode", "latency", "--limit", "0.2", "--out", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", ["benchmark", *TINY, *wanted])
    with pytest.raises(SystemExit) as ended:
        modes.main()
    assert ended.value.code == 0
    printed = capsys.readouterr().out
    assert "torchvision exceeded the limit of 0.2 s in the start (latency, batch 1, size 32)\n" in printed
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    exceeded = [(problem["contender"], problem["during"], problem["limit"]) for problem in results["exceeded"]]
    assert exceeded == [("torchvision", "the start", 0.2), ("matrix product", "the start", 0.2)]
    assert (results["rows"], results["failed"]) == ([], [])


def test_an_interrupted_run_leaves_the_rows_of_the_rounds_before(tmp_path, monkeypatch):
    class Fake:
        def __init__(self, spec):
            self.spec, self.medians = spec, []
            self.facts = dict.fromkeys(("start_seconds", "first_step_seconds", "peak_memory", "device_memory"), 1)
            self.facts |= {"gpu": None, "tf32": None}
            self.seconds = 0.5

        def start(self):
            pass

        def measure(self, seconds):
            if self.spec.contender == "torchvision" and self.medians:
                raise KeyboardInterrupt
            self.medians.append(0.5)

        def stop(self):
            pass

    monkeypatch.setattr(rounds, "Contender", Fake)
    wanted = ["--against", "torchvision", "--mode", "training", "--rounds", "3", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["benchmark", "--backend", BACKEND, *wanted])
    with pytest.raises(SystemExit, match="has what was measured before"):
        modes.main()
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert [(row["contender"], row["rounds"]) for row in rows] == [(f"keras_mnv2, {BACKEND}", 2), ("torchvision", 1)]
    assert rows[0]["ratios"] == {"torchvision": 1}
    assert rows[0]["fraction_of_peak"] > 0


@once
def test_an_interrupt_leaves_no_process_behind(monkeypatch):
    started = []

    def interrupted(contender, seconds):
        started.append(contender.process)
        raise KeyboardInterrupt

    monkeypatch.setattr(rounds.Contender, "measure", interrupted)
    spec = Spec("matrix product", "", "inference", 0.35, 32, 1, True, "")
    with pytest.raises(KeyboardInterrupt):
        rounds.Bench().run_rounds([spec], 1, 1.0)
    assert started[0].returncode < 0
    with pytest.raises(ProcessLookupError):
        os.killpg(started[0].pid, 0)


def test_contenders_run_rounds(monkeypatch):
    order = []

    class Fake:
        def __init__(self, spec):
            self.spec = spec

        def start(self):
            order.append(f"start {self.spec.label}")

        def measure(self, seconds):
            order.append(self.spec.label)
            if self.spec.label == "b" and order.count("b") == 2:
                raise rounds.ContenderError("out of breath")

        def stop(self):
            order.append(f"stop {self.spec.label}")

    monkeypatch.setattr(rounds, "Contender", Fake)
    bench = rounds.Bench()
    specs = [Spec(name, "", "inference", 1.0, 32, 1, True, "") for name in "abc"]
    assert [c.spec.label for c in bench.run_rounds(specs, 3, 1.0)] == ["a", "c"]
    assert order[:3] == ["start a", "start b", "start c"]
    assert order[3:11] == ["a", "b", "c", "a", "b", "c", "a", "c"]
    assert sorted(order[11:]) == ["stop a", "stop b", "stop c"]
    assert bench.failed == {specs[1]: "out of breath"}


def rows_by_hand():
    seconds = {"keras_mnv2, jax": 0.1, "keras.applications, jax": 0.4, "keras_mnv2, torch": 0.2, "torchvision": 0.3}
    return [{"mode": "training", "contender": name, "seconds": value} for name, value in seconds.items()]


def test_ratios_are_to_the_same_backend_and_mode():
    rows = [*rows_by_hand(), {"mode": "fit", "contender": "keras_mnv2, jax", "seconds": 0.2}]
    rows += [{"mode": "host", "contender": f"{name}, jax", "seconds": 0.2} for name in ("keras_mnv2", "keras_mnv2 fit")]
    charts.compare(rows)
    assert rows[0]["ratios"] == pytest.approx({"keras": 4, "torchvision": 3})
    assert rows[1]["ratios"] == pytest.approx({"keras": 1, "torchvision": 0.75})
    assert rows[2]["ratios"] == pytest.approx({"torchvision": 1.5})
    assert rows[4]["ratios"] == pytest.approx({"train_on_batch": 0.5})
    assert rows[5]["ratios"] == {}
    assert rows[6]["ratios"] == pytest.approx({"train_on_batch": 1})


def test_the_table_has_the_columns_that_were_measured():
    rows = [row | {"spread": 0.05} for row in rows_by_hand()]
    charts.compare(rows)
    lines = charts.table(rows).splitlines()
    assert [cell.strip() for cell in lines[0].split("  ") if cell] == [
        "contender",
        "spread",
        "x keras",
        "x torchvision",
    ]
    assert lines[1].split() == ["keras_mnv2,", "jax", "5%", "4.00", "3.00"]
    assert lines[3].split() == ["keras_mnv2,", "torch", "5%", "1.50"]
    assert len({len(line) for line in lines}) == 1
    assert charts.table([]) == "nothing was measured"


def test_the_share_of_the_peak():
    # 300 million multiply-adds are 0.6 GFLOP: at 100 images/s 60 GFLOP/s.
    assert charts.fraction_of_peak(300_000_000, "inference", 100.0, 120e9) == pytest.approx(0.5)
    assert charts.fraction_of_peak(300_000_000, "training", 100.0, 360e9) == pytest.approx(0.5)
    assert charts.fraction_of_peak(300_000_000, "inference", 100.0, None) is None


def test_the_slope_is_that_of_the_upper_half():
    x = np.array([1, 2, 4, 8, 16, 32])
    assert charts.slope(x, 3 * x**2) == pytest.approx(2)
    assert charts.slope(x, np.array([5, 5, 5, 8, 16, 32])) == pytest.approx(1)
    assert charts.slope([1, 4], [1, 2]) == pytest.approx(0.5)
    assert charts.slope([1], [1]) is None


def points_by_hand():
    batch = [
        {"backend": "jax", "axis": "batch", "batch": b, "pixels": 1024, "seconds": b, "memory_mib": 10}
        for b in (1, 2, 4, 8)
    ]
    return [*batch, {"backend": "jax", "axis": "pixels", "batch": 8, "pixels": 1024, "seconds": 1, "memory_mib": 1}]


def test_growth_has_a_line_for_each_curve():
    lines = charts.growth_table(points_by_hand()).splitlines()
    assert lines[1].split() == ["jax", "batch", "1", "8", "1000.0", "8000.0", "1.00", "10.0", "10.0", "0.00"]
    assert lines[2].split() == ["jax", "pixels", "1024", "1024", "1000.0", "1000.0", "1.0", "1.0"]
    assert charts.growth_table([]) == "nothing was measured"


def test_growth_is_drawn(tmp_path):
    charts.draw_growth(points_by_hand(), tmp_path / "growth.png")
    assert (tmp_path / "growth.png").read_bytes().startswith(PNG)
    assert [path.name for path in tmp_path.iterdir()] == ["growth.png"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--alpha", "0"], "alpha"),
        (["--size", "16"], "input_shape"),
        (["--rounds", "0"], "rounds must be a whole number of at least 1"),
        (["--threads", "0"], "threads must be a whole number of at least 1"),
        (["--limit", "0"], "limit must be a finite number above 0"),
        (["--precision", "float16"], "float16"),
        (["--mode", "exports", "--precision", "bfloat16"], "mode must be without 'exports' where precision"),
    ],
)
def test_a_bad_option_ends_in_one_sentence(arguments, message, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(sys, "argv", ["benchmark", *arguments, "--out", str(tmp_path / "out")])
    with pytest.raises(SystemExit) as ended:
        modes.main()
    assert ended.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_exports_are_measured_beside_the_model_that_they_come_from(tmp_path):
    command = [sys.executable, "-m", "training.benchmark", *TINY, "--mode", "exports", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=rounds.ROOT)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert [row["contender"] for row in rows] == [f"{name}, {BACKEND}" for name in ("keras_mnv2", *exports.FILES)]
    model = rows[0]
    assert model["ratios"] == {"unfolded": 1}
    for row in rows[1:]:
        assert row["ratios"]["unfolded"] == pytest.approx(model["seconds"] / row["seconds"])
        assert 0 < row["megabytes"] < 10
        assert row["top1_agreement"] is not None
        if "16" not in row["contender"] and "int8" not in row["contender"]:
            assert row["largest_difference"] <= 1e-4
    for word in ("x unfolded", "same top-1", "largest difference", "LiteRT dynamic int8"):
        assert word in done.stdout
