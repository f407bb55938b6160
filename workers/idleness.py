"""Which partitions have fallen silent, so that nobody has to wait for them."""

from collections.abc import Collection


class Idleness:
    """A partition is idle once it has been seen at its end, and only there, for `idle_s`.

    What a process did not look at cannot be called silent: after half of `idle_s` without a look
    the count begins anew.
    """

    def __init__(self, idle_s: float) -> None:
        self._idle_s = idle_s
        self._since: dict[int, float] = {}
        self._looked_at = float("-inf")

    def update(self, at_end: Collection[int], now_s: float) -> frozenset[int]:
        """The idle ones among the partitions that stand at their end now."""
        blind = now_s - self._looked_at > self._idle_s / 2
        self._looked_at = now_s
        self._since = {p: now_s if blind else self._since.get(p, now_s) for p in at_end}
        return frozenset(p for p, since in self._since.items() if now_s - since >= self._idle_s)
