"""Audio in messages: what is taken, how long it is, and how many tokens it counts for."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from deployments.media.audio import (
    MAX_SECONDS,
    TOKENS_PER_S,
    AudioUrl,
    InputAudio,
    seconds_of,
)
from deployments.media.medium import MAX_MEDIA
from deployments.parameters.chat import ChatRequest
from policies.capabilities import Capability
from tests.support.recordings import encoded, flac, mp3, ogg, url_of, wav


def chat(*parts: dict[str, Any], role: str = "user") -> ChatRequest:
    """A chat about these parts."""
    text = {"type": "text", "text": "What is said?"}
    message = {"role": role, "content": [text, *parts]}
    return ChatRequest.model_validate({"model": "auto", "messages": [message]})


def part(data: bytes, kind: str = "wav") -> dict[str, Any]:
    """As OpenAI's clients send it."""
    sent = {"data": encoded(data), "format": kind}
    return {"type": "input_audio", "input_audio": sent}


@pytest.mark.parametrize("seconds", [1.0, 12.5, 300.0])
def test_durations_are_read_from_the_heads_of_files(seconds: float) -> None:
    """Of all formats; a frame of MP3 is 26 ms."""
    assert seconds_of(wav(seconds)) == pytest.approx(seconds)
    assert seconds_of(wav(seconds, rate=44_100)) == pytest.approx(seconds)
    assert seconds_of(flac(seconds)) == pytest.approx(seconds)
    assert seconds_of(ogg(seconds)) == pytest.approx(seconds)
    assert seconds_of(ogg(seconds, vorbis=True)) == pytest.approx(seconds)
    for counted in ("", "Xing", "Info", "VBRI"):
        for version in (1, 2):
            data = mp3(seconds, counted, 64, version)
            assert seconds_of(data) == pytest.approx(seconds, abs=0.03, rel=0.005)
    tagged = mp3(seconds, tag=300_000)
    assert seconds_of(tagged) == pytest.approx(seconds, abs=0.03, rel=0.005)


def test_a_wav_of_a_stream_is_as_long_as_its_data() -> None:
    """Its head states the largest length; other chunks may stand before the data."""
    data = wav(2.0)
    at = data.index(b"data")
    endless = data[: at + 4] + b"\xff" * 4 + data[at + 8 :]
    assert seconds_of(endless) == pytest.approx(2.0)
    listed = data[:at] + b"LIST\x05\0\0\0abcde\0" + data[at:]
    assert seconds_of(listed) == pytest.approx(2.0)


@settings(deadline=None)
@given(st.binary(max_size=600), st.integers(0, 4))
def test_any_bytes_have_a_duration_or_none(noise: bytes, which: int) -> None:
    """Heads that are cut or followed by noise, too."""
    heads = (b"", wav(0.01), flac(1.0), ogg(1.0, vorbis=True), mp3(1.0, "Xing"))
    for cut in range(0, 60, 7):
        found = seconds_of(heads[which][:cut] + noise)
        assert found is None or found >= 0


@pytest.mark.parametrize(
    ("kind", "data"),
    [("wav", wav(3.0)), ("mp3", mp3(3.0)), ("flac", flac(3.0)), ("ogg", ogg(3.0))],
)
def test_audio_reaches_the_model_as_it_was_sent(kind: str, data: bytes) -> None:
    """As OpenAI's part and by a data URL."""
    url = {"url": url_of(data, f"audio/{kind}")}
    for sent in (part(data, kind), {"type": "audio_url", "audio_url": url}):
        request = chat(sent)
        (message,) = request.body()["messages"]  # type: ignore[misc]
        assert message["content"][1] == sent
        assert abs(request.texts().media_tokens - 3 * TOKENS_PER_S) <= 1
        (need,) = request.needs()
        assert need.capability is Capability.AUDIO
        assert need.parameter == "messages.0.content"


def test_audio_of_a_host_counts_for_an_assumed_duration() -> None:
    sent = {"type": "audio_url", "audio_url": {"url": "https://a.example/b.wav"}}
    request = chat(sent)
    assert request.texts().media_tokens == AudioUrl.unknown_tokens
    ((_, medium),) = request.media()
    assert medium.host == "a.example"


def test_what_is_no_audio_or_too_long_is_refused() -> None:
    """With what is taken, and the limit."""
    for data in (b"", b"no audio", wav(1.0)[:20], b"\xff\xfb\x00\x00" * 50):
        with pytest.raises(ValidationError, match="no WAV, MP3"):
            chat(part(data))
    counted = mp3(1.0, "Xing")
    at = counted.index(b"Xing") + 8
    endless = counted[:at] + b"\xff" * 4 + counted[at + 4 :]
    for data in (flac(MAX_SECONDS + 1), ogg(1e12), endless):
        with pytest.raises(ValidationError, match="more than 600 s"):
            chat(part(data))
    with pytest.raises(ValidationError, match="no base64"):
        InputAudio.model_validate({"data": "a", "format": "wav"})
    with pytest.raises(ValidationError, match="begins with data:audio/wav"):
        AudioUrl.model_validate({"url": url_of(wav(1.0), "audio/midi")})
    with pytest.raises(ValidationError, match="has text only"):
        chat(part(wav(0.1)), role="system")


def test_media_of_all_kinds_are_bounded_together() -> None:
    sent = part(wav(0.01))
    chat(*[sent] * MAX_MEDIA)
    with pytest.raises(ValidationError, match="more than 16"):
        chat(*[sent] * (MAX_MEDIA + 1))
