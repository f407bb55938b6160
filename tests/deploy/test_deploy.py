import json
import os
import re
import shutil
import subprocess
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer.main
import yaml
from packaging.requirements import Requirement
from typer.core import TyperGroup

from workers.cli import app
from workers.config import Settings
from workers.local_kafka import KAFKA_VERSION
from workers.metrics import Metrics
from workers.service import STOP_WITHIN_S

DEPLOY = Path(__file__).parents[2] / "deploy"
COMPOSE = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
OURS = {name: s for name, s in SERVICES.items() if "build" in s}
DOCKERFILE = (DEPLOY / "Dockerfile").read_text()
ALERTS = yaml.safe_load((DEPLOY / "prometheus/alerts.yml").read_text())
RULES = [rule for group in ALERTS["groups"] for rule in group["rules"]]
DASHBOARD = json.loads((DEPLOY / "grafana/gpt-trader-stream.json").read_text())


def seconds(duration: str) -> int:
    assert duration.endswith("s")
    return int(duration[:-1])


# ---- compose ----


@pytest.mark.parametrize(
    "name", [n for n, s in OURS.items() if "alembic" not in s.get("entrypoint", [])]
)
def test_every_command_of_compose_is_one_that_the_cli_has(name: str) -> None:
    command: Any = typer.main.get_command(app)
    words = list(OURS[name]["command"])
    while isinstance(command, TyperGroup):
        command = command.commands[words.pop(0)]
    options = {option for parameter in command.params for option in parameter.opts}
    assert {word for word in words if word.startswith("--")} <= options


def test_every_variable_of_compose_is_one_that_the_config_reads(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, value in OURS["inference"]["environment"].items():
        assert name in ("KAFKA_BOOTSTRAP_SERVERS", "DATABASE_URL") or name.startswith("GPT_TRADER_")
        monkeypatch.setenv(name, re.sub(r"\$\{\w+:[-?]([^}]*)\}", r"\1", value))
    monkeypatch.setenv("GPT_TRADER_REPLICA", "3")
    settings = Settings()
    assert settings.bootstrap_servers == "kafka:9092"
    assert settings.kafka.partitions == 4
    assert settings.http.port == 9100
    assert settings.replica == "3"


def test_what_a_service_depends_on_exists_and_can_be_ready() -> None:
    for name, service in SERVICES.items():
        needs = service.get("depends_on", {})
        for need, how in needs.items() if isinstance(needs, dict) else ():
            if how["condition"] == "service_healthy":
                assert "healthcheck" in SERVICES[need], f"{name} waits for {need}"
            else:
                assert SERVICES[need]["restart"] == "no", f"{name} waits for the end of {need}"
        assert set(needs) <= set(SERVICES)


def test_every_named_volume_is_declared_and_every_mounted_file_exists() -> None:
    for service in SERVICES.values():
        for volume in service.get("volumes", []):
            source = re.sub(r"^\$\{\w+:-([^}]*)\}", r"\1", volume).split(":")[0]
            if source.startswith("."):
                assert (DEPLOY / source).exists() or source == "./bars.parquet", source
            else:
                assert source in COMPOSE["volumes"]


def test_containers_get_longer_to_stop_than_workers_take() -> None:
    for name in ("inference", "monitor", "trainer"):
        assert seconds(OURS[name]["stop_grace_period"]) > STOP_WITHIN_S


def test_containers_are_confined() -> None:
    for service in OURS.values():
        assert service["read_only"] is True
        assert service["cap_drop"] == ["ALL"]


def test_no_password_is_written_down() -> None:
    assert re.findall(r"PASSWORD: (?!\$\{)", (DEPLOY / "compose.yaml").read_text()) == []


def test_compose_runs_the_kafka_that_the_tests_ran_on() -> None:
    assert SERVICES["kafka"]["image"] == f"apache/kafka:{KAFKA_VERSION}"


# ---- replica slots ----


def slot_holders(slots: Path) -> Iterator[subprocess.Popen[str]]:
    """Endless replicas that say their slot and stay."""
    script = DEPLOY / "replica-slot.sh"
    while True:
        yield subprocess.Popen(
            [script, slots, "sh", "-c", 'echo "$GPT_TRADER_REPLICA"; exec sleep 60'],
            stdout=subprocess.PIPE,
            text=True,
        )


def slot_of(process: subprocess.Popen[str]) -> int:
    assert process.stdout is not None
    return int(process.stdout.readline())


def test_live_replicas_have_different_slots_and_a_killed_ones_is_taken_again(
    tmp_path: Path,
) -> None:
    started = slot_holders(tmp_path / "slots")
    replicas = [next(started) for _ in range(4)]
    try:
        slots = [slot_of(replica) for replica in replicas]
        assert sorted(slots) == [0, 1, 2, 3]
        victim = replicas[slots.index(1)]
        victim.kill()
        victim.wait()
        replicas.append(next(started))
        assert slot_of(replicas[-1]) == 1
    finally:
        for replica in replicas:
            replica.kill()
            replica.communicate()


def test_the_worker_takes_the_place_of_the_script_so_that_signals_reach_it(tmp_path: Path) -> None:
    replica = next(slot_holders(tmp_path / "slots"))
    assert slot_of(replica) == 0
    replica.terminate()
    began = time.monotonic()
    replica.communicate()
    assert time.monotonic() - began < 30


def test_the_status_of_the_worker_is_the_status_of_the_container(tmp_path: Path) -> None:
    done = subprocess.run([DEPLOY / "replica-slot.sh", tmp_path, "sh", "-c", "exit 7"], check=False)
    assert done.returncode == 7


# ---- image ----


def test_the_image_does_not_run_as_root() -> None:
    assert re.search(r"^USER 10001$", DOCKERFILE, re.MULTILINE)


def test_everything_the_image_copies_is_there_and_let_through() -> None:
    root = DEPLOY.parent
    allowed = {
        line[1:]
        for line in (root / ".dockerignore").read_text().splitlines()
        if line.startswith("!")
    }
    for sources in re.findall(r"^COPY (?!--from)(.*) \S+$", DOCKERFILE, re.MULTILINE):
        for source in sources.split():
            assert (root / source).exists() or source == "README.md", source
            assert any(source == a or source.startswith(f"{a}/") for a in allowed), source


def test_image_compose_and_prometheus_agree_on_the_port() -> None:
    port = re.search(r"GPT_TRADER_HTTP__PORT=(\d+)", DOCKERFILE)
    assert port is not None
    assert f"EXPOSE {port[1]}" in DOCKERFILE
    assert OURS["inference"]["environment"]["GPT_TRADER_HTTP__PORT"] == port[1]
    for job in yaml.safe_load((DEPLOY / "prometheus/prometheus.yml").read_text())["scrape_configs"]:
        [lookup] = job["dns_sd_configs"]
        assert str(lookup["port"]) == port[1]
        assert set(lookup["names"]) == {job["job_name"]} <= set(OURS)


def test_the_pinned_packages_are_hashed_and_name_no_index() -> None:
    text = (DEPLOY / "requirements.txt").read_text()
    pins = re.findall(r"^([a-z0-9][a-z0-9._-]*)==\S+.* \\$", text, re.MULTILINE)
    assert len(pins) == len(re.findall(r"^[a-z]", text, re.MULTILINE)) > 100
    assert "://" not in text
    assert "index" not in text.lower()
    for block in re.split(r"^(?=[a-z0-9])", text, flags=re.MULTILINE)[1:]:
        assert "--hash=sha256:" in block


def test_the_pins_are_of_the_packages_that_the_project_asks_for() -> None:
    """If this fails: `make lock`."""
    project = tomllib.loads((DEPLOY.parent / "pyproject.toml").read_text())
    asked = [
        Requirement(text)
        for texts in (
            project["project"]["dependencies"],
            *project["project"]["optional-dependencies"].values(),
            *project["dependency-groups"].values(),
        )
        for text in texts
    ]
    pins = re.findall(
        r"^([a-z0-9][a-z0-9._-]*)==(\S+)", (DEPLOY / "requirements.txt").read_text(), re.MULTILINE
    )
    for requirement in asked:
        if requirement.name != "gpt-trader-stream":
            versions = [version for name, version in pins if name == requirement.name]
            assert versions, requirement
            assert all(requirement.specifier.contains(version) for version in versions), requirement


# ---- alerts and dashboard ----


def series() -> set[str]:
    """Every series name that a worker exposes, labelled metrics without a sample included."""
    suffixes = {
        "counter": ("_total",),
        "histogram": ("_bucket", "_sum", "_count"),
        "gauge": ("",),
        "info": ("_info",),
    }
    return {
        metric._name + suffix
        for metric in vars(Metrics()).values()
        if hasattr(metric, "_labelnames")
        for suffix in suffixes[metric._type]
    }


def expressions() -> Iterator[str]:
    yield from (rule["expr"] for rule in RULES)
    for panel in DASHBOARD["panels"]:
        yield from (target["expr"] for target in panel.get("targets", []))


def test_rules_and_dashboard_ask_for_metrics_that_exist() -> None:
    asked = {name for e in expressions() for name in re.findall(r"gpt_trader_\w+", e)}
    assert asked <= series()


def test_texts_of_alerts_name_metrics_that_exist() -> None:
    said = {
        name
        for rule in RULES
        for text in rule["annotations"].values()
        for name in re.findall(r"gpt_trader_\w+", text)
    }
    assert said <= series()


def test_every_alert_says_how_bad_what_and_what_to_do() -> None:
    for rule in RULES:
        assert rule["labels"]["severity"] in ("page", "ticket", "info"), rule["alert"]
        assert {"summary", "description"} == set(rule["annotations"]), rule["alert"]
    assert len({rule["alert"] for rule in RULES}) == len(RULES)


def test_panels_have_a_unit_a_description_and_a_place_of_their_own() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        if panel["type"] != "row":
            assert panel["description"], panel["title"]
            assert panel["fieldConfig"]["defaults"]["unit"], panel["title"]
        at = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(at["x"], at["x"] + at["w"])
            for y in range(at["y"], at["y"] + at["h"])
        }
        assert not cells & taken, panel["title"]
        assert all(x < 24 for x, _ in cells), panel["title"]
        taken |= cells


promtool = pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")


@promtool
@pytest.mark.parametrize(
    "arguments",
    [
        ["check", "config", str(DEPLOY / "prometheus/prometheus.yml")],
        ["test", "rules", str(Path(__file__).parent / "alerts_test.yml")],
    ],
    ids=["configuration", "alerts"],
)
def test_prometheus_itself_accepts(arguments: list[str]) -> None:
    done = subprocess.run(["promtool", *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


# ---- Makefile and continuous integration ----


def test_make_help_lists_what_the_readme_promises() -> None:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MAKE")}
    done = subprocess.run(
        ["make", "help"],
        cwd=DEPLOY.parent,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    listed = set(re.findall(r"^  make (\w+) ", done.stdout, re.MULTILINE))
    assert {"setup", "demo", "test", "lint", "bench", "clean"} <= listed


def test_migrations_are_named_after_their_revision() -> None:
    for path in (DEPLOY / "migrations/versions").glob("*.py"):
        assert f'revision = "{path.name[:4]}"' in path.read_text()
