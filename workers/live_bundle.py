"""The bundles that `models.lifecycle` asks for: fetched, verified and warmed aside, then handed over."""

import logging
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor

from pydantic import ValidationError

from models.bundle import BundleRejected
from models.runtimes import Runtime
from schemas.messages import SLOTS, Lifecycle, Slot
from workers.errors import BundleUnavailable
from workers.logs import event
from workers.metrics import Metrics

log = logging.getLogger(__name__)

Opener = Callable[[str, str | None], Runtime]
"""Opens the bundle of a version (at a uri, or in the store) after all its checks."""


TRIED_AGAIN_S = 5.0
"""After which a bundle is asked for again that the store did not give."""


class LiveBundles:
    """What each slot should run by the newest lifecycle record, and the bundles loaded for it.

    Loading happens in a thread of its own, so that no batch waits for it. A bundle that fails a
    check is refused once and for good: the one before it stays. One that the store does not give is
    tried again.
    """

    def __init__(
        self,
        records: Callable[[], Iterable[bytes | None]],
        open_bundle: Opener,
        metrics: Metrics,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.wanted: dict[Slot, Lifecycle] = {}
        self.refused: set[str] = set()
        self._records = records
        self._open = open_bundle
        self._metrics = metrics
        self._loading: dict[str, Future[Runtime]] = {}
        self._loaded: set[str] = set()
        self._clock = clock
        self._not_before: dict[str, float] = {}
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="bundle")

    def poll(self) -> list[Runtime]:
        """Read new lifecycle records, start loading what they name, return what is ready to run."""
        for value in self._records():
            self._read(value)
        for record in list(self.wanted.values()):
            if record.bundle and not self._known(record.bundle) and self._may_try(record.bundle):
                self._loading[record.bundle] = self._thread.submit(
                    self._open, record.bundle, record.uri
                )
        done = [version for version, future in self._loading.items() if future.done()]
        return [runtime for version in done if (runtime := self._collect(version))]

    @property
    def loading(self) -> bool:
        """Whether a bundle is still on its way."""
        return bool(self._loading)

    def open(self, version: str) -> Runtime:
        """Load one version now, from the store; for restoring state that it made.

        Raises BundleUnavailable: the state cannot be restored exactly without it.
        """
        try:
            runtime = self._open(version, None)
        except (BundleRejected, OSError) as error:
            raise BundleUnavailable(f"bundle {version} is needed for a restore: {error}") from error
        self._loaded.add(version)
        return runtime

    def forget(self, version: str) -> None:
        """The bundle has been unloaded; it may be asked for again."""
        self._loaded.discard(version)

    def refuse(self, version: str, reason: str) -> None:
        """Do not try this bundle again."""
        self._loaded.discard(version)
        self.refused.add(version)
        slot = next((slot for slot in SLOTS if self._wants(slot, version)), "challenger")
        self._metrics.bundles_rejected.labels(slot).inc()
        event(log, "bundle_rejected", bundle=version, role=slot, reason=reason)

    def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _known(self, version: str) -> bool:
        return version in self._loaded or version in self._loading or version in self.refused

    def _may_try(self, version: str) -> bool:
        return self._clock() >= self._not_before.get(version, 0.0)

    def _wants(self, slot: Slot, version: str) -> bool:
        record = self.wanted.get(slot)
        return record is not None and record.bundle == version

    def _read(self, value: bytes | None) -> None:
        if value is None:
            return
        try:
            record = Lifecycle.model_validate_json(value)
        except ValidationError as error:
            event(log, "lifecycle_record_invalid", reason=str(error), value=value[:200])
            return
        self.wanted[record.slot] = record

    def _collect(self, version: str) -> Runtime | None:
        future = self._loading.pop(version)
        try:
            runtime = future.result()
        except BundleRejected as error:
            self.refuse(version, str(error))
            return None
        except OSError as error:
            self._not_before[version] = self._clock() + TRIED_AGAIN_S
            event(log, "bundle_unavailable", bundle=version, reason=error, again_s=TRIED_AGAIN_S)
            return None
        self._loaded.add(version)
        return runtime
