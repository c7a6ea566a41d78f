import os
import signal
import subprocess
import sys
import time

import pytest

from training.state.signals import Stop, Stopped


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_outside_a_step_ends_at_once(number):
    stop = Stop()
    before = signal.getsignal(number)
    with stop.handled(), pytest.raises(Stopped):
        signal.raise_signal(number)
    assert stop.signal == number
    assert signal.getsignal(number) == before


def test_a_signal_within_a_step_waits_for_its_end():
    stop = Stop()
    with stop.handled():
        with stop.waiting():
            stop.check()
            signal.raise_signal(signal.SIGTERM)
            # Still here: the step goes on.
            with pytest.raises(Stopped):
                stop.check()
        # There is time to save.
        assert stop._timer.finished.is_set()


def test_no_library_takes_the_end_for_its_own_failure():
    assert not issubclass(Stopped, Exception)


CHILD = """
import signal, sys, time
from training.state import signals as stopping
stopping.GRACE = 0.5
stop = stopping.Stop()
with stop.handled(), stop.waiting():
    print("ready", flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize(("signals", "why"), [(1, "the step did not end within"), (2, "a second signal came")])
def test_a_step_that_does_not_end_is_given_up(signals, why):
    child = subprocess.Popen([sys.executable, "-c", CHILD], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert child.stdout.readline() == "ready\n"
    start = time.perf_counter()
    for _ in range(signals):
        os.kill(child.pid, signal.SIGTERM)
        time.sleep(0.1)
    _, errors = child.communicate(timeout=20)
    assert child.returncode == 128 + signal.SIGTERM
    assert why in errors
    assert time.perf_counter() - start < 10
