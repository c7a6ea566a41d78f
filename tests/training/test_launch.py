import json
import os
import signal
import subprocess
import sys
import time

import pytest

from training import launch
from training.__main__ import repeated


def test_each_backend_finds_its_variables():
    found = launch.environment(3, 2, ["a", "b"], [100, 101, 102], {})
    assert found["RANK"] == "3"
    assert found["LOCAL_RANK"] == "1"
    assert found["WORLD_SIZE"] == found["KERAS_DISTRIBUTION_NUM_PROCESSES"] == "4"
    assert (found["MASTER_ADDR"], found["MASTER_PORT"]) == ("a", "100")
    assert found["KERAS_DISTRIBUTION_JOB_ADDRESSES"] == "a:100"
    assert json.loads(found["TF_CONFIG"]) == {
        "cluster": {"worker": ["a:101", "a:102", "b:101", "b:102"]},
        "task": {"type": "worker", "index": 3},
    }
    assert found["CUDA_VISIBLE_DEVICES"] == "1"
    visible = launch.environment(3, 2, ["a", "b"], [100, 101, 102], {"CUDA_VISIBLE_DEVICES": "4,7"})
    assert visible["CUDA_VISIBLE_DEVICES"] == "7"


def test_free_ports_differ():
    assert len(set(launch.free_ports(5))) == 5


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--processes", "0"], "at least 1, got 0"),
        (["--processes", "2", "--host-number", "3"], "from 0 to 0, got 3"),
        ([], "--processes"),
    ],
)
def test_a_bad_launch_is_one_sentence(words, message):
    done = subprocess.run([sys.executable, "-m", "training.launch", *words], capture_output=True, text=True)
    assert done.returncode == 2
    assert message in done.stderr.splitlines()[-1]


def test_workers_know_the_command_of_the_launch(monkeypatch):
    started = []
    monkeypatch.setattr(launch.subprocess, "Popen", lambda command, env, **_: started.append((command, env)))
    monkeypatch.setattr(launch, "wait", lambda *_: 0)
    monkeypatch.setattr(launch.signal, "signal", lambda *_: None)
    monkeypatch.setattr(sys, "argv", ["launch.py", "--processes", "2", "digits", "--epochs", "1"])
    assert launch.main() == 0
    assert [command[1:] for command, _ in started] == [["-m", "training", "digits", "--epochs", "1"]] * 2
    for _, environment in started:
        monkeypatch.setenv("KERAS_MNV2_LAUNCH", environment["KERAS_MNV2_LAUNCH"])
        monkeypatch.delenv("KERAS_BACKEND", raising=False)
        expected = "python -m training.launch --processes 2 digits --epochs 1"
        assert repeated("digits", ["--epochs", "1"]) == expected


def children(*codes):
    """Processes that sleep, or do what `codes` say."""
    return {i: subprocess.Popen([sys.executable, "-c", code]) for i, code in enumerate(codes)}


SLEEP = "import time; time.sleep(60)"


def test_the_others_end_with_one_that_fails(capsys, monkeypatch):
    monkeypatch.setattr(launch, "PATIENCE", 0.2)
    started = children(SLEEP, "import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
    start = time.monotonic()
    assert launch.wait(started) == 128 + signal.SIGKILL
    assert time.monotonic() - start < 10
    assert capsys.readouterr().err == "Worker 1 was ended by SIGKILL, and with it the others.\n"
    assert launch.wait(children("raise SystemExit(3)", SLEEP)) == 3
    assert launch.wait(children("", "")) == 0


def test_one_that_does_not_want_to_end_is_ended(monkeypatch):
    monkeypatch.setattr(launch, "PATIENCE", 1.0)
    monkeypatch.setattr(launch, "LAST_SECONDS", 0.2)
    stubborn = f"import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); {SLEEP}"
    started = children(stubborn, "import time; time.sleep(0.5); raise SystemExit(3)")
    assert launch.wait(started) == 3
    assert started[0].returncode == -signal.SIGKILL


def test_workers_that_do_not_hear_a_signal_are_ended(monkeypatch):
    monkeypatch.setattr(launch, "LAST_SECONDS", 0.2)
    started = children(SLEEP, SLEEP)
    assert launch.wait(started, [time.monotonic()]) == 128 + signal.SIGKILL


def test_a_signal_to_the_launch_reaches_each_worker_once():
    worker = (
        "import os, signal, time\n"
        "count = []\n"
        "signal.signal(signal.SIGINT, lambda *arguments: count.append(1))\n"
        # One write for a line: print's two would mix with the other worker's.
        "os.write(1, b'ready\\n')\n"
        "while not count: time.sleep(0.05)\n"
        "time.sleep(0.5)\n"
        "os.write(1, b'signals %d\\n' % len(count))\n"
    )
    code = (
        "import subprocess, sys, training.launch as launch\n"
        "original = subprocess.Popen\n"
        f"worker = {worker!r}\n"
        "launch.subprocess.Popen = lambda command, **options: original([sys.executable, '-c', worker], **options)\n"
        "sys.argv = ['launch', '--processes', '2']\n"
        "sys.exit(launch.main())\n"
    )
    launched = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert [launched.stdout.readline() for _ in range(2)] == ["ready\n"] * 2
    # As a terminal does: to the whole group.
    os.killpg(launched.pid, signal.SIGINT)
    output, _ = launched.communicate(timeout=20)
    assert output.splitlines() == ["signals 1"] * 2
    assert launched.returncode == 0
