import queue
import socket
import subprocess
import sys
import threading

import numpy as np
import pytest

from training import workers
from training.workers import Workers, connect


def connected(of, task):
    """Runs `task(worker)` in as many threads as workers, and gives what each returns."""
    told, results = [queue.Queue() for _ in range(of)], [None] * of

    def work(number):
        def exchange(numbers):
            if number == 0:
                for box in told:
                    box.put(numbers)
            return told[number].get(timeout=30)

        results[number] = task(connect(number, of, "127.0.0.1", exchange))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(of)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    return results


def test_one_worker_needs_nobody():
    alone = connect(0, 1, "", None)
    assert alone.main
    assert alone.share == (0, 1)
    assert alone.gather(b"a") == [b"a"]
    assert alone.broadcast(b"b") == b"b"
    assert alone.agree(3) == 3
    np.testing.assert_array_equal(alone.sum([1.0, 2.0]), [1, 2])
    alone.close()


@pytest.mark.parametrize("of", [2, 4])
def test_what_workers_tell_each_other(of):
    def task(worker):
        found = (
            worker.gather(bytes([worker.number]) * 3),
            worker.broadcast(b"from zero" if worker.main else b""),
            worker.sum([worker.number, 0.5]).tolist(),
            worker.agree(1 << worker.number),
            worker.broadcast(b"x" * 3_000_000)[-1:],
        )
        worker.close()
        return found

    results = connected(of, task)
    everything = [bytes([number]) * 3 for number in range(of)]
    for number, (gathered, told, total, flags, long) in enumerate(results):
        assert gathered == ([] if number else everything)
        assert told == b"from zero"
        assert total == [sum(range(of)), of / 2]
        assert flags == 2**of - 1
        assert long == b"x"


def test_a_stranger_is_not_let_in(monkeypatch):
    original, strangers = socket.create_server, []

    def server(address, **options):
        listener = original(address, **options)
        stranger = socket.create_connection(("127.0.0.1", listener.getsockname()[1]))
        stranger.sendall(b"0" * (workers.TOKEN_BYTES + 4))
        strangers.append(stranger)
        return listener

    monkeypatch.setattr(socket, "create_server", server)
    assert connected(2, lambda worker: worker.agree(1 + worker.number)) == [3, 3]
    assert strangers


def test_a_worker_that_nobody_joins_says_so(monkeypatch):
    monkeypatch.setattr(workers, "CONNECT_SECONDS", 0.2)
    with pytest.raises(ConnectionError, match="2 of 3 workers did not connect"):
        connect(0, 3, "127.0.0.1", lambda numbers: numbers)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        told = np.array([port, 0, 0, 0, 0], "<i4")
        with pytest.raises(ConnectionError, match=r"Worker 0 cannot be reached at 127\.0\.0\.1"):
            connect(1, 3, "127.0.0.1", lambda numbers: told)


CHILD = """
import sys, time
import numpy as np
from training.workers import connect
def exchange(numbers):
    print(*numbers, flush=True)
    return numbers
worker = connect(0, 2, "127.0.0.1", exchange)
print("connected", flush=True)
time.sleep(60)  # As in a collective that never ends.
"""


def test_a_worker_ends_as_soon_as_another_has():
    child = subprocess.Popen([sys.executable, "-c", CHILD], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    told = np.array(child.stdout.readline().split(), "<i4")
    (port,), token = told[:1], told[1:].tobytes()
    other = socket.create_connection(("127.0.0.1", int(port)))
    other.sendall(token + (1).to_bytes(4, "little"))
    assert child.stdout.readline() == "connected\n"
    other.close()
    _, errors = child.communicate(timeout=10)
    assert child.returncode == workers.LOST
    assert errors.startswith("Worker 1 of 2 has ended, so worker 0 ends")


def test_a_lone_worker_is_the_first():
    assert Workers().main
