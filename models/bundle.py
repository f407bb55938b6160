"""A bundle: network, scaler, feature spec, targets and evidence, immutable and content-addressed.

On disk it is a directory named by its version, of JSON and safetensors only:

    config.json         what is served: features, targets, network, calibration of the monitor
    model.safetensors   weights
    scaler.json         fitted on training rows only
    golden.safetensors  inputs and what the bundle says to them
    inputs.safetensors  what its inputs looked like; absent in older ones, which report no input drift
    metrics.json        how it scored when it was trained
    model_card.md       the same for people
    MANIFEST.json       sha256 of each of the above, and where it comes from

The version is the hash of the manifest: the same content has the same version wherever it is made.
"""

import hashlib
import json
import os
import platform
import shutil
import stat
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, model_validator
from safetensors import SafetensorError
from safetensors.numpy import load as tensors_from_bytes
from safetensors.numpy import save as tensors_to_bytes

from models.baselines import Reference
from models.blending import EnsembleConfig
from models.drift import Calibration
from models.features import FEATURE_NAMES, FeatureSpec
from models.input_drift import InputReference
from models.network_config import NetworkConfig
from models.scaling import Scaler
from models.tabular import TabularConfig
from models.targets import Target

CONFIG, WEIGHTS, SCALER, GOLDEN = (
    "config.json",
    "model.safetensors",
    "scaler.json",
    "golden.safetensors",
)
INPUTS = "inputs.safetensors"
METRICS, CARD, MANIFEST = "metrics.json", "model_card.md", "MANIFEST.json"
MIB = 1 << 20
MAX_BYTES = {
    MANIFEST: MIB // 16,
    CONFIG: MIB,
    WEIGHTS: 512 * MIB,
    SCALER: 4 * MIB,
    GOLDEN: 64 * MIB,
    INPUTS: 128 * MIB,
    METRICS: 4 * MIB,
    CARD: MIB,
}
"""A larger file is refused unread."""

Finite = Annotated[float, Field(allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class BundleRejected(Exception):
    """Damaged, foreign or wrong; the message says what. The champion stays."""


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class LabelScaling(_Frozen):
    """The network learns (label - mean) / sd; 0 and 1 for a direction."""

    mean: Finite = 0.0
    sd: Positive = 1.0


ModelConfig = Annotated[
    NetworkConfig | TabularConfig | EnsembleConfig, Field(discriminator="family")
]
"""What runs, by its family. Each has family, n_features, n_outputs and window; takes(weights) says
whether they are its own, and summary() what it is. `models.runtimes` knows who can run which."""


class BundleConfig(_Frozen):
    features: FeatureSpec
    feature_names: tuple[str, ...] = FEATURE_NAMES
    targets: Annotated[tuple[Target, ...], Field(min_length=1)]
    network: ModelConfig
    label_scaling: tuple[LabelScaling, ...]
    variance_bias: tuple[Finite, ...]
    """Per target: half the residual variance of a log variance forecast, so that exp() is a mean."""
    warm_up_bars: Annotated[int, Field(ge=0)]
    """Steps of the network after a reset before its outputs count (burn-in and window)."""
    references: tuple[Reference, ...]
    calibrations: tuple[Calibration | None, ...]

    @model_validator(mode="after")
    def _parts_agree(self) -> Self:
        if self.network.n_features != len(self.feature_names):
            raise ValueError("network.n_features is not the number of features")
        if self.network.n_outputs != sum(target.n_outputs for target in self.targets):
            raise ValueError("network.n_outputs is not what the targets need")
        crosses = isinstance(self.network, NetworkConfig) and self.network.attention == "cross"
        if crosses and self.features.rolling_half_life is not None:
            raise ValueError("attention='cross' reads the clock, which rolling features have lost")
        for name in ("label_scaling", "variance_bias", "references", "calibrations"):
            if len(getattr(self, name)) != len(self.targets):
                raise ValueError(f"{name} has not one entry for each target")
        return self

    @property
    def window(self) -> int:
        return self.network.window

    @property
    def remembered_bars(self) -> int:
        """Bars of features that an engine keeps of a symbol, to build the state of this bundle anew."""
        return max(self.warm_up_bars, self.window)

    @property
    def sequence(self) -> NetworkConfig:
        """The network, where the family is `sequence`; TypeError where it is not."""
        if not isinstance(self.network, NetworkConfig):
            raise TypeError(f"a bundle of the family {self.network.family!r} has no network")
        return self.network


def library_versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in ("gpt-trader-stream", "numpy", "safetensors", "torch"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


class Provenance(_Frozen):
    """Where a bundle comes from; part of its version."""

    parent: str | None = None
    seed: int
    from_ts: int
    to_ts: int
    """Open times of the first and last bar it was trained on."""
    bars: int
    symbols: int
    libraries: dict[str, str] = Field(default_factory=library_versions)


class _Manifest(_Frozen):
    format: Literal[2] = 2
    """2: alarms are calibrated on running losses."""
    files: dict[str, str]
    provenance: Provenance


Arrays = Mapping[str, NDArray[Any]]


@dataclass(frozen=True, eq=False)
class Bundle:
    config: BundleConfig
    weights: Arrays
    scaler: Scaler
    provenance: Provenance
    metrics: Mapping[str, Any] = field(default_factory=dict)
    golden: Arrays = field(default_factory=dict)
    """`x` f32[n, L, F] unscaled, `values` f64[n, L, K] and `weights` f32[n, L, T] from zero state."""
    inputs: InputReference | None = None

    @cached_property
    def version(self) -> str:
        return _version(self._manifest)

    @property
    def sha256(self) -> str:
        """Of the manifest; the version is its beginning."""
        return _sha256(self._manifest)

    def values(
        self, outputs: NDArray[np.floating[Any]]
    ) -> tuple[NDArray[np.float64], dict[int, NDArray[np.float64]]]:
        """Network outputs [n, O] -> values f64[n, K], probabilities f64[n, classes] by target index.

        A value is the log of the expected variance per bar, a log return, or the probability of a
        rise; only a direction has probabilities, the rise last.
        """
        exact: NDArray[np.float64] = np.asarray(outputs, np.float64)
        values = np.empty((len(exact), len(self.config.targets)))
        probabilities = {}
        column = 0
        for k, target in enumerate(self.config.targets):
            raw = exact[:, column : column + target.n_outputs]
            column += target.n_outputs
            if target.kind == "direction":
                probabilities[k] = _probabilities(raw)
                values[:, k] = probabilities[k][:, -1]
            else:
                scaling = self.config.label_scaling[k]
                values[:, k] = scaling.mean + scaling.sd * raw[:, 0] + self.config.variance_bias[k]
        return values, probabilities

    def with_golden(self, golden: Arrays) -> "Bundle":
        return replace(self, golden=golden)

    @cached_property
    def _files(self) -> dict[str, bytes]:
        return {
            CONFIG: _json(self.config.model_dump(mode="json")),
            WEIGHTS: _tensors(self.weights),
            SCALER: self.scaler.to_json().encode(),
            GOLDEN: _tensors(self.golden),
            METRICS: _json(self.metrics),
            CARD: _model_card(self).encode(),
        } | ({} if self.inputs is None else {INPUTS: _tensors(self.inputs.arrays())})

    @cached_property
    def _manifest(self) -> bytes:
        files = {name: _sha256(content) for name, content in sorted(self._files.items())}
        manifest = _Manifest(files=files, provenance=self.provenance)
        return _json(manifest.model_dump(mode="json"))


def save(bundle: Bundle, root: Path) -> Path:
    """Write `root/<version>` so that it is there wholly or not at all; a sound one is left as it is."""
    final = root / bundle.version
    if final.exists():
        try:
            load(final)
            return final
        except BundleRejected:
            shutil.rmtree(final)
    root.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=f".{bundle.version}.", dir=root))
    try:
        for name, content in {**bundle._files, MANIFEST: bundle._manifest}.items():
            with (aside / name).open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        aside.chmod(0o755)
        _sync(aside)
        aside.rename(final)
        _sync(root)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    return final


def load(path: Path, expected: str | None = None) -> Bundle:
    """Read a bundle whose every byte is vouched for by its version.

    `expected` is the version it must have, by default the directory's name. Whether the network
    takes the weights and says what the golden file says is for `models.runtimes.open_runtime`.
    Raises BundleRejected; OSError where the disk fails.
    """
    expected = path.name if expected is None else expected
    raw = _read(path, MANIFEST)
    if _version(raw) != expected:
        raise BundleRejected(f"{path}: {MANIFEST} is not that of version {expected}")
    with _parsing(path, MANIFEST):
        manifest = _Manifest.model_validate_json(raw)
    contents = {}
    absent = {INPUTS} - set(manifest.files)
    for name in sorted(set(MAX_BYTES) - {MANIFEST} - absent):
        contents[name] = _read(path, name)
        if manifest.files.get(name) != _sha256(contents[name]):
            raise BundleRejected(f"{path}: {name} is not the file that the manifest names")
    if set(manifest.files) != set(contents):
        raise BundleRejected(f"{path}: the manifest names files that a bundle has not")

    with _parsing(path, CONFIG):
        config = BundleConfig.model_validate_json(contents[CONFIG])
    if config.feature_names != FEATURE_NAMES:
        raise BundleRejected(f"{path}: made for other features than this version computes")
    with _parsing(path, WEIGHTS):
        weights = _floats(contents[WEIGHTS])
    if not config.network.takes(weights):
        raise BundleRejected(f"{path}: {WEIGHTS} does not fit the network")
    with _parsing(path, GOLDEN):
        golden = _floats(contents[GOLDEN])
    with _parsing(path, SCALER):
        scaler = Scaler.from_json(contents[SCALER].decode())
    if len(scaler.centre) != len(FEATURE_NAMES):
        raise BundleRejected(f"{path}: {SCALER} is for another number of features")
    with _parsing(path, METRICS):
        metrics = dict(json.loads(contents[METRICS]))
    inputs = None
    if not absent:
        with _parsing(path, INPUTS):
            inputs = InputReference.from_arrays(_floats(contents[INPUTS]), len(FEATURE_NAMES))
    bundle = Bundle(config, weights, scaler, manifest.provenance, metrics, golden, inputs)
    # The bytes that were read stay the bundle's, so that its version outlives a field added later.
    vars(bundle).update(_files=contents, _manifest=raw)
    return bundle


def _read(path: Path, name: str) -> bytes:
    """A regular file of the directory itself, never one that a link points to."""
    try:
        handle = os.open(path / name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        raise BundleRejected(f"{path}: cannot read {name}: {error.strerror}") from error
    try:
        status = os.fstat(handle)
        if not stat.S_ISREG(status.st_mode):
            raise BundleRejected(f"{path}: {name} is not a file")
        if status.st_size > MAX_BYTES[name]:
            raise BundleRejected(f"{path}: {name} has {status.st_size} bytes, too many")
        with os.fdopen(handle, "rb", closefd=False) as file:
            return file.read(MAX_BYTES[name])
    finally:
        os.close(handle)


@contextmanager
def _parsing(path: Path, name: str) -> Iterator[None]:
    try:
        yield
    except (ValueError, KeyError, TypeError, SafetensorError) as error:
        raise BundleRejected(f"{path}: {name} is malformed: {error}") from error


def _probabilities(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    if logits.shape[1] == 1:
        logits = np.concatenate([np.zeros_like(logits), logits], axis=1)
    shifted = np.exp(logits - logits.max(axis=1, keepdims=True))
    return np.asarray(shifted / shifted.sum(axis=1, keepdims=True))


def _json(content: Any) -> bytes:
    return json.dumps(content, sort_keys=True, indent=1, allow_nan=False).encode() + b"\n"


def _floats(content: bytes) -> dict[str, NDArray[Any]]:
    arrays = tensors_from_bytes(content)
    for name, array in arrays.items():
        if array.dtype == np.uint8:  # the trees of an ensemble, whose runtime reads them
            continue
        if array.dtype not in (np.float32, np.float64) or not np.isfinite(array).all():
            raise ValueError(f"{name} is not made of finite floats")
    return arrays


def _tensors(arrays: Arrays) -> bytes:
    return tensors_to_bytes({name: np.ascontiguousarray(a) for name, a in arrays.items()})


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _version(manifest: bytes) -> str:
    return _sha256(manifest)[:16]


def _sync(directory: Path) -> None:
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _model_card(bundle: Bundle) -> str:
    config, origin = bundle.config, bundle.provenance
    lines = [
        "# Model card",
        "",
        f"Forecasts {', '.join(t.name for t in config.targets)} from bars of "
        f"{config.features.interval_ms / 60_000:g} minutes, by {len(config.feature_names)} features.",
        "",
        f"- Model: {config.network.summary()}; "
        f"{sum(a.size for a in bundle.weights.values()):,} weights.",
        f"- Trained on {origin.bars:,} bars of {origin.symbols} symbol(s), open times "
        f"{_day(origin.from_ts)} to {_day(origin.to_ts)}, seed {origin.seed}.",
        f"- Parent: {origin.parent or 'none'}.",
        f"- Silent for the first {config.warm_up_bars} bars of a symbol that its features are ready.",
        "- A volatility value is the log of the expected variance per bar; a direction value is the "
        "probability of a rise.",
        "",
        "## Metrics",
        "",
        *(f"- {name}: {_figure(value)}" for name, value in sorted(bundle.metrics.items())),
        "",
        "## Limits",
        "",
        "Past bars of the instruments above are all it has seen; a break in regime shows in the "
        "monitor, not here. It is a forecast, not advice.",
    ]
    return "\n".join(lines) + "\n"


def _day(ts: int) -> str:
    return str(np.datetime64(ts, "ms").astype("datetime64[D]"))


def _figure(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else json.dumps(value, sort_keys=True)
