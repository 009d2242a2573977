"""Which engines compute in their own process."""

from types import SimpleNamespace

import pytest
from ray.llm._internal.serve.engines.vllm.vllm_engine import VLLMEngine
from vllm.v1.executor.abstract import Executor
from vllm.v1.executor.multiproc_executor import MultiprocExecutor
from vllm.v1.executor.uniproc_executor import UniProcExecutor

from deployments.models import engine
from deployments.models.engine import Engine
from deployments.models.server import ModelServer

BIND = "VLLM_CPU_OMP_THREADS_BIND"


def config(world_size: int = 1) -> SimpleNamespace:
    """What is read of vLLM's configuration, as Ray makes it for a CPU."""
    parallel = SimpleNamespace(distributed_executor_backend="mp", world_size=world_size)
    return SimpleNamespace(parallel_config=parallel)


@pytest.mark.parametrize(
    ("cpu", "bind", "world_size", "one_process"),
    [
        (True, "nobind", 1, True),
        (True, "auto", 1, False),
        (True, "0-3", 1, False),
        (True, "nobind", 2, False),
        (False, "nobind", 1, False),
    ],
)
def test_the_executor(
    cpu: bool,
    bind: str,
    world_size: int,
    one_process: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One process is for a CPU without bound threads; other engines keep what Ray and vLLM choose."""
    monkeypatch.setenv(BIND, bind)
    monkeypatch.setattr(engine, "current_platform", SimpleNamespace(is_cpu=lambda: cpu))
    given = config(world_size)
    engine.use_one_process(given)
    expected = UniProcExecutor if one_process else MultiprocExecutor
    assert Executor.get_class(given) is expected


def test_ray_starts_the_engine_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """If this fails after an upgrade of Ray, see the docstring of Engine."""
    server = ModelServer.__new__(ModelServer)
    assert server._get_default_engine_class() is Engine
    started = []
    monkeypatch.setattr(
        VLLMEngine,
        "_start_async_llm_engine",
        lambda _, *args: started.append(args),
        raising=True,
    )
    monkeypatch.setenv(BIND, engine.UNBOUND)
    given = config()
    object.__new__(Engine)._start_async_llm_engine("args", given, "group")
    assert started == [("args", given, "group")]
    assert Executor.get_class(given) is UniProcExecutor
