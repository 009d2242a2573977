"""Images in messages."""

from collections.abc import Iterator
from math import ceil
from typing import Literal

from deployments.errors import field_error
from deployments.media.integers import big, little
from deployments.media.medium import MediumUrl
from policies.capabilities import Capability

MAX_PIXELS = 2**24
PATCH = 28  # pixels of a side that become one token, as in Qwen's models; others differ
MAX_TOKENS = 16_384  # of one image; models scale larger ones down
JPEG_SIZES = {*range(0xC0, 0xD0)} - {
    0xC4,
    0xC8,
    0xCC,
}  # markers of segments with a size
Size = tuple[int, int]


def size_of(data: bytes) -> Size | None:
    """Width and height that the head of an image states; None if it is no PNG, JPEG, WebP or GIF.

    Nothing is decoded, so a small file of a huge image costs nothing.
    """
    if data.startswith(b"\x89PNG\r\n\x1a\n") and data[12:16] == b"IHDR":
        return big(data[16:20]), big(data[20:24])
    if data[:6] in (b"GIF87a", b"GIF89a"):
        return little(data[6:8]), little(data[8:10])
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return _webp_size(data)
    if data.startswith(b"\xff\xd8"):
        return _jpeg_size(data)
    return None


def _webp_size(data: bytes) -> Size | None:
    kind = data[12:16]
    if kind == b"VP8X":
        return little(data[24:27]) + 1, little(data[27:30]) + 1
    if kind == b"VP8L":
        bits = little(data[21:25])
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    if kind == b"VP8 ":
        return little(data[26:28]) & 0x3FFF, little(data[28:30]) & 0x3FFF
    return None


def _jpeg_size(data: bytes) -> Size | None:
    """The size of a JPEG, which one of its segments has."""
    for marker, at in _jpeg_segments(data):
        if marker in JPEG_SIZES:
            return big(data[at + 5 : at + 7]), big(data[at + 3 : at + 5])
    return None


def _jpeg_segments(data: bytes) -> Iterator[tuple[int, int]]:
    """The marker of each segment, and where the segment begins after it."""
    at = 2
    while at + 4 <= len(data) and data[at] == 0xFF:
        marker = data[at + 1]
        if marker == 0xFF:  # a fill byte
            at += 1
            continue
        yield marker, at + 2
        at += 2 + max(2, big(data[at + 2 : at + 4]))


class ImageUrl(MediumUrl):
    """Where an image is."""

    capability = Capability.IMAGES
    noun = "image"
    mime = "image"
    formats = ("png", "jpeg", "webp", "gif")
    unknown_tokens = 1_024

    detail: Literal["auto", "low", "high"] | None = None

    def measure(self, data: bytes) -> int:
        """See MediumUrl."""
        size = size_of(data)
        if size is None or not all(size):
            raise field_error("url", "the data is no PNG, JPEG, WebP or GIF")
        width, height = size
        if width * height > MAX_PIXELS:
            raise field_error(
                "url", f"the image has more than {MAX_PIXELS} pixels; shrink it"
            )
        return min(MAX_TOKENS, ceil(width / PATCH) * ceil(height / PATCH))
