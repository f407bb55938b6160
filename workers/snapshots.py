"""State of one partition with the input offsets it stands for: written whole, verified when read."""

import hashlib
import json
import logging
import os
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import fsspec
import numpy as np
from fsspec.implementations.local import LocalFileSystem
from numpy.typing import NDArray
from safetensors.numpy import save as tensors_to_bytes

from workers.logs import event
from workers.metrics import Metrics

log = logging.getLogger(__name__)

SUFFIX = ".snapshot"
_DIGEST_BYTES = hashlib.sha256().digest_size
_META = "__meta__"
_DTYPES = {"BOOL": "?", "I8": "i1", "U8": "u1", "I16": "<i2", "U16": "<u2", "I32": "<i4"}
_DTYPES |= {"U32": "<u4", "I64": "<i8", "U64": "<u8", "F16": "<f2", "F32": "<f4", "F64": "<f8"}
READ_AHEAD = 1
"""Snapshots held in memory beside the one that is being used."""


class Snapshot(NamedTuple):
    offsets: dict[str, int]
    """Next offset to read of each input topic."""
    arrays: dict[str, NDArray[Any]]
    """Not to be written to, once they have been loaded."""
    meta: dict[str, Any]


class Snapshots:
    """Snapshots of one worker group under an fsspec URL or directory: `<url>/<worker>/<partition>/`.

    A file is the sha256 of its content, then safetensors. Names sort by the offsets in them.
    """

    def __init__(
        self, url: str, worker: str, *, keep: int = 3, metrics: Metrics | None = None
    ) -> None:
        self._files, root = fsspec.url_to_fs(url)
        self._root = f"{root}/{worker}"
        self._keep = keep
        self._metrics = metrics

    def save(
        self,
        partition: int,
        offsets: Mapping[str, int],
        arrays: Mapping[str, NDArray[Any]],
        meta: Mapping[str, Any],
    ) -> bool:
        """Write one snapshot and drop the oldest; False, logged and counted, where it cannot be."""
        header = json.dumps({"offsets": dict(offsets), "meta": dict(meta)}).encode()
        content = tensors_to_bytes(
            {name: np.ascontiguousarray(array) for name, array in arrays.items()}
            | {_META: np.frombuffer(header, np.uint8)}
        )
        try:
            self._write(self._name(partition, offsets), content)
            for old in self._names(partition)[: -self._keep] + self._left_over(partition):
                self._files.rm_file(old)
        except Exception as error:  # fsspec passes on whatever the store's own client raises
            self._failed("save", partition, error)
            return False
        if self._metrics is not None:
            self._metrics.snapshot_bytes.labels(str(partition)).set(len(content))
        return True

    def load(self, partition: int, at_or_below: Mapping[str, int]) -> Snapshot | None:
        """The newest sound snapshot none of whose offsets is above `at_or_below`; else None."""
        try:
            names = self._names(partition)
        except Exception as error:  # as in `save`
            self._failed("load", partition, error)
            return None
        for name in reversed(names):
            try:
                snapshot = _parsed(self._read(name))
            except Exception as error:  # it may be damaged in any way, too
                self._failed("load", partition, error)
                continue
            if all(offset <= at_or_below[topic] for topic, offset in snapshot.offsets.items()):
                return snapshot
        return None

    def load_each(
        self, at_or_below: Mapping[int, Mapping[str, int]]
    ) -> Iterator[tuple[int, Snapshot | None]]:
        """As `load`, of every partition: while one is used, the next is read in another thread."""
        ahead: deque[tuple[int, Future[Snapshot | None]]] = deque()
        with ThreadPoolExecutor(1, thread_name_prefix="snapshot-reader") as reader:
            for partition, offsets in at_or_below.items():
                ahead.append((partition, reader.submit(self.load, partition, offsets)))
                if len(ahead) > READ_AHEAD:
                    first, reading = ahead.popleft()
                    yield first, reading.result()
                    del reading
            for last, reading in ahead:
                yield last, reading.result()

    def _name(self, partition: int, offsets: Mapping[str, int]) -> str:
        place = "-".join(f"{offsets[topic]:020d}" for topic in sorted(offsets))
        return f"{self._root}/{partition}/{place}{SUFFIX}"

    def _names(self, partition: int) -> list[str]:
        return sorted(name for name in self._listed(partition) if name.endswith(SUFFIX))

    def _left_over(self, partition: int) -> list[str]:
        """What processes that were killed while writing left behind."""
        return [name for name in self._listed(partition) if f"{SUFFIX}." in name]

    def _listed(self, partition: int) -> list[str]:
        try:
            return list(self._files.ls(f"{self._root}/{partition}", detail=False, refresh=True))
        except FileNotFoundError:
            return []

    def _read(self, name: str) -> memoryview:
        if isinstance(self._files, LocalFileSystem):
            return np.fromfile(name, np.uint8).data  # in large pages: read in half the time
        return memoryview(self._files.cat_file(name))

    def _write(self, name: str, content: bytes) -> None:
        """A reader, or a crash at any moment, meets the whole snapshot or none."""
        digest = hashlib.sha256(content).digest()
        directory = name.rpartition("/")[0]
        self._files.makedirs(directory, exist_ok=True)
        if not isinstance(self._files, LocalFileSystem):
            self._files.pipe_file(
                name, digest + content
            )  # object stores show an object when it is complete
            return
        aside = Path(f"{name}.{os.getpid()}")
        try:
            with aside.open("wb") as file:
                file.write(digest)
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            aside.replace(name)
        except OSError:
            aside.unlink(missing_ok=True)
            raise

    def _failed(self, operation: str, partition: int, error: Exception) -> None:
        if self._metrics is not None:
            self._metrics.snapshot_failures.labels(operation).inc()
        event(log, f"snapshot_{operation}_failed", partition=partition, reason=error)


def _parsed(raw: memoryview) -> Snapshot:
    content = raw[_DIGEST_BYTES:]
    if hashlib.sha256(content).digest() != raw[:_DIGEST_BYTES]:
        raise ValueError("the content is not what was written")
    arrays = _tensors(content)
    header = json.loads(arrays.pop(_META).tobytes())
    return Snapshot(header["offsets"], arrays, header["meta"])


def _tensors(content: memoryview) -> dict[str, NDArray[Any]]:
    """Arrays in safetensors' layout, as views of it: copying them would take as long as reading."""
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(bytes(content[8:start]))
    return {
        name: np.ndarray(
            tensor["shape"],
            _DTYPES[tensor["dtype"]],
            content,
            start + tensor["data_offsets"][0],
        )
        for name, tensor in header.items()
    }
