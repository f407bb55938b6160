"""Log lines go to standard error as it is when they are written."""

import io
import logging
import sys
from collections.abc import Iterator

import pytest

from workers.logs import event, set_up


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


def test_a_standard_error_that_was_captured_and_closed_is_no_trouble(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    captured = io.StringIO()
    monkeypatch.setattr(sys, "stderr", captured)
    set_up("w")
    captured.close()
    now = io.StringIO()
    monkeypatch.setattr(sys, "stderr", now)
    event(logging.getLogger("test"), "swap", bundle="b c")
    assert now.getvalue().endswith(' level=info worker=w event=swap bundle="b c"\n')
