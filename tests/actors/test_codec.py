from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from esperd.actors.codec import LARGEST_ID, OUT_OF_BAND_BYTES, Codec, Head, Kind
from esperd.errors import MalformedMessage, ProtocolMismatch
from esperd.messages import MESSAGE_TYPES, PROTOCOL_VERSION, Done, ErrorReply, Message
from esperd.messages.control import Heartbeat, Ready
from esperd.messages.jobs import Budget, Job, SubmitJob

CODEC = Codec()
JOB = Job(host="cnn", data="digits", budget=Budget(epochs=3))


class Blob(Message, frozen=True, kw_only=True):
    content: bytes


class Parcel(Message, frozen=True, kw_only=True):
    first: bytes
    second: bytes = b""
    label: str = ""


class Telegram(Message, frozen=True, kw_only=True):
    text: str


def _heads() -> st.SearchStrategy[Head]:
    return st.builds(
        CODEC.head,
        st.sampled_from(Kind),
        st.integers(0, LARGEST_ID),
        to=st.text(max_size=20),
        sender=st.text(max_size=20),
        deadline_ms=st.none() | st.integers(0, 2**40),
        trace=st.just("") | st.text(max_size=55),
    )


def _messages() -> st.SearchStrategy[Message]:
    whole = st.integers(-(2**63), 2**63 - 1)
    return st.one_of(
        st.just(Done()),
        st.builds(Heartbeat, actor=st.text(), generation=whole, step=st.none() | whole),
        st.builds(Ready, actor=st.text(), generation=whole, pid=whole, protocol=whole, version=st.text()),
        st.builds(
            ErrorReply,
            code=st.text(),
            message=st.text(),
            fields=st.dictionaries(
                st.text(), st.one_of(st.text(), whole, st.booleans(), st.none(), st.lists(st.text()), st.floats(allow_nan=False))
            ),
        ),
        st.builds(SubmitJob, job=st.just(JOB), idempotency_key=st.text()),
    )


@given(_heads(), _messages())
def test_what_is_encoded_comes_back_equal(head: Head, message: Message) -> None:
    assert CODEC.decode(CODEC.encode(head, message)) == (head, message)


@given(st.data())
def test_mutated_frames_are_malformed_and_never_another_exception(data: st.DataObject) -> None:
    head, message = data.draw(_heads()), data.draw(_messages())
    frames = [bytearray(frame) for frame in CODEC.encode(head, message)]
    for _ in range(data.draw(st.integers(1, 4))):
        frame = frames[data.draw(st.integers(0, 1))]
        if not frame:
            continue
        at = data.draw(st.integers(0, len(frame) - 1))
        match data.draw(st.sampled_from(["flip", "cut", "insert"])):
            case "flip":
                frame[at] = data.draw(st.integers(0, 255))
            case "cut":
                del frame[at:]
            case "insert":
                frame[at:at] = data.draw(st.binary(max_size=8))
    try:
        _, decoded = CODEC.decode([bytes(frame) for frame in frames])
    except (MalformedMessage, ProtocolMismatch):
        return
    assert type(decoded) in MESSAGE_TYPES


@given(st.lists(st.binary(max_size=64), max_size=4))
def test_random_frames_are_malformed(frames: list[bytes]) -> None:
    with pytest.raises((MalformedMessage, ProtocolMismatch)):
        CODEC.decode(frames)
    CODEC.opening(frames)


@pytest.mark.parametrize(
    "body",
    [
        b"\x91" * 1_000_000,
        b"\xdd\xff\xff\xff\xff",
        b"\xdb\xff\xff\xff\xff",
        b"\x81\xa4type\xa2\xc3\x28",
        msgspec.msgpack.encode({"type": "Pickle"}),
        msgspec.msgpack.encode({"type": "Heartbeat", "actor": 3, "generation": 1}),
    ],
    ids=["deep nesting", "giant array", "giant text", "broken utf-8", "unknown message", "wrong type"],
)
def test_a_hostile_body_is_malformed(body: bytes) -> None:
    head, _ = CODEC.encode(CODEC.head(Kind.TELL, 1, to="a", sender="b"), Done())
    with pytest.raises(MalformedMessage):
        CODEC.decode([head, body])


def test_another_protocol_version_is_named_even_when_its_head_and_kinds_have_grown() -> None:
    newer = msgspec.msgpack.encode([PROTOCOL_VERSION + 1, 9, 77, {"route": "x"}, "more", None, "fields"])
    with pytest.raises(ProtocolMismatch) as caught:
        CODEC.decode([newer, b"whatever"])
    assert caught.value.fields == {"peer": PROTOCOL_VERSION + 1, "own": PROTOCOL_VERSION}
    opening = CODEC.opening([newer])
    assert opening is not None
    assert opening.id == 77


def test_fields_that_a_later_head_appends_are_ignored() -> None:
    longer = msgspec.msgpack.encode([PROTOCOL_VERSION, 2, 5, "to", "from", None, "", [], {"later": "x"}])
    head, _ = CODEC.decode([longer, msgspec.msgpack.encode(Done())])
    assert head.id == 5


TRACE = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


def test_the_head_of_a_peer_from_before_traces_is_read_and_it_reads_ours() -> None:
    class Before(msgspec.Struct, frozen=True, array_like=True):
        protocol: int
        kind: Kind
        id: int
        to: str
        sender: str
        deadline_ms: int | None = None

    theirs = msgspec.msgpack.encode(Before(PROTOCOL_VERSION, Kind.ASK, 5, "to", "from", 9))
    assert CODEC.decode([theirs, msgspec.msgpack.encode(Done())])[0] == CODEC.head(
        Kind.ASK, 5, to="to", sender="from", deadline_ms=9
    )
    ours = CODEC.encode(CODEC.head(Kind.ASK, 5, to="to", sender="from", deadline_ms=9, trace=TRACE), Done())[0]
    assert msgspec.msgpack.decode(ours, type=Before) == Before(PROTOCOL_VERSION, Kind.ASK, 5, "to", "from", 9)


def test_a_trace_context_that_no_version_of_the_standard_could_have_is_malformed() -> None:
    long = msgspec.msgpack.encode([PROTOCOL_VERSION, 1, 5, "to", "from", None, "0" * 129])
    with pytest.raises(MalformedMessage, match="length <= 128"):
        CODEC.decode([long, msgspec.msgpack.encode(Done())])


def test_a_message_that_is_not_of_the_protocol_is_refused_before_it_is_sent() -> None:
    private = msgspec.defstruct("Private", [("x", int)], bases=(Message,), frozen=True, kw_only=True)
    with pytest.raises(MalformedMessage, match="Private"):
        CODEC.encode(CODEC.head(Kind.TELL, 1, to="a", sender="b"), private(x=1))


def test_a_value_without_a_msgpack_form_is_refused_before_it_is_sent() -> None:
    too_large = ErrorReply(code="error", message="", fields={"n": 2**80})
    with pytest.raises(MalformedMessage, match="cannot be sent"):
        CODEC.encode(CODEC.head(Kind.REPLY, 1, to="a", sender="b"), too_large)


def test_bytes_cross_unchanged() -> None:
    head = CODEC.head(Kind.TELL, 1, to="a", sender="b")
    codec = Codec([Blob, Telegram])
    payload = bytes(range(256)) * 10
    assert codec.decode(codec.encode(head, Blob(content=payload)))[1] == Blob(content=payload)


PARCELS = Codec([Parcel, Done])
LARGE = bytes(range(256)) * (OUT_OF_BAND_BYTES // 256)


@pytest.mark.parametrize("second", [b"", LARGE[:-1], LARGE, LARGE * 3])
def test_large_bytes_are_frames_of_their_own_and_are_not_copied_on_the_way_out(second: bytes) -> None:
    message = Parcel(first=LARGE, second=second, label="x")
    head = PARCELS.head(Kind.ASK, 7, to="a", sender="b")
    frames = PARCELS.encode(head, message)
    assert frames[2] is message.first
    assert len(frames) == (4 if len(second) >= OUT_OF_BAND_BYTES else 3)
    assert len(frames[1]) < 100 + (len(second) if len(frames) == 3 else 0)
    decoded_head, decoded = PARCELS.decode(frames)
    assert (decoded, decoded_head.id) == (message, 7)
    assert message.first is LARGE, "what is sent is not emptied"


def test_what_would_cost_its_sender_the_connection_is_refused_before_it_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("esperd.actors.codec.LARGEST_FRAME_BYTES", 2 * len(LARGE))
    head = PARCELS.head(Kind.TELL, 1, to="a", sender="b")
    PARCELS.encode(head, Parcel(first=LARGE * 2))
    for message in (Parcel(first=LARGE * 2 + b"x"), Parcel(first=b"", label="x" * 2 * len(LARGE))):
        with pytest.raises(MalformedMessage, match="in one piece") as refused:
            PARCELS.encode(head, message)
        assert refused.value.fields["limit_bytes"] == 2 * len(LARGE)


@pytest.mark.parametrize(
    ("buffers", "frames"),
    [
        ([], [LARGE]),
        ([["first", len(LARGE)]], []),
        ([["first", len(LARGE)]], [LARGE + b"x"]),
        ([["first", len(LARGE)], ["first", len(LARGE)]], [LARGE, LARGE]),
        ([["label", len(LARGE)]], [LARGE]),
        ([["__class__", len(LARGE)]], [LARGE]),
        ([["first", 3]], [b"abc"]),
        ([["second", len(LARGE)]], [LARGE]),
    ],
    ids=["unnamed", "missing", "longer", "twice", "text", "no field", "small", "not empty"],
)
def test_frames_that_are_not_what_the_head_says_are_malformed(buffers: list[list[object]], frames: list[bytes]) -> None:
    head = msgspec.msgpack.encode([PROTOCOL_VERSION, 2, 5, "to", "from", None, "", buffers])
    body = msgspec.msgpack.encode(Parcel(first=b"", second=b"full"))
    with pytest.raises(MalformedMessage):
        PARCELS.decode([head, body, *frames])
