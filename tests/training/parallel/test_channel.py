import contextlib
import queue
import socket
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from training.parallel import channel
from training.parallel.channel import Channel, connect


def connected(of, task):
    """Runs `task(worker)` in as many threads as workers, and gives what each returns."""
    told, results = [queue.Queue() for _ in range(of)], [None] * of

    def work(number):
        def exchange(numbers):
            if number == 0:
                for box in told:
                    box.put(numbers)
            return told[number].get(timeout=30)

        worker = connect(number, of, "127.0.0.1", exchange)
        results[number] = task(worker)
        worker.close()

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
    assert alone.shard == (0, 1)
    assert alone.gather(b"a") == [b"a"]
    (arrays,) = alone.gather_arrays(np.array(3), np.ones((2, 3), "float32"), np.zeros((0, 2)))
    assert [(array.shape, array.dtype) for array in arrays] == [((), "int64"), ((2, 3), "float32"), ((0, 2), "float64")]
    assert alone.broadcast(b"b") == b"b"
    assert alone.agree(3) == 3
    np.testing.assert_array_equal(alone.sum([1.0, 2.0]), [1, 2])
    alone.close()


@pytest.mark.parametrize("of", [2, 4])
def test_what_workers_tell_each_other(of):
    def task(worker):
        return (
            worker.gather(bytes([worker.number]) * 3),
            worker.broadcast(b"from zero" if worker.main else b""),
            worker.sum([worker.number, 0.5]).tolist(),
            worker.agree(1 << worker.number),
            worker.broadcast(b"x" * 3_000_000)[-1:],
            [[array.tolist() for array in arrays] for arrays in worker.gather_arrays(np.full(worker.number, 0.5))],
        )

    results = connected(of, task)
    everything = [bytes([number]) * 3 for number in range(of)]
    for number, (gathered, told, total, flags, long, arrays) in enumerate(results):
        assert gathered == ([] if number else everything)
        assert told == b"from zero"
        assert total == [sum(range(of)), of / 2]
        assert flags == 2**of - 1
        assert long == b"x"
        assert arrays == ([] if number else [[[0.5] * other] for other in range(of)])


@pytest.fixture
def crowd(monkeypatch):
    """Strangers who are connected before any worker: silent ones, and ones that say the wrong thing, or too little."""
    original, strangers = socket.create_server, []

    def server(address, **options):
        listener = original(address, **options)
        for said in (b"", b"", b"", b"0" * channel.GREETING_BYTES, b"0"):
            strangers.append(socket.create_connection(("127.0.0.1", listener.getsockname()[1]), 10))
            strangers[-1].sendall(said)
        return listener

    monkeypatch.setattr(socket, "create_server", server)
    yield strangers
    for stranger in strangers:
        stranger.close()


def test_strangers_are_not_let_in_and_delay_nobody(crowd):
    start = time.monotonic()
    assert connected(3, lambda worker: worker.agree(1 << worker.number)) == [7, 7, 7]
    assert time.monotonic() - start < channel.GREETING_SECONDS
    assert len(crowd) == 5
    for stranger in crowd:
        assert closed(stranger)


def closed(connection):
    """Whether the other side has ended a connection, or does within its time limit."""
    try:
        return connection.recv(1) == b""
    except ConnectionResetError:
        return True


def waiting_worker(of=2):
    """Worker 0 in a thread, and when it listens its port and token, and a list that will hold it."""
    told, found = queue.Queue(), []

    def exchange(numbers):
        told.put((int(numbers[0]), numbers[1:].tobytes()))
        return numbers

    def work():
        try:
            found.append(connect(0, of, "127.0.0.1", exchange))
        except ConnectionError as error:
            found.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    return thread, *told.get(timeout=10), found


def test_who_does_not_greet_in_time_is_let_go(crowd, monkeypatch):
    monkeypatch.setattr(channel, "GREETING_SECONDS", 0.2)
    thread, port, token, found = waiting_worker()
    for stranger in crowd:
        assert closed(stranger)
    # Nor may the greeting come piece by piece.
    with socket.create_connection(("127.0.0.1", port)) as slow:
        for i in range(6):
            with contextlib.suppress(OSError):
                slow.sendall(token[i : i + 1])
            time.sleep(0.1)
        slow.settimeout(0.05)
        assert closed(slow)
    assert not found
    with socket.create_connection(("127.0.0.1", port)) as worker:
        worker.sendall(token + (1).to_bytes(4, "little"))
        thread.join(10)
        assert found[0].number == 0
        found[0].leave()


def test_a_number_that_no_worker_has_is_let_go():
    thread, port, token, found = waiting_worker(3)
    kept = []
    for number, stays in ((1, True), (1, False), (0, False), (3, False), (-1, False)):
        one = socket.create_connection(("127.0.0.1", port), 10)
        one.sendall(token + number.to_bytes(4, "little", signed=True))
        if stays:
            kept.append(one)
            time.sleep(0.2)
        else:
            assert closed(one)
            one.close()
    with socket.create_connection(("127.0.0.1", port)) as last:
        last.sendall(token + (2).to_bytes(4, "little"))
        thread.join(10)
        found[0].leave()
        kept[0].close()


def test_strangers_without_end_do_not_keep_a_worker_out(monkeypatch):
    monkeypatch.setattr(channel, "MOST_STRANGERS", 3)
    thread, port, token, found = waiting_worker()
    strangers = [socket.create_connection(("127.0.0.1", port), 2) for _ in range(20)]
    assert closed(strangers[0])
    with socket.create_connection(("127.0.0.1", port)) as worker:
        worker.sendall(token + (1).to_bytes(4, "little"))
        thread.join(10)
        found[0].leave()
    for stranger in strangers:
        stranger.close()


def test_strangers_do_not_prolong_the_minute(crowd, monkeypatch):
    monkeypatch.setattr(channel, "CONNECT_SECONDS", 0.3)
    start = time.monotonic()
    thread, _, _, found = waiting_worker()
    thread.join(10)
    assert time.monotonic() - start < 3
    assert str(found[0]) == "1 of 2 workers did not connect in a minute."
    assert all(closed(stranger) for stranger in crowd)


@pytest.mark.parametrize(
    ("host", "resolved", "expected"),
    [
        ("127.0.0.1", "127.0.0.1", "127.0.0.1"),
        ("localhost", "127.0.0.1", "127.0.0.1"),
        # Some machines know their own name so, and the others know it as another address.
        ("node1", "127.0.0.1", "0.0.0.0"),
        ("node2", "192.0.2.1", "0.0.0.0"),
        ("nowhere", None, "0.0.0.0"),
    ],
)
def test_the_first_worker_listens_where_the_launch_is(host, resolved, expected, monkeypatch):
    def resolve(name, port, **options):
        assert name == host
        if resolved is None:
            raise socket.gaierror
        return [(socket.AF_INET, socket.SOCK_STREAM, 0, "", (resolved, port))]

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    with channel._listen(host) as listener:
        assert listener.getsockname()[0] == expected


def test_a_name_of_an_own_address_is_listened_at_alone(monkeypatch):
    bound = []
    infos = [
        (socket.AF_INET6, socket.SOCK_STREAM, 0, "", ("2001:db8::1", 0, 0, 0)),
        (socket.AF_INET, socket.SOCK_STREAM, 0, "", ("192.0.2.1", 0)),
    ]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *arguments, **options: infos)
    monkeypatch.setattr(socket, "create_server", lambda address, **options: bound.append((address, options)))
    channel._listen("node1")
    assert bound == [(("192.0.2.1", 0), {"family": socket.AF_INET})]


def test_a_worker_that_nobody_joins_says_so(monkeypatch):
    monkeypatch.setattr(channel, "CONNECT_SECONDS", 0.2)
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
from training.parallel.channel import connect
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
    assert child.returncode == channel.LOST
    assert errors.startswith("Worker 1 of 2 has ended, so worker 0 ends")


def test_a_lone_worker_is_the_first():
    assert Channel().main
