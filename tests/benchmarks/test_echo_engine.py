"""Test of the echo engine: it has every method that a model server calls."""

import asyncio
import os
from unittest import mock

from deployments.models import process_reaper

ASK = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 3}
TELEMETRY = "ray.llm._internal.serve.core.server.llm_server.push_telemetry_report_for_all_models"


def test_a_model_server_runs_on_the_echo_engine() -> None:
    """A model server on the echo engine starts, is healthy, and answers with and without streaming."""
    from ray.serve.llm import LLMConfig

    from deployments.models.server import ModelServer

    engine = {"RAYLLM_VLLM_ENGINE_CLS": "benchmarks.serving.echo_engine:EchoEngine"}
    config = LLMConfig(
        model_loading_config={"model_id": "small", "model_source": "assets/models/nano"}
    )

    async def run() -> tuple[bytes, dict[str, object], bytes]:
        server = ModelServer.__new__(ModelServer)
        await server.__init__(config)
        await server.check_health()
        content, report = await server.complete("chat", ASK)
        parts = [
            part async for part, _ in server.generate("chat", {**ASK, "stream": True})
        ]
        await server.__del__()
        return content, report, b"".join(parts)

    with (
        mock.patch.dict(os.environ, engine),
        mock.patch(TELEMETRY),
        mock.patch.object(process_reaper, "kill_children_on_exit"),
    ):
        content, report, streamed = asyncio.run(run())
    assert b"echo echo echo" in content and report.output_tokens == 3
    assert streamed.count(b"echo ") == 3 and streamed.endswith(b"data: [DONE]\n\n")
