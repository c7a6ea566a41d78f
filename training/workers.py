"""What the processes of a run tell each other beside the training: to stop, what was found, and that one is gone."""

import contextlib
import os
import queue
import secrets
import socket
import struct
import sys
import threading
import time
from typing import Any

import numpy as np

CONNECT_SECONDS = 60
TOKEN_BYTES = 16
# Of a process that ends because another one has ended.
LOST = 76


class Workers:
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
    def share(self) -> tuple[int, int]:
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
        connection = self._connections[peer]
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


def connect(number: int, of: int, host: str, exchange: Any) -> Workers:
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
        return Workers()
    # Whoever else connects does not know the token.
    token, listener, port = secrets.token_bytes(TOKEN_BYTES), None, 0
    if number == 0:
        listener = socket.create_server(("", 0), backlog=of)
        port = listener.getsockname()[1]
    told = exchange(np.frombuffer(struct.pack("<i", port) + token, "<i4"))
    (port,), token = struct.unpack("<i", told[:1].tobytes()), told[1:].tobytes()
    if listener is None:
        connection = _reach(host, port)
        connection.sendall(token + struct.pack("<i", number))
        return Workers(number, of, {0: _kept_alive(connection)})
    connections: dict[int, socket.socket] = {}
    listener.settimeout(CONNECT_SECONDS)
    try:
        while len(connections) < of - 1:
            connection, _ = listener.accept()
            connection.settimeout(CONNECT_SECONDS)
            try:
                greeting = _read(connection, TOKEN_BYTES + 4)
            except OSError:
                continue
            if secrets.compare_digest(greeting[:TOKEN_BYTES], token):
                connections[struct.unpack("<i", greeting[TOKEN_BYTES:])[0]] = _kept_alive(connection)
    except TimeoutError:
        raise ConnectionError(f"{of - 1 - len(connections)} of {of} workers did not connect in a minute.") from None
    finally:
        listener.close()
    return Workers(number, of, connections)


def _reach(host, port):
    start = time.monotonic()
    while True:
        try:
            return socket.create_connection((host, port), CONNECT_SECONDS)
        except OSError as error:
            if time.monotonic() - start > CONNECT_SECONDS:
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
