"""Who runs in which slot: reading and changing `models.lifecycle`, by workers and by people."""

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence

from models.bundle import Bundle, BundleRejected
from schemas.codecs import decode_bars, encode
from schemas.messages import CHALLENGERS, Challenger, Lifecycle, Policy, Share, Slot
from schemas.tables import BundleRow
from schemas.topics import BARS, LIFECYCLE
from workers.bundles import bundle_uri, open_bundle, read_bundle
from workers.config import Settings
from workers.errors import BundleUnavailable, RegistryUnavailable
from workers.kafka import make_publisher, newest_values, read_topic
from workers.logs import event
from workers.store import Registry, wall_ms

log = logging.getLogger(__name__)

WORKERS = ("monitor", "trainer")
"""Actors that are no persons."""

Evidence = Mapping[str, float | int | str]


def current(settings: Settings) -> dict[Slot, Lifecycle]:
    """The newest record of each slot."""
    return {record.slot: record for record in records(settings)}


def records(settings: Settings) -> Iterator[Lifecycle]:
    """All that the topic holds, in order."""
    for message in read_topic(settings, LIFECYCLE):
        if (value := message.value()) is not None:
            yield Lifecycle.model_validate_json(value)


def fill(
    slot: Slot,
    bundle: Bundle,
    uri: str,
    *,
    effective_ts: int,
    reason: str,
    actor: str,
    parent: str | None = None,
    share: Share | None = None,
    evidence: Evidence | None = None,
) -> Lifecycle:
    """The record that gives a slot to a bundle; `parent` is who comes back on a rollback."""
    return Lifecycle(
        slot=slot,
        bundle=bundle.version,
        uri=uri,
        sha256=bundle.sha256,
        parent=parent,
        share=share,
        effective_ts=effective_ts,
        reason=reason,
        evidence=dict(evidence or {}),
        actor=actor,
        issued_at=wall_ms(),
    )


def clear(
    slot: Slot, *, effective_ts: int, reason: str, actor: str, evidence: Evidence | None = None
) -> Lifecycle:
    """The record that empties a slot."""
    return Lifecycle(
        slot=slot,
        bundle=None,
        uri=None,
        sha256=None,
        effective_ts=effective_ts,
        reason=reason,
        evidence=dict(evidence or {}),
        actor=actor,
        issued_at=wall_ms(),
    )


def slots_of(newest: Iterable[Lifecycle], version: str) -> list[Slot]:
    """The slots that a bundle holds beside that of the champion: once it is that, they are empty."""
    return [r.slot for r in newest if r.bundle == version and r.slot != "champion"]


def audit(registry: Registry, record: Lifecycle, from_bundle: str | None) -> None:
    """Append a record to the audit; the same one again changes nothing."""
    registry.record(
        actor=record.actor,
        slot=record.slot,
        from_bundle=from_bundle,
        to_bundle=record.bundle,
        reason=record.reason,
        evidence=record.evidence,
        key=f"{record.slot}/{record.bundle}/{record.effective_ts}/{record.issued_at}",
        at=record.issued_at,
    )


def bundle_row(bundle: Bundle, uri: str) -> BundleRow:
    origin = bundle.provenance
    return BundleRow(
        version=bundle.version,
        uri=uri,
        sha256=bundle.sha256,
        parent=origin.parent,
        data_from_ts=origin.from_ts,
        data_to_ts=origin.to_ts,
        seed=origin.seed,
        code_version=origin.libraries.get("gpt-trader-stream", "source"),
        metrics=dict(bundle.metrics),
        created_at=wall_ms(),
    )


def register(settings: Settings, bundle: Bundle, uri: str) -> None:
    """Enter a stored bundle into the registry; where that is gone, the trainer does it later."""
    row = bundle_row(bundle, uri)
    registry = Registry(settings.database_url)
    try:
        registry.create()
        registry.add_bundle(row)
    except RegistryUnavailable as error:
        event(log, "registry_gone", bundle=bundle.version, error=error)
    finally:
        registry.close()


def register_all(registry: Registry, settings: Settings) -> None:
    """Enter the bundles of all lifecycle records that the registry does not have yet."""
    for record in records(settings):
        if record.bundle is None or registry.bundle(record.bundle) is not None:
            continue
        try:
            bundle = read_bundle(settings, record.bundle, record.uri)
        except (BundleRejected, OSError) as error:
            event(log, "bundle_unreadable", bundle=record.bundle, reason=error)
            continue
        row = bundle_row(bundle, record.uri or bundle_uri(settings, record.bundle))
        row.created_at = record.issued_at
        registry.add_bundle(row)


def rolled_back(records: Iterable[Lifecycle]) -> frozenset[str]:
    """Bundles whose parent came back in their place, and that no person has made champion since.

    `records` in the order of the topic.
    """
    found: set[str] = set()
    champion: Lifecycle | None = None
    for record in records:
        if record.slot != "champion" or record.bundle is None:
            continue
        if champion is not None and champion.bundle and record.bundle == champion.parent:
            found.add(champion.bundle)
        if record.actor not in WORKERS:
            found.discard(record.bundle)
        champion = record
    return frozenset(found)


def publish(settings: Settings, changes: Sequence[Lifecycle]) -> None:
    """Put the records on the topic, then into the audit; the monitor audits what it reads there too."""
    before = current(settings)
    with make_publisher(settings, "lifecycle") as publisher:
        for record in changes:
            publisher.produce(LIFECYCLE, record.slot.encode(), encode(record))
    for record in changes:
        event(log, "lifecycle", slot=record.slot, bundle=record.bundle, reason=record.reason)
    registry = Registry(settings.database_url)
    try:
        registry.create()
        for record in changes:
            held = before.get(record.slot)
            audit(registry, record, held.bundle if held else None)
    except RegistryUnavailable as error:
        event(log, "registry_gone", left_to="monitor", error=error)
    finally:
        registry.close()


def promote(
    settings: Settings, version: str, reason: str, actor: str, *, at_once: bool = False
) -> Lifecycle:
    """Make a stored bundle the champion; a person's word, without a comparison.

    It takes effect `trainer.lead_bars` after the newest bar, or with `at_once` from the first bar
    that each replica reads next. The former champion becomes its parent, and comes back if the monitor
    finds this one wanting on probation.
    Raises BundleRejected for a bundle that fails a check, its golden outputs included.
    """
    bundle = open_bundle(settings, version).bundle
    register(settings, bundle, bundle_uri(settings, version))
    slots = current(settings)
    champion = slots.get("champion")
    effective_ts = 0 if at_once else soon(settings, bundle)
    record = fill(
        "champion",
        bundle,
        bundle_uri(settings, version),
        effective_ts=effective_ts,
        reason=reason,
        actor=actor,
        parent=champion.bundle if champion else None,
        evidence={"probation_bars": settings.monitor.probation_bars},
    )
    emptied = [
        clear(slot, effective_ts=effective_ts, reason="promoted", actor=actor)
        for slot in slots_of(slots.values(), version)
    ]
    publish(settings, [record, *emptied])
    return record


def rollback(settings: Settings, reason: str, actor: str) -> Lifecycle:
    """Bring the champion's parent back. Raises BundleUnavailable where there is none."""
    champion = current(settings).get("champion")
    if champion is None or champion.parent is None:
        raise BundleUnavailable("the champion has no parent to go back to")
    bundle = open_bundle(settings, champion.parent).bundle
    record = fill(
        "champion",
        bundle,
        bundle_uri(settings, bundle.version),
        effective_ts=soon(settings, bundle),
        reason=reason,
        actor=actor,
        parent=bundle.provenance.parent,
    )
    publish(settings, [record])
    return record


def retire(
    settings: Settings, reason: str, actor: str, version: str | None = None
) -> list[Lifecycle]:
    """Send the challengers away, or the one of that version; the records that do."""
    held = challengers(current(settings))
    records = [
        clear(
            slot,
            effective_ts=soon(settings, read_bundle(settings, record.bundle, record.uri)),
            reason=reason,
            actor=actor,
        )
        for slot, record in held.items()
        if record.bundle is not None and version in (None, record.bundle)
    ]
    publish(settings, records)
    return records


def challengers(slots: Mapping[Slot, Lifecycle]) -> dict[Challenger, Lifecycle]:
    """The slots of challengers that are filled."""
    filled = {slot: slots[slot] for slot in CHALLENGERS if slot in slots}
    return {slot: record for slot, record in filled.items() if record.bundle is not None}


def free_slot(
    slots: Mapping[Slot, Lifecycle], settings: Settings, policy: Policy | None = None
) -> Challenger | None:
    """Where a new challenger goes; None while so many as may are being compared.

    The champion weighed anew has a slot of its own, and no other goes there.
    """
    filled = challengers(slots)
    if policy == "weights":
        return None if "weights" in filled else "weights"
    open_to_all = CHALLENGERS[: settings.monitor.max_challengers]
    return next((slot for slot in open_to_all if slot not in filled), None)


def differences(first: Bundle, second: Bundle) -> list[tuple[str, str, str]]:
    """Names of what is different in two bundles, and what each of them has there.

    Weights are told by one number: the share of their length by which the second's moved.
    """
    here, there = _flat(first), _flat(second)
    found = [
        (name, here.get(name, ""), there.get(name, ""))
        for name in sorted(here | there)
        if here.get(name) != there.get(name)
    ]
    if {n: a.shape for n, a in first.weights.items()} == {
        n: a.shape for n, a in second.weights.items()
    }:
        moved = sum(float(((second.weights[n] - a) ** 2).sum()) for n, a in first.weights.items())
        length = sum(float((a**2).sum()) for a in first.weights.values())
        if moved:
            found.append(("weights, moved by", "", f"{(moved / length) ** 0.5:.2%}"))
    return found


def _flat(bundle: Bundle) -> dict[str, str]:
    parts = {
        "config": bundle.config.model_dump(mode="json"),
        "origin": bundle.provenance.model_dump(mode="json"),
        "metrics": dict(bundle.metrics),
    }

    def walk(name: str, value: object) -> Iterator[tuple[str, str]]:
        if isinstance(value, Mapping):
            for key, inner in value.items():
                yield from walk(f"{name}.{key}", inner)
        else:
            yield name, f"{value:.6g}" if isinstance(value, float) else str(value)

    return dict(pair for name, part in parts.items() for pair in walk(name, part))


def newest_bar_ts(settings: Settings) -> int:
    """Event time of the newest bar on the log; 0 where there is none."""
    bars, _, _ = decode_bars(newest_values(settings, BARS))
    return int(bars.ts.max(initial=0))


def soon(settings: Settings, bundle: Bundle) -> int:
    """The bar time from which a change takes effect: `trainer.lead_bars` after the newest bar."""
    lead_ms = settings.trainer.lead_bars * bundle.config.features.interval_ms
    return newest_bar_ts(settings) + lead_ms
