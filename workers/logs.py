"""Structured logs: one line per event, `key=value` or JSON, the event's name first."""

import json
import logging
import sys
import time
from typing import Literal, TextIO


class _StandardError(logging.StreamHandler[TextIO]):
    """Looks for `sys.stderr` at each line: whoever captured it may have closed it since."""

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stderr
        super().emit(record)


class _Lines(logging.Formatter):
    def __init__(self, worker: str, form: Literal["text", "json"]) -> None:
        super().__init__()
        self.worker, self.form = worker, form

    def format(self, record: logging.LogRecord) -> str:
        fields = getattr(record, "fields", {})
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        stamp = f"{stamp}.{int(record.msecs):03d}Z"
        head = {"at": stamp, "level": record.levelname.lower(), "worker": self.worker}
        line: dict[str, object] = {**head, "event": record.getMessage(), **fields}
        if record.exc_info:
            line["error"] = self.formatException(record.exc_info)
        if self.form == "json":
            return json.dumps(line, default=str)
        return " ".join(
            f"{key}={value}" if " " not in str(value) else f"{key}={json.dumps(str(value))}"
            for key, value in line.items()
        )


def set_up(worker: str, form: Literal["text", "json"] = "text", level: str = "INFO") -> None:
    """Send every log line of this process to standard error, stamped with the worker's name."""
    handler = _StandardError()
    handler.setFormatter(_Lines(worker, form))
    logging.basicConfig(level=level, handlers=[handler], force=True)
    logging.getLogger("numba").setLevel(logging.INFO)  # its compiler tells thousands of lines


def event(logger: logging.Logger, name: str, **fields: object) -> None:
    """Log one event with its fields: `event(logger, "swap", bundle=..., effective_ts=...)`."""
    logger.info(name, extra={"fields": fields})
