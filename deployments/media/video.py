"""Videos in messages."""

from deployments.errors import field_error
from deployments.media.medium import MediumUrl
from policies.capabilities import Capability

FRAMES = 32  # that vLLM takes of a video by default, whatever its duration
FRAME_TOKENS = 64  # of a frame, of which models make 16 to some hundreds; a low guess refuses nothing that fits


class VideoUrl(MediumUrl):
    """Where a video is, as vLLM's clients send it."""

    capability = Capability.VIDEO
    noun = "video"
    mime = "video"
    formats = ("mp4", "webm", "quicktime")
    unknown_tokens = FRAMES * FRAME_TOKENS

    def measure(self, data: bytes) -> int:
        """See MediumUrl."""
        if data[4:8] != b"ftyp" and not data.startswith(b"\x1aE\xdf\xa3"):
            raise field_error("url", "the data is no MP4, QuickTime or WebM")
        return self.unknown_tokens
