"""What the lifecycle asks for is loaded, refused for good, or asked for again."""

from collections.abc import Iterable
from pathlib import Path

import fsspec
import pytest

from models.bundle import BundleRejected
from models.runtimes import Runtime, open_runtime
from models.runtimes.products import has_bfloat16
from schemas.codecs import encode
from tests.workers.builders import make_bundle
from workers.bundles import open_bundle, store_bundle
from workers.config import Settings
from workers.lifecycle import fill
from workers.live_bundle import TRIED_AGAIN_S, LiveBundles
from workers.metrics import Metrics

BUNDLE = make_bundle()


class Store:
    """Gives the bundle, or raises; and a clock that stands still."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error, self.asked, self.now_s = error, 0, 100.0
        self._records = [
            encode(fill("champion", BUNDLE, "", effective_ts=0, reason="test", actor="test"))
        ]
        self.bundles = LiveBundles(self.records, self.open, Metrics(), lambda: self.now_s)

    def records(self) -> Iterable[bytes]:
        given, self._records = self._records, []
        return given

    def open(self, version: str, uri: str | None) -> Runtime:
        self.asked += 1
        if self.error is not None:
            raise self.error
        return open_runtime(BUNDLE)

    def loaded(self) -> list[str]:
        found = self.bundles.poll()
        while self.bundles.loading:
            found += self.bundles.poll()
        return [runtime.bundle.version for runtime in found]


def test_a_bundle_that_the_store_does_not_give_is_asked_for_again() -> None:
    store = Store(OSError("no route to the store"))
    assert store.loaded() == []
    assert store.loaded() == []
    assert (store.asked, store.bundles.refused) == (1, set())
    store.error = None
    store.now_s += TRIED_AGAIN_S
    assert store.loaded() == [BUNDLE.version]


def test_a_bundle_that_fails_a_check_is_refused_for_good() -> None:
    store = Store(BundleRejected("golden values"))
    store.loaded()
    store.now_s += 10 * TRIED_AGAIN_S
    assert store.loaded() == []
    assert (store.asked, store.bundles.refused) == (1, {BUNDLE.version})


def test_a_store_of_another_kind_fails_as_a_disk_does_and_leaves_no_half_copy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    settings = Settings(store="memory://store")
    files = fsspec.filesystem("memory")
    store_bundle(settings, BUNDLE)
    cached = tmp_path / ".cache" / "gpt-trader-stream" / "bundles" / BUNDLE.version
    fetched = files.get

    def cut_off(source: str, target: str, **how: bool) -> None:
        fetched(source, target, **how)
        raise RuntimeError("connection reset")

    try:
        for file in cached.iterdir():
            file.unlink()
        cached.rmdir()
        monkeypatch.setattr(type(files), "get", lambda self, *args, **how: cut_off(*args, **how))
        with pytest.raises(OSError, match="connection reset"):
            open_bundle(settings, BUNDLE.version)
        assert not cached.exists()
        monkeypatch.undo()
        monkeypatch.setenv("HOME", str(tmp_path))
        assert open_bundle(settings, BUNDLE.version).bundle.version == BUNDLE.version
    finally:
        files.rm("/store", recursive=True)


def test_a_bundle_is_opened_in_the_precision_of_the_settings(tmp_path: Path) -> None:
    bundle = make_bundle()
    half = Settings.model_validate({"store": str(tmp_path), "inference": {"precision": "bfloat16"}})
    store_bundle(half, bundle)
    if has_bfloat16():
        assert open_bundle(half, bundle.version).bundle.version == bundle.version
    else:
        with pytest.raises(ValueError, match="bfloat16"):
            open_bundle(half, bundle.version)


def test_a_runtime_without_bfloat16_cannot_be_set_beside_it() -> None:
    with pytest.raises(ValueError, match="needs the runtime numba"):
        Settings.model_validate({"runtime": "torch", "inference": {"precision": "bfloat16"}})
