"""Images in messages: which data URLs are taken, and how many tokens they count for."""

from typing import Any

import pytest
from pydantic import ValidationError

from deployments.media.images import MAX_TOKENS, ImageUrl, size_of
from deployments.media.medium import MAX_MEDIA
from deployments.parameters.chat import ChatRequest
from policies.capabilities import Capability
from tests.support.images import drawn, url_of

FORMATS = ("PNG", "JPEG", "WEBP", "GIF")


def chat(*urls: str, role: str = "user") -> ChatRequest:
    """A chat with these images, between two texts each."""
    parts: list[Any] = [{"type": "text", "text": "What is "}]
    for url in urls:
        parts += [
            {"type": "text", "text": "this?"},
            {"type": "image_url", "image_url": {"url": url}},
        ]
    message = {"role": role, "content": parts}
    return ChatRequest.model_validate({"model": "auto", "messages": [message]})


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("size", [(1, 1), (31, 57), (640, 480)])
def test_sizes_are_read_from_the_heads_of_images(
    kind: str, size: tuple[int, int]
) -> None:
    """Those that Pillow writes; also of WebP without losses, and of a JPEG with a long comment."""
    assert size_of(drawn(kind, *size)) == size
    assert size_of(drawn("WEBP", *size, lossless=True)) == size
    assert size_of(drawn("WEBP", *size, exif=b"Exif\x00\x00" + b"a" * 50)) == size
    assert size_of(drawn("JPEG", *size, comment=b"\xff\xc0" * 20_000)) == size


def test_heads_that_are_cut_give_no_size() -> None:
    """At any place; and they never loop."""
    for kind in FORMATS:
        data = drawn(kind, 64, 48)
        for length in range(min(len(data), 200)):
            size_of(data[:length])
    assert size_of(b"") is size_of(b"BM" * 20) is size_of(b"\xff\xd8" * 99) is None


def test_an_image_reaches_the_model_with_its_text() -> None:
    """Texts that follow each other are one, as the profiler reads them; the image comes as it was sent."""
    url = url_of(drawn("PNG", 56, 84))
    request = chat(url)
    (message,) = request.body()["messages"]  # type: ignore[misc]
    assert message["content"] == [
        {"type": "text", "text": "What is this?"},
        {"type": "image_url", "image_url": {"url": url}},
    ]
    read = request.texts()
    assert read.context == "What is this?" and read.media_tokens == 2 * 3
    (need,) = request.needs()
    assert need.capability is Capability.IMAGES
    assert need.parameter == "messages.0.content"


def test_tokens_are_bounded_and_assumed_of_what_is_fetched() -> None:
    wide = url_of(drawn("PNG", 2**14, 2**10))
    assert chat(wide).texts().media_tokens <= MAX_TOKENS
    assert (
        chat("https://a.example/b.png").texts().media_tokens == ImageUrl.unknown_tokens
    )


def huge() -> bytes:
    """A PNG of 100 bytes that says it has 2**40 pixels."""
    data = bytearray(drawn("PNG", 8, 8))
    data[16:24] = (2**20).to_bytes(4, "big") * 2
    return bytes(data)


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("data:image/png;base64,", "no PNG"),
        ("data:image/png;base64,####", "no base64"),
        ("data:image/svg+xml;base64,PHN2Zz4=", "begins with"),
        ("data:text/html,<b>", "begins with"),
        (url_of(b"no image at all"), "no PNG"),
        (url_of(huge()), "pixels"),
        ("file:///etc/passwd", "no data URL"),
        ("ftp://a/b", "no data URL"),
        ("http://[", "no data URL"),
        ("https://a/" + "b" * 3_000, "characters"),
        ("", "no data URL"),
    ],
    ids=lambda value: value[:30],
)
def test_other_urls_are_refused(url: str, reason: str) -> None:
    with pytest.raises(ValidationError, match=reason):
        chat(url)


def test_images_are_bounded_in_number_and_are_of_users() -> None:
    url = url_of(drawn("PNG", 8, 8))
    chat(*[url] * MAX_MEDIA)
    with pytest.raises(ValidationError, match="more than 16 images"):
        chat(*[url] * (MAX_MEDIA + 1))
    for role in ("system", "assistant"):
        with pytest.raises(ValidationError, match="has text only"):
            chat(url, role=role)


@pytest.mark.parametrize(
    "part",
    [
        {"type": "text"},
        {"type": "image_url"},
        {"type": "text", "text": "a", "image_url": {"url": "https://a/b"}},
        {"type": "input_audio", "input_audio": {"data": "", "format": "wav"}},
        {"type": "image_url", "video_url": {"url": "https://a/b"}},
        {"type": "input_image", "image_url": {"url": "https://a/b"}},
        {"type": "file", "file": {}},
        {"type": "image_url", "image_url": "https://a/b"},
        {"type": "image_url", "image_url": {"url": "https://a/b", "uuid": "c"}},
    ],
    ids=str,
)
def test_other_parts_are_refused(part: dict[str, Any]) -> None:
    message = {"role": "user", "content": [part]}
    with pytest.raises(ValidationError):
        ChatRequest.model_validate({"model": "auto", "messages": [message]})
