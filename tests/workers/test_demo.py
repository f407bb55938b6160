"""The parts of the demo that reckon; the whole of it runs as `make demo`."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from rich.console import Console

from models.targets import Target
from schemas.codecs import BarColumns, encode
from schemas.messages import Degradation, Lifecycle
from tests.workers.builders import make_bundle
from tests.workers.test_monitor import CALM
from workers import demo, demo_report, proof
from workers.config import MonitorSettings, Settings
from workers.demo import Director, Evidence, Options, Story, Stretch
from workers.schedule import Schedule

MINUTE = 60_000
DAY = 86_400_000
OPEN = 1_514_903_400_000


def make_frame(days: int) -> pd.DataFrame:
    ts = (OPEN + DAY * np.arange(days)[:, None] + MINUTE * np.arange(391)).ravel()
    return pd.DataFrame({"symbol": "SPY", "ts": ts})


def make_record(slot: str, bundle: str | None, ts: int, parent: str | None = None) -> bytes:
    return encode(
        Lifecycle.model_validate(
            {
                "slot": slot,
                "bundle": bundle,
                "uri": bundle and "somewhere",
                "sha256": bundle and "0",
                "parent": parent,
                "effective_ts": ts,
                "reason": "as it was decided",
                "actor": "test",
                "issued_at": 1,
            }
        )
    )


def make_alarm() -> bytes:
    alarm = Degradation(
        id="x",
        bundle="aa",
        target="volatility_30",
        detector="cusum",
        statistic=161.4,
        threshold=160.0,
        arl0=20_000.0,
        since_ts=OPEN,
        ts=OPEN + DAY,
        symbols=["SPY"],
        excess_loss=0.3,
        issued_at=1,
    )
    return encode(alarm)


class Crew:
    """Stands where the fleet does, and notes what is asked of it."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, ...]] = []

    def check(self) -> None:
        pass

    def kill(self, name: str) -> None:
        self.asked.append(("kill", name))

    def start(self, name: str, *arguments: str) -> None:
        self.asked.append(("start", name))


@pytest.fixture
def crew() -> Crew:
    return Crew()


@pytest.fixture
def director(monkeypatch: pytest.MonkeyPatch, crew: Crew) -> Director:
    class Silence:
        def __init__(self, *_: object) -> None:
            pass

        def poll(self) -> list[object]:
            return []

    monkeypatch.setattr(demo, "Tail", Silence)
    monkeypatch.setattr(demo, "LOOK_EVERY_S", -1.0)
    options = Options(kill_in_session=2, down_s=-1.0, sessions_after_swap=1)
    story = Story(Console(quiet=True))
    return Director(options, Settings(), crew, story)  # type: ignore[arg-type]


def feed(director: Director, days: int, simulated: bool = False) -> list[int]:
    """Feed session by session; the sessions after which the director wanted to go on."""
    director.begin(Stretch("a stretch", make_frame(days), simulated))
    goes_on = []
    for day in range(days):
        director.fed(391)
        if not director.goes_on():
            break
        goes_on.append(day)
    return goes_on


def test_a_replica_is_killed_in_its_session_and_started_again(
    director: Director, crew: Crew
) -> None:
    feed(director, 6)
    assert crew.asked == [("kill", "inference-b"), ("start", "inference-b")]
    (kill,) = director.kills
    assert kill.ts == OPEN + 2 * DAY + 390 * MINUTE
    assert kill.from_ms <= kill.until_ms


def test_the_other_replica_is_killed_while_a_challenger_runs(
    director: Director, crew: Crew
) -> None:
    director._on_lifecycle(make_record("champion", "aa", 0))
    director._on_lifecycle(make_record("challenger", "bb", OPEN + 3 * DAY))
    feed(director, 9)
    assert [name for verb, name in crew.asked if verb == "kill"] == ["inference-b", "inference-a"]


def test_a_real_stretch_ends_a_session_after_a_refusal_and_a_simulated_one_goes_on(
    director: Director,
) -> None:
    director._on_lifecycle(make_record("champion", "aa", 0))
    director._on_lifecycle(make_record("challenger", "bb", OPEN))
    director._on_lifecycle(make_record("challenger", None, OPEN + 4 * DAY))
    assert [record.bundle for record in director.refusals] == [None]
    assert feed(director, 9)[-1] < 6
    assert len(feed(director, 9, simulated=True)) == 9


def test_a_promotion_is_no_refusal_and_ends_the_stretch(director: Director) -> None:
    director._on_lifecycle(make_record("champion", "aa", 0))
    director._on_lifecycle(make_record("challenger", "bb", OPEN))
    director._on_lifecycle(make_record("champion", "bb", OPEN + 2 * DAY, parent="aa"))
    director._on_lifecycle(make_record("challenger", None, OPEN + 2 * DAY))
    assert [record.bundle for record in director.promotions] == ["bb"]
    assert not director.refusals
    assert feed(director, 9)[-1] <= 4


def test_an_alarm_is_told_in_plain_words(director: Director) -> None:
    director._on_degradation(make_alarm())
    (line,) = director._story.lines
    assert "alarm" in line
    assert "since 2 Jan 2018 09:30" in line
    assert "20,000 bars" in line


def test_event_time_slows_down_between_an_alarm_and_its_challenger(
    director: Director, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [100.0]
    monkeypatch.setattr("workers.demo.time.monotonic", lambda: now[0])
    director._ticked = now[0]
    director._on_lifecycle(make_record("champion", "aa", 0))

    def passes(seconds: float) -> float:
        before = director.clock()
        now[0] += seconds
        return director.clock() - before

    assert passes(10) == pytest.approx(10)
    director._on_degradation(make_alarm())
    assert passes(10) == pytest.approx(1)
    director._on_lifecycle(make_record("challenger", "bb", OPEN))
    assert passes(10) == pytest.approx(10)
    director._on_degradation(make_alarm())
    assert passes(10) == pytest.approx(10), "the trainer answers no alarm while a challenger runs"
    director._on_lifecycle(make_record("challenger", None, OPEN))
    director._on_degradation(make_alarm())
    passes(director._options.retraining_s)
    assert passes(10) == pytest.approx(10), "nobody waits for ever"


def test_the_simulated_stretch_begins_with_the_next_session_and_its_symbols_are_labelled() -> None:
    options = Options(simulated_sessions=5, break_symbols=2, simulated_symbols=3, load_minutes=2)
    in_the_middle_of_a_session = OPEN + 2 * DAY + 100 * MINUTE
    stretch = demo._simulated(options, demo._load(options), in_the_middle_of_a_session)
    frame = stretch.frame
    assert stretch.simulated
    assert frame["ts"].min() == OPEN + 3 * DAY
    assert frame["ts"].is_monotonic_increasing
    assert frame["symbol"].str.startswith("SIM").all()
    watched = frame[frame["symbol"].isin(options.break_names)]
    assert len(watched) == 2 * 5 * 391
    assert len(frame) - len(watched) == 3 * 5 * 2


def test_the_real_stretch_is_spy_and_load_beside_it() -> None:
    options = Options(real="spy:2018-01-02..2018-01-03", simulated_symbols=3, load_minutes=2)
    frame = demo._real(options, demo._load(options)).frame
    assert (frame["symbol"] == "SPY").sum() == 2 * 391
    assert (frame["symbol"] != "SPY").sum() == 3 * 2 * 2


def test_children_see_the_world_of_their_parent(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = Settings(
        bootstrap_servers="k:1",
        database_url="sqlite:///x.db",
        store="/s",
        monitor=MonitorSettings(watch=("SPY", "SIM0901"), max_shadow_bars=77),
    )
    for name, value in demo.environment(settings).items():
        monkeypatch.setenv(name, value)
    child = Settings()
    assert child.bootstrap_servers == "k:1"
    assert child.database_url == "sqlite:///x.db"
    assert child.store == "/s"
    assert child.monitor == settings.monitor


def make_evidence(**changed: int) -> Evidence:
    sound = {
        "expected": 5,
        "published": 5,
        "distinct": 5,
        "lost": 0,
        "duplicated": 0,
        "unexpected": 0,
        "max_abs_difference": 0.0,
        "wrong_role": 0,
    }
    first, second = Schedule(), Schedule()
    for schedule in (first, second):
        schedule.give("champion", "aa", 0)
        schedule.give("champion", "bb", 5)
    nothing = pd.DataFrame()
    return Evidence(
        log=None,  # type: ignore[arg-type]
        predictions=nothing,
        outcomes=nothing,
        undisturbed=None,  # type: ignore[arg-type]
        comparison=proof.Comparison(**(sound | changed)),  # type: ignore[arg-type]
        schedules={0: first, 1: second},
        attention_summaries=5,
        dead_letters=0,
        bundles={},
    )


SOUND = {
    "lost": 0,
    "duplicated": 0,
    "unexpected": 0,
    "in_the_wrong_role": 0,
    "predictions": 5,
    "distinct_prediction_ids": 5,
    "max_abs_difference_from_undisturbed": 1e-7,
    "attention_summaries": 5,
    "dead_letters": 0,
    "replicas_killed": 2,
    "degradation_events": 1,
    "retrains": 1,
    "swaps": 1,
}


def test_a_sound_run_keeps_every_promise() -> None:
    promises = demo._promises(SOUND, make_evidence(), {"inference-a": 0})
    assert all(promises.values())


@pytest.mark.parametrize(
    "harm",
    [
        {"lost": 1},
        {"duplicated": 1},
        {"unexpected": 1},
        {"in_the_wrong_role": 1},
        {"max_abs_difference_from_undisturbed": 1e-4},
        {"max_abs_difference_from_undisturbed": float("nan")},
        {"attention_summaries": 4},
        {"dead_letters": 1},
        {"replicas_killed": 0},
        {"degradation_events": 0},
        {"retrains": 0},
        {"swaps": 0},
        {"predictions": 0},
    ],
    ids=str,
)
def test_every_harm_breaks_a_promise(harm: dict[str, float]) -> None:
    promises = demo._promises(SOUND | harm, make_evidence(), {"inference-a": 0})
    assert sum(not held for held in promises.values()) == 1


def test_a_worker_that_did_not_stop_in_order_breaks_a_promise() -> None:
    promises = demo._promises(SOUND, make_evidence(), {"inference-a": -9})
    assert not promises["every worker stopped in order"]


def test_champions_are_told_in_order_and_partitions_must_agree() -> None:
    evidence = make_evidence()
    assert evidence.champions == ["aa", "bb"]
    assert evidence.same_champions_everywhere
    evidence.schedules[1].give("champion", "cc", 9)
    assert not evidence.same_champions_everywhere


def test_the_report_says_so_when_the_swap_was_shown_on_simulated_bars(
    director: Director, tmp_path: Path
) -> None:
    director.begin(Stretch("real SPY minutes", make_frame(2), simulated=False))
    director.fed(700)
    assert "raised 0 alarm(s)" in " ".join(demo_report._alarms(director))
    director.begin(Stretch("simulated bars", make_frame(2), simulated=True))
    assert "shown on simulated ones" in " ".join(demo_report._alarms(director))


def test_the_reports_statistic_is_the_monitors_over_what_was_published(director: Director) -> None:
    target = Target(kind="volatility", horizon=30)
    calm = CALM.model_copy(update={"arl0_bars": 5_000, "n": 5_000})
    bundle = make_bundle(0, targets=(target,))
    bundle = replace(bundle, config=bundle.config.model_copy(update={"calibrations": (calm,)}))
    record = Lifecycle.model_validate_json(make_record("champion", bundle.version, OPEN))
    n = 90
    ts = OPEN + MINUTE * np.arange(n)
    close = 100 * np.exp(1e-3 * np.cumsum(np.random.default_rng(0).standard_normal(n)))
    bars = BarColumns(["SPY"] * n, ts, np.repeat(close, 5).reshape(n, 5))
    log = proof.BarsLog(bars, np.zeros(n, np.int64), np.zeros(n, np.int64))
    said = pd.DataFrame(
        {
            "symbol": "SPY",
            "ts": ts,
            "target": target.name,
            "value": np.log(1e-7),
            "role": "champion",
        }
        | {"bundle": bundle.version}
    )
    evidence = replace(make_evidence(), log=log, predictions=said, bundles={bundle.version: bundle})
    director.lifecycle.append(record)
    series = demo_report._replay_monitor(evidence, director, ["SPY"])
    assert series["statistic"].max() > 5
    assert set(series["bundle"]) == {bundle.version}
    assert series["ts"].iloc[0] == ts[31]  # the first bar after a whole horizon of forecasts
