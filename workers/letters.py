"""Dead letters as the people meet them who look after the workers: what was set aside and why, and sending it back."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple, Self

from schemas.topics import DEAD_LETTER
from workers.config import Settings
from workers.kafka import ExactlyOnce, Message, read_topic

REPLAYS = "replays"
"""Header of a marker on the dead-letter topic: the letter that has been sent back."""
REPLAYED_FROM = "replayed-from"
"""Header of a message that was sent back: the letter that it was."""
ORIGINAL = "header."
"""What stands before the names of the headers that the message had of its own."""
TRANSACTION_LETTERS = 1_000


@dataclass(frozen=True)
class Letter:
    """One dead letter; `id` is its place on the dead-letter topic, `partition@offset`."""

    id: str
    at_ms: int
    topic: str
    partition: int
    offset: int
    """Where the message was that could not be used."""
    error: str
    reason: str
    truncated: bool
    """Its bytes were too many to be kept whole: it cannot be sent back."""
    replayed: bool
    key: bytes | None
    value: bytes | None
    headers: tuple[tuple[str, bytes], ...]
    """The message's own."""

    @classmethod
    def of(cls, message: Message, replayed: set[str]) -> Self:
        all_headers = message.headers() or []
        ours = {name: (content or b"").decode(errors="replace") for name, content in all_headers}
        return cls(
            id=_id(message),
            at_ms=message.timestamp()[1],
            topic=ours["topic"],
            partition=int(ours["partition"]),
            offset=int(ours["offset"]),
            error=ours["error"],
            reason=ours["reason"],
            truncated="truncated" in ours,
            replayed=_id(message) in replayed,
            key=message.key(),
            value=message.value(),
            headers=tuple(
                (name.removeprefix(ORIGINAL), content)
                for name, content in all_headers
                if name.startswith(ORIGINAL)
            ),
        )

    def summary(self, value_chars: int = 60) -> dict[str, str | int | bool]:
        """What can be shown of it, the value shortened and made readable."""
        value = self.value or b""
        text = value[:value_chars].decode(errors="backslashreplace")
        return {
            "id": self.id,
            "at_ms": self.at_ms,
            "source": f"{self.topic}[{self.partition}]@{self.offset}",
            "error": self.error,
            "reason": self.reason,
            "bytes": len(value),
            "value": "".join(c if c.isprintable() else "." for c in text),
            "truncated": self.truncated,
            "replayed": self.replayed,
        }


@dataclass(frozen=True)
class Wanted:
    """Which letters; what is None or empty asks for nothing."""

    reason: str | None = None
    """Part of the reason, in whatever case."""
    topic: str | None = None
    """That the message came from."""
    since_ms: int | None = None
    until_ms: int | None = None
    ids: frozenset[str] = frozenset()

    def __contains__(self, letter: Letter) -> bool:
        return (
            (self.reason is None or self.reason.lower() in letter.reason.lower())
            and (self.topic is None or self.topic == letter.topic)
            and (self.since_ms is None or letter.at_ms >= self.since_ms)
            and (self.until_ms is None or letter.at_ms < self.until_ms)
            and (not self.ids or letter.id in self.ids)
        )


def letters(settings: Settings, wanted: Wanted = Wanted()) -> Iterator[Letter]:
    """The wanted ones that are on the topic now, oldest first."""
    replayed = {marked for message in _all(settings) if (marked := _marked(message))}
    for message in _all(settings):
        if _marked(message) is None and (letter := Letter.of(message, replayed)) in wanted:
            yield letter


class Replayed(NamedTuple):
    sent: int
    """Letters sent back; in a dry run, those that would be."""
    already: int
    """Letters that had been sent back before: none is a second time."""
    truncated: int
    """Letters that cannot be sent back."""


def replay(
    settings: Settings,
    wanted: Wanted,
    *,
    dry_run: bool = True,
    advance: Callable[[int], None] = lambda n: None,
) -> Replayed:
    """Send the original bytes, key and headers of the wanted letters back to where they came from.

    A letter and the marker that says it has gone are one transaction, so it goes once or not at
    all; two replays at a time fence each other. What is of no more use than before becomes a new
    letter. A bar that is sent back has its old time: where newer ones of its symbol have passed, it
    is late.
    """
    if dry_run:
        return _sort(letters(settings, wanted), lambda letter: None)
    publisher = ExactlyOnce(
        settings, "dead-letter-replay", None
    )  # before reading: it fences others
    with publisher:

        def send(letter: Letter) -> None:
            sent_from = (REPLAYED_FROM, f"{DEAD_LETTER}/{letter.id}".encode())
            own = [header for header in letter.headers if header[0] != REPLAYED_FROM]
            partition = letter.partition if letter.key is None else -1
            publisher.produce(
                letter.topic, letter.key, letter.value, [*own, sent_from], partition=partition
            )
            marker = [(REPLAYS, letter.id.encode())]
            publisher.produce(
                DEAD_LETTER, None, None, list(marker), partition=int(letter.id.partition("@")[0])
            )
            advance(1)

        def send_in_parts() -> Iterator[Letter]:
            for count, letter in enumerate(letters(settings, wanted), 1):
                yield letter
                if count % TRANSACTION_LETTERS == 0:
                    publisher.commit({})

        return _sort(send_in_parts(), send)


def _sort(found: Iterator[Letter], send: Callable[[Letter], None]) -> Replayed:
    sent = already = truncated = 0
    for letter in found:
        if letter.replayed:
            already += 1
        elif letter.truncated:
            truncated += 1
        else:
            send(letter)
            sent += 1
    return Replayed(sent, already, truncated)


def _all(settings: Settings) -> Iterator[Message]:
    return read_topic(settings, DEAD_LETTER)


def _id(message: Message) -> str:
    return f"{message.partition()}@{message.offset()}"


def _marked(message: Message) -> str | None:
    """The letter that this message marks as sent back; None where it is a letter itself."""
    return next((v.decode() for name, v in message.headers() or () if name == REPLAYS), None)
