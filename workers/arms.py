"""A/B tests: a bundle that agents act on for a share of the symbols, beside the champion.

An arm begins and ends at a bar time, like every change of a slot. The symbols are drawn by a hash of
salt and name, so that every replica, and any replay, knows an arm's symbols without asking.
"""

from collections.abc import Mapping

from models.bundle import Bundle
from schemas.messages import ARM_OF, ARM_SLOTS, BUCKETS, Arm, ArmSlot, Lifecycle, Share, Slot
from workers import lifecycle
from workers.bundles import bundle_uri, open_bundle, read_bundle
from workers.config import Settings
from workers.errors import BundleUnavailable


def start(
    settings: Settings, version: str, share: float, reason: str, actor: str, salt: str = ""
) -> Lifecycle:
    """Let a stored bundle serve a share of the symbols, in the first arm that is free.

    Arms that run at once share their salt, so that no symbol is in two; else it is `salt`, or the
    bundle's version: a test that is begun again has the same symbols again. Raises BundleUnavailable
    where there is no champion, arm or room, and BundleRejected for a bundle that fails its checks.
    """
    slots = lifecycle.current(settings)
    held = slots.get("champion")
    if held is None or held.bundle is None:
        raise BundleUnavailable("there is no champion to test against")
    champion = read_bundle(settings, held.bundle, held.uri)
    bundle = open_bundle(settings, version).bundle
    _check(bundle, champion)
    slot, drawn = draw(slots, share, salt or version)
    lifecycle.register(settings, bundle, bundle_uri(settings, version))
    record = lifecycle.fill(
        slot,
        bundle,
        bundle_uri(settings, version),
        effective_ts=lifecycle.soon(settings, champion),
        reason=reason,
        actor=actor,
        share=drawn,
        evidence={"against": champion.version, "share": share, **drawn.model_dump()},
    )
    lifecycle.publish(settings, [record])
    return record


def stop(settings: Settings, reason: str, actor: str, arm: Arm | None = None) -> list[Lifecycle]:
    """Give the symbols of an arm, or of all, back to the champion; the records that do."""
    slots = lifecycle.current(settings)
    records = [
        lifecycle.clear(
            slot,
            effective_ts=lifecycle.soon(settings, read_bundle(settings, held.bundle, held.uri)),
            reason=reason,
            actor=actor,
        )
        for slot, held in running(slots).items()
        if held.bundle is not None and arm in (None, ARM_OF[slot])
    ]
    lifecycle.publish(settings, records)
    return records


def running(slots: Mapping[Slot, Lifecycle]) -> dict[ArmSlot, Lifecycle]:
    """The arms that are filled."""
    return {slot: slots[slot] for slot in ARM_SLOTS if slot in slots and slots[slot].bundle}


def draw(slots: Mapping[Slot, Lifecycle], share: float, salt: str) -> tuple[ArmSlot, Share]:
    """A free arm, and buckets that no other has; something is always left to the champion."""
    beside = running(slots)
    free = next((slot for slot in ARM_SLOTS if slot not in beside), None)
    if free is None:
        raise BundleUnavailable("every arm is taken: stop one first")
    taken = sorted(
        (held.share.first, held.share.end) for held in beside.values() if held.share is not None
    )
    wanted = round(share * BUCKETS)
    if not 0 < wanted < BUCKETS - sum(end - first for first, end in taken):
        raise BundleUnavailable(f"a share of {share:g} leaves nothing to another, or is none")
    first = 0
    for start, end in taken:
        if start - first >= wanted:
            break
        first = end
    if first + wanted > BUCKETS:
        raise BundleUnavailable(f"there is no room for a share of {share:g} beside the other arm")
    shared = next((held.share.salt for held in beside.values() if held.share is not None), salt)
    return free, Share(salt=shared, first=first, end=first + wanted)


def _check(bundle: Bundle, champion: Bundle) -> None:
    if bundle.version == champion.version:
        raise BundleUnavailable(f"{bundle.version} is the champion itself")
    if bundle.config.targets != champion.config.targets:
        raise BundleUnavailable(
            f"{bundle.version} does not forecast what the champion does: its symbols would go without"
        )
