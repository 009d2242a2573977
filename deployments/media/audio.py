"""Audio in messages.

The duration is read from the head of a file; nothing is decoded, so a small file of a long duration costs nothing.
"""

import re
from math import ceil
from typing import Literal

from pydantic import Field

from deployments.errors import field_error
from deployments.media.integers import big, little
from deployments.media.medium import Medium, MediumUrl
from policies.capabilities import Capability

MAX_SECONDS = 600.0  # vLLM's default VLLM_MAX_AUDIO_DECODE_DURATION_S
TOKENS_PER_S = 25  # as in Qwen's models; others have fewer
UNKNOWN_SECONDS = 40.0  # of audio that is fetched, whose duration is not known here
MAX_CHUNKS = 64  # of a WAV file before its data
OPUS_RATE = 48_000  # of the positions in every Opus file
# MPEG audio, layer III (ISO/IEC 11172-3 and 13818-3): kbit/s by index, of version 1 and of the others
KBIT_1 = (32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320)
KBIT_2 = (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160)
MPEG_RATES = {3: (44_100, 48_000, 32_000), 2: (22_050, 24_000, 16_000)}
MPEG_RATES[0] = (11_025, 12_000, 8_000)  # version 2.5
MPEG_SYNC = re.compile(rb"\xff[\xe2\xe3\xf2\xf3\xfa\xfb]")  # of layer III
SYNC_BYTES = 4_096  # in which the first frame begins
FRAME_BYTES = 256  # of a frame in which the number of frames is
XING = re.compile(rb"(?:Xing|Info)(?=\x00\x00\x00[\x01\x03\x05\x07\x09\x0b\x0d\x0f])")


def seconds_of(data: bytes) -> float | None:
    """The duration that a file states; None if it is no WAV, MP3, FLAC or Ogg of Opus or Vorbis."""
    if data[:4] == b"RIFF" and data[8:12] == b"WAVE":
        return _wav_seconds(data)
    if data[:4] == b"fLaC":
        return _flac_seconds(data)
    if data[:4] == b"OggS":
        return _ogg_seconds(data)
    return _mp3_seconds(data)


def _wav_seconds(data: bytes) -> float | None:
    at = 12
    bytes_per_s = 0
    for _ in range(MAX_CHUNKS):
        name = data[at : at + 4]
        length = little(data[at + 4 : at + 8])
        at += 8
        if name == b"fmt ":
            bytes_per_s = little(data[at + 8 : at + 12])
        if name == b"data":
            # a stream of unknown length states the largest one
            length = min(length, max(0, len(data) - at))
            return length / bytes_per_s if bytes_per_s else None
        at += length + length % 2
    return None


def _flac_seconds(data: bytes) -> float | None:
    """From STREAMINFO (RFC 9639, sec. 8.2); without a number of samples there as long as 16 bits each would be."""
    if len(data) < 26:
        return None
    bits = big(data[18:26])
    rate = bits >> 44
    samples = bits & (2**36 - 1) or len(data) // 2
    return samples / rate if rate else None


def _ogg_seconds(data: bytes) -> float | None:
    """The position of the last page (RFC 3533) by the rate in the first one."""
    head = data[:256]
    rate = OPUS_RATE if b"OpusHead" in head else 0
    vorbis = head.find(b"\x01vorbis")
    if vorbis >= 0:
        rate = little(head[vorbis + 12 : vorbis + 16])
    last = data.rfind(b"OggS")
    return little(data[last + 6 : last + 14]) / rate if rate else None


def _mp3_seconds(data: bytes) -> float | None:
    """From the first frame: its number of frames if it has one, or else its bit rate."""
    begin = 0
    if data[:3] == b"ID3" and len(data) >= 10:
        # four times seven bits
        begin = 10 + sum(byte << 7 * (3 - i) for i, byte in enumerate(data[6:10]))
    for sync in MPEG_SYNC.finditer(data, begin, begin + SYNC_BYTES):
        head = data[sync.start() : sync.start() + 4]
        if len(head) < 4:
            break
        version = head[1] >> 3 & 3
        bit_rate = (head[2] >> 4) - 1
        rate = head[2] >> 2 & 3
        if bit_rate not in range(14) or rate == 3 or version not in MPEG_RATES:
            continue
        frames = _frames(data, sync.start())
        if frames is not None:
            samples = 1_152 if version == 3 else 576
            return frames * samples / MPEG_RATES[version][rate]
        kbit = (KBIT_1 if version == 3 else KBIT_2)[bit_rate]
        return (len(data) - sync.start()) / (kbit * 125)
    return None


def _frames(data: bytes, at: int) -> int | None:
    """The number of frames that the first frame of an MP3 of changing bit rate states; None if it states none."""
    found = XING.search(data, at, at + FRAME_BYTES)
    if found is not None:
        return big(data[found.end() + 4 : found.end() + 8])
    vbri = data.find(b"VBRI", at, at + FRAME_BYTES)
    return big(data[vbri + 14 : vbri + 18]) if vbri >= 0 else None


def tokens_of(data: bytes, field: str) -> int:
    """An estimate of the tokens of audio.

    Args:
        data: of a file.
        field: which parameter has it, for messages.

    Raises:
        ValueError: it is of none of the formats, or too long.
    """
    seconds = seconds_of(data)
    if seconds is None:
        raise field_error(
            field, "the data is no WAV, MP3, FLAC, Ogg Opus or Ogg Vorbis"
        )
    if seconds > MAX_SECONDS:
        raise field_error(
            field, f"the audio has more than {MAX_SECONDS:.0f} s; shorten it"
        )
    return ceil(seconds * TOKENS_PER_S)


class InputAudio(Medium):
    """Audio in a message, as OpenAI's clients send it."""

    capability = Capability.AUDIO
    noun = "audio"

    data: str = Field(description="The file in base64.")
    format: Literal["wav", "mp3", "flac", "ogg"]

    def model_post_init(self, _: object) -> None:
        """Check the data, and estimate the tokens.

        Raises:
            ValueError: see tokens_of.
        """
        self._tokens = tokens_of(self._decoded(self.data, "data"), "data")


class AudioUrl(MediumUrl):
    """Where audio is, as vLLM's clients send it."""

    capability = Capability.AUDIO
    noun = "audio"
    mime = "audio"
    formats = ("wav", "x-wav", "mpeg", "mp3", "flac", "ogg")
    unknown_tokens = round(UNKNOWN_SECONDS * TOKENS_PER_S)

    def measure(self, data: bytes) -> int:
        """See MediumUrl."""
        return tokens_of(data, "url")
