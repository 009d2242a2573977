"""Audio and video for tests: files of every format, of silence or of a head alone."""

import base64
import io
import struct
import wave

FLAC_RATE = 44_100


def wav(seconds: float, rate: int = 16_000) -> bytes:
    """Silence of 16 bits."""
    file = io.BytesIO()
    with wave.open(file, "wb") as written:
        written.setnchannels(1)
        written.setsampwidth(2)
        written.setframerate(rate)
        written.writeframes(b"\0\0" * round(seconds * rate))
    return file.getvalue()


def flac(seconds: float) -> bytes:
    """The marker and the STREAMINFO block, without frames."""
    samples = round(seconds * FLAC_RATE)
    packed = FLAC_RATE << 44 | 15 << 36 | samples
    info = struct.pack(">HH6sQ16s", 4096, 4096, bytes(6), packed, bytes(16))
    return b"fLaC" + b"\x80\0\0\x22" + info


def ogg(seconds: float, vorbis: bool = False) -> bytes:
    """The first page, with the head of Opus or Vorbis, and the last one."""
    rate = 44_100 if vorbis else 48_000
    head = b"OpusHead\x01\x01" + bytes(9)
    if vorbis:
        head = b"\x01vorbis" + struct.pack("<IBI", 0, 1, rate) + bytes(14)
    pages = b""
    for position, packet in ((0, head), (round(seconds * rate), b"\0" * 20)):
        number = len(pages) and 1
        pages += b"OggS\0" + struct.pack("<BqIII", 4, position, 7, number, 0)
        pages += bytes((1, len(packet))) + packet
    return pages


def mp3(
    seconds: float, counted: str = "", kbit: int = 128, version: int = 1, tag: int = 0
) -> bytes:
    """Frames of silence.

    Args:
        seconds: duration, rounded to frames.
        counted: Xing, Info or VBRI: the first frame says how many there are; "" for none.
        kbit: 128 or 64.
        version: of MPEG, 1 or 2.
        tag: bytes of a tag before them.
    """
    rate = 44_100 if version == 1 else 22_050
    samples = 1_152 if version == 1 else 576
    index = {(1, 128): 9, (1, 64): 5, (2, 64): 8}[version, kbit]
    head = bytes((0xFF, 0xFB if version == 1 else 0xF3, index << 4, 0xC4))
    size = samples // 8 * kbit * 1_000 // rate
    number = round(seconds * rate / samples)
    first = head
    if counted == "VBRI":
        first += bytes(32) + b"VBRI" + bytes(10) + struct.pack(">I", number)
    elif counted:
        first += bytes(32) + counted.encode() + struct.pack(">II", 1, number)
    frames = first.ljust(size, b"\0") + head.ljust(size, b"\0") * (number - 1)
    if not tag:
        return frames
    length = bytes((tag >> 21 & 127, tag >> 14 & 127, tag >> 7 & 127, tag & 127))
    return b"ID3\x04\0\0" + length + b"\xff\xfb\x90" + bytes(tag - 3) + frames


def mp4() -> bytes:
    """The head of a file."""
    return struct.pack(">I4s4sI", 16, b"ftyp", b"isom", 0)


def encoded(data: bytes) -> str:
    return base64.b64encode(data).decode()


def url_of(data: bytes, kind: str) -> str:
    """A data URL; `kind` is as audio/wav."""
    return f"data:{kind};base64,{encoded(data)}"
