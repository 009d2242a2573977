"""Log lines as JSON, joined by the request id, without a word of what was asked or answered.

A replica's lines go where Serve's own go (JSON by `logging_config` in serve_config.yaml), an actor's to the stderr of
its worker. The load balancer's log has the same `request_id` (deploy/haproxy).
"""

import json
import logging
import threading
import time
import traceback
from contextvars import ContextVar
from logging.handlers import MemoryHandler

from policies.types import Decision, Outcome

FLUSH_EVERY_S = 1.0
REQUEST_ID: ContextVar[str] = ContextVar("request_id", default="")
_STANDARD = set(vars(logging.makeLogRecord({}))) | {"message", "asctime", "skip_context_filter"}
log = logging.getLogger(__name__)


class JsonLine(logging.Formatter):
    """A record as one line of JSON."""

    def __init__(self, component: str):
        super().__init__()
        self._component = component

    def format(self, record: logging.LogRecord) -> str:
        """With the same keys as Serve's JSON lines, and whatever came as `extra`."""
        line = {
            "asctime": self.formatTime(record),
            "levelname": record.levelname,
            "message": record.getMessage(),
            "component": self._component,
            "logger": record.name,
            **{key: value for key, value in vars(record).items() if key not in _STANDARD},
        }
        if record.exc_text:
            line["exc_text"] = record.exc_text
        return json.dumps(line, default=str)


class Joined(logging.Handler):
    """Adds the request id, takes out what an exception says (it may quote the prompt), and hands the record on."""

    def __init__(self, targets: list[logging.Handler]):
        super().__init__()
        self._targets = targets

    def emit(self, record: logging.LogRecord) -> None:
        """To every target."""
        if REQUEST_ID.get():
            record.request_id = REQUEST_ID.get()
        if record.exc_info and record.exc_info[0] is not None:
            kind, _, trace = record.exc_info
            where = [f"{frame.filename}:{frame.lineno} {frame.name}" for frame in traceback.extract_tb(trace)]
            record.exc_text = "\n".join([*where, kind.__name__])  # formatters take it before the exception
        for target in self._targets:
            target.handle(record)


def flush(handlers: list[logging.Handler], every_s: float) -> None:
    """Write down what waits in these, again and again; of a process that is killed only the last moment is missing."""
    while True:
        time.sleep(every_s)
        for handler in handlers:
            handler.flush()


def configure(component: str) -> None:
    """Log like this in this process from now on."""
    replica: list[logging.Handler] = [
        handler for handler in logging.getLogger("ray.serve").handlers if isinstance(handler, MemoryHandler)
    ]
    if replica:  # in throughput mode Serve keeps a thousand lines back
        threading.Thread(target=flush, args=(replica, FLUSH_EVERY_S), daemon=True, name="log flusher").start()
    stderr = logging.StreamHandler()
    stderr.setFormatter(JsonLine(component))
    package = logging.getLogger("deployments")
    package.handlers[:] = [Joined(replica or [stderr])]
    package.setLevel(logging.INFO)


def finished(decision: Decision, outcome: Outcome, request_id: str) -> None:
    """One line for each answer: which decision and model it was, and what came of it."""
    of_request = REQUEST_ID.set(request_id)
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
        "skip_context_filter": True,  # Serve's: would take longer than the rest, to say what the file's name says
    }
    log.info("answered", extra=fields)
    REQUEST_ID.reset(of_request)
