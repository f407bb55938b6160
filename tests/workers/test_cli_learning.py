"""The commands that make bundles out of bars, as a user calls them."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from typer.testing import Result

from models.blending import EnsembleConfig
from models.bundle import Bundle, load, save
from models.dataset import BarsRejected
from models.pipeline import read_recipe
from models.training import TrainingRefused
from tests.workers.builders import make_bundle
from tests.workers.test_cli import few_bars, invoke
from workers import cli
from workers.config import Settings

RECIPE = """
burn_in = 16
length = 32
chunks_per_stream = 4

[network]
hidden = 4
layers = 1
window = 8
heads = 1
attention_size = 4

[training]
epochs = 2
seed = 7
"""


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> None:
    torch.set_num_threads(1)


def recipe(folder: Path, text: str = RECIPE) -> Path:
    path = folder / "recipe.toml"
    path.write_text(text)
    return path


def train(folder: Path, *options: str, out: str = "bundles", n: int = 900) -> Result:
    bars = folder / "bars.parquet"
    asked = ["--bars", str(bars if bars.exists() else few_bars(folder, n)), "--horizon", "5"]
    made_by = ["--recipe", str(recipe(folder)), "--device", "cpu", "--out", str(folder / out)]
    return invoke("train", *asked, *made_by, *options)


def only(folder: Path) -> Bundle:
    [path] = folder.iterdir()
    return load(path)


def same_weights(one: Bundle, other: Bundle) -> bool:
    return all(np.array_equal(a, other.weights[name]) for name, a in one.weights.items())


def test_a_recipe_decides_and_an_option_goes_before_it(tmp_path: Path) -> None:
    result = train(tmp_path, "--hidden", "6", "--epochs", "1")
    assert result.exit_code == 0, result.output
    bundle = only(tmp_path / "bundles")
    assert bundle.config.sequence.hidden == 6
    assert bundle.config.sequence.window == 8
    assert bundle.provenance.seed == 7
    assert bundle.metrics["epochs"] == 1


def test_a_recipe_with_a_wrong_field_is_refused(tmp_path: Path) -> None:
    few_bars(tmp_path, 5)
    path = recipe(tmp_path, RECIPE.replace("burn_in", "burning"))
    result = invoke(
        "train", "--bars", str(tmp_path / "bars.parquet"), "--out", "x", "--recipe", str(path)
    )
    assert isinstance(result.exception, ValueError)
    assert "burning" in str(result.exception)


def test_too_few_bars_are_refused_in_one_line(tmp_path: Path) -> None:
    result = train(tmp_path, n=200)
    assert isinstance(result.exception, BarsRejected)
    assert "too few bars" in str(result.exception)


def test_features_on_disk_make_the_very_same_bundle(tmp_path: Path) -> None:
    assert train(tmp_path, out="memory").exit_code == 0
    result = train(tmp_path, "--scratch", str(tmp_path / "scratch"), out="disk")
    assert result.exit_code == 0, result.output
    assert list((tmp_path / "scratch").glob("features-*.npy"))
    assert same_weights(only(tmp_path / "memory"), only(tmp_path / "disk"))


def test_a_checkpoint_is_gone_on_from(tmp_path: Path) -> None:
    assert train(tmp_path, out="whole").exit_code == 0
    run = str(tmp_path / "run.safetensors")
    assert train(tmp_path, "--checkpoint", run, out="first").exit_code == 0
    trained = only(tmp_path / "first")
    written = Path(run).stat().st_mtime_ns
    assert train(tmp_path, "--checkpoint", run, out="second").exit_code == 0
    assert Path(run).stat().st_mtime_ns == written, "both epochs were done already"
    assert same_weights(trained, only(tmp_path / "second"))
    assert same_weights(trained, only(tmp_path / "whole"))


def test_a_checkpoint_of_another_run_is_refused_in_one_line(tmp_path: Path) -> None:
    run = str(tmp_path / "run.safetensors")
    assert train(tmp_path, "--checkpoint", run).exit_code == 0
    error = train(tmp_path, "--checkpoint", run, "--seed", "8").exception
    assert isinstance(error, TrainingRefused)
    assert "another configuration" in str(error)
    assert cli._is_expected(error)


def test_an_ensemble_is_one_bundle_and_has_no_checkpoint(tmp_path: Path) -> None:
    result = train(tmp_path, "--ensemble", "stacked", n=1_600)
    assert result.exit_code == 0, result.output
    network = only(tmp_path / "bundles").config.network
    assert isinstance(network, EnsembleConfig)
    assert network.weighting == "stacked"
    refused = train(tmp_path, "--ensemble", "equal", "--checkpoint", str(tmp_path / "run"))
    assert refused.exit_code == 2


def test_fine_tuning_the_heads_leaves_all_else_as_it_is(tmp_path: Path) -> None:
    assert train(tmp_path).exit_code == 0
    parent = only(tmp_path / "bundles")
    asked = ["--bundle", str(tmp_path / "bundles" / parent.version), "--bars"]
    asked += [str(tmp_path / "bars.parquet"), "--device", "cpu", "--epochs", "1", "--out"]
    told = recipe(tmp_path, "burn_in = 16\nlength = 32\nchunks_per_stream = 4\nbatch = 4\n")
    moved = {}
    for name, options in {"heads": ["--only-heads"], "all": []}.items():
        result = invoke(
            "fine-tune", *asked, str(tmp_path / name), "--recipe", str(told), *options,
            "--learning-rate", "0.01",
        )  # fmt: skip
        assert result.exit_code == 0, result.output
        child = only(tmp_path / name)
        assert child.provenance.parent == parent.version
        moved[name] = {
            n for n, a in child.weights.items() if not np.array_equal(a, parent.weights[n])
        }
    assert moved["heads"] == {"head.weight", "head.bias", "skip.weight"}
    assert {"gate.weight", "recurrent.0.weight_hh_l0"} < moved["all"]


def test_a_search_leaves_a_recipe_that_train_takes_and_goes_on_where_it_ended(
    tmp_path: Path,
) -> None:
    bars, out = few_bars(tmp_path), tmp_path / "tuning"
    asked = ["tune", "--bars", str(bars), "--horizon", "5", "--recipe", str(recipe(tmp_path))]
    asked += ["--epochs", "1", "--out", str(out), "--trials"]
    for trials in ("1", "2"):
        result = invoke(*asked, trials)
        assert result.exit_code == 0, result.output
    assert {path.name for path in out.iterdir()} >= {
        "search.db",
        "recipe.json",
        "tuning_history.png",
        "tuning_options.png",
    }
    found = read_recipe(out / "recipe.json")
    assert found.training.epochs == 1
    assert found.length == 32
    assert {"hidden", "window", "dropout"} <= set(found.network)


def test_clean_fills_holes_up_to_the_limit_and_marks_what_it_filled(tmp_path: Path) -> None:
    frame = pd.read_parquet(few_bars(tmp_path, 40))
    at = frame["ts"].rank(method="dense")
    holes = (frame["symbol"] == "A") & (at.between(11, 12) | at.between(21, 23))
    frame[~holes].to_parquet(tmp_path / "bars.parquet")
    out = tmp_path / "new" / "clean.parquet"
    asked = ["--bars", str(tmp_path / "bars.parquet"), "--limit", "2", "--fill", "backward"]
    result = invoke("clean", *asked, "--out", str(out))
    assert result.exit_code == 0, result.output
    whole = pd.read_parquet(out)
    filled = whole[whole["absent"]]
    assert len(filled) == 2, "the hole of three stays"
    after = frame[(frame["symbol"] == "A") & (at == 13)]
    assert (filled["close"] == after["open"].item()).all()
    assert (filled["volume"] == 0).all()


def test_two_bundles_are_told_apart_field_by_field(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GPT_TRADER_STORE", str(tmp_path))
    first, second = make_bundle(seed=0), make_bundle(seed=1)
    for bundle in (first, second):
        save(bundle, tmp_path / "bundles")
    result = invoke("models", "diff", first.version, second.version)
    assert result.exit_code == 0, result.output
    assert "origin.seed" in result.output
    assert "weights, moved by" in result.output
    assert "config.network" not in result.output, "both have the same"
    alike = invoke("models", "diff", first.version, first.version)
    assert "origin" not in alike.output


def test_a_system_in_which_nothing_has_happened_has_a_report(
    fresh_topics: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KAFKA_BOOTSTRAP_SERVERS", fresh_topics.bootstrap_servers)
    monkeypatch.setenv("GPT_TRADER_DATABASE_URL", f"sqlite:///{tmp_path}/registry.db")
    result = invoke("report", "--out", str(tmp_path / "report"))
    assert result.exit_code == 0, result.output
    assert "<html" in (tmp_path / "report" / "report.html").read_text()


@pytest.mark.parametrize(
    ("options", "library", "instead"),
    [
        ((), "torch", "--library sklearn"),
        (("--ensemble", "equal"), "xgboost", "no --ensemble"),
        (("--library", "sklearn"), "sklearn", "gpt-trader-stream[ensemble]"),
    ],
)
def test_what_is_not_installed_is_said_with_what_to_do(
    options: tuple[str, ...],
    library: str,
    instead: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == library else found(name)
    )
    refused = train(tmp_path, *options)
    assert refused.exit_code == 2
    said = " ".join(refused.output.replace("│", " ").split())
    assert library in said
    assert instead in said


def test_evaluate_writes_numbers_and_a_page(tmp_path: Path) -> None:
    bars = few_bars(tmp_path, 2_500)
    table = pd.read_parquet(bars)
    table.assign(ts=table["ts"] + 1_600_000_000_000).to_parquet(bars)
    told, page = tmp_path / "out.json", tmp_path / "out.html"
    asked = ["--bars", str(bars), "--horizon", "6", "--fast", "--seeds", "1", "--threads", "1"]
    result = invoke("evaluate", *asked, "--json", str(told), "--report", str(page))
    assert result.exit_code == 0, result.output
    found = json.loads(told.read_text())
    rows = {row["model"]: row for row in found["rows"]}
    assert {"har_tod", "xgboost", "lstm", "lstm_attention", "blend"} <= set(rows)
    for name, row in rows.items():
        assert {"qlike", "mse_log", "n", "seconds_fit", "seconds_predict", "dm_vs"} <= set(row), (
            name
        )
    assert found["protocol"]["horizon_bars"] == 6
    assert found["protocol"]["bars_impossible"] == 0
    assert page.read_text().count("data:image/png;base64") >= 3
