"""Videos in messages: what is taken, and how many tokens it counts for."""

import pytest
from pydantic import ValidationError

from deployments.media.video import VideoUrl
from deployments.parameters.chat import ChatRequest
from policies.capabilities import Capability
from tests.support.recordings import mp4, url_of, wav


@pytest.mark.parametrize(
    "url",
    [
        url_of(mp4(), "video/mp4"),
        url_of(b"\x1aE\xdf\xa3" + bytes(40), "video/webm"),
        "https://a.example/b.mp4",
    ],
)
def test_a_video_reaches_the_model_as_it_was_sent(url: str) -> None:
    """It counts for the frames that an engine takes, however long it is."""
    part = {"type": "video_url", "video_url": {"url": url}}
    message = {"role": "user", "content": [part]}
    request = ChatRequest.model_validate({"model": "auto", "messages": [message]})
    (sent,) = request.body()["messages"]  # type: ignore[misc]
    assert sent["content"] == [part]
    assert request.texts().media_tokens == VideoUrl.unknown_tokens
    (need,) = request.needs()
    assert need.capability is Capability.VIDEO


def test_what_is_no_video_is_refused() -> None:
    for url, reason in (
        (url_of(wav(0.1), "video/mp4"), "no MP4"),
        (url_of(b"", "video/webm"), "no MP4"),
        (url_of(mp4(), "video/x-flv"), "begins with data:video/mp4"),
        ("file:///a.mp4", "no data URL of video"),
    ):
        with pytest.raises(ValidationError, match=reason):
            VideoUrl.model_validate({"url": url})
