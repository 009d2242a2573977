"""Decision ids and keyed hashes, both made with the secret salt of the journal.

A decision id carries its creation time and a keyed checksum. So the router can classify an id that the journal does
not contain, without a list of all ids: forged (unknown), just created by an ingress (pending), or older than the
journal's retention (expired).
"""

import hashlib
import secrets

# ends the id of a decision that an ingress made by itself, before a checksum of its own
LOCAL_SUFFIX = "-here"
_PREFIX = "dec-"
# lengths of the three parts of an id, in hexadecimal digits
_TIME_DIGITS = 12
_RANDOM_DIGITS = 16
_CHECKSUM_DIGITS = 8


class IdFactory:
    """Creates decision ids and keyed hashes.

    Args:
        salt: at least 16 random bytes. Keep them secret: a holder of the salt can forge ids and test guesses of
            hashed texts.
    """

    def __init__(self, salt: bytes):
        self._salt = salt

    @property
    def journal_id(self) -> str:
        """The id of the journal with this salt: its own name in MLflow, in snapshots and in policy versions."""
        return hashlib.blake2b(self._salt, digest_size=8).hexdigest()

    def new_id(self, time_s: float) -> str:
        """Create an id that carries this time (seconds since the epoch, kept to the millisecond)."""
        return self._id(time_s, secrets.token_hex(_RANDOM_DIGITS // 2))

    def derived_id(self, time_s: float, text: str) -> str:
        """The id that belongs to a time and a text: the same both times, and not to be guessed without the salt."""
        return self._id(time_s, self.hash(text)[:_RANDOM_DIGITS])

    def local_id(self, decision_id: str) -> str:
        """The id of the decision that an ingress makes by itself in place of the one with this id."""
        marked = f"{decision_id}{LOCAL_SUFFIX}"
        return f"{marked}{self._checksum(marked)}"

    def _id(self, time_s: float, digits: str) -> str:
        body = f"{int(time_s * 1000):0{_TIME_DIGITS}x}{digits}"
        return f"{_PREFIX}{body}{self._checksum(body)}"

    def created_at(self, decision_id: str) -> float | None:
        """The creation time of an id in seconds since the epoch; None if no factory with this salt has made it.

        An id has one spelling: a client cannot make a second one from one that it was given.
        """
        own_id = original_id(decision_id)
        if decision_id not in (own_id, self.local_id(own_id)):
            return None
        if not own_id.startswith(_PREFIX):
            return None
        digits = own_id.removeprefix(_PREFIX)
        body = digits[:-_CHECKSUM_DIGITS]
        checksum = digits[-_CHECKSUM_DIGITS:]
        if len(body) != _TIME_DIGITS + _RANDOM_DIGITS:
            return None
        if not secrets.compare_digest(self._checksum(body).encode(), checksum.encode()):
            return None
        return int(body[:_TIME_DIGITS], 16) / 1000

    def hash(self, text: str) -> str:
        """Keyed hash of a text: 32 hexadecimal digits (BLAKE2b, RFC 7693)."""
        return hashlib.blake2b(
            text.encode("utf-8", "replace"), digest_size=16, key=self._salt
        ).hexdigest()

    def user_hash(self, user: str) -> str:
        """Keyed hash of a client's name for its user; it differs from that of a prompt with the same text."""
        return self.hash(f"user\0{user}")

    def signature(self, text: str) -> str:
        """Signature of a text: it shows that a holder of the salt has seen the text."""
        return hashlib.blake2b(
            text.encode("utf-8", "replace"),
            digest_size=32,
            key=self._salt,
            person=b"signature",
        ).hexdigest()

    def _checksum(self, body: str) -> str:
        digest = hashlib.blake2b(
            body.encode("utf-8", "replace"),
            digest_size=_CHECKSUM_DIGITS // 2,
            key=self._salt,
            person=b"id",
        )
        return digest.hexdigest()


def trace_id(decision_id: str) -> str:
    """Id of the trace of a decision in MLflow, derived from the decision's id."""
    digest = hashlib.blake2b(decision_id.encode(), digest_size=16)
    return f"tr-{digest.hexdigest()}"


def original_id(decision_id: str) -> str:
    """The id without the ending of `IdFactory.local_id`."""
    return decision_id.partition(LOCAL_SUFFIX)[0]


def sampled(decision_id: str, share: float) -> bool:
    """Whether a decision belongs to the sample of this share.

    The answer for an id never changes, whether the router or an ingress makes the decision. The sample of a larger
    share contains the sample of a smaller one.
    """
    own_id = original_id(decision_id)
    digest = hashlib.blake2b(own_id.encode(), digest_size=4).digest()
    return int.from_bytes(digest) < share * 2**32
