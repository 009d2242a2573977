"""The speed and the memory of a replica of each size, and the cluster that a portfolio of models is given."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Engine:
    """How a replica of one size behaves.

    A step of the engine makes one token of every running answer. It takes

        step_s + sequence_s · running answers + chunk / prefill_tokens_s, the last term only while a prompt is read.

    gpus: of one replica.
    prefill_tokens_s: prompt tokens read in a second.
    step_s: duration of a step without any answer, which is mainly the time to read the weights.
    sequence_s: additional duration for each running answer.
    kv_tokens: prompt and answer tokens of all running requests that fit into the memory.
    chunk: prompt tokens that are read in one step.
    max_running: answers in one step.
    start_s: from nothing to ready.
    """

    gpus: float
    prefill_tokens_s: float
    step_s: float
    sequence_s: float
    kv_tokens: int
    chunk: float = 512
    max_running: int = 64
    start_s: float = 60.0

    def running_at_most(self, tokens: float) -> float:
        """Number of requests with so many prompt and answer tokens that run at once."""
        return min(float(self.max_running), max(1.0, self.kv_tokens / max(tokens, 1.0)))

    def work_s(self, prompt: float, answer: float, tokens: float) -> float:
        """Seconds of a replica that a request takes while the replica is full.

        Args:
            prompt: its prompt tokens.
            answer: its answer tokens.
            tokens: mean of prompt and answer tokens of the other requests.
        """
        running = self.running_at_most(tokens)
        shared_step_s = self.step_s / running + self.sequence_s
        return prompt / self.prefill_tokens_s + answer * shared_step_s

    def alone_s(self, prompt: float, answer: float) -> tuple[float, float]:
        """Seconds to the first and to the last token of a request on an idle replica."""
        first = prompt / self.prefill_tokens_s + prompt / self.chunk * self.step_s
        return first, first + max(0.0, answer - 1) * (self.step_s + self.sequence_s)


@dataclass(frozen=True)
class Size:
    """A model: its name, its engine and the number of its replicas."""

    name: str
    engine: Engine
    replicas: int


# Assumptions of the order that vendors publish for bf16 weights; they were not measured here.
SMALL_3B = Engine(1, 16_000, 0.009, 0.00008, 300_000, start_s=30.0)
SMALL_7B = Engine(1, 8_000, 0.016, 0.00015, 120_000, start_s=40.0)
MIDDLE_14B = Engine(1, 5_500, 0.021, 0.00022, 90_000, start_s=60.0)
LARGE_72B = Engine(4, 5_000, 0.024, 0.00030, 400_000, start_s=120.0)
LARGE_110B = Engine(8, 5_500, 0.026, 0.00030, 500_000, start_s=180.0)
# by number of models: engines from the smallest to the largest, each with its number of replicas
CLUSTERS: dict[int, tuple[tuple[Engine, int], ...]] = {
    2: ((SMALL_7B, 4), (LARGE_72B, 2)),
    3: ((SMALL_7B, 4), (LARGE_72B, 2), (LARGE_110B, 1)),
    4: ((SMALL_3B, 3), (SMALL_7B, 5), (MIDDLE_14B, 3), (LARGE_72B, 2)),
}


def sizes(names: tuple[str, ...]) -> tuple[Size, ...]:
    """The cluster for these models, cheapest first.

    Raises:
        ValueError: no cluster has so many models.
    """
    if len(names) not in CLUSTERS:
        raise ValueError(
            f"no cluster has {len(names)} models; choose a portfolio of: {', '.join(map(str, CLUSTERS))}"
        )
    given = zip(names, CLUSTERS[len(names)], strict=True)
    return tuple(Size(name, engine, replicas) for name, (engine, replicas) in given)
