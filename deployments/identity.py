"""Ids and hashes that only this product's salt can make.

A decision's id carries when it was made and a keyed checksum, so that an id that the journal does not know can be
told apart without a list of all there ever were: made up (unknown), just now made elsewhere (wait for it), or older
than what is kept (gone).
"""

import hashlib
import secrets

HERE = "-here"  # ends the id of a decision that an ingress made by itself
_MARK, _STAMP, _RANDOM, _CHECK = "dec-", 12, 16, 8  # the last three in hexadecimal digits


class Identity:
    """Makes ids and hashes.

    Args:
        salt: at least 16 random bytes; whoever has them can make ids, and test guesses of hashed texts.
    """

    def __init__(self, salt: bytes):
        self._salt = salt

    def new_id(self, time_s: float) -> str:
        """An id made at this time (seconds since the epoch; kept to the millisecond)."""
        body = f"{int(time_s * 1000):0{_STAMP}x}{secrets.token_hex(_RANDOM // 2)}"
        return f"{_MARK}{body}{self._check(body)}"

    def made_at(self, decision_id: str) -> float | None:
        """When an id was made, in seconds since the epoch; None if it is none of ours."""
        digits = decision_id.removeprefix(_MARK).removesuffix(HERE)
        body, check = digits[:-_CHECK], digits[-_CHECK:]
        if len(body) != _STAMP + _RANDOM or not secrets.compare_digest(self._check(body).encode(), check.encode()):
            return None
        return int(body[:_STAMP], 16) / 1000

    def hash(self, text: str) -> str:
        """Salted hash of a text: 32 hexadecimal digits (BLAKE2b, RFC 7693, keyed)."""
        return hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=16, key=self._salt).hexdigest()

    def _check(self, body: str) -> str:
        digest = hashlib.blake2b(body.encode("utf-8", "replace"), digest_size=_CHECK // 2, key=self._salt, person=b"id")
        return digest.hexdigest()


def sampled(decision_id: str, share: float) -> bool:
    """Whether a decision is in the sample of this share: always the same answer, and a larger share has all of a
    smaller one's.
    """
    return int.from_bytes(hashlib.blake2b(decision_id.encode(), digest_size=4).digest()) < share * 2**32
