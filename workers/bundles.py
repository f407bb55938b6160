"""Where bundles are kept: `<store>/bundles/<version>`, a directory or any fsspec URL."""

import shutil
from pathlib import Path

import fsspec

from models.bundle import Bundle, load, save
from models.runtimes import Runtime, open_runtime
from workers.config import Settings


def bundle_uri(settings: Settings, version: str) -> str:
    return f"{settings.store.rstrip('/')}/bundles/{version}"


def open_bundle(settings: Settings, version: str, uri: str | None = None) -> Runtime:
    """The runtime of a stored bundle, after every check it can fail.

    Raises BundleRejected for a damaged bundle or one of another version, OSError where the
    store cannot be read.
    """
    bundle = read_bundle(settings, version, uri)
    return open_runtime(bundle, settings.runtime, settings.device, settings.inference.precision)


def read_bundle(settings: Settings, version: str, uri: str | None = None) -> Bundle:
    """The stored bundle, fetched if its store is not a directory here. Raises as `open_bundle`."""
    return load(_fetched(uri or bundle_uri(settings, version), version), version)


def store_bundle(settings: Settings, bundle: Bundle) -> str:
    """Save a bundle where every replica finds it; its uri. Raises OSError where that fails."""
    files, root = fsspec.url_to_fs(f"{settings.store.rstrip('/')}/bundles")
    if _is_local(files):
        return str(save(bundle, Path(root)))
    saved = save(bundle, _cache())
    uri = bundle_uri(settings, bundle.version)
    files.put(f"{saved}/", f"{root}/{bundle.version}/", recursive=True)
    return uri


def _fetched(uri: str, version: str) -> Path:
    files, path = fsspec.url_to_fs(uri)
    if _is_local(files):
        return Path(path)
    here = _cache() / version
    if not here.exists():
        try:
            files.get(f"{path}/", f"{here}/", recursive=True)
        except Exception as error:  # each kind of store has errors of its own
            shutil.rmtree(here, ignore_errors=True)
            raise OSError(f"{uri}: {error}") from error
    return here


def _is_local(files: fsspec.AbstractFileSystem) -> bool:
    return "file" in files.protocol


def _cache() -> Path:
    return Path.home() / ".cache" / "gpt-trader-stream" / "bundles"
