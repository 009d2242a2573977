"""The engine of the benchmarks has all that a model server asks of one, or they would measure nothing."""

import asyncio
import os
from unittest import mock

from deployments import orphans

ASK = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 3}
TELEMETRY = "ray.llm._internal.serve.core.server.llm_server.push_telemetry_report_for_all_models"


def test_a_model_server_runs_on_an_engine_that_only_waits() -> None:
    """Started, asked whole and streamed, and found well."""
    from ray.serve.llm import LLMConfig

    from deployments.models import ModelServer

    engine = {"RAYLLM_VLLM_ENGINE_CLS": "benchmarks.echo:EchoEngine"}
    config = LLMConfig(model_loading_config={"model_id": "small", "model_source": "assets/models/nano"})

    async def run() -> tuple[bytes, dict[str, object], bytes]:
        server = ModelServer.__new__(ModelServer)
        await server.__init__(config)
        await server.check_health()
        content, report = await server.complete("chat", ASK)
        parts = [part async for part, _ in server.generate("chat", {**ASK, "stream": True})]
        await server.__del__()
        return content, report, b"".join(parts)

    with mock.patch.dict(os.environ, engine), mock.patch(TELEMETRY), mock.patch.object(orphans, "guard"):
        content, report, streamed = asyncio.run(run())
    assert b"echo echo echo" in content and report["output_tokens"] == 3
    assert streamed.count(b"echo ") == 3 and streamed.endswith(b"data: [DONE]\n\n")
