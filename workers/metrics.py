"""All metrics of all workers, declared here and nowhere else; each says what a rise means.

One `Metrics` belongs to one process (`Service.metrics`) and has a registry of its own, so that a
test can make as many as it likes. Where the values of a label are known they are listed here and
their series start at 0: Prometheus sees no increase in a series that begins with 1. Only `bundle`
grows without end, slowly: take a retired one back with `remove`.
"""

from itertools import product
from typing import get_args

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info, ProcessCollector

from schemas.messages import SLOTS, Bar, Role

PREFIX = "gpt_trader"
ROLES = get_args(Role)
BAR_FAULTS = (*Bar.model_fields, "bar", "malformed")
"""The field that is at fault, the bar as a whole, or bytes that are no bar at all."""

_SECONDS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
_LONG_SECONDS = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1800.0, 3600.0)
_BATCH = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)


class Metrics:
    def __init__(self, registry: CollectorRegistry | None = None) -> None:
        self.registry = registry = registry or CollectorRegistry()
        ProcessCollector(registry=registry)  # memory, CPU seconds, open files

        def counter(name: str, text: str, **labels: tuple[str, ...]) -> Counter:
            metric = Counter(f"{PREFIX}_{name}", text, tuple(labels), registry=registry)
            for values in product(*labels.values()) if labels else ():
                metric.labels(*values)
            return metric

        def gauge(name: str, text: str, *labels: str) -> Gauge:
            return Gauge(f"{PREFIX}_{name}", text, labels, registry=registry)

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(f"{PREFIX}_{name}", text, buckets=buckets, registry=registry)

        # ---- every worker ----

        # Rises with load. Flat while the lag rises: the worker hangs.
        self.messages_consumed = counter(
            "messages_consumed", "Messages taken from a topic", topic=()
        )
        # Rises with load. Flat while messages_consumed rises: everything is warming or refused.
        self.messages_produced = counter(
            "messages_produced",
            "Messages handed to a topic; those of aborted transactions too",
            topic=(),
        )
        # Should be 0. A burst right after a deploy: that deploy. reason is a class of reasons, not a text.
        self.dead_letters = counter(
            "dead_letters", "Messages sent to the dead-letter topic", reason=BAR_FAULTS
        )
        # Rises: the worker is slower than its input. Add replicas (up to one per partition).
        self.lag = gauge(
            "lag_messages", "Messages between the position and the end", "topic", "partition"
        )
        # Should be 0. Messages wait and a partition does not move: /healthz is 503 and the log names it.
        self.stalled_partitions = gauge(
            "stalled_partitions", "Partitions that stand still though messages wait in them"
        )
        # Rises: the loop hangs. /healthz turns 503 at `http.stalled_after_s`.
        self.progress_age = gauge("progress_age_seconds", "Time since the loop last made progress")
        # Moves up: bigger batches, a slower model, or a slower broker; compare with batch_bars.
        self.cycle_seconds = histogram(
            "cycle_seconds", "One cycle with messages, poll to commit", _SECONDS
        )
        # Moves up: the broker is slow to commit; exactly-once latency follows it directly.
        self.commit_seconds = histogram(
            "commit_seconds", "One commit of offsets or transaction", _SECONDS
        )
        # Now and then in a rebalance. Steadily: cycles are longer than `kafka.transaction_timeout_ms`.
        self.transactions_aborted = counter(
            "transactions_aborted", "Transactions given up and replayed from the committed offsets"
        )
        # On scaling and deploys only. Steadily, or ever kind=lost: evicted for missing the poll deadline.
        self.rebalances = counter(
            "rebalances",
            "Callbacks of the consumer group, by kind: assigned, revoked, lost",
            kind=("assigned", "revoked", "lost"),
        )
        # Rises: monitor or trainer write into a database that is gone; they buffer meanwhile.
        self.registry_errors = counter(
            "registry_errors", "Registry database operations that failed", operation=()
        )

        # ---- inference ----

        # ok rises with load. duplicate, late: the feed sends bars twice or late. reset, warming:
        # symbols with long silences, or a state that could not be restored.
        self.bars = counter(
            "bars",
            "Bars by what became of them: ok, warming, reset, duplicate, late",
            status=("ok", "warming", "reset", "duplicate", "late"),
        )
        # filled: the feed loses bars. break: sessions, once a day. jump: splits, or wrong prices.
        self.gaps = counter(
            "gaps",
            "What lay between two bars of a symbol: absent bars filled, session breaks, price jumps",
            kind=("filled", "break", "jump"),
        )
        # Rises with bars{status="ok"}, once for each target; challenger only while one runs in shadow.
        self.predictions = counter("predictions", "Predictions published", role=ROLES)
        # Moves up: the worker falls behind and takes what has piled up; it is then at its most efficient.
        self.batch_bars = histogram("batch_bars", "Bars in one cycle", _BATCH)
        # Rises with new symbols, and memory with it.
        self.symbols = gauge("symbols", "Symbols whose state this process keeps")
        # Rises: symbols have vanished from the feed; they keep their memory.
        self.symbols_silent = gauge(
            "symbols_silent", "Symbols without a bar for so long that the next one starts them anew"
        )
        # Moves up: snapshots are old, corrupt or missing, and bars are replayed instead.
        self.restore_seconds = histogram(
            "restore_seconds", "Assignment of partitions to their first live bar", _LONG_SECONDS
        )
        # Moves up: the snapshot store is slow; the cycles between are delayed by as much.
        self.snapshot_seconds = histogram(
            "snapshot_seconds", "Writing one partition's snapshot", _SECONDS
        )
        # Rises with the symbols of the partition.
        self.snapshot_bytes = gauge("snapshot_bytes", "Size of the newest snapshot", "partition")
        # Should be 0. save: store full or gone. load: a corrupt snapshot was skipped.
        self.snapshot_failures = counter(
            "snapshot_failures",
            "Snapshots not written, or skipped on loading",
            operation=("save", "load"),
        )
        # Always 1; its `bundle` label says what runs in a role. Different on two replicas for
        # longer than a moment: one of them could not load it.
        self.bundle = Info(f"{PREFIX}_bundle", "Bundle in a role", ["role"], registry=registry)
        # Rises with each lifecycle change that took effect here.
        self.swaps = counter("swaps", "Bundles taken into a slot between two bars", role=SLOTS)
        # Should be 0: a bundle failed its checks or could not be fetched; the one before stays.
        self.bundles_rejected = counter(
            "bundles_rejected", "Bundles refused at loading", role=SLOTS
        )

        # ---- monitor ----

        # Rises with predictions, a horizon later. Falls behind: labels do not mature, bars are missing.
        self.outcomes = counter(
            "outcomes", "Predictions joined with their matured label", target=(), role=ROLES
        )
        # Rises: the champion is losing against its frozen reference; at the threshold it is an event.
        self.cusum = gauge("cusum", "CUSUM of standardised excess loss", "bundle", "target")
        # Constant for a bundle: calibrated in training for the declared ARL0.
        self.cusum_threshold = gauge(
            "cusum_threshold", "Where the CUSUM alarms", "bundle", "target"
        )
        # Each one asks the trainer for a retrain. More often than 1/ARL0: the champion is stale.
        self.degradations = counter("degradations", "Degradation events published", target=())
        # Rises: what the network is shown looks less like what it was made of (the log names the
        # features). Nothing is wrong unless losses rise too; where they do, it says where to look.
        self.input_psi = gauge(
            "input_psi", "Population stability index of the feature that moved most", "bundle"
        )
        # Rises: as input_psi, but a mere shift counts in full and rare extremes hardly; 1 at most.
        self.input_ks = gauge(
            "input_ks", "Kolmogorov-Smirnov statistic of the feature that moved most", "bundle"
        )
        # Rises: the network's hidden states are elsewhere than in training, whichever feature did it.
        # At 1 they have moved as far as they were spread.
        self.input_embedding_distance = gauge(
            "input_embedding_distance",
            "Frechet distance of the hidden states, in units of their spread in training",
            "bundle",
        )
        # Rises towards 1: the challenger is about to be promoted.
        self.challenger_evidence = gauge(
            "challenger_evidence",
            "Evidence for the challenger, as a share of what promotes it",
            "bundle",
            "target",
        )
        # promoted, refused: answers to challengers. rolled_back: a promotion was a mistake; look at it.
        self.decisions = counter(
            "lifecycle_decisions",
            "Decisions by kind: promoted, refused, rolled_back",
            decision=("promoted", "refused", "rolled_back"),
        )

        # ---- trainer ----

        # failed should be 0; skipped: cool-down or the daily cap held a retrain back.
        self.retrains = counter(
            "retrains",
            "Degradation events by answer: succeeded, failed, skipped",
            result=("succeeded", "failed", "skipped"),
        )
        # Moves up: more history, a slower machine, or training fights inference for cores.
        self.retrain_seconds = histogram(
            "retrain_seconds", "One retrain, history fetch to bundle written", _LONG_SECONDS
        )
        # Rises to 1 during a retrain, then back to 0. Stands still: the training process hangs.
        self.retrain_progress = gauge(
            "retrain_progress_ratio", "Epochs done of the retrain that runs"
        )
