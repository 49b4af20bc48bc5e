"""What travels over Flower: a payload as bytes and beside it, as JSON, who is asked and where in the run."""

from __future__ import annotations

from typing import Annotated, TypeVar

from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from pydantic import Field, ValidationError

from neurocl.config import Config
from neurocl.federated.exchange import LARGEST_REPLY
from neurocl.federated.payload import PayloadError

HELLO, PHASE = "query.hello", "train.phase"
RECORD = "neurocl"
VERSION = 1
MAX_HEADER_BYTES = 1 << 16
MAX_TEXT = 500
LONGEST_TIMEOUT = 7 * 24 * 3600.0
_STYPE = "neurocl.payload"

Number = Annotated[int, Field(ge=0, lt=2**31)]


class Header(Config):
    """What a message says beside its payload.

    Attributes:
        version: of this convention.
        run: sixteen hexadecimal digits, the same after a resume.
        client: number of the one who is asked.
        counted: how many of its replies the server has used, so what it stored with the last of them is current.
        task, phase, rounds, train, round, attempt: the place.
        timeout: seconds after which the server stops waiting.
        config: the run's :class:`~neurocl.federated.config.FederatedConfig` as JSON.
    """

    version: int
    run: str
    client: Number
    counted: Number
    task: Number
    phase: str
    rounds: Number
    train: bool
    round: Number
    attempt: Number
    timeout: Annotated[float, Field(gt=0, le=LONGEST_TIMEOUT)]
    config: str


class Answer(Config):
    """What a reply says beside its payload.

    Attributes:
        version: of this convention.
        client: number of the one who answers.
        kind: of the failure, as in :class:`~neurocl.federated.exchange.Failure`; empty if there is a payload.
        text: what happened.
    """

    version: int
    client: Number
    kind: str = ""
    text: str = ""


def to_record(header: Config, data: bytes = b"") -> RecordDict:
    """A header and an encoded payload as Flower carries them.

    Raises:
        PayloadError: a header of more than 64 kB.
    """
    text = header.model_dump_json()
    if len(text.encode()) > MAX_HEADER_BYTES:
        raise PayloadError(f"a header of {len(text)} characters, at most {MAX_HEADER_BYTES} bytes are allowed")
    array = Array(dtype="uint8", shape=(len(data),), stype=_STYPE, data=bytes(data))
    return RecordDict({f"{RECORD}.payload": ArrayRecord({"payload": array}), RECORD: ConfigRecord({"header": text})})


HeaderT = TypeVar("HeaderT", Header, Answer)


def from_record(kind: type[HeaderT], content: RecordDict, limit: int = LARGEST_REPLY) -> tuple[HeaderT, bytes]:
    """The header and the bytes of :func:`to_record`, whose sizes have been checked but not what they say.

    Raises:
        PayloadError: other records, a wrong header, too many bytes.
    """
    configs, arrays = content.config_records, content.array_records
    text = configs[RECORD].get("header") if set(configs) == {RECORD} else None
    if not isinstance(text, str) or len(text.encode()) > MAX_HEADER_BYTES:
        raise PayloadError("a message without a header of neurocl, or with one that is too long")
    try:
        header = kind.model_validate_json(text)
    except ValidationError as error:
        found = error.errors()[0]
        raise PayloadError(f"header of a message: {'.'.join(map(str, found['loc']))}: {found['msg']}") from None
    if header.version != VERSION:
        raise PayloadError(f"message of version {header.version}, this neurocl speaks version {VERSION}")
    name = f"{RECORD}.payload"
    if set(arrays) != {name} or set(arrays[name]) != {"payload"} or arrays[name]["payload"].stype != _STYPE:
        raise PayloadError("a message must carry exactly one payload of neurocl")
    data = arrays[name]["payload"].data
    if len(data) > limit:
        raise PayloadError(f"message of {len(data)} bytes, at most {limit} are allowed")
    return header, data
