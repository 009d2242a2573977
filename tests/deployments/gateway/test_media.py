"""Images, audio and videos go to the models that read them; they count as tokens, and are fetched only from hosts that
are named.
"""

from collections.abc import Iterator
from typing import Any

import pytest

from deployments.models import capabilities
from tests.support import recordings
from tests.support.fakes import FakeModel
from tests.support.gateway import ROOT, Gateway, eventually
from tests.support.images import drawn, url_of

HOST = "images.example.com"


@pytest.fixture(scope="module")
def seeing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    """Three sizes, of which the small one takes audio and videos, the middle one images; tokens are counted."""
    size = {"context_tokens": 4096}
    tokenizer = str(ROOT / "assets/models/nano/tokenizer.json")
    made = Gateway(
        tmp_path_factory.mktemp("seeing"),
        models={"small": size, "medium": size, "large": size},
        profiler={"embedder": str(ROOT / "assets/embedder"), "tokenizer": tokenizer},
        media_hosts=[HOST],
    )
    with made.client:
        heard = {"audio": 2, "video": {"count": 1}, "image": 0}
        made.deploy("small", {"engine_kwargs": {"limit_mm_per_prompt": heard}})
        made.deploy("medium", {"engine_kwargs": {"limit_mm_per_prompt": {"image": 4}}})
        made.deploy("large", {"engine_kwargs": {"language_model_only": True}})
        yield made


@pytest.fixture(autouse=True)
def fresh(seeing: Gateway) -> None:
    """Each test begins with models that say their name."""
    for name in seeing.models:
        seeing.models[name] = FakeModel(name)
    seeing.ingress.dispatcher._methods.clear()


def show(gateway: Gateway, url: str, **body: Any) -> Any:
    """A chat about an image."""
    parts = [
        {"type": "text", "text": "What is this?"},
        {"type": "image_url", "image_url": {"url": url, "detail": "low"}},
    ]
    return gateway.chat(messages=[{"role": "user", "content": parts}], **body)


@pytest.mark.parametrize("stream", [False, True])
def test_images_go_to_the_one_model_that_reads_them(
    seeing: Gateway, stream: bool
) -> None:
    """By `auto`, and by its name; the others are refused with the place."""
    url = url_of(drawn("JPEG", 280, 280), "jpeg")
    for model in ("auto", "medium"):
        for _ in range(8):
            answer = show(seeing, url, model=model, stream=stream)
            assert answer.status_code == 200, answer.text
            assert answer.headers["x-router-model"] == "medium"
    (text, image) = seeing.models["medium"].calls[0]["messages"][0]["content"]
    assert text == {"type": "text", "text": "What is this?"}
    assert image["image_url"] == {"url": url, "detail": "low"}
    for model in ("small", "large"):
        answer = show(seeing, url, model=model, stream=stream)
        error = answer.json()["error"]
        assert answer.status_code == 400 and error["code"] == capabilities.CODE
        assert error["param"] == "messages.0.content"
        assert "can read images" in error["message"]
        assert not seeing.models[model].calls


def heard(kind: str, url: str = "") -> dict[str, Any]:
    """A part with ten seconds of audio, or with a video."""
    data = recordings.wav(10.0)
    if kind == "input_audio":
        sent = {"data": recordings.encoded(data), "format": "wav"}
        return {"type": kind, kind: sent}
    if kind == "audio_url":
        url = url or recordings.url_of(data, "audio/wav")
    url = url or recordings.url_of(recordings.mp4(), "video/mp4")
    return {"type": kind, kind: {"url": url}}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("kind", ["input_audio", "audio_url", "video_url"])
def test_audio_and_videos_go_to_the_one_model_that_takes_them(
    seeing: Gateway, kind: str, stream: bool
) -> None:
    """By `auto` and by name, as they were sent; with an image beside them no model is left."""
    part = heard(kind)
    parts: list[Any] = [{"type": "text", "text": "What is this?"}, part]
    for model in ("auto", "small"):
        messages = [{"role": "user", "content": parts}]
        answer = seeing.chat(messages=messages, model=model, stream=stream)
        assert answer.status_code == 200, answer.text
        assert answer.headers["x-router-model"] == "small"
        assert seeing.models["small"].calls[-1]["messages"][0]["content"] == parts
    refused = seeing.chat(messages=messages, model="medium", stream=stream)
    word = "watch videos" if kind == "video_url" else "listen to audio"
    assert refused.status_code == 400
    assert f"can {word} (medium)" in refused.json()["error"]["message"]
    image = {"type": "image_url", "image_url": {"url": url_of(drawn("PNG", 28, 28))}}
    messages = [{"role": "user", "content": [*parts, image]}]
    error = seeing.chat(messages=messages, stream=stream).json()["error"]
    assert error["code"] == capabilities.CODE and error["param"] == "messages.0.content"


def test_audio_counts_by_its_duration(seeing: Gateway) -> None:
    message = {"role": "user", "content": [heard("input_audio")]}
    answer = seeing.chat(messages=[message])
    where = f"/v1/router/decisions/{answer.headers['x-router-decision-id']}"
    eventually(lambda: seeing.client.get(where).json().get("outcome"))
    profile = seeing.client.get(where).json()["profile"]
    assert profile["needs"] == ["audio"] and profile["prompt_tokens"] >= 250


@pytest.mark.parametrize("kind", ["audio_url", "video_url"])
def test_audio_and_videos_are_fetched_from_named_hosts_only(
    seeing: Gateway, kind: str
) -> None:
    for host, status in ((HOST, 200), ("example.com", 400)):
        message = {"role": "user", "content": [heard(kind, f"https://{host}/a")]}
        answer = seeing.chat(messages=[message])
        assert answer.status_code == status, answer.text
    assert "is fetched from" in answer.json()["error"]["message"]


def test_the_tokens_of_an_image_are_in_the_profile(seeing: Gateway) -> None:
    """Of a larger image more, and the text's beside them; what does not fit goes nowhere."""
    counts = []
    for side in (28, 280):
        answer = show(seeing, url_of(drawn("PNG", side, side)))
        where = f"/v1/router/decisions/{answer.headers['x-router-decision-id']}"
        eventually(lambda where=where: seeing.client.get(where).json().get("outcome"))
        profile = seeing.client.get(where).json()["profile"]
        assert profile["needs"] == ["images"]
        counts.append(profile["prompt_tokens"])
    assert counts[1] - counts[0] == 99
    answer = show(seeing, url_of(drawn("PNG", 2_800, 2_800)))
    assert answer.json()["error"]["code"] == "context_length_exceeded"


def test_images_are_fetched_from_named_hosts_only(seeing: Gateway) -> None:
    """The engine gets the URL; any other host is refused before a decision, however it is written."""
    assert show(seeing, f"https://{HOST}/a.png").status_code == 200
    for url in (
        "https://example.com/a.png",
        f"https://{HOST}.evil.example/a.png",
        f"https://{HOST}@evil.example/a.png",
        f"https://evil.example/{HOST}",
        "http://127.0.0.1:8265/",
        "http://169.254.169.254/latest/meta-data",
        "http:///a.png",
    ):
        answer = show(seeing, url)
        error = answer.json()["error"]
        assert answer.status_code == 400, url
        assert error["param"] == "messages.0.content"
        assert HOST in error["message"] and "evil" not in error["message"]
    assert len(seeing.models["medium"].calls) == 1


def test_no_host_is_the_default(gateway: Gateway) -> None:
    """And no model of which nothing is known is asked to read an image."""
    answer = show(gateway, url_of(drawn("PNG", 8, 8)))
    error = answer.json()["error"]
    assert answer.status_code == 400 and error["param"] == "messages.0.content"
    assert gateway.settings.media_hosts == ()
