"""Mutated messages: the decoder against the slow reference, and a whole replica on a real Kafka."""

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from schemas.codecs import decode_bars, encode_bars
from schemas.topics import BARS, DEAD_LETTER
from tests.workers.builders import rows_of
from tests.workers.faults.replicas import Replicas
from tests.workers.faults.rig import (
    ALONE,
    BARS_OF_ALL,
    CHAMPION,
    LIVE,
    SYMBOLS,
    drained,
    for_faults,
    with_section,
)
from tests.workers.streams import (
    appoint,
    assert_exactly_once,
    compared,
)
from workers.bench import fuzz
from workers.config import Settings
from workers.kafka import make_publisher, read_topic
from workers.proof import read_predictions

MUTATIONS = 3_000


def test_twenty_thousand_mutations_are_judged_as_the_reference_does_in_flat_memory() -> None:
    told: list[float] = []
    found = fuzz.run(20_000, seed=7, tell=lambda _, share: told.append(share))
    assert found["disagreements"] == 0
    assert found["accepted_mutations"] > 1_000
    assert found["dead_letters"] > 10_000
    assert found["accepted_mutations"] + found["dead_letters"] == found["mutations"] == 20_000
    assert found["rss_peak_mb_end"] < found["rss_peak_mb_settled"] + 20
    assert told[-1] == pytest.approx(1, abs=0.02)


def test_the_same_seed_mutates_alike() -> None:
    assert list(fuzz.batches(500, seed=3)) == list(fuzz.batches(500, seed=3))
    assert list(fuzz.batches(500, seed=3)) != list(fuzz.batches(500, seed=4))


@pytest.mark.parametrize("harm", ["accepts", "refuses", "forgets", "alters"])
def test_a_decoder_that_errs_is_found_out(harm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    good, bad = encode_bars(rows_of(BARS_OF_ALL, slice(0, 2))), b"{"
    values = [good[0], bad, good[1]]

    def erring(values: list[bytes | None]) -> Any:
        match harm:
            case "accepts":
                return decode_bars([values[0], values[0], values[2]])
            case "refuses":
                return decode_bars([values[0], values[1], b"["])
            case "forgets":
                columns, places, _ = decode_bars(values)
                return columns, places, []
            case _:
                columns, places, rejected = decode_bars(values)
                columns.ohlcv[1, 3] *= 1.0001
                return columns, places, rejected

    assert fuzz.disagreements(values) == (2, 0)
    monkeypatch.setattr("workers.bench.fuzz.decode_bars", erring)
    assert fuzz.disagreements(values)[1] > 0


# ---- a whole replica ----


@pytest.fixture
def replicas(fresh_topics: Settings, tmp_path: Path) -> Iterator[Replicas]:
    with Replicas(for_faults(fresh_topics), tmp_path / "logs") as replicas:
        appoint(replicas.settings, "champion", CHAMPION, 0)
        yield replicas


@pytest.mark.kafka
def test_thousands_of_mutated_messages_are_set_aside_or_used_and_harm_no_other(
    replicas: Replicas,
) -> None:
    settings = replicas.settings
    rng = random.Random(11)
    strangers = encode_bars(rows_of(BARS_OF_ALL, slice(0, 200)))
    strangers = [value.replace(b'"S', b'"X') for value in strangers]
    good = list(zip(BARS_OF_ALL.symbols, encode_bars(BARS_OF_ALL), strict=True))
    share = MUTATIONS / len(good)
    valid: list[bytes] = []
    with make_publisher(settings, "test") as publisher:
        for symbol, value in good:
            publisher.produce(BARS, symbol.encode(), value)
            if rng.random() < share:
                bad = mutated_value(rng.choice(strangers), rng)
                if bad is not None and fuzz.judged(bad) is not None:
                    valid.append(bad)
                publisher.produce(BARS, mutated_key(rng), bad, mutated_headers(rng))
    replicas.start("one")
    drained(replicas)
    assert replicas.stop() == {"one": 0}

    messages = {(m.partition(), m.offset()): m for m in read_topic(settings, BARS)}
    letters = list(read_topic(settings, DEAD_LETTER))
    assert len(letters) == len(messages) - len(good) - len(valid) > MUTATIONS / 2
    for letter in letters:
        headers = dict(letter.headers() or [])
        original = messages.pop((int(headers["partition"]), int(headers["offset"])))
        assert (letter.key(), letter.value()) == (original.key(), original.value())
        assert headers["topic"] == BARS.encode()
        assert headers["reason"]
        assert headers["error"] == b"InvalidMessage"
    assert_exactly_once(compared(settings, [CHAMPION], ALONE))
    said = read_predictions(settings)
    unharmed = said[said["symbol"].isin(SYMBOLS)]
    assert len(unharmed) == len(CHAMPION.config.targets) * len(SYMBOLS) * LIVE


def mutated_value(value: bytes, rng: random.Random) -> bytes | None:
    return None if rng.random() < 0.01 else fuzz.mutated(value, rng)


def mutated_key(rng: random.Random) -> bytes | None:
    return rng.choice([None, b"", b"S0", b"\xff\xfe", rng.randbytes(rng.randint(1, 2_000))])


def mutated_headers(rng: random.Random) -> list[tuple[str, str | bytes | None]]:
    names = ["", "topic", "reason", "\u00e9", "x" * 500]
    return [
        (rng.choice(names), rng.choice([None, b"", rng.randbytes(rng.randint(1, 500))]))
        for _ in range(rng.randint(0, 4))
    ]


@pytest.mark.kafka
@pytest.mark.parametrize(
    ("limits", "word"),
    [
        ({"max_consecutive": 50}, "51 messages in a row of market.bars["),
        ({"max_ratio": 0.3, "window": 400}, "messages are unusable; limit 30%"),
    ],
    ids=["in a row", "too large a share"],
)
def test_a_bad_deploy_stops_the_worker_with_a_word_and_loses_nothing(
    replicas: Replicas, limits: dict[str, float], word: str
) -> None:
    settings, wrong = replicas.settings, 0
    with make_publisher(settings, "test") as publisher:
        values = zip(BARS_OF_ALL.symbols, encode_bars(BARS_OF_ALL), strict=True)
        for n, (symbol, value) in enumerate(values):
            publisher.produce(BARS, symbol.encode(), value)
            if 2_000 <= n < 2_400:
                run = 60 if n == 2_200 else 1
                for _ in range(run):
                    publisher.produce(BARS, symbol.encode(), b'{"symbol": "S0"}')
                wrong += run
    replicas.start("one", settings=with_section(settings, "dead_letter", **limits))
    assert replicas.ended("one") == 1
    assert word in replicas.log("one")
    replicas.start("one")
    drained(replicas)
    assert replicas.stop() == {"one": 0}
    assert_exactly_once(compared(settings, [CHAMPION], ALONE))
    assert sum(1 for _ in read_topic(settings, DEAD_LETTER)) == wrong
