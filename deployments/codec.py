"""Events and arrays as bytes (MessagePack), and back."""

from typing import Any

import msgspec
import numpy as np

from policies.ledger import Event
from policies.types import ArmEstimate, Decision, Feedback, Outcome

KINDS: dict[str, type[Any]] = {"decision": Decision, "outcome": Outcome, "feedback": Feedback}


def _encode_array(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return {"shape": list(value.shape), "data": value.astype("<f8").tobytes()}
    raise NotImplementedError(f"cannot store a {type(value).__name__}")


def decode_array(_: Any, value: dict[str, Any]) -> np.ndarray[Any, Any]:
    """An array of float64 as it was encoded."""
    return np.frombuffer(value["data"], "<f8").reshape(value["shape"]).copy()


_ENCODER = msgspec.msgpack.Encoder(enc_hook=_encode_array)
_DECODERS = {name: msgspec.msgpack.Decoder(kind, dec_hook=decode_array) for name, kind in KINDS.items()}


def encode(value: Any) -> bytes:
    """A record of policies/types.py, or one with arrays of numbers in it, as bytes."""
    return _ENCODER.encode(value)


def decode(kind: str, body: bytes) -> Event:
    """The event that was encoded; fields that it did not have yet take their defaults.

    Raises:
        msgspec.ValidationError: the bytes are no such event.
    """
    try:
        event: Event = _DECODERS[kind].decode(body)
    except msgspec.ValidationError:
        if kind != "decision":
            raise
        event = _early_decision(body)
    return event


def _early_decision(body: bytes) -> Decision:
    """A decision of the first version, whose estimates were maps."""
    raw = msgspec.msgpack.decode(body)
    known = ArmEstimate._fields
    estimates = [ArmEstimate(**{k: v for k, v in given.items() if k in known}) for given in raw["estimates"]]
    return msgspec.convert({**raw, "estimates": estimates}, Decision, dec_hook=decode_array)
