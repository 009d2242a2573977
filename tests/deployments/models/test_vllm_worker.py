"""The private interface of vLLM that deployments/models/vllm_worker.py replaces."""

from types import SimpleNamespace
from typing import Any

import pytest
from vllm.distributed.device_communicators import shm_broadcast

from deployments.models import vllm_worker


def test_a_waiting_worker_sleeps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Within POLL_S of its last read a worker sleeps for PAUSE_S, and later it waits for a message. It never yields.

    If this fails after an upgrade of vLLM: find how a worker waits for its next step (`ShmRingBuffer`), and replace
    every loop of sched_yield there by a short sleep. Without such a loop delete this module, and
    `worker_extension_cls` from serve_config.yaml.
    """
    now = [100.0]
    pauses: list[float] = []
    polls: list[int | None] = []
    clock = SimpleNamespace(monotonic=lambda: now[0], sleep=pauses.append)
    monkeypatch.setattr(shm_broadcast, "time", clock)
    monkeypatch.setattr(vllm_worker, "time", clock)
    monkeypatch.setattr(shm_broadcast, "sched_yield", lambda: pytest.fail("it yields"))

    def poll(timeout: int | None) -> list[Any]:
        polls.append(timeout)
        return []

    condition = shm_broadcast.SpinCondition.__new__(shm_broadcast.SpinCondition)
    condition.is_reader = True
    condition.busy_loop_s = 1.0
    condition.poller = SimpleNamespace(poll=poll)
    condition.read_cancel_socket = condition.local_notify_socket = object()
    condition.record_read()
    now[0] += 0.5 * vllm_worker.POLL_S
    condition.wait(timeout_ms=7)
    assert pauses == [vllm_worker.PAUSE_S] and not polls
    now[0] += vllm_worker.POLL_S
    condition.wait(timeout_ms=7)
    assert polls == [7] and len(pauses) == 1
