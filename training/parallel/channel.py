"""What the processes of a run tell each other beside the training: to stop, what was found, and that one is gone."""

import contextlib
import io
import ipaddress
import os
import queue
import secrets
import selectors
import socket
import struct
import sys
import threading
import time
from typing import Any

import numpy as np

CONNECT_SECONDS = 60
# A worker says who it is as soon as it is connected.
GREETING_SECONDS = 5
TOKEN_BYTES = 16
GREETING_BYTES = TOKEN_BYTES + 4  # And the number of the worker.
# Of those who have not said it yet; beyond, the oldest is let go.
MOST_STRANGERS = 100
# Of a process that ends because another one has ended.
LOST = 76


class Channel:
    """The processes of a run; this one is `number` of `of`.

    Each holds a TCP connection to process 0. The engines' own collectives would do for the numbers, but they hang or
    fail in a dozen ways when a process dies; here the connection breaks, and the others end at once with one line.

    Args:
        number: of this process.
        of: how many there are.
        connections: to each other process from process 0, by number; from the others to process 0 alone.
    """

    def __init__(self, number: int = 0, of: int = 1, connections: dict[int, socket.socket] | None = None):
        self.number = number
        self.of = of
        self._connections = connections or {}
        self._received: dict[int, queue.Queue] = {peer: queue.Queue() for peer in self._connections}
        self._closing = False
        for peer in self._connections:
            threading.Thread(target=self._receive, args=(peer,), daemon=True).start()

    @property
    def shard(self) -> tuple[int, int]:
        """What `Batches` takes."""
        return self.number, self.of

    @property
    def main(self) -> bool:
        """Whether this process writes and prints."""
        return self.number == 0

    def gather(self, content: bytes) -> list[bytes]:
        """The contents of all processes in order, in process 0; nothing in the others."""
        if not self.main:
            self._send(0, content)
            return []
        return [content, *(self._received[peer].get() for peer in range(1, self.of))]

    def gather_arrays(self, *arrays: np.ndarray) -> list[list[np.ndarray]]:
        """The arrays of all processes in order, in process 0; nothing in the others."""
        content = io.BytesIO()
        np.savez(content, *arrays, allow_pickle=False)
        found = [np.load(io.BytesIO(part), allow_pickle=False) for part in self.gather(content.getvalue())]
        return [[file[name] for name in file] for file in found]

    def broadcast(self, content: bytes = b"") -> bytes:
        """What process 0 gives, in all processes."""
        if not self.main:
            return self._received[0].get()
        for peer in self._connections:
            self._send(peer, content)
        return content

    def sum(self, numbers: Any) -> np.ndarray:
        """The sum of all processes' arrays, in all processes, always in the same order."""
        own = np.asarray(numbers, "float64")
        parts = self.gather(own.tobytes())
        total = sum(np.frombuffer(part).reshape(own.shape) for part in parts) if parts else own
        return np.frombuffer(self.broadcast(np.asarray(total).tobytes())).reshape(own.shape)

    def agree(self, flags: int) -> int:
        """The flags that any process has set, in all processes."""
        if self.of == 1:
            return flags
        total = 0
        for part in self.gather(bytes([flags])):
            total |= part[0]
        return self.broadcast(bytes([total]))[0]

    def leave(self) -> None:
        """Says that this process is about to end: from now on the others may."""
        self._closing = True

    def close(self) -> None:
        """Waits for the others, and ends the connections."""
        self.agree(0)
        self.leave()
        for connection in self._connections.values():
            with contextlib.suppress(OSError):
                connection.sendall(struct.pack("<q", -1))

    def _send(self, peer, content):
        try:
            self._connections[peer].sendall(struct.pack("<q", len(content)) + content)
        except OSError:
            self._lost(peer)

    def _receive(self, peer):
        with self._connections[peer] as connection:
            try:
                while True:
                    (size,) = struct.unpack("<q", _read(connection, 8))
                    if size < 0:
                        return  # The other side ends in good order.
                    self._received[peer].put(_read(connection, size))
            except OSError:
                if not self._closing:
                    self._lost(peer)

    def _lost(self, peer):
        # The main thread may wait for the lost one in a collective, where no exception reaches it.
        sys.stdout.flush()
        sys.stderr.write(
            f"Worker {peer} of {self.of} has ended, so worker {self.number} ends: "
            "the same command with --resume goes on from the last checkpoint.\n"
        )
        sys.stderr.flush()
        os._exit(LOST)


def connect(number: int, of: int, host: str, exchange: Any) -> Channel:
    """Connects the processes.

    Args:
        number: of this process.
        of: how many there are.
        host: the name or address of process 0.
        exchange: from an array of int32 to process 0's, by the engine's own means.

    Raises:
        ConnectionError: where process 0 cannot be reached in a minute.
    """
    if of == 1:
        return Channel()
    # Whoever else connects does not know the token.
    token, listener, port = secrets.token_bytes(TOKEN_BYTES), None, 0
    if number == 0:
        listener = _listen(host)
        port = listener.getsockname()[1]
    told = exchange(np.frombuffer(struct.pack("<i", port) + token, "<i4"))
    (port,), token = struct.unpack("<i", told[:1].tobytes()), told[1:].tobytes()
    if listener is None:
        connection = _reach(host, port)
        connection.sendall(token + struct.pack("<i", number))
        return Channel(number, of, {0: _kept_alive(connection)})
    return Channel(number, of, _greet(listener, of, token))


def _listen(host):
    """Where the other workers come from: at the address of `host`, or at all where that cannot be told."""
    with contextlib.suppress(OSError):
        # IPv4 first: the others may have no IPv6, and try each address of the name.
        found = sorted(socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM), key=lambda one: one[0] != socket.AF_INET)
        family, *_, address = found[0]
        # Some machines know their own name as a loopback address, and the others know it as another one.
        if not ipaddress.ip_address(str(address[0]).partition("%")[0]).is_loopback or _is_loopback(host):
            return socket.create_server(address, family=family)
    return socket.create_server(("", 0))


def _is_loopback(host):
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _greet(listener, of, token):
    """The connections of the other workers by their numbers. None waits for another one, or for a stranger."""
    connections: dict[int, socket.socket] = {}
    said: dict[Any, bytes] = {}  # Of those who have not greeted yet, the oldest first.
    until: dict[Any, float] = {}
    end = time.monotonic() + CONNECT_SECONDS
    with listener, selectors.DefaultSelector() as selector:
        listener.setblocking(False)
        selector.register(listener, selectors.EVENT_READ)

        def forget(stranger):
            selector.unregister(stranger)
            del said[stranger], until[stranger]

        try:
            while len(connections) < of - 1:
                now = time.monotonic()
                if now >= end:
                    missing = of - 1 - len(connections)
                    raise ConnectionError(f"{missing} of {of} workers did not connect in a minute.")
                late = {stranger for stranger in said if until[stranger] <= now}
                for stranger in late.union(list(said)[: -of - MOST_STRANGERS]):
                    forget(stranger)
                    stranger.close()
                for key, _ in selector.select(min([end, *until.values()]) - now):
                    one: Any = key.fileobj
                    if one is listener:
                        with contextlib.suppress(OSError):
                            one, _ = listener.accept()
                            one.setblocking(False)
                            selector.register(one, selectors.EVENT_READ)
                            said[one], until[one] = b"", time.monotonic() + GREETING_SECONDS
                        continue
                    part = b""
                    with contextlib.suppress(OSError):
                        part = one.recv(GREETING_BYTES - len(said[one]))
                    said[one] += part
                    if len(said[one]) == GREETING_BYTES or not part:
                        peer = _peer(said[one], token)
                        forget(one)
                        if 0 < peer < of and peer not in connections:
                            connections[peer] = _kept_alive(one)
                        else:
                            one.close()
        finally:
            for stranger in said:
                stranger.close()
    return connections


def _peer(greeting, token):
    """The number of the worker that greets so; 0 of a stranger."""
    known = secrets.compare_digest(greeting[:TOKEN_BYTES], token)
    return int.from_bytes(greeting[TOKEN_BYTES:], "little") if known else 0


def _reach(host, port):
    end = time.monotonic() + CONNECT_SECONDS
    while True:
        try:
            return socket.create_connection((host, port), max(0.1, end - time.monotonic()))
        except OSError as error:
            if time.monotonic() > end:
                raise ConnectionError(f"Worker 0 cannot be reached at {host}, port {port}: {error}.") from error
            time.sleep(0.1)


def _kept_alive(connection):
    """Without a time limit for a read, but with a check that the other machine is there: lost after 30 seconds."""
    connection.settimeout(None)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (("TCP_KEEPIDLE", 15), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 3)):
        if hasattr(socket, option):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
    return connection


def _read(connection, size):
    parts = []
    while size:
        part = connection.recv(min(size, 1 << 20))
        if not part:
            raise ConnectionError("the other side has closed")
        parts.append(part)
        size -= len(part)
    return b"".join(parts)
