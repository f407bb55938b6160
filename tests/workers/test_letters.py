"""Dead letters listed and sent back, on a real Kafka."""

import json
from collections.abc import Sequence
from typing import Any

import pytest
from confluent_kafka import Message as ClientMessage
from typer.testing import CliRunner

from schemas.topics import BARS, DEAD_LETTER, OUTCOMES
from workers import cli, letters
from workers.bench.stage import environment
from workers.config import DeadLetterSettings, Settings
from workers.errors import Fenced, TransactionAborted
from workers.kafka import DeadLetters, Message, make_publisher, read_topic
from workers.letters import Letter, Replayed, Wanted, replay

pytestmark = pytest.mark.kafka

EVERYTHING = Wanted()


def set_aside(settings: Settings, reasons: Sequence[str], topic: str = BARS, **more: Any) -> None:
    """One letter for each reason; its message has the reason for its value."""
    with make_publisher(settings, "test") as publisher:
        dead = DeadLetters(publisher, DeadLetterSettings())
        for offset, reason in enumerate(reasons):
            message = ClientMessage(
                topic, 1, offset, **{"key": b"SPY", "value": reason.encode()} | more
            )
            dead.send(message, reason)  # type: ignore[arg-type]


def found(settings: Settings, wanted: Wanted = EVERYTHING) -> list[Letter]:
    return list(letters.letters(settings, wanted))


def arrived(settings: Settings, topic: str = BARS) -> list[Message]:
    return list(read_topic(settings, topic))


def test_a_letter_says_when_from_where_and_why(fresh_topics: Settings) -> None:
    set_aside(fresh_topics, ["volume: is negative"], headers=[("trace", b"7")])
    (letter,) = found(fresh_topics)
    summary = letter.summary(value_chars=6)
    assert letter.headers == (("trace", b"7"),)
    assert summary.pop("at_ms") == letter.at_ms > 1_700_000_000_000
    assert summary == {
        "id": "0@0",
        "source": "market.bars[1]@0",
        "error": "InvalidMessage",
        "reason": "volume: is negative",
        "bytes": 19,
        "value": "volume",
        "truncated": False,
        "replayed": False,
    }


@pytest.mark.parametrize(
    ("value", "shown"),
    [(None, ""), (b"\xff\x00a", "\\xff.a"), (b"[red]\n", "[red]."), ("é".encode(), "é")],
)
def test_whatever_bytes_a_value_has_it_can_be_shown(value: bytes | None, shown: str) -> None:
    message = ClientMessage(DEAD_LETTER, 0, 3, value=value, headers=_headers())
    letter = Letter.of(message, set())  # type: ignore[arg-type]
    assert letter.summary()["value"] == shown


def _headers(**more: str) -> list[tuple[str, str | bytes | None]]:
    ours = {"topic": BARS, "partition": "0", "offset": "1", "error": "E", "reason": "ts: late"}
    return [(name, text.encode()) for name, text in (ours | more).items()]


@pytest.mark.parametrize(
    ("wanted", "is_in"),
    [
        (Wanted(), True),
        (Wanted(reason="LATE"), True),
        (Wanted(reason="volume"), False),
        (Wanted(topic=BARS), True),
        (Wanted(topic=OUTCOMES), False),
        (Wanted(since_ms=5_000), True),
        (Wanted(since_ms=5_001), False),
        (Wanted(until_ms=5_000), False),
        (Wanted(until_ms=5_001), True),
        (Wanted(ids=frozenset({"0@3", "0@4"})), True),
        (Wanted(ids=frozenset({"0@4"})), False),
        (Wanted(reason="late", topic=OUTCOMES), False),
    ],
)
def test_letters_are_chosen_by_reason_topic_time_and_place(wanted: Wanted, is_in: bool) -> None:
    message = ClientMessage(DEAD_LETTER, 0, 3, timestamp=(1, 5_000), headers=_headers())
    assert (Letter.of(message, set()) in wanted) == is_in  # type: ignore[arg-type]


def test_a_dry_run_counts_and_sends_nothing(fresh_topics: Settings) -> None:
    set_aside(fresh_topics, ["close: no number", "volume: is negative", "close: missing"])
    assert replay(fresh_topics, Wanted(reason="close")) == Replayed(2, 0, 0)
    assert arrived(fresh_topics) == []
    assert len(arrived(fresh_topics, DEAD_LETTER)) == 3


def test_what_is_sent_back_is_what_came_and_goes_once_only(fresh_topics: Settings) -> None:
    settings = fresh_topics
    set_aside(settings, ["close: no number", "volume: is negative"], headers=[("trace", b"7")])
    set_aside(settings, ["late"], topic=OUTCOMES, key=None, value=None)
    told: list[int] = []
    done = replay(settings, Wanted(topic=BARS), dry_run=False, advance=told.append)
    assert (done, sum(told)) == (Replayed(2, 0, 0), 2)
    assert [(m.key(), m.value()) for m in arrived(settings)] == [
        (b"SPY", b"close: no number"),
        (b"SPY", b"volume: is negative"),
    ]
    assert arrived(settings)[0].headers() == [
        ("trace", b"7"),
        ("replayed-from", b"dead-letter/0@0"),
    ]
    assert [letter.replayed for letter in found(settings)] == [True, True, False]

    assert replay(settings, EVERYTHING, dry_run=False) == Replayed(1, 2, 0)
    assert replay(settings, EVERYTHING, dry_run=False) == Replayed(0, 3, 0)
    assert len(arrived(settings)) == 2
    (outcome,) = arrived(settings, OUTCOMES)
    assert (outcome.key(), outcome.value(), outcome.partition()) == (None, None, 1)


def test_what_is_of_no_more_use_than_before_becomes_a_new_letter_with_one_origin(
    fresh_topics: Settings,
) -> None:
    settings = fresh_topics
    set_aside(settings, ["close: no number"])
    replay(settings, EVERYTHING, dry_run=False)
    with make_publisher(settings, "test") as publisher:
        DeadLetters(publisher, DeadLetterSettings()).send(arrived(settings)[0], "close: no number")
    old, new = found(settings)
    assert (old.replayed, new.replayed) == (True, False)
    replay(settings, EVERYTHING, dry_run=False)
    assert arrived(settings)[1].headers() == [("replayed-from", f"dead-letter/{new.id}".encode())]


def test_a_letter_whose_bytes_were_cut_is_not_sent_back(fresh_topics: Settings) -> None:
    set_aside(fresh_topics, ["size: too large"], value=b"x" * 9_000_000)
    assert replay(fresh_topics, EVERYTHING, dry_run=False) == Replayed(0, 0, 1)
    assert arrived(fresh_topics) == []


def test_a_replay_that_another_one_fenced_leaves_nothing_behind(
    fresh_topics: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = fresh_topics
    set_aside(settings, ["close: no number"])
    whole = letters.letters

    def meanwhile(*arguments: Any) -> Any:
        yield from whole(*arguments)
        monkeypatch.setattr(letters, "letters", whole)
        assert replay(settings, EVERYTHING, dry_run=False).sent == 1

    monkeypatch.setattr(letters, "letters", meanwhile)
    with pytest.raises((TransactionAborted, Fenced)):
        replay(settings, EVERYTHING, dry_run=False)
    assert len(arrived(settings)) == 1


def test_a_crash_between_letter_and_marker_leaves_neither(fresh_topics: Settings) -> None:
    settings = fresh_topics
    set_aside(settings, ["a: wrong", "b: wrong"])

    def crash(_: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        replay(settings, EVERYTHING, dry_run=False, advance=crash)
    assert arrived(settings) == []
    assert replay(settings, EVERYTHING, dry_run=False) == Replayed(2, 0, 0)


def test_the_commands_list_what_is_there_and_send_only_on_demand(fresh_topics: Settings) -> None:
    settings = fresh_topics
    set_aside(settings, ["close: no number", "volume: is negative", "close: missing"])

    def invoke(*arguments: str) -> Any:
        variables = environment(settings) | {"COLUMNS": "200"}
        done = CliRunner().invoke(cli.app, ["dead-letter", *arguments], env=variables)
        assert done.exit_code == 0, done.output
        return json.loads(done.stdout) if "--json" in arguments else done.stdout

    listed = invoke("list", "--reason", "close", "--limit", "1", "--json")
    assert listed["found"] == 2
    assert [letter["reason"] for letter in listed["letters"]] == ["close: missing"]
    assert invoke("list", "--until", "2020-01-01", "--json")["found"] == 0
    assert "volume: is negative" in invoke("list", "--since", "2020-01-01")

    would = {"sent": 1, "already": 0, "truncated": 0}
    assert invoke("replay", "0@1", "--json") == would | {"dry_run": True}
    assert arrived(settings) == []
    assert invoke("replay", "0@1", "--yes", "--json") == would | {"dry_run": False}
    assert [m.value() for m in arrived(settings)] == [b"volume: is negative"]
    assert invoke("list", "--json")["letters"][1]["replayed"] is True
