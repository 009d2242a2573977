"""Log lines as JSON with the request id and without any text of prompts or answers.

A replica writes to the log file that Serve has for it (JSON by `logging_config` in serve_config.yaml). An actor writes
to the stderr of its worker. The load balancer's log has the same `request_id` (deploy/haproxy).
"""

import logging
import threading
import time
import traceback
from contextvars import ContextVar

from pythonjsonlogger.core import RESERVED_ATTRS
from pythonjsonlogger.json import JsonFormatter

from deployments import runtime
from policies.events import Decision, Outcome

FLUSH_EVERY_S = 1.0
REQUEST_ID: ContextVar[str] = ContextVar("request_id", default="")
# keys of a line, as in Serve's lines, before those of the record's `extra`
LINE = ("asctime", "levelname", "message", "name")
NAMES = {"name": "logger", "exc_info": "exc_text"}
log = logging.getLogger(__name__)


class _Formatter(JsonFormatter):
    def formatException(self, ei: object) -> str:  # noqa: N802
        """Empty, so that the text from RequestIdHandler is written in place of the exception's message."""
        return ""


class RequestIdHandler(logging.Handler):
    """Adds the request id to a record, removes the message of an exception, and passes the record on.

    An exception's message may quote the prompt, so only its type and its traceback are logged.

    Args:
        targets: handlers that write the record.
    """

    def __init__(self, targets: list[logging.Handler]):
        super().__init__()
        self._targets = targets

    def emit(self, record: logging.LogRecord) -> None:
        """Pass a record to every target."""
        if REQUEST_ID.get():
            record.request_id = REQUEST_ID.get()
        if record.exc_info and record.exc_info[0] is not None:
            kind, _, trace = record.exc_info
            where = [
                f"{frame.filename}:{frame.lineno} {frame.name}"
                for frame in traceback.extract_tb(trace)
            ]
            # formatters prefer this text to the exception
            record.exc_text = "\n".join([*where, kind.__name__])
        for target in self._targets:
            target.handle(record)


def flush(handlers: list[logging.Handler], every_s: float) -> None:
    """Flush handlers periodically, forever, so that a killed process loses the lines of one period only."""
    while True:
        time.sleep(every_s)
        for handler in handlers:
            handler.flush()


def configure(component: str) -> None:
    """Set up the logging of this process.

    Args:
        component: name of the process, written to each line.
    """
    replica = runtime.serve_log_buffers()
    if replica:  # in throughput mode Serve buffers a thousand lines
        threading.Thread(
            target=flush, args=(replica, FLUSH_EVERY_S), daemon=True, name="log flusher"
        ).start()
    stderr = logging.StreamHandler()
    formatter = _Formatter(
        LINE,
        rename_fields=NAMES,
        static_fields={"component": component},
        reserved_attrs=[*RESERVED_ATTRS, *runtime.SKIP_SERVE_CONTEXT],
    )
    stderr.setFormatter(formatter)
    package = logging.getLogger("deployments")
    package.handlers[:] = [RequestIdHandler(replica or [stderr])]
    package.setLevel(logging.INFO)


def finished(decision: Decision, outcome: Outcome, request_id: str) -> None:
    """Log one line for an answer: its decision, its model and its outcome."""
    token = REQUEST_ID.set(request_id)
    fields = {
        "decision_id": decision.id,
        "arm": decision.arm,
        "fallback": decision.fallback or "none",
        "policy_version": decision.policy_version,
        "status": outcome.status,
        "ttft_ms": round(1e3 * outcome.ttft_s, 3),
        "latency_ms": round(1e3 * outcome.latency_s, 3),
        "prompt_tokens": outcome.prompt_tokens,
        "output_tokens": outcome.output_tokens,
    }
    # without the skip, Serve's filter would add the context of whichever request is current
    log.info("answered", extra=fields | runtime.SKIP_SERVE_CONTEXT)
    REQUEST_ID.reset(token)
