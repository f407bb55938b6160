"""The contract with everybody outside: a change of it shows as a change of `contracts.json`."""

import json
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

import schemas.messages
from schemas.messages import Bar, Lifecycle, Message, prediction_id, series_key

CONTRACTS = Path(__file__).with_name("contracts.json")

MESSAGES = {
    name: kind
    for name, kind in vars(schemas.messages).items()
    if isinstance(kind, type) and issubclass(kind, Message) and kind is not Message
}

LIFECYCLE = {
    "slot": "champion",
    "bundle": "abc",
    "uri": "file:///store/abc",
    "sha256": "0" * 64,
    "effective_ts": 0,
    "reason": "first",
    "actor": "a person",
    "issued_at": 0,
}


def pin(name: str, contract: object) -> None:
    """`UPDATE_CONTRACTS=1 make test` writes the file anew: look at the diff before committing it."""
    stored = json.loads(CONTRACTS.read_text()) if CONTRACTS.exists() else {}
    if os.environ.get("UPDATE_CONTRACTS"):
        text = json.dumps(stored | {name: contract}, indent=1, sort_keys=True)
        CONTRACTS.write_text(text + "\n")
        return
    assert contract == stored[name]


def test_the_json_schema_of_every_message_is_pinned() -> None:
    pin("messages", {name: kind.model_json_schema() for name, kind in MESSAGES.items()})


@pytest.mark.parametrize("kind", MESSAGES.values(), ids=MESSAGES.keys())
def test_every_message_is_frozen_and_ignores_what_it_does_not_know(kind: type[Message]) -> None:
    assert kind.model_config["frozen"] is True
    assert kind.model_config["extra"] == "ignore"
    assert kind.model_fields["schema_version"].default == 1


def test_a_filled_slot_names_where_its_bundle_is_and_an_empty_one_need_not() -> None:
    assert Lifecycle.model_validate(LIFECYCLE).bundle == "abc"
    emptied = LIFECYCLE | {"bundle": None, "uri": None, "sha256": None}
    assert Lifecycle.model_validate(emptied).bundle is None
    for missing in ("uri", "sha256"):
        with pytest.raises(ValidationError, match="uri and sha256"):
            Lifecycle.model_validate(LIFECYCLE | {missing: None})


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_evidence_must_be_finite(value: float) -> None:
    with pytest.raises(ValidationError, match="not finite"):
        Lifecycle.model_validate(LIFECYCLE | {"evidence": {"gain": value}})


def test_a_bar_of_one_price_and_no_volume_is_possible() -> None:
    Bar(symbol="SPY", ts=0, open=1.0, high=1.0, low=1.0, close=1.0, volume=0.0)


TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)


@given(TEXT, TEXT, TEXT, st.integers(0, 4_102_444_800_000))
def test_a_prediction_id_is_27_hex_digits_and_holds_its_time(
    symbol: str, target: str, bundle: str, ts: int
) -> None:
    name = prediction_id(symbol, ts, target, bundle)
    assert len(name) == 27
    assert name[:16] == series_key(symbol, target, bundle)
    assert int(name[16:], 16) == ts


def test_the_parts_of_a_series_key_cannot_run_into_each_other() -> None:
    assert series_key("ab", "c", "d") != series_key("a", "bc", "d")
    assert series_key("SPY", "volatility_30", "abc") == "ba296e5e1fe35810"
