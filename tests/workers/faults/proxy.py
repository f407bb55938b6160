"""A TCP proxy between a client and a broker that can be slow, cut, or hold everything back."""

import contextlib
import socket
import threading
import time
from types import TracebackType
from typing import Self

CHUNK_BYTES = 65_536


class Proxy:
    """Forwards its `port` of the loopback interface to `target`, and back."""

    def __init__(self) -> None:
        self.target = 0
        self.delay_s = 0.0
        """Added to every chunk, each way."""
        self._flowing = threading.Event()
        self._flowing.set()
        self._refusing = False
        self._sockets: set[socket.socket] = set()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        threading.Thread(target=self._accept, name="proxy", daemon=True).start()

    def cut(self) -> None:
        """Reset all connections and refuse new ones, until `mend`."""
        self._refusing = True
        for side in list(self._sockets):
            self._drop(side)

    def hold(self) -> None:
        """Connections stay open and nothing passes, as when a cable is pulled; until `mend`."""
        self._flowing.clear()

    def mend(self) -> None:
        self._refusing = False
        self._flowing.set()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._listener.close()
        self.cut()
        self._flowing.set()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # closed
            while True:
                client, _ = self._listener.accept()
                if self._refusing:
                    _reset(client)
                    continue
                try:
                    broker = socket.create_connection(("127.0.0.1", self.target), timeout=5)
                except OSError:
                    _reset(client)
                    continue
                broker.settimeout(None)
                self._sockets |= {client, broker}
                for one, other in ((client, broker), (broker, client)):
                    threading.Thread(target=self._pump, args=(one, other), daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while chunk := source.recv(CHUNK_BYTES):
                time.sleep(self.delay_s)
                self._flowing.wait()
                sink.sendall(chunk)
        self._drop(source)
        self._drop(sink)

    def _drop(self, side: socket.socket) -> None:
        self._sockets.discard(side)
        _reset(side)


def _reset(side: socket.socket) -> None:
    with contextlib.suppress(OSError):
        side.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        side.shutdown(socket.SHUT_RDWR)  # wakes whoever reads it
    side.close()
