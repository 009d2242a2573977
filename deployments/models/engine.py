"""The vLLM engine of a model: on a CPU, one process both schedules the requests and computes the answers.

On a CPU, Ray and vLLM give every engine a second process, the worker, because the environment that binds threads to
cores must be set before a process starts. A small model pays much for that: another copy of the libraries in memory, a
second start, and two messages for every step. Without bound threads there is no need for it.
"""

from typing import Any

from ray.llm._internal.serve.engines.vllm.vllm_engine import VLLMEngine
from vllm import envs
from vllm.platforms import current_platform
from vllm.v1.executor.uniproc_executor import UniProcExecutor

UNBOUND = "nobind"  # value of VLLM_CPU_OMP_THREADS_BIND


def use_one_process(vllm_config: Any) -> None:
    """Let the engine compute in its own process, if it is a single one on a CPU whose threads are not bound to cores.

    Args:
        vllm_config: a `vllm.config.VllmConfig`; it is changed.
    """
    parallel = vllm_config.parallel_config
    unbound = envs.VLLM_CPU_OMP_THREADS_BIND == UNBOUND
    if current_platform.is_cpu() and unbound and parallel.world_size == 1:
        parallel.distributed_executor_backend = UniProcExecutor


class Engine(VLLMEngine):  # type: ignore[misc]
    """Ray's vLLM engine, which may use one process; ModelServer names it as the class of its engine.

    When Ray changes: look in `ray.llm._internal.serve.engines.vllm.vllm_engine.VLLMEngine.start` for the call that
    receives vLLM's configuration, and in `LLMServer` for `_default_engine_cls`. When Ray keeps a
    `distributed_executor_backend` of `engine_kwargs` on a CPU, and vLLM does not replace it either, set it in
    serve_config.yaml and delete this module.
    """

    def _start_async_llm_engine(
        self, vllm_engine_args: Any, vllm_engine_config: Any, placement_group: Any
    ) -> Any:
        use_one_process(vllm_engine_config)
        return super()._start_async_llm_engine(
            vllm_engine_args, vllm_engine_config, placement_group
        )
