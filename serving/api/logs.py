"""Write logs as JSON, one object a line: what a client sends cannot make a line of its own."""

import json
import logging
import sys
import time
import traceback
from typing import Any, TextIO

logger = logging.getLogger("serving")


class _JsonLines(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
            + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "event": record.getMessage(),
        }
        line |= getattr(record, "fields", {})
        if record.exc_info and record.exc_info[1] is not None:
            line["error"] = traceback.format_exception(record.exc_info[1])[-20:]
        return json.dumps(line, default=str)


def write_logs(stream: TextIO | None = None, level: int = logging.INFO) -> None:
    """From now on the server's logs go to a stream; by default to standard error."""
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(_JsonLines())
    for name, least in (("serving", level), ("uvicorn", logging.WARNING)):
        log = logging.getLogger(name)
        log.handlers, log.propagate = [handler], False
        log.setLevel(least)


def log(event: str, *, level: int = logging.INFO, **fields: Any) -> None:
    """Writes one line with an event and its fields."""
    logger.log(level, event, extra={"fields": fields})


def log_exception(error: BaseException, request_id: str) -> None:
    """Writes a fault of the server's own, with where it came from."""
    logger.error("exception", exc_info=error, extra={"fields": {"id": request_id}})
