import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from workers.fleet import free_port
from workers.metrics import Metrics
from workers.snapshots import Snapshots

ARRAYS: dict[str, NDArray[Any]] = {
    "h": np.arange(12, dtype=np.float32).reshape(3, 4),
    "ts": np.array([2**62], np.int64),
    "empty": np.zeros((0, 5)),
    "flag": np.array(True),
}
META = {"symbols": ["SPY", "é"], "newest_ts": 7, "nested": {"none": None}}


def failures(metrics: Metrics, operation: str) -> float:
    return float(
        metrics.registry.get_sample_value(
            "gpt_trader_snapshot_failures_total", {"operation": operation}
        )
        or 0
    )


def save(snapshots: Snapshots, *offsets: int, partition: int = 0) -> None:
    for offset in offsets:
        arrays = {"offset": np.array([offset])}
        assert snapshots.save(partition, {"market.bars": offset}, arrays, {})


def newest(snapshots: Snapshots, at_or_below: int, partition: int = 0) -> int | None:
    snapshot = snapshots.load(partition, {"market.bars": at_or_below})
    if snapshot is None:
        return None
    assert snapshot.arrays["offset"].tolist() == [snapshot.offsets["market.bars"]]
    return snapshot.offsets["market.bars"]


def files_of(directory: Path) -> list[Path]:
    return sorted(path for path in directory.rglob("*") if path.is_file())


@pytest.fixture(params=["directory", "memory", "s3"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty store; every test that asks for it runs on each kind."""
    if request.param == "s3":
        return str(request.getfixturevalue("s3_url"))
    return str(tmp_path) if request.param == "directory" else f"memory://{tmp_path.name}"


def test_what_is_saved_is_loaded_unchanged(url: str) -> None:
    snapshots = Snapshots(url, "inference")
    offsets = {"market.bars": 10, "signals.predictions": 3}
    assert snapshots.save(4, offsets, ARRAYS, META)
    loaded = snapshots.load(4, offsets)
    assert loaded is not None
    assert (loaded.offsets, loaded.meta) == (offsets, META)
    assert loaded.arrays.keys() == ARRAYS.keys()
    for name, array in ARRAYS.items():
        assert loaded.arrays[name].dtype == array.dtype
        np.testing.assert_array_equal(loaded.arrays[name], array)


def test_the_newest_at_or_below_the_committed_offset_is_taken(url: str) -> None:
    snapshots = Snapshots(url, "inference")
    save(snapshots, 9, 99, 100)
    assert [newest(snapshots, n) for n in (8, 9, 98, 99, 100, 10**15)] == [None, 9, 9, 99, 100, 100]


def test_of_several_partitions_each_has_its_own_in_the_order_asked_for(url: str) -> None:
    snapshots = Snapshots(url, "inference")
    for partition in range(5):
        save(snapshots, 10 + partition, partition=partition)
    wanted = {4: 99, 0: 9, 2: 12, 1: 99, 3: 99}
    loaded = snapshots.load_each({p: {"market.bars": offset} for p, offset in wanted.items()})
    found = [(p, snapshot and snapshot.arrays["offset"].item()) for p, snapshot in loaded]
    assert found == [(4, 14), (0, None), (2, 12), (1, 11), (3, 13)]


def test_every_topic_of_a_snapshot_must_be_at_or_below(url: str) -> None:
    snapshots = Snapshots(url, "monitor")
    for bars, predictions in ((5, 9), (6, 1)):
        snapshots.save(0, {"b": bars, "p": predictions}, {}, {"bars": bars})
    loaded = snapshots.load(0, {"b": 10, "p": 5})
    assert loaded is not None
    assert loaded.meta == {"bars": 6}
    assert snapshots.load(0, {"b": 5, "p": 5}) is None


def test_partitions_and_workers_do_not_see_each_other(url: str) -> None:
    save(Snapshots(url, "inference"), 5, partition=1)
    assert newest(Snapshots(url, "inference"), 9, partition=11) is None
    assert newest(Snapshots(url, "monitor"), 9, partition=1) is None
    assert newest(Snapshots(url, "inference"), 9, partition=1) == 5


def test_only_the_newest_few_are_kept(url: str) -> None:
    snapshots = Snapshots(url, "inference", keep=2)
    save(snapshots, 1, 2, 30, 4, 5)
    assert [newest(snapshots, n) for n in (4, 5, 30)] == [None, 5, 30]
    files, root = fsspec.url_to_fs(url)
    assert len(files.find(root)) == 2


def test_saving_the_same_place_again_replaces_it(url: str) -> None:
    snapshots = Snapshots(url, "inference")
    save(snapshots, 5)
    assert snapshots.save(0, {"market.bars": 5}, {"offset": np.array([5])}, {"again": True})
    loaded = snapshots.load(0, {"market.bars": 5})
    assert loaded is not None
    assert loaded.meta == {"again": True}


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda raw: b"",
    "shorter than the digest": lambda raw: raw[:7],
    "truncated": lambda raw: raw[:-1],
    "longer": lambda raw: raw + b"x",
    "a bit flipped in the content": lambda raw: raw[:-1] + bytes([raw[-1] ^ 1]),
    "a bit flipped in the digest": lambda raw: bytes([raw[0] ^ 1]) + raw[1:],
    "pickle": lambda raw: b"\x80\x04\x95cos\nsystem\n(S'false'\ntR.",
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_snapshot_is_counted_and_the_one_before_it_is_taken(
    damage: str, url: str
) -> None:
    metrics = Metrics()
    snapshots = Snapshots(url, "inference", metrics=metrics)
    save(snapshots, 1, 2)
    store, root = fsspec.url_to_fs(url)
    first, last = sorted(store.find(root))
    store.pipe_file(last, DAMAGES[damage](store.cat_file(last)))
    assert newest(snapshots, 9) == 1
    assert failures(metrics, "load") == 1
    store.pipe_file(first, b"")
    assert newest(snapshots, 9) is None


@given(data=st.data())
def test_no_bit_of_a_snapshot_can_flip_unnoticed(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    directory = tmp_path_factory.mktemp("flip")
    snapshots = Snapshots(str(directory), "inference")
    save(snapshots, 5)
    (path,) = files_of(directory)
    raw = bytearray(path.read_bytes())
    bit = data.draw(st.integers(0, 8 * len(raw) - 1))
    raw[bit // 8] ^= 1 << bit % 8
    path.write_bytes(raw)
    assert newest(snapshots, 9) is None


@given(
    array=hnp.arrays(
        st.sampled_from([np.float32, np.float64, np.int64, np.int8, np.bool_]),
        hnp.array_shapes(min_dims=0, max_dims=3, min_side=0),
    )
)
def test_any_array_comes_back_bit_by_bit(array: NDArray[Any]) -> None:
    snapshots = Snapshots("memory://bits", "inference")
    assert snapshots.save(0, {"b": 0}, {"a": array, "transposed": array.T}, {})
    loaded = snapshots.load(0, {"b": 0})
    assert loaded is not None
    assert loaded.arrays["a"].tobytes() == np.ascontiguousarray(array).tobytes()
    assert loaded.arrays["transposed"].tobytes() == np.ascontiguousarray(array.T).tobytes()


def test_a_full_disk_is_counted_leaves_nothing_and_the_worker_goes_on(tmp_path: Path) -> None:
    metrics = Metrics()
    snapshots = Snapshots("/dev/full/store", "inference", metrics=metrics)
    assert not snapshots.save(0, {"b": 1}, ARRAYS, META)
    snapshots = Snapshots(str(tmp_path), "inference", metrics=metrics)
    save(snapshots, 1)
    limited = (
        "import resource, signal, sys, numpy as np\n"
        "from workers.snapshots import Snapshots\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
        "ok = Snapshots(sys.argv[1], 'inference').save(0, {'market.bars': 2}, {'a': np.ones(10**5)}, {})\n"
        "sys.exit(3 if ok is False else 1)\n"
    )
    ended = subprocess.run([sys.executable, "-c", limited, str(tmp_path)], check=False)
    assert ended.returncode == 3
    assert failures(metrics, "save") == 1
    assert len(files_of(tmp_path)) == 1
    assert newest(snapshots, 9) == 1


def test_what_a_killed_writer_left_is_never_read_and_is_cleared_away(tmp_path: Path) -> None:
    snapshots = Snapshots(str(tmp_path), "inference")
    save(snapshots, 1)
    (whole,) = files_of(tmp_path)
    half = whole.with_name(f"{9:020d}.snapshot.{os.getpid() + 1}")
    half.write_bytes(whole.read_bytes())
    assert newest(snapshots, 100) == 1
    save(snapshots, 2)
    assert not half.exists()
    assert len(files_of(tmp_path)) == 2


def test_a_store_that_is_not_there_yet_has_no_snapshot(url: str) -> None:
    assert Snapshots(f"{url}/not/yet", "inference").load(0, {}) is None


def test_a_store_that_cannot_be_reached_is_counted_and_the_worker_goes_on(
    s3_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{free_port()}")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    metrics = Metrics()
    gone = f"{s3_url}-of-a-server-that-is-down"
    fsspec.filesystem("s3").clear_instance_cache()
    snapshots = Snapshots(gone, "inference", metrics=metrics)
    assert not snapshots.save(0, {"market.bars": 1}, ARRAYS, META)
    assert snapshots.load(0, {"market.bars": 1}) is None
    assert (failures(metrics, "save"), failures(metrics, "load")) == (1, 1)
    fsspec.filesystem("s3").clear_instance_cache()
