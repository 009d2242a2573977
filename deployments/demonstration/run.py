"""Demonstration of learning on a running server: `router demo`.

A seeded, mixed stream of tasks goes through `auto`: calculations, and questions for a language model if one is served.
A program checks each answer and posts the result as feedback.
Then the same stream goes to each model and each variant by name, and to the models that static rules choose.

The demo prints a table, saves a picture, logs an MLflow run with one below it for each strategy, and registers the
learned policy as a version.
"""

import os
import random
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pandas as pd

from assets import talk, tasks
from assets.tasks import Task
from deployments.demonstration.client import DEFAULT_URL, Answer, run_stream, state
from deployments.observability.colours import AUTO, STATIC, colours_of
from deployments.profiler.reader import load_classifier
from deployments.settings import ProfilerSettings
from policies.baselines import Static
from policies.profiling import features
from policies.types import Arm, Objective, Request

TITLES = {
    "easy": "easy calculations",
    "medium": "medium calculations",
    "hard": "hard calculations",
    talk.LEVEL: "facts, words and sentences",
}
LEVELS = tuple(TITLES)
WINDOW = 50  # requests over which a share is averaged
DEFAULT_MLFLOW = "http://127.0.0.1:5000"


def make_stream(seed: int, count: int, with_talk: bool = False) -> list[Task]:
    """A stream with every kind of task equally often.

    The tasks contain no words of urgency or care, so that every strategy has the same objective.

    Args:
        seed: another seed is another stream.
        count: number of tasks.
        with_talk: also the kinds of talk.py, which a language model answers.
    """
    rng = random.Random(seed)
    kinds = tasks.KINDS + talk.KINDS if with_talk else tasks.KINDS
    stream = []
    for _ in range(count):
        kind = rng.choice(kinds)
        if kind in talk.KINDS:
            stream.append(talk.make_talk(rng, kind))
        else:
            stream.append(tasks.make_task(rng, kind, wishes=False))
    return stream


def stream_for(names: Collection[str], seed: int, count: int) -> list[Task]:
    """The demo's stream for these models: with talk, if the language model of the default portfolio is among them."""
    return make_stream(seed, count, with_talk=talk.MODEL in names)


def static_rule(names: list[str], threshold: float) -> Any:
    """The model that the policy `static` would choose, as a function of the task.

    A language model, if there is one, gets everything but calculations.
    """
    by_kind = {}
    if talk.MODEL in names and len(names) > 1:
        others = set(features.KINDS) - {"arithmetic", "strings"}
        by_kind = dict.fromkeys(others, talk.MODEL)
    policy = Static([Arm(name) for name in names], threshold, by_kind)
    classifier = load_classifier(ProfilerSettings().classifier)
    rng = np.random.default_rng(0)

    def choose(task: Task) -> str:
        text = task.question
        reading = classifier.read(text)
        profile = features.profile(text, reading, None, "chat", len(text))
        return policy.decide([Request("", profile, Objective())], {}, rng, 0)[0].arm

    return choose


def level_of(kind: str) -> str:
    """`easy`, `medium` or `hard` for a calculation, else `talk`."""
    return talk.LEVEL if kind in talk.KINDS else tasks.level_of(kind)


def as_frame(
    answers: list[Answer], strategy: str, live: dict[str, Any]
) -> pd.DataFrame:
    """A row for each answer, with its cost in US dollars and its utility under the server's objective."""
    objective = Objective(
        live["objective"]["latency_weight"], live["objective"]["cost_weight"]
    )
    rows = []
    for i, a in enumerate(answers):
        price = live["models"][a.model]
        cost = (
            a.prompt_tokens * price["prompt_price_usd"]
            + a.output_tokens * price["output_price_usd"]
        )
        rows.append(
            {
                "strategy": strategy,
                "i": i,
                "third": 1 + 3 * i // len(answers),
                "kind": a.task.kind,
                "level": level_of(a.task.kind),
                "model": a.model,
                "right": float(a.right),
                "latency_s": a.latency_s,
                "ttft_s": a.ttft_s,
                "cost_usd": cost,
                "utility": objective.utility(float(a.right), a.latency_s, cost),
                "fallback": a.fallback != "none",
            }
        )
    return pd.DataFrame(rows)


def summarise(frame: pd.DataFrame, names: list[str]) -> dict[str, float]:
    """Figures of one strategy."""
    figures = {
        "accuracy": frame.right.mean(),
        "latency_mean_s": frame.latency_s.mean(),
        "latency_p95_s": frame.latency_s.quantile(0.95),
        "cost_usd_per_1000": 1000 * frame.cost_usd.mean(),
        "utility": frame.utility.mean(),
        "utility_first_third": frame[frame.third == 1].utility.mean(),
        "utility_last_third": frame[frame.third == 3].utility.mean(),
        "accuracy_last_third": frame[frame.third == 3].right.mean(),
    }
    last = frame[frame.third == 3]
    for name in names:
        figures[f"share_last_third/{name}"] = (last.model == name).mean()
    return {key: float(value) for key, value in figures.items()}


def table(figures: dict[str, dict[str, float]]) -> str:
    """A Markdown table of all strategies."""
    return str(pd.DataFrame(figures).T.rename_axis("strategy").round(4).to_markdown())


def draw(frames: dict[str, pd.DataFrame], names: list[str], path: Path) -> None:
    """Draw the shares of `auto` for each level of difficulty, and the mean utility of every strategy.

    Each model, `auto` and the static rules have one colour in all panels.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    auto = frames["auto"]
    levels = [level for level in LEVELS if (auto.level == level).any()]
    rows = ["easy medium", "hard utility"]
    if talk.LEVEL in levels:
        rows = ["easy medium", f"hard {talk.LEVEL}", "utility utility"]
    layout: list[Any] = [row.split() for row in rows]
    figure, axes = plt.subplot_mosaic(
        layout, figsize=(11, 3.8 * len(rows)), layout="constrained"
    )
    colours = {"auto": AUTO, "static rules": STATIC, **colours_of(names)}
    for level in levels:
        axis = axes[level]
        part = auto[auto.level == level].reset_index(drop=True)
        shares = []
        for name in names:
            chosen = (part.model == name).astype(float)
            shares.append(chosen.rolling(WINDOW, min_periods=5).mean().fillna(0))
        axis.stackplot(
            part.i, shares, labels=names, colors=[colours[name] for name in names]
        )
        axis.set(
            title=TITLES[level],
            xlabel="request",
            ylabel="share of the last 50",
            ylim=(0, 1),
        )
    for name, frame in frames.items():
        mean = frame.utility.rolling(2 * WINDOW, min_periods=WINDOW).mean()
        axes["utility"].plot(
            frame.i,
            mean,
            label=name,
            color=colours[name],
            linewidth=2.5 if name == "auto" else 1.2,
        )
    axes["utility"].set(
        title="utility, mean of the last 100", xlabel="request", ylabel="utility"
    )
    # the colours are the same in all panels, and beside them the legend hides nothing
    figure.legend(
        handles=axes["utility"].get_lines(), loc="outside right upper", fontsize=9
    )
    figure.suptitle(
        "Models that `auto` chooses as it learns, and the utility of every strategy"
    )
    figure.savefig(path, dpi=110)
    plt.close(figure)


@dataclass(frozen=True)
class Options:
    """How the demonstration is run.

    url: of the gateway.
    mlflow: URL of MLflow; "" logs nothing.
    seed: another seed is another stream.
    requests: length of the stream.
    scored: share of the answers of `auto` that get a score.
    concurrency: requests at once.
    threshold: complexity from which the static rules choose the largest model.
    out: folder of the picture and of the answers.
    headers: of every request, as that with an API key.
    """

    url: str = DEFAULT_URL
    mlflow: str = DEFAULT_MLFLOW
    seed: int = 1
    requests: int = 600
    scored: float = 1.0
    concurrency: int = 8
    threshold: float = 0.5
    out: Path = Path("var")
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Span:
    """When something began and ended, in seconds since the epoch."""

    begin: float
    end: float


def log_to_mlflow(
    options: Options,
    figures: dict[str, dict[str, float]],
    frames: dict[str, pd.DataFrame],
    picture: Path,
    spans: dict[str, Span],
) -> None:
    """Log a run of the demo and, below it, a run for each strategy, each with the time that it really took.

    Args:
        options: of the demonstration; they are the parameters.
        figures: of each strategy.
        frames: the answers of each strategy.
        picture: becomes an artefact of the demo's run.
        spans: by strategy.
    """
    from deployments.tracking.descriptions import DEMO, NOTE
    from deployments.tracking.model_registry import PolicyRegistry

    registry = PolicyRegistry(options.mlflow, "adaptive-router")
    parameters = {
        name: str(asdict(options)[name])
        for name in ("seed", "requests", "scored", "concurrency", "threshold")
    }
    tags = {"seed": parameters["seed"], NOTE: DEMO}
    whole = Span(
        min(span.begin for span in spans.values()),
        max(span.end for span in spans.values()),
    )
    parent = registry.start_run(
        f"demo seed {options.seed}",
        {**tags, "kind": "demo"},
        parameters,
        whole.begin,
    )
    for name, values in figures.items():
        run = registry.start_run(
            f"demo {name} seed {options.seed}",
            {
                **tags,
                "strategy": name,
                "kind": "demo strategy",
                "mlflow.parentRunId": parent,
            },
            {**parameters, "strategy": name},
            spans[name].begin,
        )
        registry.log(run, values, len(frames[name]))
        for third in (1, 2, 3):
            part = frames[name][frames[name].third == third]
            progress = {
                "utility_by_third": part.utility.mean(),
                "accuracy_by_third": part.right.mean(),
            }
            registry.log(run, progress, third)
        registry.client.set_terminated(run, end_time=int(spans[name].end * 1000))
    registry.log(parent, figures["auto"], len(frames["auto"]))
    registry.client.log_artifact(parent, str(picture))
    registry.client.set_terminated(parent, end_time=int(whole.end * 1000))


def play_strategies(
    options: Options, names: list[str], live: dict[str, Any]
) -> tuple[dict[str, pd.DataFrame], dict[str, Span]]:
    """Answers of `auto`, of each model and variant by name and of the static rules, by strategy; when each was played.

    The static rules choose among the models, without their variants.
    """
    stream = stream_for(names, options.seed, options.requests)
    strategies: dict[str, Any] = {"auto": lambda _: "auto"}
    for name in names:
        strategies[name] = lambda _, name=name: name
    models = [name for name in names if not live["models"][name]["variant_of"]]
    strategies["static rules"] = static_rule(models, options.threshold)
    rng = random.Random(options.seed)
    scored = {i for i in range(len(stream)) if rng.random() < options.scored}
    frames = {}
    spans = {}
    for name, choose in strategies.items():
        begin = time.time()
        answers = run_stream(
            options.url,
            stream,
            choose,
            f"{name:>12}",
            options.concurrency,
            feedback=scored if name == "auto" else (),
            headers=options.headers,
        )
        spans[name] = Span(begin, time.time())
        frames[name] = as_frame(answers, name, live)
    return frames, spans


def results(
    figures: dict[str, dict[str, float]], auto: pd.DataFrame, names: list[str]
) -> list[str]:
    """The table of strategies, the choices of `auto`, and the utilities at the end.

    The best single size is the best of the models and their variants, each of which a client could name.
    """
    last = auto[auto.third == 3]
    shares = pd.crosstab(last.kind, last.model, normalize="index").round(2)
    utility = {name: values["utility_last_third"] for name, values in figures.items()}
    best = max(names, key=lambda name: utility[name])
    return [
        "\n" + table(figures),
        "\nWhere `auto` sent each kind in the last third:\n" + shares.to_markdown(),
        f"\nutility in the last third: auto {utility['auto']:.4f}; best single size ({best}) "
        f"{utility[best]:.4f}; static rules {utility['static rules']:.4f}",
    ]


def check_mlflow(url: str) -> None:
    """Find out before the stream whether its results can be logged.

    Raises:
        SystemExit: no MLflow answers at this address.
    """
    try:
        well = httpx.get(f"{url}/health", timeout=10).is_success
    except httpx.HTTPError:
        well = False
    if not well:
        raise SystemExit(
            f"no MLflow answers at {url}; name yours by --mlflow, or log nothing: --mlflow ''"
        )


def demonstrate(
    options: Options, say: Callable[[str], object] = print
) -> dict[str, dict[str, float]]:
    """Play every strategy, then show and log the results.

    Returns:
        The figures of each strategy, as in the table.

    Raises:
        SystemExit: the gateway or MLflow does not answer, or a request was refused.
    """
    live = state(options.url, options.headers)
    if options.mlflow:
        check_mlflow(options.mlflow)
        # otherwise MLflow prints two lines for each run
        os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    names = [name for name, model in live["models"].items() if "chat" in model["tasks"]]
    strategies = len(names) + 2
    say(
        f"{strategies} strategies with {options.requests} requests each (auto, {', '.join(names)}, static rules); "
        f"the router has made {live['decisions']} decisions before"
    )
    try:
        frames, spans = play_strategies(options, names, live)
    except (RuntimeError, httpx.HTTPError) as error:
        raise SystemExit(f"the demonstration ended early: {error}") from None
    figures = {name: summarise(frame, names) for name, frame in frames.items()}
    options.out.mkdir(parents=True, exist_ok=True)
    picture = options.out / f"demo-seed{options.seed}.png"
    draw(frames, names, picture)
    pd.concat(frames.values()).to_parquet(picture.with_suffix(".parquet"))
    for text in results(figures, frames["auto"], names):
        say(text)
    version = httpx.post(
        f"{options.url}/v1/router/versions", headers=options.headers, timeout=120
    )
    if version.is_success:
        registered = version.json()
        say(f"registered as version {registered['version']} of {registered['name']}")
    if options.mlflow:
        log_to_mlflow(options, figures, frames, picture, spans)
    say(f"picture: {picture}")
    return figures
