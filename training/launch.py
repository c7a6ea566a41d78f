"""Starts a run in several processes: `python -m training.launch --processes N RECIPE [--field value ...]`.

Each worker is the same command with the variables that its engine reads: torchrun's, Keras's or TF_CONFIG. On several
machines the same line runs on each, with `--hosts A,B` and its own `--host-number`.
"""

import argparse
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence

from .__main__ import settings, split
from .parallel.channel import LOST
from .process import LAUNCH, PACKAGE

# After the end of one worker, the others have this long to say what they know before they are told to end.
PATIENCE = 3.0
# They may save after that, or after a signal to the launch, but no longer.
LAST_SECONDS = 60.0
MOST_PORT = 65535


def main() -> int:
    """Starts the workers of this machine, waits for them, and gives the exit status."""
    parser = argparse.ArgumentParser(
        prog=f"python -m {PACKAGE}.launch",
        description=__doc__.replace("python -m training", f"python -m {PACKAGE}"),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--processes", type=int, required=True, help="workers on each machine, one for each GPU")
    parser.add_argument("--hosts", default="127.0.0.1", help="machines, separated by commas; the first coordinates")
    parser.add_argument("--host-number", type=int, default=0, help="which of the hosts this is, from 0")
    parser.add_argument("--port", type=int, default=0, help="first of the ports; on several machines 29400 by default")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="the recipe and its fields")
    options = parser.parse_args()
    hosts = options.hosts.split(",")
    if options.processes < 1:
        parser.error(f"--processes must be at least 1, got {options.processes}")
    if not 0 <= options.host_number < len(hosts):
        parser.error(f"--host-number must be from 0 to {len(hosts) - 1}, got {options.host_number}")
    if not 0 <= options.port <= MOST_PORT - options.processes:
        parser.error(f"--port must be from 0 to {MOST_PORT - options.processes}, got {options.port}")
    # Once, and not in each worker.
    settings(*split(options.command))
    if options.port or len(hosts) > 1:
        first = options.port or 29400
        ports = [first + i for i in range(options.processes + 1)]
    else:
        ports = free_ports(options.processes + 1)
    own = sys.argv[1 : len(sys.argv) - len(options.command)]
    told = {LAUNCH: shlex.join(["python", "-m", f"{PACKAGE}.launch", *own])}
    numbers = [options.host_number * options.processes + i for i in range(options.processes)]
    started = {
        number: subprocess.Popen(
            [sys.executable, "-m", PACKAGE, *options.command],
            env={**os.environ, **told, **environment(number, options.processes, hosts, ports, os.environ)},
            # A terminal's Ctrl-C reaches them once, through this process.
            start_new_session=True,
        )
        for number in numbers
    }
    asked: list[float] = []

    def forward(signum, frame):
        asked.append(time.monotonic())
        tell(started, signum)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, forward)
    return wait(started, asked)


def environment(
    number: int, workers: int, hosts: list[str], ports: list[int], outer: Mapping[str, str]
) -> dict[str, str]:
    """The variables of one worker, for each backend.

    Args:
        number: of the worker, over all machines.
        workers: on each machine.
        hosts: names or addresses of the machines.
        ports: the first for the coordinator, then one for each worker of a machine.
        outer: the environment of the launch.
    """
    local, total = number % workers, workers * len(hosts)
    cluster = [f"{host}:{port}" for host in hosts for port in ports[1:]]
    visible = outer.get("CUDA_VISIBLE_DEVICES")
    found = {
        "RANK": number,
        "WORLD_SIZE": total,
        "LOCAL_RANK": local,
        "LOCAL_WORLD_SIZE": workers,
        "MASTER_ADDR": hosts[0],
        "MASTER_PORT": ports[0],
        "KERAS_DISTRIBUTION_JOB_ADDRESSES": f"{hosts[0]}:{ports[0]}",
        "KERAS_DISTRIBUTION_NUM_PROCESSES": total,
        "KERAS_DISTRIBUTION_PROCESS_ID": number,
        "TF_CONFIG": json.dumps({"cluster": {"worker": cluster}, "task": {"type": "worker", "index": number}}),
    }
    if workers > 1 and visible != "":
        # A GPU each.
        found["CUDA_VISIBLE_DEVICES"] = (visible.split(",") if visible else list(map(str, range(workers))))[local]
    return {name: str(value) for name, value in found.items()}


def free_ports(count: int) -> list[int]:
    """Ports of this machine that nothing listens on."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
    finally:
        for one in sockets:
            one.close()


def wait(workers: dict[int, subprocess.Popen], asked: Sequence[float] = ()) -> int:
    """Waits for all; when one fails, ends the others, and says which it was.

    Args:
        workers: by their numbers.
        asked: when signals were sent to them, in seconds of the monotonic clock.
    """
    order: list[int] = []
    deadline = float("inf")
    told = False
    while len(order) < len(workers):
        order += [number for number, worker in workers.items() if number not in order and worker.poll() is not None]
        if deadline == float("inf") and any(workers[number].returncode for number in order):
            deadline = time.monotonic() + PATIENCE
        elif time.monotonic() > deadline:
            tell(workers, signal.SIGKILL if told else signal.SIGTERM)
            told, deadline = True, time.monotonic() + LAST_SECONDS
        elif asked and time.monotonic() - asked[0] > LAST_SECONDS:
            tell(workers, signal.SIGKILL)
        time.sleep(0.05)
    # Those that ended because of another one say nothing of the reason.
    codes = {number: workers[number].returncode for number in order if workers[number].returncode}
    reasons = {number: code for number, code in codes.items() if code != LOST} or codes
    if not reasons:
        return 0
    failed, code = next(iter(reasons.items()))
    if code < 0:
        how = signal.Signals(-code).name
        print(f"Worker {failed} was ended by {how}, and with it the others.", file=sys.stderr)
    return code if code > 0 else 128 - code


def tell(workers: dict[int, subprocess.Popen], signum: int) -> None:
    """Sends a signal to those that run."""
    for worker in workers.values():
        if worker.poll() is None:
            worker.send_signal(signum)


if __name__ == "__main__":
    sys.exit(main())
