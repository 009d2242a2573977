"""A gateway without Ray, of whose three models one calls tools: `python -m tests.support.tool_gateway`.

It prints its URL when it answers, and runs until it is ended. The model that calls tools is an engine double, so the
answers are what vLLM's parsers make of a model's text. The clients' tests start it in an environment of their own.
"""

import logging
import socket
import tempfile
from pathlib import Path

import uvicorn

from deployments.models.capabilities import of_application
from tests.support.engine_double import ANSWER, CALL, EngineDouble
from tests.support.gateway import Gateway

SIZE = {"context_tokens": 4_096}
CALLER = "medium"
# engine arguments of each model
ENGINES = {
    "small": {},
    CALLER: {
        "enable_auto_tool_choice": True,
        "tool_call_parser": "hermes",
        "reasoning_parser": "qwen3",
    },
    "large": {},
}


class Announcing(uvicorn.Server):
    """A server that prints its URL when it has started."""

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start, and print the URL of the first socket."""
        await super().startup(sockets)
        assert sockets
        print(f"http://127.0.0.1:{sockets[0].getsockname()[1]}", flush=True)


def make_gateway(folder: Path) -> Gateway:
    """The gateway; its journal is in this folder."""
    made = Gateway(folder, models=dict.fromkeys(ENGINES, SIZE))
    for name, engine in ENGINES.items():
        made.watch.capabilities[name] = of_application({"engine_kwargs": engine})
    made.models[CALLER].script = EngineDouble(CALL, after_tools=ANSWER).script
    return made


def main() -> None:
    """Serve on a free port."""
    logging.disable(logging.WARNING)
    listener = socket.create_server(("127.0.0.1", 0))
    with tempfile.TemporaryDirectory() as folder:
        app = make_gateway(Path(folder)).client.app
        config = uvicorn.Config(app, log_level="warning", lifespan="on")
        Announcing(config).run([listener])


if __name__ == "__main__":
    main()
