"""The report says what registry and topics hold: intervals, expected alarms, a card for each bundle."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from models.bundle import Bundle
from schemas.messages import InputDrift, Lifecycle
from schemas.tables import AuditRow
from tests.workers.builders import MINUTE_MS, make_bundle
from tests.workers.test_monitor import CALM
from tests.workers.test_trainer import make_degradation, make_record
from workers import report
from workers.quality_report import (
    Evidence,
    arms,
    at_least,
    comparisons,
    half_width,
    marks,
    observed_alarms,
    sections,
    summary,
)

N = 4_000


def calibrated(seed: int) -> Bundle:
    bundle = make_bundle(seed)
    none = (None,) * (len(bundle.config.targets) - 1)
    config = bundle.config.model_copy(update={"calibrations": (CALM, *none)})
    return replace(bundle, config=config)


OLD, NEW = calibrated(0), calibrated(1)


def record(bundle: Bundle, minute: int, parent: Bundle | None = None) -> Lifecycle:
    found = make_record("champion", bundle.version)
    return found.model_copy(
        update={"effective_ts": minute * MINUTE_MS, "parent": parent and parent.version}
    )


def make_outcomes(gain: float) -> pd.DataFrame:
    """OLD is champion and NEW its challenger on the same bars, better by `gain` on average."""
    rng = np.random.default_rng(0)
    ts = MINUTE_MS * np.arange(N)
    loss = 0.3 + rng.gamma(2.0, 0.1, N)
    own = {"symbol": "A", "ts": ts, "reference_loss": 0.6}
    champion = pd.DataFrame({**own, "role": "champion", "bundle": OLD.version, "loss": loss})
    better = loss - gain + rng.normal(0, 0.05, N)
    shadow = pd.DataFrame({**own, "role": "challenger", "bundle": NEW.version, "loss": better})
    return pd.concat([champion, shadow], ignore_index=True)


def make_evidence(gain: float = 0.05) -> Evidence:
    entry = AuditRow(
        seq=1,
        key="k",
        at=1_700_000_000_000,
        actor="<b>anna</b>",
        slot="champion",
        from_bundle=OLD.version,
        to_bundle=NEW.version,
        reason="by hand & by heart",
        evidence={},
        previous="",
        hash="",
    )
    return Evidence(
        outcomes=make_outcomes(gain),
        alarms=[make_degradation(OLD.version, ts=m * MINUTE_MS) for m in (500, 900, 90_000)],
        records=[record(OLD, 0), record(NEW, 1_000, OLD), record(OLD, 2_000)],
        runs=[],
        windows=[],
        audit=[entry],
        problems=[],
        bundles={OLD.version: OLD, NEW.version: NEW},
        attention={OLD.version: {0: 0.25, 7: 0.75}},
    )


@pytest.mark.parametrize("gain", [0.05, 0.0, -0.05])
def test_the_interval_of_a_comparison_holds_the_true_gain(gain: float) -> None:
    [row] = comparisons(make_evidence(gain)).to_dict("records")
    assert (row["challenger"], row["champion"], row["bars"]) == (NEW.version, OLD.version, N)
    assert abs(row["gain"] - gain) < row["half_width"] < 0.01


def make_test(gain: float) -> Evidence:
    """OLD has symbol A, and stands beside NEW in arm b on symbol B, where bars are harder to forecast."""
    alone = make_outcomes(0.0).query("role == 'champion'")
    beside = make_outcomes(gain).replace({"champion": "control", "challenger": "arm-b", "A": "B"})
    beside["loss"] += 0.5
    return replace(make_evidence(), outcomes=pd.concat([alone, beside], ignore_index=True))


@pytest.mark.parametrize(("gain", "word"), [(0.05, "better"), (0.0, "undecided"), (-0.05, "worse")])
def test_an_arm_is_held_against_the_champion_beside_it_and_not_against_other_symbols(
    gain: float, word: str, tmp_path: Path
) -> None:
    found = make_test(gain)
    a, b = arms(found).to_dict("records")
    assert (a["arm"], a["bundle"], a["symbols"], b["arm"], b["bundle"]) == (
        *("a", OLD.version, 1),
        *("b", NEW.version),
    )
    assert a["loss"] == pytest.approx(0.5, abs=5 * a["half_width"])
    assert b["loss"] == pytest.approx(1.0 - gain, abs=5 * b["half_width"])
    [row] = comparisons(found).to_dict("records")
    assert row["role"] == "arm-b"
    assert abs(row["gain"] - gain) < row["half_width"] < 0.01
    text = report.write(tmp_path, "title", summary(found), sections(found)).read_text()
    assert f", {word}." in text


def test_intervals_hold_the_true_mean_about_as_often_as_they_say() -> None:
    rng = np.random.default_rng(0)
    held = 0
    for _ in range(300):
        noise = np.convolve(rng.normal(size=1_200), np.ones(5), "valid")  # overlapping labels
        half = half_width(noise, horizon=5)
        assert half is not None
        held += abs(noise.mean()) < half
    assert 0.89 < held / 300 < 0.98
    assert half_width(np.zeros(50), horizon=5) is None


def test_alarms_are_held_against_what_was_declared() -> None:
    [row] = observed_alarms(make_evidence()).to_dict("records")
    assert row.pop("expected") == pytest.approx(4.0)
    assert row == {"bundle": OLD.version, "bars": N, "arl0": 1_000, "raised": 3}


def test_the_chance_of_so_many_alarms_is_that_of_poisson() -> None:
    assert at_least(0, 2.0) == 1.0
    assert at_least(1, 2.0) == pytest.approx(1 - np.exp(-2.0))
    assert at_least(3, 2.0) == pytest.approx(0.3233, abs=1e-4)


def test_a_champion_whose_parent_came_back_is_marked_as_rolled_back() -> None:
    texts = [m.text for m in marks(make_evidence(), 0, N * MINUTE_MS)]
    assert texts == ["alarm", "alarm", "promotion", "rollback"]
    assert summary(make_evidence())["rolled back"] == [NEW.version]


def test_the_page_has_a_card_for_each_bundle_and_escapes_what_people_wrote(tmp_path: Path) -> None:
    found = make_evidence()
    text = report.write(tmp_path, "title", summary(found), sections(found)).read_text()
    for version in (OLD.version, NEW.version):
        assert f"<h2>Bundle {version}</h2>" in text
    assert "&lt;b&gt;anna&lt;/b&gt;" in text
    assert "by hand &amp; by heart" in text
    assert "What the inputs looked like" not in text
    assert {path.stem for path in tmp_path.glob("*.png")} == {
        "losses",
        "calibration",
        "comparisons",
        f"attention-{OLD.version}",
    }


@pytest.mark.parametrize("embedding", [None, 0.75])
def test_what_the_inputs_looked_like_stands_beside_the_alarm(
    tmp_path: Path, embedding: float | None
) -> None:
    drift = InputDrift(
        ts=500 * MINUTE_MS,
        symbols=["A", "B"],
        rows=780,
        psi={"volume": 2.25, "hour": 0.1},
        ks={"range": 0.5},
        embedding=embedding,
    )
    found = make_evidence()
    measured = found.alarms[0].model_copy(update={"inputs": drift})
    found = replace(found, alarms=[measured, *found.alarms[1:]])
    text = report.write(tmp_path, "title", summary(found), sections(found)).read_text()
    assert f"alarm {measured.id}: PSI 2.25 (volume), 0.10 (hour); KS 0.50 (range)" in text
    assert ("hidden states 0.75 of their spread away" in text) is (embedding is not None)
    assert "no alarm is ever raised by this" in text


def test_a_system_in_which_nothing_has_happened_has_a_report_all_the_same(tmp_path: Path) -> None:
    columns = ["symbol", "ts", "role", "bundle", "loss", "reference_loss"]
    nothing = Evidence(pd.DataFrame(columns=columns), [], [], [], [], [], [], {}, {})
    report.write(tmp_path, "title", summary(nothing), sections(nothing))
