"""The command line as a user meets it: help, errors in one line, true exit status."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
import typer
from pydantic import ValidationError
from typer.testing import CliRunner, Result

from models.bundle import BundleRejected, load, save
from tests.workers.builders import make_bars, make_bundle
from workers import cli
from workers.cli.shared import show

ROOT = Path(cli.__file__).parent.parent.parent


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(cli.app, arguments, env={"COLUMNS": "200", "NO_COLOR": "1"})


def run(*arguments: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "workers.cli", *arguments],
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "200"} | environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def commands() -> list[tuple[str, ...]]:
    def names(app: typer.Typer) -> list[str]:
        return [c.name or str(getattr(c.callback, "__name__", "")) for c in app.registered_commands]

    def under(app: typer.Typer, *path: str) -> list[tuple[str, ...]]:
        found = [(*path, name) for name in names(app)]
        for group in app.registered_groups:
            assert group.typer_instance is not None
            found += under(group.typer_instance, *path, *([group.name] if group.name else []))
        return found

    return under(cli.app)


def test_the_first_help_names_every_command_and_shows_the_way() -> None:
    text = invoke("--help").output
    names = (
        "demo kafka topics feed inference monitor trainer train predict models dead-letter bench"
    )
    for name in names.split():
        assert f" {name} " in text
    assert "gpt-trader-stream topics create" in text


@pytest.mark.parametrize("command", commands(), ids=" ".join)
def test_every_command_and_every_option_explains_itself(command: tuple[str, ...]) -> None:
    result = invoke(*command, "--help")
    assert result.exit_code == 0
    assert len(result.output.splitlines()) > 3


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys, workers.cli; from typer.testing import CliRunner;"
        "CliRunner().invoke(workers.cli.app, ['feed', '--help']);"
        "sys.exit(','.join(m for m in ('torch', 'pandas', 'numpy', 'confluent_kafka', 'matplotlib')"
        " if m in sys.modules) or 0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is torch's")
def test_a_replica_imports_nothing_that_it_does_not_need(tmp_path: Path) -> None:
    """What it imports is missing when a killed one is to come back."""
    code = (
        "import sys; from pathlib import Path; import workers.inference as worker;"
        "from models.bundle import load; from models.runtimes import open_runtime;"
        "worker.set_threads(1); open_runtime(load(Path(sys.argv[1])), 'auto', 'auto');"
        "heavy = ('torch', 'pandas', 'pyarrow', 'sqlalchemy', 'matplotlib', 'faust');"
        "sys.exit(','.join(m for m in heavy if m in sys.modules) or 0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, save(make_bundle(), tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_no_command_is_a_question_answered_with_help() -> None:
    assert "Usage" in invoke().output


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("predict", "--bundle", ".", "--bars", "nowhere.parquet", "--out", "x"), "MANIFEST"),
        (("train", "--bars", "spy:1999", "--out", "x"), "holds no bars"),
        (("train", "--bars", "nowhere.parquet", "--out", "x"), "nowhere.parquet"),
    ],
)
def test_what_the_user_can_mend_is_one_line_and_status_1(
    tmp_path: Path, arguments: tuple[str, ...], words: str
) -> None:
    done = run(*arguments, cwd=tmp_path)
    assert done.returncode == 1
    assert words in done.stderr
    assert "Traceback" not in done.stderr


def few_bars(folder: Path, n: int = 900) -> Path:
    bars = make_bars(["A", "B"], n)
    table = pd.DataFrame({"symbol": bars.symbols, "ts": bars.ts})
    table[["open", "high", "low", "close", "volume"]] = bars.ohlcv
    table.to_parquet(folder / "bars.parquet")
    return folder / "bars.parquet"


@pytest.mark.parametrize(
    ("options", "model"),
    [
        (
            "--hidden 8 --layers 1 --window 6 --network mode=window --network attention=self "
            "--network cell=gru --network bidirectional=true --network layer_norm=true",
            "1 x bidirectional GRU of 8, attention `self`, the last 6 steps",
        ),
        ("--library sklearn", "a line for each target over the last 1 step(s)"),
    ],
)
def test_train_makes_what_its_options_ask_for(tmp_path: Path, options: str, model: str) -> None:
    bars, out = few_bars(tmp_path), tmp_path / "bundles"
    asked = ["--bars", str(bars), "--out", str(out), "--horizon", "5", "--epochs", "1"]
    result = invoke("train", *asked, "--device", "cpu", *options.split())
    assert result.exit_code == 0, result.output
    [path] = out.iterdir()
    assert load(path).config.network.summary() == model


def test_choices_that_do_not_go_together_are_refused_before_any_work(tmp_path: Path) -> None:
    asked = ["--bars", str(few_bars(tmp_path, 5)), "--out", str(tmp_path / "bundles")]
    result = invoke("train", *asked, "--network", "bidirectional=true")
    assert isinstance(result.exception, ValidationError)
    assert "bidirectional needs mode='window'" in str(result.exception)
    assert invoke("train", *asked, "--network", "gru").exit_code == 2


def test_a_setting_that_is_wrong_is_named(tmp_path: Path) -> None:
    done = run("topics", "check", cwd=tmp_path, GPT_TRADER_KAFKA__PARTITIONS="-3")
    assert done.returncode == 1
    assert "kafka.partitions" in done.stderr
    assert "Traceback" not in done.stderr


def test_predict_writes_what_the_engine_says_for_every_warm_bar(tmp_path: Path) -> None:
    bundle = make_bundle()
    path = save(bundle, tmp_path)
    bars = make_bars(["A", "B"], 450)
    table = pd.DataFrame({"symbol": bars.symbols, "ts": bars.ts})
    table[["open", "high", "low", "close", "volume"]] = bars.ohlcv
    table.sample(frac=1, random_state=1).to_parquet(tmp_path / "bars.parquet")
    out = tmp_path / "new" / "said.parquet"
    result = invoke(
        "predict", "--bundle", str(path), "--bars", str(tmp_path / "bars.parquet"), "--out", str(out)
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    said = pd.read_parquet(out)
    assert set(said["target"]) == {target.name for target in bundle.config.targets}
    assert said["id"].is_unique
    first = said["ts"].min()
    warm = (bars.ts >= first).sum()
    assert len(said) == warm * len(bundle.config.targets)
    assert set(said["bundle"]) == {bundle.version}


def test_predict_says_the_same_in_another_runtime_and_refuses_one_that_cannot(
    tmp_path: Path,
) -> None:
    path, bars = save(make_bundle(), tmp_path), few_bars(tmp_path, 450)
    asked = ["predict", "--bundle", str(path), "--bars", str(bars), "--device", "cpu", "--out"]
    for runtime in ("torch", "onnx"):
        result = invoke(*asked, str(tmp_path / runtime), "--runtime", runtime)
        assert result.exit_code == 0, result.output
    one, other = (pd.read_parquet(tmp_path / runtime) for runtime in ("torch", "onnx"))
    pd.testing.assert_frame_equal(one, other, atol=1e-5, rtol=1e-5)
    refused = invoke(*asked, str(tmp_path / "none"), "--runtime", "sklearn").exception
    assert isinstance(refused, BundleRejected)
    assert "take torch" in str(refused)


def test_json_is_one_object_on_standard_output(capsys: pytest.CaptureFixture[str]) -> None:
    show({"predictions_per_s": 12345, "runtime": "torch"}, json=True)
    assert json.loads(capsys.readouterr().out)["predictions_per_s"] == 12345
    show({"predictions_per_s": 12345, "runtime": "torch"}, json=False)
    assert "12,345" in capsys.readouterr().out
