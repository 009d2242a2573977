"""What a client sends, and what it saw: the messages between a benchmark and its client's process."""

import msgspec

TIMEOUT_S = 120.0
OK = "200"


class Sending(msgspec.Struct, frozen=True):
    """A request.

    at_s: when it is to be sent, in seconds after the beginning; the closed loop ignores it.
    body: of the HTTP request.
    """

    at_s: float
    body: msgspec.Raw


class Plan(msgspec.Struct, frozen=True):
    """The requests of a run.

    url: of the gateway.
    sendings: in the order of their times.
    headers: of every request, as that with an API key.
    clients: of the closed loop, each of which sends the next request as soon as it has its answer; 0: the open loop,
        which sends every request at its time.
    seconds: how long the closed loop sends.
    """

    url: str
    sendings: tuple[Sending, ...]
    headers: dict[str, str] = {}
    clients: int = 0
    seconds: float = 0.0


class Seen(msgspec.Struct, frozen=True):
    """What a client saw of one request.

    number: of its sending in the plan.
    status: of HTTP, or the name of the error.
    sent_s: when it was sent, in seconds after the beginning.
    lag_s: how much later than intended the client itself sent it.
    ttft_s, latency_s: seconds from the intended time to the first and to the last token; 0 for an answer without any.
    """

    number: int
    status: str
    sent_s: float
    lag_s: float
    ttft_s: float = 0.0
    latency_s: float = 0.0
    model: str = ""
    decision_id: str = ""
    text: str = ""
    prompt_tokens: int = 0
    output_tokens: int = 0

    @property
    def answered(self) -> bool:
        """Whether the answer is complete."""
        return self.status == OK

    @property
    def served_s(self) -> float:
        """Seconds from the real time of sending to the last token."""
        return self.latency_s - self.lag_s
