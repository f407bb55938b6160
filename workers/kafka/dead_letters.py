"""Messages that cannot be used are set aside, within limits."""

from collections import deque

from schemas.topics import DEAD_LETTER
from workers.config import DeadLetterSettings
from workers.errors import TooManyDeadLetters
from workers.kafka.client import MAX_MESSAGE_BYTES, Headers, Message, Partition
from workers.kafka.publishing import Publisher
from workers.metrics import Metrics

CUT_BYTES = 256 * 1024
"""What stays of the key and of the value of a dead letter that is too large."""


class DeadLetters:
    """Sets aside messages that cannot be used, and stops a worker that would drain a topic.

    They go the publisher's way, so they are delivered before the offsets move past them.
    """

    def __init__(
        self, publisher: Publisher, limits: DeadLetterSettings, metrics: Metrics | None = None
    ) -> None:
        self._publisher = publisher
        self._limits = limits
        self._metrics = metrics
        self._next: dict[
            Partition, tuple[int, int]
        ] = {}  # -> offset after the last one, run length
        self._batches: deque[tuple[int, int]] = (
            deque()
        )  # (good, bad) of the newest `window` messages
        self._good = self._bad = 0
        self._unpassed = 0

    def send(self, message: Message, reason: str, error: str = "InvalidMessage") -> None:
        """Raises TooManyDeadLetters before sending the one that is too many in unbroken succession."""
        self._limit_run(message)
        self._publisher.produce(DEAD_LETTER, *_dead_letter(message, reason, error))
        self._unpassed += 1
        kind = reason.partition(":")[0].partition(".")[0]
        if self._metrics is not None:
            self._metrics.dead_letters.labels(kind if kind.isidentifier() else "malformed").inc()

    def passed(self, good: int) -> None:
        """End of a batch with `good` usable messages. Raises TooManyDeadLetters by their ratio."""
        bad, self._unpassed = self._unpassed, 0
        self._batches.append((good, bad))
        self._good, self._bad = self._good + good, self._bad + bad
        while self._good + self._bad - sum(self._batches[0]) >= self._limits.window:
            old_good, old_bad = self._batches.popleft()
            self._good, self._bad = self._good - old_good, self._bad - old_bad
        total = self._good + self._bad
        if total >= self._limits.window and self._bad > self._limits.max_ratio * total:
            raise TooManyDeadLetters(
                f"{self._bad} of the last {total} messages are unusable; limit {self._limits.max_ratio:.0%}"
            )

    def _limit_run(self, message: Message) -> None:
        place, offset = (message.topic(), message.partition()), message.offset()
        following, run = self._next.get(place, (-1, 0))
        run = run + 1 if offset == following else 1
        if run > self._limits.max_consecutive:
            raise TooManyDeadLetters(
                f"{run} messages in a row of {place[0]}[{place[1]}] are unusable, up to offset {offset}"
            )
        self._next[place] = (offset + 1, run)


def _dead_letter(
    message: Message, reason: str, error: str
) -> tuple[bytes | None, bytes | None, Headers]:
    """Key, value and headers; the originals, cut short only where they would not fit."""
    key, value = message.key(), message.value()
    headers: Headers = [
        ("topic", message.topic().encode()),
        ("partition", str(message.partition()).encode()),
        ("offset", str(message.offset()).encode()),
        ("error", error.encode()),
        ("reason", reason.encode(errors="replace")[:1_000]),
    ]
    original = [(f"header.{name}", content or b"") for name, content in message.headers() or ()]
    size = sum(len(name.encode()) + len(content) + 10 for name, content in original)
    if len(key or b"") + len(value or b"") + size > MAX_MESSAGE_BYTES:
        headers.append(("truncated", str(len(value or b"")).encode()))
        return (key or b"")[:CUT_BYTES], (value or b"")[:CUT_BYTES], headers
    return key, value, headers + original
