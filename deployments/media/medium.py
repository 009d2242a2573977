"""A part of a message that is no text: its capability, its tokens, and where the engine gets it from."""

import binascii
import re
from abc import abstractmethod
from typing import ClassVar
from urllib.parse import urlsplit

from pydantic import Field, PrivateAttr, field_validator

from deployments.errors import field_error
from deployments.model_settings import StrictModel
from policies.capabilities import Capability

MAX_MEDIA = 16  # of one request
MAX_BYTES = 20 * 2**20  # of one medium; max_body_bytes bounds them before
MAX_URL = 2_048  # characters of a URL that is no data URL


class Medium(StrictModel):
    """An image, audio or a video.

    Attributes:
        capability: what an arm needs to read it.
        noun: what it is, for messages.
    """

    capability: ClassVar[Capability]
    noun: ClassVar[str]
    _tokens: int = PrivateAttr(0)

    @property
    def tokens(self) -> int:
        """An estimate of the tokens that a model reads."""
        return self._tokens

    @property
    def host(self) -> str | None:
        """The host that the engine fetches it from; None if the request has its data."""
        return None

    def _decoded(self, encoded: str, field: str) -> bytes:
        """The bytes of base64.

        Raises:
            ValueError: it is no base64, or too long.
        """
        if len(encoded) > MAX_BYTES * 4 // 3 + 4:
            raise field_error(
                field, f"the {self.noun} has more than {MAX_BYTES} bytes; shrink it"
            )
        try:
            return binascii.a2b_base64(encoded, strict_mode=True)
        except ValueError:
            raise field_error(field, "the data is no base64; correct it") from None


class MediumUrl(Medium):
    """A medium behind a URL.

    Attributes:
        mime: the kind of its data URLs, as image.
        formats: the formats of its data URLs, as png.
        unknown_tokens: what it counts for if it is fetched, because its size is not known here.
    """

    mime: ClassVar[str]
    formats: ClassVar[tuple[str, ...]]
    unknown_tokens: ClassVar[int]

    url: str = Field(
        description="A data URL; other URLs only of hosts that the operator names."
    )

    @field_validator("url")
    @classmethod
    def _check_scheme(cls, url: str) -> str:
        if url.startswith("data:"):
            return url
        if len(url) > MAX_URL:
            raise ValueError(f"has more than {MAX_URL} characters; shorten it")
        try:
            known = urlsplit(url).scheme in ("http", "https")
        except ValueError:
            known = False
        if not known:
            raise ValueError(
                f"is no data URL of {cls.mime}, and no URL of http or https"
            )
        return url

    def model_post_init(self, _: object) -> None:
        """Check a data URL, and estimate the tokens.

        Raises:
            ValueError: the data is of none of the formats, or too large.
        """
        if not self.url.startswith("data:"):
            self._tokens = self.unknown_tokens
            return
        head = re.match(
            rf"data:{self.mime}/({'|'.join(self.formats)});base64,", self.url
        )
        if head is None:
            first, *others = self.formats
            raise field_error(
                "url",
                f"a data URL begins with data:{self.mime}/{first};base64, (or {', '.join(others)})",
            )
        data = self._decoded(self.url[head.end() :], "url")
        self._tokens = self.measure(data)

    @property
    def host(self) -> str | None:
        """See Medium; None for a data URL."""
        if self.url.startswith("data:"):
            return None
        return urlsplit(self.url).hostname or ""

    @abstractmethod
    def measure(self, data: bytes) -> int:
        """An estimate of the tokens of these data.

        Raises:
            ValueError: they are of none of the formats, or too large.
        """
