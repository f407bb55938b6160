"""What finished fits of a long evaluation said, in a folder: a run that was cut goes on from there."""

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from models.panel import Panel

Arrays = dict[str, NDArray[Any]]


class Shelf:
    """Fits by name, by the bars, and by every option given; a change of the code it does not notice."""

    def __init__(self, folder: Path | None, panel: Panel, protocol: Mapping[str, Any]) -> None:
        self._folder = folder
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            self._about = {
                "protocol": protocol,
                "spec": panel.spec.model_dump(mode="json"),
                "target": panel.target.model_dump(mode="json"),
                "bars": _digest(panel.ts, panel.y, panel.x),
            }

    def take(self, name: str, options: Mapping[str, Any], make: Callable[[], Arrays]) -> Arrays:
        """From the folder, or made and put there."""
        if self._folder is None:
            return make()
        told = json.dumps([self._about, name, options], sort_keys=True, default=str)
        path = self._folder / f"{name}-{hashlib.sha256(told.encode()).hexdigest()[:16]}.npz"
        if path.exists():
            with np.load(path, allow_pickle=False) as file:
                return dict(file)
        made = make()
        aside = path.with_suffix(f".{os.getpid()}.part")
        with aside.open("wb") as file:
            np.savez(file, allow_pickle=False, **made)
        aside.replace(path)
        return made


def _digest(*arrays: NDArray[Any]) -> str:
    sha = hashlib.sha256()
    for array in arrays:
        sha.update(np.ascontiguousarray(array).data)
    return sha.hexdigest()
