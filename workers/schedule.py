"""Which bundle has which slot at which bar time, for one partition."""

import json
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from schemas.messages import Share, Slot, bucket_of

KEPT = 8
"""Changes remembered per slot: enough for any replay between two snapshots, few enough for the
4,096 bytes that a broker allows as metadata of a committed offset."""


_EVER = np.iinfo(np.int64).max


class Change(NamedTuple):
    bundle: str | None
    from_ts: int
    salt: str = ""
    first: int = 0
    end: int = 0
    """The last three of an arm: its `schemas.messages.Share`."""

    def serves(self, symbol: str) -> bool:
        return self.first <= bucket_of(self.salt, symbol) < self.end


@dataclass
class Schedule:
    """The changes of every slot, oldest first; a bar's roles are decided by `ts` and symbol alone.

    It is committed with the offsets, in the same transaction as the predictions that it shaped,
    so that a replay gives every bar to the same bundles again.
    """

    changes: dict[Slot, list[Change]] = field(default_factory=lambda: defaultdict(list))
    newest_ts: int = -1
    """The newest bar time that was processed: the past, which no later change may touch."""

    def give(
        self, slot: Slot, bundle: str | None, from_ts: int, share: Share | None = None
    ) -> None:
        """Give `slot` to `bundle` from `from_ts` on; a change not later than another replaces it."""
        kept = [change for change in self.changes[slot] if change.from_ts < from_ts]
        self.changes[slot] = [*kept, Change(bundle, from_ts, *_parts(share))][-KEPT:]

    def change(
        self, slot: Slot, bundle: str | None, effective_ts: int, share: Share | None = None
    ) -> int:
        """As `give`, but from the next bar time on if `effective_ts` has passed; from when it is."""
        from_ts = max(effective_ts, self.newest_ts + 1)
        self.give(slot, bundle, from_ts, share)
        return from_ts

    def says(self, slot: Slot, bundle: str | None, share: Share | None = None) -> bool:
        """Whether the newest change of the slot is to this bundle and share."""
        newest = next(reversed(self.changes.get(slot, [])), Change(None, 0))
        return (newest.bundle, *newest[2:]) == (bundle, *_parts(share))

    def bundles(self, since_ts: int) -> set[str]:
        """Every bundle that a bar at `since_ts` or later may need."""
        needed = set()
        for changes in self.changes.values():
            ends = [following.from_ts for following in changes[1:]] + [since_ts + 1]
            for change, until_ts in zip(changes, ends, strict=False):
                if change.bundle is not None and until_ts > since_ts:
                    needed.add(change.bundle)
        return needed

    def holders(
        self, slot: Slot, ts: NDArray[np.int64]
    ) -> Iterator[tuple[str, Change, NDArray[np.bool_]]]:
        """The bundles that hold a slot at some of the times, with where: (bundle, change, bool[n])."""
        changes = self.changes.get(slot)
        if not changes:
            return
        until_ts, left = _EVER, len(ts)
        for change in reversed(changes):
            here = (ts >= change.from_ts) & (ts < until_ts)
            until_ts = change.from_ts
            if not (count := int(np.count_nonzero(here))):
                continue
            if change.bundle is not None:
                yield change.bundle, change, here
            left -= count
            if not left:
                break

    def to_json(self) -> str:
        content: dict[str, object] = {
            str(slot): [change if change.end else change[:2] for change in changes]
            for slot, changes in self.changes.items()
            if changes
        }
        content["newest_ts"] = self.newest_ts
        return json.dumps(content, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> Self:
        content = json.loads(text)
        schedule = cls(newest_ts=int(content.pop("newest_ts")))
        for slot, changes in content.items():
            schedule.changes[slot] = [Change(*change) for change in changes]
        return schedule


def _parts(share: Share | None) -> tuple[str, int, int]:
    return (share.salt, share.first, share.end) if share is not None else ("", 0, 0)
