"""The messages on the topics: frozen, validated on arrival, pinned as JSON Schema by a test.

A consumer ignores fields it does not know; a field is never given another meaning.
Event time is `ts` (epoch milliseconds UTC); wall time has other names (`issued_at`).
"""

import hashlib
import math
from collections.abc import Mapping
from functools import lru_cache
from typing import Annotated, Literal, Self, get_args

from pydantic import BaseModel, ConfigDict, Field, model_validator

EARLIEST_TS = 0
"""1970-01-01: no bar is older."""
LATEST_TS = 4_102_444_800_000
"""2100-01-01: a stamp beyond it is a unit mistake (micro- or nanoseconds), not a bar."""

Role = Literal["champion", "challenger", "control"]
"""champion: to be acted on, one for each bar, whichever arm it comes from. challenger: in shadow.
control: the champion's bundle on a symbol of another arm, for comparison."""
Arm = Literal["a", "b", "c"]
"""Of an A/B test: `a` is the bundle in the champion's slot."""
Challenger = Literal["challenger", "challenger-2", "challenger-3", "challenger-4", "weights"]
"""Slots of the role challenger; in `weights` it is the champion with its members weighed anew."""
ArmSlot = Literal["arm-b", "arm-c"]
Slot = Literal["champion", Challenger, ArmSlot]
CHALLENGERS: tuple[Challenger, ...] = get_args(Challenger)
ARM_SLOTS: tuple[ArmSlot, ...] = get_args(ArmSlot)
ARM_OF: Mapping[Slot, Arm] = {"arm-b": "b", "arm-c": "c"}
ARM_SLOT_OF: Mapping[Arm, ArmSlot] = {"b": "arm-b", "c": "arm-c"}
SLOTS: tuple[Slot, ...] = ("champion", *CHALLENGERS, *ARM_SLOTS)
BUCKETS = 10_000
"""Into so many equal parts an A/B test divides all symbols."""
Trigger = Literal["alarm", "schedule", "command"]
Policy = Literal["bias", "weights", "fine_tune", "full"]
RunStatus = Literal["requested", "running", "succeeded", "failed", "skipped"]

Symbol = Annotated[str, Field(min_length=1, max_length=64)]
EventTime = Annotated[int, Field(strict=True, ge=EARLIEST_TS, le=LATEST_TS)]
Finite = Annotated[float, Field(strict=True, allow_inf_nan=False)]
Price = Annotated[float, Field(strict=True, gt=0, allow_inf_nan=False)]
Volume = Annotated[float, Field(strict=True, ge=0, allow_inf_nan=False)]


class Message(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")

    schema_version: Literal[1] = 1


class Bar(Message):
    """One closed OHLCV interval of one symbol; `ts` is the interval's open."""

    symbol: Symbol
    ts: EventTime
    open: Price
    high: Price
    low: Price
    close: Price
    volume: Volume
    extra: dict[str, Finite] | None = None

    @model_validator(mode="after")
    def _prices_within_range(self) -> Self:
        if not self.low <= min(self.open, self.close):
            raise ValueError("low is above open or close")
        if not self.high >= max(self.open, self.close):
            raise ValueError("high is below open or close")
        return self


class Prediction(Message):
    """A forecast made when the bar at `ts` had closed.

    `value` is in the target's own unit: log variance per bar (`volatility`), log return (`return`),
    probability of a rise (`direction`). The label is complete `horizon` bars later; `horizon_ts`
    is when that is at the earliest.
    """

    id: str
    symbol: Symbol
    ts: EventTime
    horizon_ts: EventTime
    horizon: int
    target: str
    value: Finite
    probabilities: list[Finite] | None = None
    bundle: str
    role: Role
    arm: Arm = "a"
    """Whose bundle made it, where the role is champion."""


class AttendedStep(BaseModel):
    model_config = ConfigDict(frozen=True)

    ts: EventTime
    lag: Annotated[int, Field(ge=0)]
    weight: Finite


class AttentionSummary(Message):
    """Where the network looked for one bar: the heaviest steps, and how spread the weights are.

    `entropy` is in nats over the mean of the heads; `effective_length` = exp(entropy) bars.
    """

    prediction_id: str
    symbol: Symbol
    ts: EventTime
    bundle: str
    role: Role
    top: list[AttendedStep]
    entropy: Finite
    effective_length: Finite


class Outcome(Message):
    """A prediction joined with its matured label, and the losses of it and of the frozen reference."""

    prediction_id: str
    symbol: Symbol
    ts: EventTime
    matured_ts: EventTime
    target: str
    bundle: str
    role: Role
    arm: Arm = "a"
    """As in the prediction."""
    value: Finite
    label: Finite
    loss: Finite
    reference_loss: Finite


class InputDrift(BaseModel):
    """How far the newest inputs of a few symbols are from those that a bundle was made of.

    It says where to look; nothing is ever raised by it (`models.input_drift`).
    """

    model_config = ConfigDict(frozen=True)

    ts: EventTime
    """The newest bar that was measured."""
    symbols: list[Symbol]
    rows: int
    """Bars of all symbols."""
    psi: dict[str, Finite]
    """Population stability index of the worst features, the worst first."""
    ks: dict[str, Finite]
    """Statistic of Kolmogorov and Smirnov of the worst features, the worst first."""
    embedding: Finite | None = None
    """Distance of the hidden states in units of their spread; None where there are none."""


class Degradation(Message):
    """The champion is worse than its frozen reference, by a statistic with a declared false-alarm rate.

    One that was measured comes a second time, the same but for its `inputs`: an `id` is one alarm.
    """

    id: str
    bundle: str
    target: str
    detector: str
    statistic: Finite
    threshold: Finite
    arl0: Finite
    since_ts: EventTime
    ts: EventTime
    symbols: list[Symbol]
    """Those that are worse by themselves, the worst first; none: no single one stands out."""
    excess_loss: Finite
    excess_by_symbol: dict[str, Finite] = {}
    bars: int | None = None
    """Bar times since `since_ts` that were judged; None where nobody said."""
    repeats: int = 0
    """How often this alarm was raised before; it has not been over since."""
    action: Literal["retrain", "roll_back"] = "retrain"
    picture: str | None = None
    """Where a PNG of the statistic is (or soon will be)."""
    inputs: InputDrift | None = None
    """Measured when it was raised, not why."""
    issued_at: EventTime


class TrainingRun(Message):
    """One retrain as it stands: the newest message of an id says how far it has come, and why."""

    id: str
    trigger: Trigger
    actor: str
    """Who asked: a worker, or a person."""
    reason: str
    ts: EventTime
    """Bar time of what asked for it."""
    since_ts: EventTime
    """Since when the champion is thought to be worse; `ts` where nobody said so."""
    new_bars: int | None = None
    """Bar times since then that were judged; None where nobody said so."""
    parent: str
    """The champion that was to be retrained."""
    symbols: list[str]
    status: RunStatus = "requested"
    policy: Policy | None = None
    evidence: dict[str, float | int | str] = {}
    """What the choice of the policy rests on."""
    attempts: int = 0
    """Processes that worked on it; more than one: one of them died."""
    epochs_done: int = 0
    epochs: int = 0
    bars: int = 0
    seconds: Finite = 0.0
    bundle: str | None = None
    error: str | None = None
    requested_at: EventTime
    started_at: EventTime | None = None
    finished_at: EventTime | None = None


class Performance(Message):
    """Mean losses of one bundle and role over the outcomes with from_ts <= ts < to_ts."""

    bundle: str
    role: str
    """A `Role`; what an arm but `a` did as champion stands under its slot (`arm-b`)."""
    target: str
    from_ts: EventTime
    to_ts: EventTime
    n: int
    mean_loss: Finite
    mean_reference_loss: Finite


class Share(BaseModel):
    """The symbols of an arm: those whose `bucket_of(salt, symbol)` is in first <= bucket < end."""

    model_config = ConfigDict(frozen=True)

    salt: Annotated[str, Field(min_length=1, max_length=16, pattern=r"^[\w.-]+$")]
    first: Annotated[int, Field(ge=0, lt=BUCKETS)]
    end: Annotated[int, Field(gt=0, le=BUCKETS)]

    @model_validator(mode="after")
    def _holds_a_bucket(self) -> Self:
        if self.end <= self.first:
            raise ValueError("a share without a bucket")
        return self


class Lifecycle(Message):
    """Which bundle fills a slot from bar time `effective_ts` on; `bundle` None empties the slot."""

    slot: Slot
    bundle: str | None = None
    uri: str | None = None
    sha256: str | None = None
    parent: str | None = None
    share: Share | None = None
    """Of an arm: the symbols that its bundle serves."""
    effective_ts: EventTime
    reason: str
    evidence: dict[str, float | int | str] = {}
    actor: str
    issued_at: EventTime

    @model_validator(mode="after")
    def _names_what_it_fills(self) -> Self:
        if self.bundle is not None and (self.uri is None or self.sha256 is None):
            raise ValueError("a filled slot needs uri and sha256")
        if (self.share is not None) != (self.bundle is not None and self.slot in ARM_SLOTS):
            raise ValueError("an arm that is filled needs a share, and no other slot has one")
        if any(isinstance(v, float) and not math.isfinite(v) for v in self.evidence.values()):
            raise ValueError("evidence holds a value that is not finite")
        return self


@lru_cache(maxsize=1 << 20)
def series_key(symbol: str, target: str, bundle: str) -> str:
    """16 hex digits that name one (symbol, target, bundle) series: BLAKE2b-64 of the three."""
    text = "\0".join((symbol, target, bundle)).encode()
    return hashlib.blake2b(text, digest_size=8).hexdigest()


@lru_cache(maxsize=1 << 18)
def bucket_of(salt: str, symbol: str) -> int:
    """Place of a symbol among `BUCKETS`, the same everywhere and for ever: BLAKE2b-64 of both."""
    digest = hashlib.blake2b(f"{salt}\0{symbol}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") % BUCKETS


def prediction_id(symbol: str, ts: int, target: str, bundle: str) -> str:
    """Deterministic id of a prediction: its series key and its bar time in 11 hex digits.

    The same bar through the same bundle has the same id in whatever delivery mode, so a
    consumer can drop a repeated one.
    """
    return f"{series_key(symbol, target, bundle)}{ts:011x}"
