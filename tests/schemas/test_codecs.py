import json
import tracemalloc
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from schemas.codecs import (
    MAX_BAR_BYTES,
    BarColumns,
    decode_bars,
    encode,
    encode_attention,
    encode_bars,
    encode_outcomes,
    encode_predictions,
    reason_of,
)
from schemas.messages import AttentionSummary, Bar, Outcome, Prediction, prediction_id

FIELDS = {
    "symbol": '"SPY"',
    "ts": "1514764800000",
    "open": "10",
    "high": "12.5",
    "low": "9",
    "close": "11",
    "volume": "0",
}


def bar_json(*more: str, **fields: str) -> bytes:
    """A bar's JSON text with some fields replaced and some members added."""
    members = [f'"{name}":{value}' for name, value in (FIELDS | fields).items()]
    return ("{" + ",".join([*members, *more]) + "}").encode("utf-8", "surrogatepass")


def judge(value: bytes) -> Bar | None:
    try:
        return Bar.model_validate_json(value)
    except ValidationError:
        return None


def assert_decoded_as_bar_says(values: list[bytes]) -> None:
    columns, places, rejected = decode_bars(values)
    expected = [(i, bar) for i, value in enumerate(values) if (bar := judge(value)) is not None]
    assert places.tolist() == [i for i, _ in expected]
    assert columns.symbols == [bar.symbol for _, bar in expected]
    assert columns.ts.tolist() == [bar.ts for _, bar in expected]
    assert columns.ohlcv.tolist() == [
        [bar.open, bar.high, bar.low, bar.close, bar.volume] for _, bar in expected
    ]
    assert columns.ohlcv.shape == (len(expected), 5)
    assert sorted(r.index for r in rejected) == sorted(set(range(len(values))) - set(places))
    assert all(r.reason and "\n" not in r.reason for r in rejected)


NUMBERS = [
    *("1", "1.0", "1e0", "10e-1", "1.5", "-0", "-0.0", "-1", "true", "false", "null", '"1"'),
    *("NaN", "Infinity", "-Infinity", "nan", "1e400", "-1e400", "01", "+1", "1.", ".5", "1e"),
    *("0x1", "1_0", "[]", "{}", "-", "1,", "9223372036854775807", "9223372036854775808"),
    *("18446744073709551616", "4102444800000", "4102444800001", "9007199254740993", "4.9e-324"),
    *("1e-400", "1e99999999999999999999", "1.0000000000000000000000000001"),
    *("9" * 400, "9" * 5_000, "0." + "0" * 400 + "1"),
]
STRINGS = [
    '""',
    '" "',
    '"\\ud800"',
    '"\\udc00\\ud800"',
    '"\\ud83d\\ude00"',
    '"\ud800"',
    '"' + "\U0001f600" * 64 + '"',
    '"' + "\U0001f600" * 65 + '"',
    '"a\\u0000"',
    '"\x00"',
    '"\n"',
    '"\x7f"',
    '"\\x"',
    '"\\u12"',
    '"\\/"',
    "'a'",
    '"a',
]
BYTES = [b"\xff", b"\xc0\x80", b"\xed\xa0\x80", b"\xf4\x90\x80\x80", b"\xc3", b"\xe2\x82"]
DEPTHS = [100, 198, 199, 200, 201, 500, 1_000, 5_000, 30_000]
MANGLED = [
    b"",
    b" ",
    b"null",
    b"[]",
    b"{}",
    b"{",
    b'{"a":1,}',
    b"//x\n" + bar_json(),
    b"\xef\xbb\xbf" + bar_json(),
    b" \t\r\n" + bar_json() + b" \n",
    bar_json() + b"x",
    bar_json() * 2,
    bar_json() + b"\0",
    bar_json()[:-1],
    b"[" + bar_json() + b"]",
    bar_json().decode().encode("utf-16"),
    bar_json().decode().encode("utf-32"),
    b'["SPY",1,1,2,0.5,1,0]',
    bar_json('"ts":5', '"ts":"x"', '"ts":7'),
    bar_json('"ts":7', ts='"x"'),
    bar_json('"open":"x"'),
    bar_json('"open":10', open="NaN"),
    bar_json('"\\u0074s":9'),
    bar_json('"extra":5', '"extra":null'),
    bar_json('"extra":{"a":"x","a":1}'),
    bar_json('"extra":{"a":1,"a":"x"}'),
    bar_json('"extra":null'),
    bar_json('"extra":{}'),
    bar_json('"extra":[]'),
    bar_json('"unknown":{"a":[1,"b",null]}'),
]


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize("field", [*FIELDS, "schema_version", "extra", "unknown"])
def test_every_shape_of_number_in_every_field_is_judged_as_bar_does(
    field: str, number: str
) -> None:
    assert_decoded_as_bar_says([bar_json(**{field: number}), bar_json()])
    assert_decoded_as_bar_says([bar_json(**{field: f'{{"a":{number}}}'}), bar_json()])


@pytest.mark.parametrize("text", STRINGS)
def test_every_shape_of_string_is_judged_as_bar_does(text: str) -> None:
    values = [bar_json(symbol=text), bar_json(f'"u":{text}'), bar_json(f"{text}:1")]
    assert_decoded_as_bar_says([*values, bar_json(f'"extra":{{{text}:1}}')])


@pytest.mark.parametrize("raw", BYTES)
def test_bytes_that_are_no_utf8_are_judged_as_bar_does(raw: bytes) -> None:
    texts = [bar_json(symbol='"@"'), bar_json('"u":"@"'), bar_json('"@":1')]
    assert_decoded_as_bar_says([text.replace(b"@", raw) for text in texts])


@pytest.mark.parametrize("depth", DEPTHS)
def test_nesting_is_judged_as_bar_does_and_never_overflows(depth: int) -> None:
    lists, objects = "[" * depth + "]" * depth, '{"a":' * depth + "1" + "}" * depth
    values = [bar_json(f'"{f}":{v}') for f in ("u", "extra", "ts") for v in (lists, objects)]
    values += [b"[" * depth, b'{"a":' * depth]
    assert_decoded_as_bar_says([value for value in values if len(value) <= MAX_BAR_BYTES])


def test_mangled_text_is_judged_as_bar_does() -> None:
    assert_decoded_as_bar_says(MANGLED)


@given(st.lists(st.binary(max_size=200), max_size=5))
def test_any_bytes_are_judged_as_bar_does(values: list[bytes]) -> None:
    assert_decoded_as_bar_says(values)


@given(data=st.data())
def test_any_damage_to_a_bar_is_judged_as_bar_does(data: st.DataObject) -> None:
    value = bytearray(data.draw(st.sampled_from([bar_json(), *MANGLED])))
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(value)))
        until = data.draw(st.integers(at, min(at + 8, len(value))))
        value[at:until] = data.draw(st.binary(max_size=8) | st.sampled_from([*BYTES, b"1e9", b"-"]))
    assert_decoded_as_bar_says([bytes(value), bar_json()])


NAME = st.text(st.sampled_from('a"\\\u00e9\u2028\U0001f600\ud800\x00'), max_size=4)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | NAME,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAME, inner),
    max_leaves=5,
)


@settings(max_examples=300)
@given(
    changes=st.dictionaries(
        st.sampled_from([*FIELDS, "extra", "schema_version", "unknown"]),
        JSON | st.floats(-1, 20) | st.dictionaries(NAME, st.floats()),
    ),
    absent=st.sets(st.sampled_from([*FIELDS]), max_size=1),
)
@example({"extra": {"a": float("nan")}}, set())
@example({"schema_version": 2}, set())
def test_any_json_in_any_field_is_judged_as_bar_does(
    changes: dict[str, Any], absent: set[str]
) -> None:
    bar = {name: json.loads(value) for name, value in FIELDS.items()} | changes
    text = json.dumps({name: value for name, value in bar.items() if name not in absent})
    assert_decoded_as_bar_says([text.encode()])


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"high": "1"}, "high is below"),
        ({"low": "11.5"}, "low is above"),
        ({"volume": "-1"}, "volume: "),
        ({"close": "NaN"}, "close: "),
        ({"ts": "1514764800000000"}, "ts: "),
        ({"ts": "1.5"}, "ts: "),
        ({"open": '"10"'}, "open: "),
        ({"open": "true"}, "open: "),
        ({"open": "0"}, "open: "),
        ({"symbol": '""'}, "symbol: "),
        ({"schema_version": "2"}, "schema_version: "),
        ({"extra": '{"a": 1e999}'}, "extra.a: "),
    ],
)
def test_the_reason_names_the_field(fields: dict[str, str], reason: str) -> None:
    _, _, (rejected,) = decode_bars([bar_json(**fields)])
    assert reason in rejected.reason
    assert rejected.reason == reason_of(bar_json(**fields))


def test_megabytes_of_rubbish_are_refused_without_being_read() -> None:
    rubbish = [b"\x00" * 5_000_000, b"[" * 5_000_000, bar_json(f'"u":"{"x" * MAX_BAR_BYTES}"')]
    tracemalloc.start()
    _, places, rejected = decode_bars([*rubbish, None, bar_json()])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert places.tolist() == [4]
    assert [r.reason.split(",")[0] for r in rejected] == [
        "5000000 bytes",
        "5000000 bytes",
        f"{len(rubbish[2])} bytes",
        "empty value",
    ]
    assert peak < 1_000_000


def test_no_values_give_no_bars() -> None:
    columns, places, rejected = decode_bars([])
    assert (len(columns), columns.ohlcv.shape, len(places), rejected) == (0, (0, 5), 0, [])


PRICE = st.floats(1e-6, 1e9)


@given(
    st.lists(
        st.tuples(
            st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=64),
            st.integers(0, 4_102_444_800_000),
            PRICE,
            PRICE,
            st.floats(0, 1e15),
        ),
        max_size=6,
    )
)
def test_bars_that_are_encoded_are_decoded_bit_by_bit(
    rows: list[tuple[str, int, float, float, float]],
) -> None:
    columns = BarColumns(
        [row[0] for row in rows],
        np.array([row[1] for row in rows], np.int64),
        np.array([[a, max(a, b), min(a, b), b, v] for _, _, a, b, v in rows]).reshape(-1, 5),
    )
    decoded, places, rejected = decode_bars(encode_bars(columns))
    assert (rejected, len(places)) == ([], len(rows))
    assert decoded.symbols == columns.symbols
    np.testing.assert_array_equal(decoded.ts, columns.ts)
    np.testing.assert_array_equal(decoded.ohlcv, columns.ohlcv)
    again = [encode(Bar.model_validate_json(value)) for value in encode_bars(columns)]
    np.testing.assert_array_equal(decode_bars(again)[0].ohlcv, columns.ohlcv)


def test_encoded_predictions_are_what_the_message_says() -> None:
    values = encode_predictions(
        ["SPY", "é"],
        np.array([60_000, 120_000]),
        np.array([-9.5, 1e-300]),
        np.array([[0.25, 0.75], [1.0, 0.0]]),
        target="direction_2",
        horizon=2,
        interval_ms=60_000,
        bundle="abc",
        role="champion",
    )
    first, second = map(Prediction.model_validate_json, values)
    assert first == Prediction(
        id=prediction_id("SPY", 60_000, "direction_2", "abc"),
        symbol="SPY",
        ts=60_000,
        horizon_ts=180_000,
        horizon=2,
        target="direction_2",
        value=-9.5,
        probabilities=[0.25, 0.75],
        bundle="abc",
        role="champion",
    )
    assert (second.symbol, second.value) == ("é", 1e-300)


def test_encoded_attention_and_outcomes_are_what_the_messages_say() -> None:
    (summary,) = encode_attention(
        ["SPY"],
        np.array([180_000]),
        np.array([[180_000, 0]]),
        np.array([[0, 3]]),
        np.array([[0.75, 0.0]], np.float32),
        np.array([0.5], np.float32),
        target="t",
        bundle="b",
        role="challenger",
    )
    attention = AttentionSummary.model_validate_json(summary)
    assert attention.prediction_id == prediction_id("SPY", 180_000, "t", "b")
    assert [(s.ts, s.lag, s.weight) for s in attention.top] == [(180_000, 0, 0.75)]
    assert attention.effective_length == pytest.approx(np.exp(0.5), abs=1e-4)
    (row,) = encode_outcomes(
        [("SPY", "t", "b", "champion", "b")],
        *(np.array([n]) for n in (0, 0, 60_000)),
        *(np.array([x]) for x in (1.0, 2.0, 0.5, 0.25)),
    )
    outcome = Outcome.model_validate_json(row)
    assert outcome.prediction_id == prediction_id("SPY", 0, "t", "b")
    assert outcome.arm == "b"
    assert (outcome.label, outcome.loss, outcome.reference_loss) == (2.0, 0.5, 0.25)


def test_outcomes_are_written_as_consumers_know_them() -> None:
    first, second = encode_outcomes(
        [("é", "t", "b", "challenger", "a"), ('"},{"', "u", "b", "champion", "c")],
        np.array([1, 0]),
        np.array([0, 60_000]),
        np.array([60_000, 120_000]),
        np.array([1e-300, -9.5]),
        np.array([2.0, 1e22]),
        np.array([0.5, 0.1]),
        np.array([0.0, 1 / 3]),
    )
    odd, plain = prediction_id('"},{"', 0, "u", "b"), prediction_id("é", 60_000, "t", "b")
    assert first.decode() == (
        f'{{"prediction_id":"{odd}","symbol":"\\"}},{{\\"","ts":0,'
        '"matured_ts":60000,"target":"u","bundle":"b","role":"champion","value":1e-300,"label":2.0,'
        '"loss":0.5,"reference_loss":0.0,"arm":"c"}'
    )
    assert second.decode() == (
        f'{{"prediction_id":"{plain}","symbol":"é","ts":60000,'
        '"matured_ts":120000,"target":"t","bundle":"b","role":"challenger","value":-9.5,'
        '"label":1e22,"loss":0.1,"reference_loss":0.3333333333333333}'
    )
