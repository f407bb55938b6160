import subprocess
import time
from pathlib import Path

import pytest

from workers.fleet import Fleet, WorkerDied, free_port


@pytest.fixture
def fleet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Fleet:
    """Starts `python script.py` in place of the command."""
    script = tmp_path / "workers" / "cli.py"
    script.parent.mkdir()
    (script.parent / "__init__.py").touch()
    script.write_text(
        "import os, signal, sys, time\n"
        "print(sys.argv[1], os.environ['COLOUR'], flush=True)\n"
        "if sys.argv[1] == 'dies': sys.exit('out of luck')\n"
        "if sys.argv[1] == 'stubborn': signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "else: signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))\n"
        "print('ready', flush=True)\n"
        "time.sleep(60)\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return Fleet({"COLOUR": "red"}, tmp_path / "logs")


def wait_for(text: str, log: Path) -> None:
    deadline = time.monotonic() + 20
    while text not in (log.read_text() if log.exists() else ""):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_workers_get_the_environment_log_to_their_file_and_stop_in_order(fleet: Fleet) -> None:
    with fleet:
        fleet.start("one", "obedient")
        fleet.start("two", "obedient")
        for name in ("one", "two"):
            wait_for("ready", fleet.log_file(name))
        fleet.check()
        assert "obedient red" in fleet.log_file("one").read_text()
        assert fleet.stop() == {"one": 0, "two": 0}


def test_a_worker_that_does_not_stop_is_killed_and_its_status_says_so(fleet: Fleet) -> None:
    fleet.start("one", "stubborn")
    wait_for("ready", fleet.log_file("one"))
    assert fleet.stop(within_s=0.2) == {"one": -9}


def test_a_worker_that_ends_by_itself_is_an_error_with_the_end_of_its_log(fleet: Fleet) -> None:
    with fleet:
        fleet.start("one", "dies")
        wait_for("out of luck", fleet.log_file("one"))
        time.sleep(0.2)
        with pytest.raises(WorkerDied, match=r"one ended with status 1:\n(.|\n)*out of luck"):
            fleet.check()


def test_a_killed_worker_may_be_started_again_and_goes_on_in_its_log(fleet: Fleet) -> None:
    with fleet:
        fleet.start("one", "obedient")
        wait_for("ready", fleet.log_file("one"))
        fleet.kill("one")
        fleet.check()
        fleet.start("one", "obedient")
        wait_for("ready\nobedient", fleet.log_file("one"))


def test_one_that_ended_is_told_once_and_one_of_several_can_be_stopped(fleet: Fleet) -> None:
    with fleet:
        fleet.start("dying", "dies")
        fleet.start("one", "obedient")
        fleet.start("two", "obedient")
        for name in ("one", "two"):
            wait_for("ready", fleet.log_file(name))
        wait_for("out of luck", fleet.log_file("dying"))
        deadline = time.monotonic() + 20
        while not (ended := fleet.ended()):
            assert time.monotonic() < deadline
        assert ended == {"dying": 1}
        assert fleet.ended() == {}
        assert fleet.stop("one") == {"one": 0}
        assert fleet.stop() == {"two": 0}


def test_nothing_outlives_the_fleet_when_the_block_fails(fleet: Fleet) -> None:
    def broken_demo() -> None:
        with fleet:
            fleet.start("one", "obedient")
            started.append(fleet._running["one"])
            raise RuntimeError("the demo broke")

    started: list[subprocess.Popen[bytes]] = []
    with pytest.raises(RuntimeError):
        broken_demo()
    (process,) = started
    assert process.poll() is not None


def test_a_free_port_is_free() -> None:
    assert 1024 < free_port() < 65_536


def test_a_frozen_worker_does_nothing_until_it_is_let_go(fleet: Fleet) -> None:
    with fleet:
        fleet.start("one", "obedient")
        wait_for("ready", fleet.log_file("one"))
        (pid,) = (process.pid for process in fleet._running.values())

        def state() -> str:
            return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0]

        with fleet.frozen("one"):
            deadline = time.monotonic() + 10
            while state() != "T":
                assert time.monotonic() < deadline
        assert fleet.stop() == {"one": 0}
