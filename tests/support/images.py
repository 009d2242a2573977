"""Images for tests."""

import base64
import io
from typing import Any

from PIL import Image


def drawn(kind: str, width: int, height: int, **options: Any) -> bytes:
    """An image of one colour."""
    file = io.BytesIO()
    Image.new("RGB", (width, height), "red").save(file, kind, **options)
    return file.getvalue()


def url_of(data: bytes, kind: str = "png") -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
