"""Encodes events and snapshots as bytes (MessagePack), and decodes them."""

from typing import Any

import msgspec
import numpy as np

from policies.events import ArmEstimate, Decision, Event, Feedback, Outcome
from policies.types import Vector

KINDS: dict[str, type[Event]] = {
    "decision": Decision,
    "outcome": Outcome,
    "feedback": Feedback,
}


def _encode_array(value: object) -> dict[str, object]:
    if isinstance(value, np.ndarray):
        return {"shape": list(value.shape), "data": value.astype("<f8").tobytes()}
    raise NotImplementedError(f"cannot store a {type(value).__name__}")


def decode_array(_: type, value: dict[str, Any]) -> Vector:
    """Decode an array of float64."""
    array: Vector = np.frombuffer(value["data"], "<f8").reshape(value["shape"])
    return array.copy()


_ENCODER = msgspec.msgpack.Encoder(enc_hook=_encode_array)
_DECODERS = {
    name: msgspec.msgpack.Decoder(kind, dec_hook=decode_array)
    for name, kind in KINDS.items()
}


def encode(value: object) -> bytes:
    """Encode an event or a snapshot; arrays are stored as float64."""
    return _ENCODER.encode(value)


def decode(kind: str, body: bytes) -> Event:
    """Decode an event; fields that an earlier version did not have take their defaults.

    Raises:
        msgspec.ValidationError: the bytes are not an event of this kind.
    """
    try:
        event: Event = _DECODERS[kind].decode(body)
    except msgspec.ValidationError:
        if kind != "decision":
            raise
        event = _decode_first_version(body)
    return event


def _decode_first_version(body: bytes) -> Decision:
    """Decode a decision of the first version, which stored its estimates as maps."""
    raw = msgspec.msgpack.decode(body)
    estimates = []
    for stored in raw["estimates"]:
        fields = {k: v for k, v in stored.items() if k in ArmEstimate._fields}
        estimates.append(ArmEstimate(**fields))
    return msgspec.convert(
        {**raw, "estimates": estimates}, Decision, dec_hook=decode_array
    )
