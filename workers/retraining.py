"""One retrain, from what asked for it to a challenger: what the trainer's child process does.

    python -m workers.retraining

The first line on standard input is the job; the pipe stays open, and when it closes the trainer is
dead and so is this process. Lines on standard output are `Said`: progress, and at last the result; a
retrain that fails has a result too. Everything here may block and take cores: that is why it has a
process of its own.

Bars, choice and training checkpoint lie in `<trainer.runs>/<run id>` until the end: a second attempt
goes on from there, to the very bundle that the first would have made.
"""

import itertools
import logging
import os
import shutil
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd
from pydantic import BaseModel

from models.blending import EnsembleConfig
from models.bundle import Bundle, BundleRejected
from models.dataset import OHLCV, BarsRejected
from schemas.codecs import decode_bars
from schemas.messages import CHALLENGERS, Lifecycle, Policy, TrainingRun
from schemas.topics import BARS, LIFECYCLE
from workers import lifecycle
from workers.bundles import read_bundle, store_bundle
from workers.config import Settings, TrainerSettings
from workers.errors import StreamError
from workers.kafka import Message, Tail, newest_values, read_topic
from workers.logs import event, set_up

if TYPE_CHECKING:
    from models.targets import Target
    from models.training import Epoch

log = logging.getLogger(__name__)

ACTOR = "trainer"
SAMPLE = 4_000
"""Messages from the end of a partition by which its symbols are counted."""
DECODED_AT_ONCE = 10_000
WAITING_S = 1.0
"""Between two looks for a free slot."""
NICENESS = 5
"""Inference goes first where cores are short."""


class Job(BaseModel):
    settings: Settings
    run: TrainingRun
    tried: list[Policy] = []
    """Remedies that alarms on this champion were answered with before."""


class Progress(BaseModel):
    policy: Policy
    evidence: dict[str, float | int | str]
    epochs_done: int
    epochs: int


class Result(BaseModel):
    """What came of a job; `error` says why there is no bundle."""

    bundle: str | None = None
    bars: int = 0
    seconds: float = 0.0
    error: str | None = None


class Said(BaseModel):
    progress: Progress | None = None
    result: Result | None = None


Tell = Callable[[Progress], None]


class Choice(BaseModel):
    """Made once, whatever becomes of the process."""

    policy: Policy
    evidence: dict[str, float | int | str]
    shift: float = 0.0


def retrain(job: Job, tell: Tell = lambda progress: None) -> Result:
    """Answer the run with a child of its champion, and put that into a challenger's slot."""
    settings, run = job.settings, job.run
    started = time.monotonic()
    folder = Path(settings.trainer.runs) / run.id
    bars = pd.DataFrame()
    try:
        champion = lifecycle.current(settings).get("champion")
        if champion is None or champion.bundle != run.parent:
            raise BundleRejected(f"{run.parent} is no longer the champion")
        parent = read_bundle(settings, run.parent, champion.uri)
        bars = _kept_bars(settings, run, folder)
        choice = _kept_choice(job, parent, bars, folder)
        child = _made(job, choice, parent, bars, folder, tell)
        _publish(settings, child, run, choice)
    except (
        ArithmeticError,
        BarsRejected,
        BundleRejected,
        OSError,
        StreamError,
        ValueError,
    ) as error:
        seconds = time.monotonic() - started
        return Result(bars=len(bars), seconds=seconds, error=f"{type(error).__name__}: {error}")
    shutil.rmtree(folder, ignore_errors=True)
    return Result(bundle=child.version, bars=len(bars), seconds=time.monotonic() - started)


def _kept_bars(settings: Settings, run: TrainingRun, folder: Path) -> pd.DataFrame:
    """The bars that the first attempt fetched."""
    kept = folder / "bars.parquet"
    if not kept.exists():
        symbols = settings.monitor.watch or tuple(run.symbols)
        bars = recent_bars(settings, symbols, settings.trainer.history_bars)
        folder.mkdir(parents=True, exist_ok=True)
        aside = kept.with_suffix(".part")
        bars.to_parquet(aside, index=False)
        aside.replace(kept)
    return pd.read_parquet(kept)


def _kept_choice(job: Job, parent: Bundle, bars: pd.DataFrame, folder: Path) -> Choice:
    kept = folder / "choice.json"
    if not kept.exists():
        aside = kept.with_suffix(".part")
        aside.write_text(_choose(job, parent, bars).model_dump_json())
        aside.replace(kept)
    return Choice.model_validate_json(kept.read_text())


def _choose(job: Job, parent: Bundle, bars: pd.DataFrame) -> Choice:
    from models.remedy import choose, recent_excess

    target = _decisive(parent, job.settings)
    found = recent_excess(parent, bars, target, job.run.since_ts)
    tried = list(job.tried)
    if lifecycle.free_slot(lifecycle.current(job.settings), job.settings, "weights") is None:
        tried.append("weights")  # they are being tried
    policy = asked_for(job.run, parent, job.settings) or choose(found, tried, job.run.new_bars)
    if policy == "bias" and target.kind == "direction":
        policy = "fine_tune"
    evidence: dict[str, float | int | str] = {
        "excess_loss": found.total,
        "level_share": found.level_share,
        "weights_share": found.weights_share,
        "shift": found.shift,
        "rows": found.rows,
        "tried": ", ".join(sorted(job.tried)),
    }
    return Choice(policy=policy, evidence=evidence, shift=found.shift)


def asked_for(run: TrainingRun, parent: Bundle, settings: Settings) -> Policy | None:
    """The remedy that the run or the configuration names; None leaves the choice to the losses."""
    configured = settings.trainer.policy
    named = run.policy or (None if configured == "auto" else configured)
    if named == "weights" and not isinstance(parent.config.network, EnsembleConfig):
        return "fine_tune"
    return named


def _decisive(bundle: Bundle, settings: Settings) -> "Target":
    wanted, targets = settings.monitor.target, bundle.config.targets
    return next((t for t in targets if wanted in (t.kind, t.name)), targets[0])


class _Watcher:
    """Tells of every epoch."""

    def __init__(self, tell: Tell, choice: Choice, epochs: int) -> None:
        self._tell, self._choice, self._epochs = tell, choice, epochs

    def chunk(self, done: int, total: int, loss: float) -> None: ...

    def epoch(self, epoch: "Epoch", network: object, sample: object) -> None:
        self.say(epoch.number)

    def say(self, epochs_done: int) -> None:
        policy, evidence = self._choice.policy, self._choice.evidence
        self._tell(
            Progress(policy=policy, evidence=evidence, epochs_done=epochs_done, epochs=self._epochs)
        )


def _made(
    job: Job, choice: Choice, parent: Bundle, bars: pd.DataFrame, folder: Path, tell: Tell
) -> Bundle:
    import torch

    from models.remedy import apply, lesson
    from models.runtimes import open_runtime

    settings, policy = job.settings, choice.policy
    torch.set_num_threads(settings.trainer.torch_threads)
    epochs = epochs_of(policy, settings.trainer)
    bars, recipe = lesson(policy, parent, bars, job.run.since_ts, epochs)
    epochs = 0 if policy in ("bias", "weights") else recipe.training.epochs
    watcher = _Watcher(tell, choice, epochs)
    watcher.say(0)
    child = apply(
        policy,
        parent,
        bars,
        recipe,
        _decisive(parent, settings),
        choice.shift,
        watchers=[watcher],
        checkpoint=folder / "checkpoint.safetensors",
        device=settings.device,
    )
    open_runtime(child)  # nothing goes out that fails its golden outputs
    return child


def epochs_of(policy: Policy, settings: TrainerSettings) -> int:
    return settings.fine_tune_epochs if policy == "fine_tune" else settings.full_epochs


def recent_bars(settings: Settings, symbols: Collection[str], bars_each: int) -> pd.DataFrame:
    """The last bars of these symbols, at most `bars_each` of each, sorted by symbol and ts.

    From the log, behind those of `trainer.history` if that is set; no symbols means all there are.
    """
    parts = [_bars_on_log(settings, symbols, bars_each)]
    if settings.trainer.history:
        parts.insert(0, _bars_on_disk(settings.trainer.history, symbols))
    frame = pd.concat([part for part in parts if len(part)] or parts, ignore_index=True)
    if frame.empty:
        raise BarsRejected(f"there are no bars of {', '.join(sorted(symbols)) or 'any symbol'}")
    frame = frame.drop_duplicates(["symbol", "ts"], keep="last")
    frame = frame.sort_values(["symbol", "ts"], kind="stable")
    return frame.groupby("symbol").tail(bars_each).reset_index(drop=True)


def _bars_on_disk(path: str, symbols: Collection[str]) -> pd.DataFrame:
    chosen = [("symbol", "in", sorted(symbols))] if symbols else None
    return pd.read_parquet(path, columns=["symbol", "ts", *OHLCV], filters=chosen)


def _bars_on_log(settings: Settings, symbols: Collection[str], bars_each: int) -> pd.DataFrame:
    """Records are stamped with the time they were sent, not with the bar's: so how far back to read
    is reckoned from the number of symbols in each partition.
    """
    keys = {symbol.encode() for symbol in symbols}
    with Tail(settings, BARS) as tail:
        ends = dict(tail.ends)
    starts = {partition: max(end - SAMPLE, 0) for partition, end in ends.items()}
    counts: dict[int, dict[bytes, int]] = defaultdict(lambda: defaultdict(int))
    for message in read_topic(settings, BARS, from_offsets=starts):
        counts[message.partition()][message.key() or b""] += 1
    for partition, end in ends.items():
        here = counts[partition]
        wanted = [n for key, n in here.items() if not keys or key in keys]
        share = min(wanted) / sum(here.values()) if wanted else 0.0
        starts[partition] = max(end - int(1.1 * bars_each / share), 0) if share else end
    messages = (
        m for m in read_topic(settings, BARS, from_offsets=starts) if not keys or m.key() in keys
    )
    parts = [_frame(some) for some in _batches(messages)]
    return pd.concat(parts, ignore_index=True) if parts else _frame([])


def _batches(messages: Iterator[Message]) -> Iterator[Sequence[Message]]:
    while some := list(itertools.islice(messages, DECODED_AT_ONCE)):
        yield some


def _frame(messages: Sequence[Message]) -> pd.DataFrame:
    bars, _, _ = decode_bars([message.value() for message in messages])
    frame = pd.DataFrame(bars.ohlcv, columns=OHLCV)
    frame.insert(0, "symbol", bars.symbols)
    frame.insert(1, "ts", bars.ts)
    return frame


def _publish(settings: Settings, child: Bundle, run: TrainingRun, choice: Choice) -> None:
    """Store it, and fill a free slot from `lead_bars` after the newest bar on; once for a run.

    Waits for a slot where others have taken the last one meanwhile.
    """
    uri = store_bundle(settings, child)
    if any(_comes_from(value, run) for value in newest_values(settings, LIFECYCLE, 10_000)):
        return  # an earlier attempt came as far as here
    interval_ms = child.config.features.interval_ms
    while (
        slot := lifecycle.free_slot(lifecycle.current(settings), settings, choice.policy)
    ) is None:
        time.sleep(WAITING_S)
    record = lifecycle.fill(
        slot,
        child,
        uri,
        effective_ts=lifecycle.newest_bar_ts(settings) + settings.trainer.lead_bars * interval_ms,
        reason=f"{choice.policy} after {run.trigger}: {run.reason}",
        actor=ACTOR,
        parent=run.parent,
        evidence={**choice.evidence, "run": run.id, "asked_by": run.actor},
    )
    lifecycle.publish(settings, [record])


def _comes_from(value: bytes, run: TrainingRun) -> bool:
    record = Lifecycle.model_validate_json(value)
    return record.slot in CHALLENGERS and record.evidence.get("run") == run.id


def _say(said: Said) -> None:
    sys.stdout.write(said.model_dump_json() + "\n")
    sys.stdout.flush()


def _die_with_parent() -> None:
    sys.stdin.read()
    os._exit(1)


def main() -> None:
    set_up("retraining")
    job = Job.model_validate_json(sys.stdin.readline())
    threading.Thread(target=_die_with_parent, daemon=True).start()
    os.nice(NICENESS)
    event(log, "retraining", run=job.run.id, parent=job.run.parent, attempt=job.run.attempts)
    _say(Said(result=retrain(job, lambda progress: _say(Said(progress=progress)))))


if __name__ == "__main__":
    main()
