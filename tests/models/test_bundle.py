"""A bundle reads back as it was written, or is refused; it never half works."""

import hashlib
import json
import os
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from safetensors.numpy import load as tensors_from_bytes
from safetensors.numpy import save as tensors_to_bytes

from models import bundle as bundles
from models.bundle import (
    CARD,
    CONFIG,
    GOLDEN,
    INPUTS,
    MANIFEST,
    MAX_BYTES,
    METRICS,
    SCALER,
    WEIGHTS,
    Bundle,
    BundleConfig,
    BundleRejected,
    load,
    save,
)
from models.runtimes import open_runtime
from tests.models.networks import DIRECTION, DIRECTION_3, RETURN, VOLATILITY, make_bundle

FILES = sorted(MAX_BYTES)


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    return make_bundle()


@pytest.fixture
def saved(bundle: Bundle, tmp_path: Path) -> Path:
    return save(bundle, tmp_path)


def resealed(path: Path, name: str, content: bytes) -> Path:
    """The work of an attacker or a bug that keeps the books: a changed file under a right manifest."""
    (path / name).write_bytes(content)
    manifest = json.loads((path / MANIFEST).read_bytes())
    manifest["files"][name] = hashlib.sha256(content).hexdigest()
    raw = json.dumps(manifest, sort_keys=True, indent=1).encode() + b"\n"
    (path / MANIFEST).write_bytes(raw)
    return path.rename(path.parent / hashlib.sha256(raw).hexdigest()[:16])


def test_what_is_loaded_is_what_was_saved(bundle: Bundle, saved: Path) -> None:
    back = load(saved)
    assert back.version == bundle.version == saved.name
    assert back.config == bundle.config
    assert back.provenance == bundle.provenance
    assert back.metrics == bundle.metrics
    for mine, theirs in ((bundle.weights, back.weights), (bundle.golden, back.golden)):
        assert mine.keys() == theirs.keys()
        assert all(np.array_equal(mine[name], theirs[name]) for name in mine)
    x = np.random.default_rng(0).normal(size=(5, len(bundle.config.feature_names)))
    assert np.array_equal(back.scaler.transform(x), bundle.scaler.transform(x))
    assert bundle.inputs is not None
    assert back.inputs is not None
    for name, array in bundle.inputs.arrays().items():
        assert np.array_equal(back.inputs.arrays()[name], array)
    open_runtime(back)


def test_the_same_content_has_the_same_version_wherever_it_is_made(bundle: Bundle) -> None:
    assert make_bundle().version == bundle.version


def test_any_change_of_content_changes_the_version(bundle: Bundle) -> None:
    weights = {name: a.copy() for name, a in bundle.weights.items()}
    weights["head.bias"][0] = np.nextafter(weights["head.bias"][0], 9.0, dtype=np.float32)
    others = [
        replace(bundle, weights=weights),
        replace(bundle, metrics={}),
        replace(bundle, provenance=bundle.provenance.model_copy(update={"seed": 1})),
        replace(bundle, config=bundle.config.model_copy(update={"warm_up_bars": 13})),
    ]
    assert len({b.version for b in (bundle, *others)}) == 5


def test_a_bundle_has_the_files_it_should_and_no_others(saved: Path) -> None:
    assert sorted(p.name for p in saved.iterdir()) == FILES
    assert [p.name for p in saved.parent.iterdir()] == [saved.name]


def test_a_bundle_that_does_not_know_its_inputs_is_served_all_the_same(
    bundle: Bundle, tmp_path: Path
) -> None:
    older = save(replace(bundle, inputs=None), tmp_path)
    assert sorted(p.name for p in older.iterdir()) == [name for name in FILES if name != INPUTS]
    back = load(older)
    assert back.inputs is None
    open_runtime(back)


def test_saving_twice_is_saving_once(bundle: Bundle, saved: Path) -> None:
    before = {p.name: p.stat().st_mtime_ns for p in saved.iterdir()}
    assert save(bundle, saved.parent) == saved
    assert {p.name: p.stat().st_mtime_ns for p in saved.iterdir()} == before


def test_saving_over_a_damaged_bundle_mends_it(bundle: Bundle, saved: Path) -> None:
    (saved / WEIGHTS).write_bytes(b"")
    load(save(bundle, saved.parent))


def test_a_save_that_fails_leaves_nothing_behind(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        save(bundle, tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_model_card_tells_people_what_it_is(saved: Path) -> None:
    card = (saved / CARD).read_text()
    for words in ("volatility_5, direction_3", "1970-01-01 to 1970-01-02", "qlike: 0.25"):
        assert words in card


# Damage, file by file.


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_refused(saved: Path, name: str) -> None:
    (saved / name).unlink()
    with pytest.raises(BundleRejected, match=name):
        load(saved)


@pytest.mark.parametrize("name", FILES)
def test_a_truncated_file_is_refused(saved: Path, name: str) -> None:
    content = (saved / name).read_bytes()
    for length in (0, 1, len(content) // 2, len(content) - 1):
        (saved / name).write_bytes(content[:length])
        with pytest.raises(BundleRejected):
            load(saved)


@settings(max_examples=40, deadline=None)
@given(name=st.sampled_from(FILES), place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_one_flipped_bit_is_refused(
    tmp_path_factory: pytest.TempPathFactory, name: str, place: float, bit: int
) -> None:
    path = save(make_bundle_once(), tmp_path_factory.mktemp("flip"))
    content = bytearray((path / name).read_bytes())
    content[int(place * len(content))] ^= 1 << bit
    (path / name).write_bytes(content)
    with pytest.raises(BundleRejected):
        load(path)


def make_bundle_once(made: list[Bundle] = []) -> Bundle:  # noqa: B006
    if not made:
        made.append(make_bundle())
    return made[0]


@pytest.mark.parametrize("name", FILES)
def test_an_oversize_file_is_refused_unread(saved: Path, name: str) -> None:
    with (saved / name).open("r+b") as file:
        file.truncate(MAX_BYTES[name] + 1)
    with pytest.raises(BundleRejected, match="too many"):
        load(saved)


@pytest.mark.parametrize("name", FILES)
def test_a_link_out_of_the_directory_is_refused(saved: Path, tmp_path: Path, name: str) -> None:
    outside = tmp_path / "outside"
    (saved / name).rename(outside)
    (saved / name).symlink_to(outside)
    with pytest.raises(BundleRejected, match=name):
        load(saved)


def test_a_directory_or_a_pipe_in_place_of_a_file_is_refused(saved: Path) -> None:
    (saved / METRICS).unlink()
    (saved / METRICS).mkdir()
    with pytest.raises(BundleRejected):
        load(saved)
    (saved / METRICS).rmdir()
    os.mkfifo(saved / METRICS)
    with pytest.raises(BundleRejected, match="not a file"):
        load(saved)


def test_another_bundle_under_this_name_is_refused(saved: Path, tmp_path: Path) -> None:
    other = save(make_bundle(seed=1), tmp_path / "others")
    moved = other.rename(other.parent / saved.name)
    with pytest.raises(BundleRejected, match=saved.name):
        load(moved)
    with pytest.raises(BundleRejected):
        load(saved, expected="0" * 16)


def test_files_of_two_bundles_do_not_mix(saved: Path, tmp_path: Path) -> None:
    other = save(make_bundle(seed=1), tmp_path / "others")
    (saved / WEIGHTS).write_bytes((other / WEIGHTS).read_bytes())
    with pytest.raises(BundleRejected, match=WEIGHTS):
        load(saved)


# Damage under a right manifest: hashes are no proof of sense.


@pytest.mark.parametrize("name", [n for n in FILES if n not in (MANIFEST, CARD)])
@pytest.mark.parametrize(
    "content",
    [b"", b"{}", b"null", b"[1, 2]", b"\xff\xfe", b"\x00" * 64, pickle.dumps({"a": 1})],
    ids=["empty", "object", "null", "list", "not-text", "zeros", "pickle"],
)
def test_rubbish_is_refused(saved: Path, name: str, content: bytes) -> None:
    if (name, content) == (METRICS, b"{}"):
        return
    with pytest.raises(BundleRejected):
        open_runtime(load(resealed(saved, name, content)))


def test_a_pickle_is_never_run(saved: Path, tmp_path: Path) -> None:
    trap = tmp_path / "sprung"

    class Trap:
        def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
            return os.mkdir, (str(trap),)

    for name in (WEIGHTS, GOLDEN, INPUTS, SCALER, CONFIG):
        saved = resealed(saved, name, pickle.dumps(Trap()))
        with pytest.raises(BundleRejected):
            load(saved)
    assert not trap.exists()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", [WEIGHTS, GOLDEN, INPUTS])
def test_numbers_that_are_not_finite_are_refused(saved: Path, name: str, bad: float) -> None:
    arrays = {k: a.copy() for k, a in tensors_from_bytes((saved / name).read_bytes()).items()}
    arrays[sorted(arrays)[0]].flat[0] = bad
    with pytest.raises(BundleRejected, match="finite"):
        load(resealed(saved, name, tensors_to_bytes(arrays)))


@pytest.mark.parametrize("change", ["transposed", "missing", "extra", "integers"])
def test_weights_of_another_shape_are_refused(saved: Path, change: str) -> None:
    arrays = dict(tensors_from_bytes((saved / WEIGHTS).read_bytes()))
    weight = arrays.pop("head.weight")
    if change == "transposed":
        arrays["head.weight"] = np.ascontiguousarray(weight.T)
    if change == "extra":
        arrays |= {"head.weight": weight, "other": weight}
    if change == "integers":
        arrays["head.weight"] = weight.astype(np.int64)
    with pytest.raises(BundleRejected):
        open_runtime(load(resealed(saved, WEIGHTS, tensors_to_bytes(arrays))))


def test_weights_that_say_something_else_than_the_golden_file_are_refused(saved: Path) -> None:
    arrays = dict(tensors_from_bytes((saved / WEIGHTS).read_bytes()))
    arrays["head.bias"] = arrays["head.bias"] + np.float32(0.01)
    with pytest.raises(BundleRejected, match="golden"):
        open_runtime(load(resealed(saved, WEIGHTS, tensors_to_bytes(arrays))))


def test_a_manifest_that_names_a_path_outside_is_refused(saved: Path, tmp_path: Path) -> None:
    (tmp_path / "outside").write_bytes(b"{}")
    manifest = json.loads((saved / MANIFEST).read_bytes())
    manifest["files"]["../outside"] = hashlib.sha256(b"{}").hexdigest()
    raw = json.dumps(manifest, sort_keys=True, indent=1).encode() + b"\n"
    (saved / MANIFEST).write_bytes(raw)
    moved = saved.rename(saved.parent / hashlib.sha256(raw).hexdigest()[:16])
    with pytest.raises(BundleRejected, match="manifest"):
        load(moved)


def test_a_bundle_for_other_features_is_refused(saved: Path) -> None:
    config = json.loads((saved / CONFIG).read_bytes())
    config["feature_names"][0] = "moon_phase"
    with pytest.raises(BundleRejected, match="other features"):
        load(resealed(saved, CONFIG, bundles._json(config)))


def test_a_scaler_for_fewer_features_is_refused(saved: Path) -> None:
    scaler = json.loads((saved / SCALER).read_bytes())
    scaler["centre"], scaler["scale"] = scaler["centre"][:-1], scaler["scale"][:-1]
    with pytest.raises(BundleRejected):
        open_runtime(load(resealed(saved, SCALER, json.dumps(scaler).encode())))


def test_metrics_that_are_not_numbers_cannot_be_saved(bundle: Bundle, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON compliant"):
        save(replace(bundle, metrics={"qlike": float("nan")}), tmp_path)


@pytest.mark.parametrize("part", ["label_scaling", "variance_bias", "references", "calibrations"])
def test_a_config_has_one_of_each_part_for_each_target(bundle: Bundle, part: str) -> None:
    content = bundle.config.model_dump()
    content[part] = content[part][:1]
    with pytest.raises(ValidationError, match=part):
        BundleConfig.model_validate(content)


# Values.


def test_values_are_in_the_units_of_their_targets() -> None:
    bundle = make_bundle(targets=(VOLATILITY, RETURN, DIRECTION, DIRECTION_3))
    outputs = np.array([[2.0, -1.0, 0.0, 1.0, 1.0, 1.0], [0.0, 0.0, 100.0, -900.0, 0.0, 900.0]])
    values, probabilities = bundle.values(outputs)
    np.testing.assert_allclose(values[:, 0], [-2 + 0.5 * 2 + 0.125, -2 + 0.125])
    np.testing.assert_allclose(values[:, 1], [-2.5, -2.0])
    np.testing.assert_allclose(values[:, 2], [0.5, 1.0])
    np.testing.assert_allclose(values[:, 3], [1 / 3, 1.0])
    assert probabilities.keys() == {2, 3}
    for p in probabilities.values():
        np.testing.assert_allclose(p.sum(axis=1), 1.0)
    np.testing.assert_allclose(probabilities[2][0], [0.5, 0.5])
