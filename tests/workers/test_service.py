import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http import HTTPStatus
from typing import Any
from urllib.error import HTTPError
from urllib.request import urlopen

import pytest

from workers.config import HttpSettings
from workers.service import STOPPED_TOO_SLOWLY, Service

LOCAL = HttpSettings(host="127.0.0.1", stalled_after_s=10.0)


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def get(service: Service, path: str) -> tuple[int, dict[str, str], str]:
    try:
        with urlopen(f"http://127.0.0.1:{service.port}{path}", timeout=5) as answer:
            return answer.status, dict(answer.headers), answer.read().decode()
    except HTTPError as error:
        with error:
            return error.code, dict(error.headers), error.read().decode()


def healthz(service: Service) -> tuple[int, dict[str, Any]]:
    status, _, body = get(service, "/healthz")
    return status, json.loads(body)


def test_healthz_is_503_before_the_first_progress() -> None:
    with Service("inference", LOCAL, clock=Clock()) as service:
        status, body = healthz(service)
    assert status == HTTPStatus.SERVICE_UNAVAILABLE
    assert (body["worker"], body["status"]) == ("inference", "starting")


def test_healthz_follows_progress_not_the_process() -> None:
    clock = Clock()
    with Service("inference", LOCAL, clock=clock) as service:
        service.progress()
        clock.now += 10.0
        at_the_limit = healthz(service)
        clock.now += 0.001
        past_it = healthz(service)
        service.progress()
        again = healthz(service)
    assert (at_the_limit[0], at_the_limit[1]["status"]) == (200, "ok")
    assert at_the_limit[1]["seconds_since_progress"] == 10.0
    assert (past_it[0], past_it[1]["status"]) == (503, "stalled")
    assert (again[0], again[1]["seconds_since_progress"]) == (200, 0.0)


def test_details_are_merged_by_name_and_shown() -> None:
    with Service("inference", LOCAL) as service:
        service.publish(partitions={"0": {"position": 17}}, bundle="abc")
        service.publish(bundle="def")
        _, body = healthz(service)
    assert body["details"] == {"partitions": {"0": {"position": 17}}, "bundle": "def"}


def test_metrics_are_served_and_hold_the_age_of_progress() -> None:
    clock = Clock()
    with Service("inference", LOCAL, clock=clock) as service:
        service.metrics.bars.labels("ok").inc(5)
        service.progress()
        clock.now += 2.5
        status, headers, page = get(service, "/metrics")
    assert status == 200
    assert headers["Content-Type"].startswith("text/plain")
    assert 'gpt_trader_bars_total{status="ok"} 5.0' in page
    assert "gpt_trader_progress_age_seconds 2.5" in page


@pytest.mark.parametrize("path", ["/", "/metricsx", "/healthz/", "/../etc/passwd"])
def test_other_paths_are_404(path: str) -> None:
    with Service("inference", LOCAL) as service:
        assert get(service, path)[0] == 404


def test_a_query_string_does_not_hide_a_path() -> None:
    with Service("inference", LOCAL) as service:
        assert get(service, "/healthz?probe=1")[1]["Content-Type"] == "application/json"


def test_a_hanging_client_does_not_block_the_next_one() -> None:
    with (
        Service("inference", LOCAL) as service,
        socket.create_connection(("127.0.0.1", service.port)),
    ):
        service.progress()
        assert healthz(service)[0] == 200


def test_a_taken_port_is_an_error_at_the_start() -> None:
    with Service("one", LOCAL) as one:
        taken = HttpSettings(host="127.0.0.1", port=one.port)
        with pytest.raises(OSError, match="in use"), Service("two", taken):
            pass


def test_the_port_is_free_again_after_the_end() -> None:
    with Service("one", LOCAL) as one:
        port = one.port
    with Service("two", HttpSettings(host="127.0.0.1", port=port)) as two:
        assert two.port == port


def test_stop_from_another_thread_ends_the_loop_and_the_wait() -> None:
    with Service("inference", LOCAL) as service:
        threading.Timer(0.05, service.stop).start()
        began = time.monotonic()
        went_on = service.wait(30.0)
        assert not went_on
        assert not service.running
        assert time.monotonic() - began < 10
        assert healthz(service)[1]["status"] == "stopping"


def test_an_error_leaves_the_frame_as_it_is() -> None:
    with pytest.raises(ZeroDivisionError), Service("inference", LOCAL) as service:
        raise ZeroDivisionError
    assert not service.running


def test_handlers_are_put_back() -> None:
    before = [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)]
    with Service("inference", LOCAL):
        assert [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)] != before
    assert [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)] == before
    assert signal.set_wakeup_fd(-1) == -1


def test_outside_the_main_thread_signals_are_left_alone() -> None:
    before = signal.getsignal(signal.SIGTERM)
    seen = []

    def work() -> None:
        with Service("inference", LOCAL):
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [before]


WORKER = """
    import sys, time, ctypes
    from workers.config import HttpSettings
    from workers.logs import set_up
    from workers.service import Service
    set_up("w")
    http = HttpSettings(host="127.0.0.1")
    with Service("w", http, stop_within_s=float(sys.argv[1])) as service:
        sys.stdout.write("up\\n"); sys.stdout.flush()
        {loop}
    sys.stdout.write("done\\n"); sys.stdout.flush()
"""
POLITE = "while service.running: service.progress(); time.sleep(0.01)"
DEAF = "[time.sleep(0.01) for _ in iter(int, 1)]"
IN_C = "[ctypes.CDLL(None).sleep(60) for _ in iter(int, 1)]"


@contextmanager
def worker(loop: str, stop_within_s: float = 60.0) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(WORKER).format(loop=loop), str(stop_within_s)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "up\n"
        yield process
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_first_signal_is_an_ordered_stop_with_status_0(number: signal.Signals) -> None:
    with worker(POLITE) as process:
        process.send_signal(number)
        out, err = process.communicate(timeout=20)
    assert (process.returncode, out) == (0, "done\n")
    assert f"event=stop_asked signal={number.name}" in err
    assert "event=stopped" in err


@pytest.mark.parametrize("loop", [DEAF, IN_C], ids=["busy in Python", "hanging in a C call"])
@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)], ids=["term", "int"]
)
def test_second_signal_forces_exit(loop: str, number: signal.Signals, status: int) -> None:
    with worker(loop) as process:
        assert process.stderr is not None
        process.send_signal(signal.SIGTERM)
        while "stop_asked" not in process.stderr.readline():
            pass
        process.send_signal(number)
        out, err = process.communicate(timeout=20)
    assert (process.returncode, out) == (status, "")
    assert "event=stop_forced" in err


def test_a_stop_that_takes_too_long_is_forced_with_its_own_status() -> None:
    with worker(DEAF, stop_within_s=0.2) as process:
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=20)
    assert process.returncode == STOPPED_TOO_SLOWLY
    assert "not stopped after 0.2 s" in err


def test_a_crash_has_the_status_of_a_crash() -> None:
    with worker("raise RuntimeError('boom')") as process:
        _, err = process.communicate(timeout=20)
    assert process.returncode == 1
    assert "cause=RuntimeError" in err
