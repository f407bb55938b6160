"""Where the benchmarks of the whole worker play: a Kafka of its own, and a replica as a process."""

import json
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from models.bundle import Bundle
from schemas.codecs import encode
from schemas.messages import Slot
from schemas.topics import BARS, LIFECYCLE
from workers.bench.fixtures import Market, WarmState
from workers.bundles import store_bundle
from workers.config import Settings
from workers.errors import StreamError
from workers.fleet import Fleet, free_port
from workers.kafka import Publisher, Tail, create_topics, make_publisher
from workers.lifecycle import clear, fill
from workers.local_kafka import LocalKafka
from workers.snapshots import Snapshots

PATIENCE_S = 180.0
"""A benchmark in which nothing happens for so long has failed."""
NAME = "bench"


class NothingHappened(StreamError):
    pass


@contextmanager
def own_kafka(broker: Mapping[str, str | int] | None = None) -> Iterator[Settings]:
    """Settings on a real Kafka that was started for the block, with topics and an empty store."""
    with (
        tempfile.TemporaryDirectory(prefix="bench-") as directory,
        LocalKafka(properties=broker) as kafka,
    ):
        settings = Settings(
            bootstrap_servers=kafka.bootstrap_servers,
            store=f"{directory}/store",
            database_url=f"sqlite:///{directory}/registry.db",
            replica=NAME,
        )
        create_topics(settings)
        yield settings


def with_sections(settings: Settings, **sections: Mapping[str, Any]) -> Settings:
    """The settings with fields of some sections changed: `kafka={"delivery": "at_least_once"}`."""
    return settings.model_copy(
        update={
            name: getattr(settings, name).model_copy(update=dict(changes))
            for name, changes in sections.items()
        }
    )


def environment(settings: Settings) -> dict[str, str]:
    """The variables that give another process the same settings."""
    variables = {
        "KAFKA_BOOTSTRAP_SERVERS": settings.bootstrap_servers,
        "DATABASE_URL": settings.database_url,
        "GPT_TRADER_STORE": settings.store,
        "GPT_TRADER_REPLICA": settings.replica,
        "GPT_TRADER_DEVICE": settings.device,
        "GPT_TRADER_RUNTIME": settings.runtime,
    }
    for section in ("kafka", "inference"):
        for field, value in getattr(settings, section).model_dump(mode="json").items():
            variables[f"GPT_TRADER_{section}__{field}".upper()] = str(value)
    return variables


def appoint(settings: Settings, slot: Slot, bundle: Bundle | None, effective_ts: int = 0) -> None:
    """Give a slot to a bundle, or empty it, from a bar time on."""
    how = {"effective_ts": effective_ts, "reason": "benchmark", "actor": NAME}
    record = (
        clear(slot, **how)  # type: ignore[arg-type]
        if bundle is None
        else fill(slot, bundle, store_bundle(settings, bundle), **how)  # type: ignore[arg-type]
    )
    with make_publisher(settings, NAME) as publisher:
        publisher.produce(LIFECYCLE, slot.encode(), encode(record))


def lay_snapshots(settings: Settings, state: WarmState) -> None:
    """Snapshots from which a replica restores every symbol of the market, warm, at the first bar."""
    snapshots = Snapshots(f"{settings.store}/snapshots", settings.inference.group)
    for partition in range(settings.kafka.partitions):
        numbers = state.market.of_partition(partition)
        if not snapshots.save(partition, {BARS: 0}, *state.given_to(numbers)):
            raise OSError(f"no snapshot could be written to {settings.store}")


def send(publisher: Publisher, market: Market, minute: int, numbers: range | None = None) -> None:
    """Produce one minute's bars of all symbols, or of these."""
    for key, value, partition in market.messages(minute, numbers or range(market.symbols)):
        publisher.produce(BARS, key, value, partition=partition)


def tail_from_end(settings: Settings, topic: str) -> Tail:
    """Reads what is committed to a topic from now on."""
    with Tail(settings, topic) as whole:
        ends = whole.ends
    return Tail(settings, topic, from_offsets=ends)


class Patience:
    """`while patience.lasts(): ...`; raises NothingHappened when `PATIENCE_S` have gone."""

    def __init__(self, replica: "Replica", waiting_for: str) -> None:
        self._replica, self._waiting_for = replica, waiting_for
        self._until = time.monotonic() + PATIENCE_S

    def lasts(self) -> bool:
        self._replica.check()
        if time.monotonic() > self._until:
            raise NothingHappened(f"waited {PATIENCE_S:.0f} s for {self._waiting_for}")
        return True


class Replica:
    """One inference process; it dies with the block."""

    def __init__(self, settings: Settings, *options: str) -> None:
        self.settings = settings
        self._options = options
        self._fleet = Fleet(environment(settings), Path(settings.store).parent / "logs")
        self._port = free_port()

    def start(self) -> None:
        arguments = ("inference", "--port", str(self._port))
        self._fleet.start(NAME, *self._options, *arguments)

    def wait_until_live(self) -> None:
        """Until every partition is assigned, restored and replayed."""
        patience = Patience(self, "the replica to be live")
        while patience.lasts():
            held = self.details().get("partitions", {})
            if len(held) == self.settings.kafka.partitions and all(
                partition["live"] for partition in held.values()
            ):
                return
            time.sleep(0.05)

    def details(self) -> dict[str, Any]:
        """What /healthz shows; nothing while the process is starting."""
        text = self._page("healthz")
        return json.loads(text)["details"] if text else {}

    def metrics(self) -> dict[str, float]:
        """The samples of /metrics by name and labels; none while the process is starting."""
        lines = (line.rpartition(" ") for line in self._page("metrics").splitlines())
        return {name: float(value) for name, _, value in lines if not name.startswith("#")}

    def predictions(self) -> float:
        return self.metrics().get('gpt_trader_predictions_total{role="champion"}', 0.0)

    def log_lines(self) -> list[str]:
        return self._fleet.log_file(NAME).read_text(errors="replace").splitlines()

    def check(self) -> None:
        self._fleet.check()

    def frozen(self) -> Any:
        return self._fleet.frozen(NAME)

    def kill(self) -> None:
        self._fleet.kill(NAME)

    def _page(self, path: str) -> str:
        try:
            request = f"http://127.0.0.1:{self._port}/{path}"
            with urllib.request.urlopen(request, timeout=10) as answer:
                return str(answer.read().decode())
        except OSError:  # not there yet, or 503
            return ""

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._fleet.stop()
