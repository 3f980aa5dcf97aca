"""What RFC 9113 and RFC 7541 call errors, as bytes, and what has to follow.

Each case begins after a greeting. A reaction is `goaway CODE`, `reset CODE`, `status N` or
`nothing`. An error of a stream may be answered by ending the connection (section 5.4.1).
"""

from __future__ import annotations

import dataclasses

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
(
    DATA,
    HEADERS,
    PRIORITY,
    RST_STREAM,
    SETTINGS,
    PUSH_PROMISE,
    PING,
    GOAWAY,
    WINDOW_UPDATE,
    CONTINUATION,
) = range(10)
END_STREAM, END_HEADERS, PADDED, PRIORITISED, ACK = 1, 4, 8, 32, 1
CODES = (
    "NO_ERROR",
    "PROTOCOL_ERROR",
    "INTERNAL_ERROR",
    "FLOW_CONTROL_ERROR",
    "SETTINGS_TIMEOUT",
    "STREAM_CLOSED",
    "FRAME_SIZE_ERROR",
    "REFUSED_STREAM",
    "CANCEL",
    "COMPRESSION_ERROR",
    "CONNECT_ERROR",
    "ENHANCE_YOUR_CALM",
    "INADEQUATE_SECURITY",
    "HTTP_1_1_REQUIRED",
)
PROTOCOL, SIZE = "goaway PROTOCOL_ERROR", "goaway FRAME_SIZE_ERROR"
COMPRESSION, FLOW = "goaway COMPRESSION_ERROR", "goaway FLOW_CONTROL_ERROR"
CLOSED, MALFORMED = "goaway STREAM_CLOSED", "reset PROTOCOL_ERROR"
NOTHING = "nothing"


def frame(kind, flags=0, stream=0, payload=b"", *, length=None):
    """A frame; its length may be a lie."""
    length = len(payload) if length is None else length
    head = length.to_bytes(3, "big") + bytes([kind, flags]) + stream.to_bytes(4, "big")
    return head + payload


def literal(name, value, first=b"\0"):
    """A field that no table remembers."""
    return first + b"".join(bytes([len(x)]) + x for x in (name, value))


def setting(name, value):
    return frame(SETTINGS, payload=name.to_bytes(2, "big") + value.to_bytes(4, "big"))


FIELDS = {
    b":method": b"POST",
    b":scheme": b"http",
    b":path": b"/curvd.v1.SessionService/GetServerInfo",
    b":authority": b"localhost",
    b"content-type": b"application/grpc",
    b"te": b"trailers",
}


def block(changes=(), *, without=(), more=b""):
    """The fields of a request."""
    fields = FIELDS | dict(changes)
    kept = [literal(n, v) for n, v in fields.items() if n not in without]
    return b"".join(kept) + more


def headers(stream=1, payload=None, flags=END_HEADERS):
    return frame(HEADERS, flags, stream, block() if payload is None else payload)


def request(stream=1, payload=None):
    """A whole call: an empty message."""
    return headers(stream, payload) + frame(DATA, END_STREAM, stream, bytes(5))


def cut(at=20):
    """The first frame of a block that is not complete."""
    return headers(payload=block()[:at], flags=0)


def number(value):
    return value.to_bytes(4, "big")


OPEN = headers()
RESET = frame(RST_STREAM, 0, 1, number(8))
WHOLE = frame(DATA, END_STREAM, 1, b"\0\0\0\0\0")


@dataclasses.dataclass(frozen=True)
class Case:
    """One thing that a client may or may not do."""

    section: str
    name: str
    data: bytes
    reaction: str

    @property
    def of_grpcio(self):
        """How grpcio reacts, without the code: it often closes and says none."""
        for verdict, names in GRPCIO_DIFFERS.values():
            if self.name in names:
                return verdict
        return verdict_of(self.reaction)


def verdict_of(reaction):
    """The class of a reaction: ended, reset, status or nothing."""
    return "ended" if reaction.startswith(("goaway", "closed")) else reaction.split()[0]


def with_field(name, value):
    return request(payload=block(more=literal(name, value)))


CASES = [
    # 4 Frames
    Case("4.1", "unknown type on the connection", frame(77, 0, 0, b"x" * 9), NOTHING),
    Case("4.1", "unknown type on an open stream", OPEN + frame(77, 3, 1), NOTHING),
    Case("4.1", "unknown flags", frame(PING, 0xFE, 0, bytes(8)), NOTHING),
    Case("4.1", "reserved bit set", headers(1 | 1 << 31), NOTHING),
    Case("4.2", "PING longer than any frame", frame(PING, length=(1 << 24) - 1), SIZE),
    Case("4.3", "headers cut off by data", cut() + frame(DATA, 0, 1, b"x"), PROTOCOL),
    Case(
        "4.3",
        "headers cut off by a ping",
        cut() + frame(PING, 0, 0, bytes(8)),
        PROTOCOL,
    ),
    Case(
        "4.3", "headers cut off by an unknown type", cut() + frame(77, 0, 1), PROTOCOL
    ),
    Case("4.3", "headers cut off by other headers", cut() + headers(3), PROTOCOL),
    Case(
        "4.3",
        "headers cut off by a priority",
        cut() + frame(PRIORITY, 0, 1, number(0) + b"\1"),
        PROTOCOL,
    ),
    Case("4.3", "headers cut off by a reset", cut() + RESET, PROTOCOL),
    Case(
        "4.3",
        "continuation of another stream",
        cut() + frame(CONTINUATION, 4, 3, block()[20:]),
        PROTOCOL,
    ),
    # 5.1 States of streams
    Case("5.1", "data on an idle stream", frame(DATA, 0, 1, b"x"), PROTOCOL),
    Case("5.1", "reset of an idle stream", RESET, PROTOCOL),
    Case(
        "5.1",
        "window of an idle stream",
        frame(WINDOW_UPDATE, 0, 1, number(9)),
        PROTOCOL,
    ),
    Case(
        "5.1",
        "continuation of an idle stream",
        frame(CONTINUATION, 4, 1, block()),
        PROTOCOL,
    ),
    Case(
        "5.1",
        "priority of an idle stream",
        frame(PRIORITY, 0, 5, number(0) + b"\1"),
        NOTHING,
    ),
    Case(
        "5.1",
        "data after the end",
        OPEN + WHOLE + frame(DATA, 0, 1, b"x"),
        "reset STREAM_CLOSED",
    ),
    Case(
        "5.1",
        "headers after the end",
        OPEN + WHOLE + headers(flags=5),
        "reset STREAM_CLOSED",
    ),
    Case(
        "5.1",
        "window after the end",
        OPEN + WHOLE + frame(WINDOW_UPDATE, 0, 1, number(9)),
        NOTHING,
    ),
    Case(
        "5.1",
        "priority after the end",
        OPEN + WHOLE + frame(PRIORITY, 0, 1, number(0) + b"\1"),
        NOTHING,
    ),
    Case("5.1", "data after a reset", OPEN + RESET + frame(DATA, 0, 1, b"x"), CLOSED),
    Case("5.1", "headers after a reset", OPEN + RESET + headers(flags=5), CLOSED),
    Case("5.1", "reset after a reset", OPEN + RESET + RESET, NOTHING),
    Case(
        "5.1",
        "window after a reset",
        OPEN + RESET + frame(WINDOW_UPDATE, 0, 1, number(9)),
        NOTHING,
    ),
    Case(
        "5.1",
        "data on a closed stream of before",
        OPEN + RESET + request(3) + frame(DATA, 0, 1, b"x"),
        CLOSED,
    ),
    Case("5.1.1", "even number", headers(2), PROTOCOL),
    Case("5.1.1", "data on an even number", OPEN + frame(DATA, 0, 2, b"x"), PROTOCOL),
    Case("5.1.1", "smaller number than before", request(5) + headers(3), PROTOCOL),
    Case("5.1.1", "headers on stream 0", headers(0), PROTOCOL),
    Case(
        "5.1.2", "more streams than allowed", OPEN + headers(3), "reset REFUSED_STREAM"
    ),
    Case(
        "5.3.1",
        "a stream that depends on itself",
        frame(HEADERS, 0x24, 1, number(1) + b"\1" + block()),
        PROTOCOL,
    ),
    Case(
        "5.3.1",
        "a priority that depends on itself",
        OPEN + frame(PRIORITY, 0, 1, number(1) + b"\1"),
        PROTOCOL,
    ),
    # 6 Definitions of frames
    Case("6.1", "data on stream 0", frame(DATA, 0, 0, b"x"), PROTOCOL),
    Case(
        "6.1",
        "more padding than data",
        OPEN + frame(DATA, PADDED, 1, b"\x09x"),
        PROTOCOL,
    ),
    Case("6.1", "padded data without length", OPEN + frame(DATA, PADDED, 1), SIZE),
    Case("6.1", "padded data", OPEN + frame(DATA, 9, 1, b"\3" + bytes(8)), NOTHING),
    Case(
        "6.2",
        "more padding than headers",
        frame(HEADERS, 0xC, 1, b"\xff" + block()),
        PROTOCOL,
    ),
    Case("6.2", "padded headers without length", frame(HEADERS, 0xC, 1), SIZE),
    Case(
        "6.2",
        "headers shorter than their priority",
        frame(HEADERS, 0x24, 1, b"\0\0"),
        SIZE,
    ),
    Case(
        "6.2",
        "padded headers",
        frame(HEADERS, 0xC, 1, b"\4" + block() + bytes(4)),
        NOTHING,
    ),
    Case("6.3", "priority on stream 0", frame(PRIORITY, 0, 0, bytes(5)), PROTOCOL),
    Case("6.3", "priority of 4 bytes", OPEN + frame(PRIORITY, 0, 1, bytes(4)), SIZE),
    Case("6.4", "reset of stream 0", frame(RST_STREAM, 0, 0, number(8)), PROTOCOL),
    Case("6.4", "reset of 3 bytes", OPEN + frame(RST_STREAM, 0, 1, bytes(3)), SIZE),
    Case("6.4", "reset of 5 bytes", OPEN + frame(RST_STREAM, 0, 1, bytes(5)), SIZE),
    Case("6.5", "settings on a stream", OPEN + frame(SETTINGS, 0, 1), PROTOCOL),
    Case(
        "6.5", "acknowledgement with a payload", frame(SETTINGS, ACK, 0, bytes(6)), SIZE
    ),
    Case("6.5", "settings of 5 bytes", frame(SETTINGS, 0, 0, bytes(5)), SIZE),
    Case("6.5.2", "ENABLE_PUSH of 2", setting(2, 2), PROTOCOL),
    Case("6.5.2", "INITIAL_WINDOW_SIZE too large", setting(4, 1 << 31), FLOW),
    Case("6.5.2", "MAX_FRAME_SIZE too small", setting(5, (1 << 14) - 1), PROTOCOL),
    Case("6.5.2", "MAX_FRAME_SIZE too large", setting(5, 1 << 24), PROTOCOL),
    Case("6.5.2", "unknown setting", setting(0x99, 5), NOTHING),
    Case(
        "6.6",
        "a push by a client",
        OPEN + frame(PUSH_PROMISE, 4, 1, number(2) + block()),
        PROTOCOL,
    ),
    Case("6.7", "ping on a stream", OPEN + frame(PING, 0, 1, bytes(8)), PROTOCOL),
    Case("6.7", "ping of 7 bytes", frame(PING, 0, 0, bytes(7)), SIZE),
    Case("6.7", "ping of 9 bytes", frame(PING, 0, 0, bytes(9)), SIZE),
    Case("6.7", "acknowledgement of no ping", frame(PING, ACK, 0, bytes(8)), NOTHING),
    Case("6.8", "goaway on a stream", OPEN + frame(GOAWAY, 0, 1, bytes(8)), PROTOCOL),
    Case("6.8", "goaway of 7 bytes", frame(GOAWAY, 0, 0, bytes(7)), SIZE),
    Case("6.9", "window of 3 bytes", frame(WINDOW_UPDATE, 0, 0, bytes(3)), SIZE),
    Case(
        "6.9",
        "connection widened by 0",
        frame(WINDOW_UPDATE, 0, 0, number(0)),
        PROTOCOL,
    ),
    Case(
        "6.9",
        "stream widened by 0",
        OPEN + frame(WINDOW_UPDATE, 0, 1, number(0)),
        MALFORMED,
    ),
    Case(
        "6.9.1",
        "connection widened too far",
        frame(WINDOW_UPDATE, 0, 0, number((1 << 31) - 1)),
        FLOW,
    ),
    Case(
        "6.9.1",
        "stream widened too far",
        OPEN + frame(WINDOW_UPDATE, 0, 1, number((1 << 31) - 1)),
        "reset FLOW_CONTROL_ERROR",
    ),
    Case(
        "6.9.2",
        "stream widened too far by settings",
        OPEN + frame(WINDOW_UPDATE, 0, 1, number(1 << 30)) + setting(4, (1 << 31) - 1),
        FLOW,
    ),
    Case(
        "6.10",
        "continuation of nothing",
        OPEN + frame(CONTINUATION, 4, 1, block()),
        PROTOCOL,
    ),
    Case(
        "6.10",
        "continuation on stream 0",
        cut() + frame(CONTINUATION, 4, 0, block()[20:]),
        PROTOCOL,
    ),
    Case(
        "6.10",
        "continuation after the end of headers",
        OPEN + frame(CONTINUATION, 0, 1),
        PROTOCOL,
    ),
    Case(
        "6.10",
        "continued headers",
        cut() + frame(CONTINUATION, 0, 1) + frame(CONTINUATION, 4, 1, block()[20:]),
        NOTHING,
    ),
    # 8 HTTP
    Case(
        "8.1",
        "trailers that do not end the stream",
        OPEN + headers(payload=literal(b"x", b"y")),
        MALFORMED,
    ),
    Case(
        "8.1",
        "trailers",
        OPEN
        + frame(DATA, 0, 1, bytes(5))
        + headers(payload=literal(b"x", b"y"), flags=5),
        NOTHING,
    ),
    Case(
        "8.1",
        "pseudo-header in trailers",
        OPEN + headers(payload=literal(b":path", b"/"), flags=5),
        MALFORMED,
    ),
    Case(
        "8.1.1",
        "content-length too large",
        with_field(b"content-length", b"9"),
        MALFORMED,
    ),
    Case(
        "8.1.1",
        "content-length too small",
        with_field(b"content-length", b"1"),
        MALFORMED,
    ),
    Case(
        "8.1.1",
        "content-length that is none",
        with_field(b"content-length", b"-5"),
        MALFORMED,
    ),
    Case(
        "8.1.1",
        "content-length twice",
        with_field(b"content-length", b"5,6"),
        MALFORMED,
    ),
    Case(
        "8.1.1",
        "content-length that is right",
        with_field(b"content-length", b"5"),
        NOTHING,
    ),
    Case("8.2.1", "name in capitals", with_field(b"X-Upper", b"y"), MALFORMED),
    Case("8.2.1", "name with a blank", with_field(b"x y", b"y"), MALFORMED),
    Case("8.2.1", "name with a colon", with_field(b"x:y", b"y"), MALFORMED),
    Case("8.2.1", "empty name", with_field(b"", b"y"), MALFORMED),
    Case("8.2.1", "value with a line feed", with_field(b"x", b"a\nb"), MALFORMED),
    Case("8.2.1", "value with a carriage return", with_field(b"x", b"a\rb"), MALFORMED),
    Case("8.2.1", "value with a NUL", with_field(b"x", b"a\0b"), MALFORMED),
    Case("8.2.1", "value that begins with a blank", with_field(b"x", b" a"), MALFORMED),
    Case("8.2.1", "value that ends with a tab", with_field(b"x", b"a\t"), MALFORMED),
    Case("8.2.2", "connection", with_field(b"connection", b"keep-alive"), MALFORMED),
    Case("8.2.2", "keep-alive", with_field(b"keep-alive", b"5"), MALFORMED),
    Case(
        "8.2.2",
        "proxy-connection",
        with_field(b"proxy-connection", b"close"),
        MALFORMED,
    ),
    Case(
        "8.2.2",
        "transfer-encoding",
        with_field(b"transfer-encoding", b"chunked"),
        MALFORMED,
    ),
    Case("8.2.2", "upgrade", with_field(b"upgrade", b"h2c"), MALFORMED),
    Case(
        "8.2.2",
        "te other than trailers",
        request(payload=block({b"te": b"gzip"})),
        MALFORMED,
    ),
    Case(
        "8.3",
        "unknown pseudo-header",
        request(payload=literal(b":x", b"y") + block()),
        MALFORMED,
    ),
    Case(
        "8.3",
        "pseudo-header of responses",
        request(payload=literal(b":status", b"200") + block()),
        MALFORMED,
    ),
    Case(
        "8.3",
        "pseudo-header after a field",
        request(payload=block(without=[b":path"], more=literal(b":path", b"/a/B"))),
        MALFORMED,
    ),
    *(
        Case(
            "8.3.1",
            f"{name.decode()} missing",
            request(payload=block(without=[name])),
            MALFORMED,
        )
        for name in (b":method", b":scheme", b":path")
    ),
    *(
        Case(
            "8.3.1",
            f"{name.decode()} twice",
            request(payload=literal(name, FIELDS[name]) + block()),
            MALFORMED,
        )
        for name in (b":method", b":scheme", b":path", b":authority")
    ),
    Case("8.3.1", "empty :path", request(payload=block({b":path": b""})), MALFORMED),
    Case(
        "8.3.1",
        ":path without a slash",
        request(payload=block({b":path": b"curvd"})),
        MALFORMED,
    ),
    Case(
        "8.3.1",
        "host that is not the authority",
        with_field(b"host", b"elsewhere"),
        MALFORMED,
    ),
    Case(
        "gRPC",
        ":method GET",
        request(payload=block({b":method": b"GET"})),
        "status 405",
    ),
    Case(
        "gRPC",
        "content-type of something else",
        request(payload=block({b"content-type": b"text/html"})),
        "status 415",
    ),
    Case(
        "gRPC",
        "content-type that begins alike",
        request(payload=block({b"content-type": b"application/grpcweb"})),
        "status 415",
    ),
    Case(
        "gRPC",
        "a timeout that is none",
        with_field(b"grpc-timeout", b"soon"),
        "status 400",
    ),
    Case(
        "gRPC",
        "no content-type",
        request(payload=block(without=[b"content-type"])),
        "status 415",
    ),
    # RFC 7541
    Case(
        "HPACK 2.3.3",
        "index out of range",
        headers(payload=block() + b"\xbf\x80\x01"),
        COMPRESSION,
    ),
    Case("HPACK 6.1", "index 0", headers(payload=block() + b"\x80"), COMPRESSION),
    Case(
        "HPACK 5.1",
        "integer without end",
        headers(payload=block() + b"\xff" * 20),
        COMPRESSION,
    ),
    Case(
        "HPACK 5.1",
        "integer that is cut",
        headers(payload=block() + b"\x0f\xff"),
        COMPRESSION,
    ),
    Case(
        "HPACK 5.2",
        "string longer than the block",
        headers(payload=block() + b"\0\x20x"),
        COMPRESSION,
    ),
    Case(
        "HPACK 5.2",
        "Huffman padding of more than 7 bits",
        headers(payload=block() + b"\0\x01x\x84\x49\x50\x9f\xff"),
        COMPRESSION,
    ),
    Case(
        "HPACK 5.2",
        "Huffman padding of zeros",
        headers(payload=block() + b"\0\x01x\x83\x49\x50\x90"),
        COMPRESSION,
    ),
    Case(
        "HPACK 5.2",
        "Huffman end of string",
        headers(payload=block() + b"\0\x01x\x84\xff\xff\xff\xff"),
        COMPRESSION,
    ),
    Case(
        "HPACK 4.2",
        "table larger than allowed",
        headers(payload=b"\x3f\xe1\xff\x03" + block()),
        COMPRESSION,
    ),
    Case(
        "HPACK 4.2",
        "table resized after a field",
        headers(payload=block() + b"\x20"),
        COMPRESSION,
    ),
    Case(
        "HPACK 4.2",
        "table resized three times",
        headers(payload=b"\x20\x20\x20" + block()),
        COMPRESSION,
    ),
    Case(
        "HPACK 4.2",
        "table resized twice",
        headers(payload=b"\x20\x3f\x10" + block()),
        NOTHING,
    ),
    # Floods that no library endures for ever
    Case(
        "10.5",
        "more headers than allowed",
        cut() + frame(CONTINUATION, 0, 1, bytes(1 << 14)) * 5,
        "goaway ENHANCE_YOUR_CALM",
    ),
    Case(
        "10.5",
        "continuations without end",
        cut() + frame(CONTINUATION, 0, 1) * 1100,
        "goaway ENHANCE_YOUR_CALM",
    ),
]


def answered(fields=(), *, stream=1, flags=END_HEADERS, more=b""):
    """The headers of a response."""
    pairs = {b":status": b"200", b"content-type": b"application/grpc"} | dict(fields)
    kept = b"".join(literal(n, v) for n, v in pairs.items() if v is not None)
    return frame(HEADERS, flags, stream, kept + more)


def trailers(*more, flags=5):
    """The end of a call that succeeded."""
    fields = b"".join(literal(*pair) for pair in more)
    return frame(HEADERS, flags, 1, literal(b"grpc-status", b"0") + fields)


@dataclasses.dataclass(frozen=True)
class ServerCase:
    """One thing that a server may or may not do in answer to a call on stream 1."""

    name: str
    data: bytes
    code: str
    """The status with which the call ends for its caller."""
    match: str = ""
    reaction: str = NOTHING


EMPTY = frame(DATA, 0, 1, bytes(5))
GOOD = answered() + EMPTY + trailers()
HTML = frame(DATA, 1, 1, b"<html>no</html>")
LOST, BAD = "UNAVAILABLE", "INTERNAL"
SERVER_CASES = [
    ServerCase("an answer", GOOD, "OK"),
    ServerCase(
        "informational headers first", answered({b":status": b"103"}) + GOOD, "OK"
    ),
    ServerCase("unknown frames between", frame(77, 0, 1, b"x") + GOOD, "OK"),
    ServerCase(
        "padded data",
        answered() + frame(DATA, 8, 1, b"\2" + bytes(7)) + trailers(),
        "OK",
    ),
    ServerCase(
        "goaway that covers the call",
        frame(GOAWAY, 0, 0, number(1) + number(0)) + GOOD,
        "OK",
    ),
    ServerCase(
        "goaway that does not",
        frame(GOAWAY, 0, 0, number(0) + number(0)),
        LOST,
        "REFUSED_STREAM",
    ),
    ServerCase(
        "goaway with a reason, then the end",
        frame(GOAWAY, 0, 0, number(1) + number(11) + b"too_many_pings"),
        LOST,
        "ENHANCE_YOUR_CALM 'too_many_pings'",
    ),
    ServerCase("refused", frame(RST_STREAM, 0, 1, number(7)), LOST, "REFUSED_STREAM"),
    ServerCase("cancelled", frame(RST_STREAM, 0, 1, number(8)), "CANCELLED", "CANCEL"),
    ServerCase("calmed", frame(RST_STREAM, 0, 1, number(11)), "RESOURCE_EXHAUSTED"),
    ServerCase(
        "reset for a defect", frame(RST_STREAM, 0, 1, number(2)), BAD, "INTERNAL_ERROR"
    ),
    ServerCase(
        "reset with a code that nobody knows",
        frame(RST_STREAM, 0, 1, number(999)),
        BAD,
        "999",
    ),
    ServerCase(
        "a push",
        frame(PUSH_PROMISE, 4, 1, number(2) + block()),
        LOST,
        "PUSH_PROMISE",
        PROTOCOL,
    ),
    ServerCase("push enabled", setting(2, 1), LOST, "ENABLE_PUSH", PROTOCOL),
    ServerCase(
        "data before headers",
        EMPTY + trailers(),
        BAD,
        "data before the headers",
        MALFORMED,
    ),
    ServerCase(
        "headers on a stream that nobody opened",
        answered(stream=3),
        LOST,
        "not open",
        PROTOCOL,
    ),
    ServerCase(
        "headers on a stream of its own", answered(stream=2), LOST, "not open", PROTOCOL
    ),
    ServerCase(
        "data on a stream of its own",
        frame(DATA, 0, 2, b"x"),
        LOST,
        "not open",
        PROTOCOL,
    ),
    ServerCase("no status", answered({b":status": None}), BAD, "no :status", MALFORMED),
    ServerCase(
        "a status that is none", answered({b":status": b"2x0"}), BAD, "2x0", MALFORMED
    ),
    ServerCase("status 101", answered({b":status": b"101"}), BAD, "101", MALFORMED),
    ServerCase(
        "an informational answer that ends",
        answered({b":status": b"103"}, flags=5),
        BAD,
        "103",
        MALFORMED,
    ),
    ServerCase(
        "a pseudo-header of requests",
        answered(more=literal(b":path", b"/")),
        BAD,
        ":path",
        MALFORMED,
    ),
    ServerCase("a name in capitals", answered({b"X-Y": b"z"}), BAD, "X-Y", MALFORMED),
    ServerCase(
        "a field of connections",
        answered({b"connection": b"close"}),
        BAD,
        "connection",
        MALFORMED,
    ),
    ServerCase(
        "a value with a line feed", answered({b"x": b"a\nb"}), BAD, "value", MALFORMED
    ),
    ServerCase(
        "blanks around a message",
        answered() + EMPTY + trailers((b"grpc-message", b"fine ")),
        "OK",
    ),
    ServerCase(
        "a pseudo-header in trailers",
        answered() + EMPTY + trailers((b":status", b"200")),
        BAD,
        ":status",
        MALFORMED,
    ),
    ServerCase(
        "trailers that do not end",
        answered() + EMPTY + trailers(flags=4),
        BAD,
        "do not end",
        MALFORMED,
    ),
    ServerCase(
        "content-length too large",
        answered({b"content-length": b"7"}) + EMPTY + trailers(),
        BAD,
        "7 were announced",
        MALFORMED,
    ),
    ServerCase(
        "data that ends within a message",
        answered() + frame(DATA, 1, 1, b"\0\0"),
        BAD,
        "ends within a message",
    ),
    ServerCase(
        "an answer without the status of gRPC",
        answered() + frame(DATA, 1, 1, bytes(5)),
        BAD,
        "without a status",
    ),
    ServerCase(
        "a page",
        answered({b"content-type": b"text/html"}) + HTML,
        "UNKNOWN",
        "HTTP status 200",
    ),
    ServerCase(
        "a page of a proxy",
        answered({b":status": b"503", b"content-type": b"text/html"}) + HTML,
        LOST,
        "HTTP status 503",
    ),
    ServerCase("index 0", answered(more=b"\x80"), LOST, "cannot be read", COMPRESSION),
    ServerCase(
        "a ping of 7 bytes", frame(PING, 0, 0, bytes(7)), LOST, "PING frame of 7", SIZE
    ),
    ServerCase(
        "settings of 5 bytes",
        frame(SETTINGS, 0, 0, bytes(5)),
        LOST,
        "SETTINGS frame of 5",
        SIZE,
    ),
    ServerCase(
        "the connection widened by 0",
        frame(WINDOW_UPDATE, 0, 0, number(0)),
        LOST,
        "by 0",
        PROTOCOL,
    ),
    ServerCase(
        "the stream widened by 0",
        frame(WINDOW_UPDATE, 0, 1, number(0)),
        BAD,
        "by 0",
        MALFORMED,
    ),
    ServerCase(
        "the stream widened too far",
        frame(WINDOW_UPDATE, 0, 1, number((1 << 31) - 1)),
        BAD,
        "widened by",
        "reset FLOW_CONTROL_ERROR",
    ),
    ServerCase(
        "headers that are not continued",
        answered(flags=0) + EMPTY,
        LOST,
        "not continued",
        PROTOCOL,
    ),
    ServerCase(
        "a flood of pings",
        frame(PING, 0, 0, bytes(8)) * 1500,
        LOST,
        "bring nothing",
        "goaway ENHANCE_YOUR_CALM",
    ),
    ServerCase("the end without an answer", b"", LOST, "closed"),
]

BEGINNINGS = {
    "a preface that is wrong": (PREFACE[:-1] + b"x" + frame(SETTINGS), PROTOCOL),
    "no settings": (PREFACE + frame(PING, 0, 0, bytes(8)), PROTOCOL),
    "an acknowledgement first": (PREFACE + frame(SETTINGS, ACK), PROTOCOL),
    "headers first": (PREFACE + headers(), PROTOCOL),
}

GRPCIO_DIFFERS = {
    "it ignores what comes for streams that it does not have, and forgets closed ones": (
        NOTHING,
        {
            "data on an idle stream",
            "reset of an idle stream",
            "window of an idle stream",
            "data after the end",
            "headers after the end",
            "data after a reset",
            "headers after a reset",
            "data on a closed stream of before",
            "data on an even number",
            "data on stream 0",
            "reset of stream 0",
        },
    ),
    "it ignores headers on streams that cannot be": (
        NOTHING,
        {"even number", "smaller number than before", "headers on stream 0"},
    ),
    "it allows more calls than one on a connection": (
        NOTHING,
        {"more streams than allowed"},
    ),
    "it skips priorities, pushes and the stream of connection frames unread": (
        NOTHING,
        {
            "a stream that depends on itself",
            "a priority that depends on itself",
            "priority on stream 0",
            "priority of 4 bytes",
            "a push by a client",
            "ping on a stream",
            "goaway on a stream",
        },
    ),
    "it does not know padding of data, and takes that of headers for headers": (
        "reset",
        {"more padding than data", "padded data without length", "padded data"},
    ),
    "padding of headers of one frame that is nothing but padding is not missed": (
        NOTHING,
        {"padded headers without length"},
    ),
    "it ends the connection where the RFC allows it and does not ask for it": (
        "ended",
        {
            "unknown flags",
            "padded headers",
            "stream widened by 0",
            "trailers that do not end the stream",
        },
    ),
    "it lets windows overflow": (
        NOTHING,
        {
            "connection widened too far",
            "stream widened too far",
            "stream widened too far by settings",
        },
    ),
    "it reads the fields that it needs, and refuses a call with a status of gRPC": (
        NOTHING,
        {
            "pseudo-header in trailers",
            "content-length too large",
            "content-length too small",
            "content-length that is none",
            "content-length twice",
            "name in capitals",
            "name with a blank",
            "name with a colon",
            "empty name",
            "value with a line feed",
            "value with a carriage return",
            "value with a NUL",
            "value that begins with a blank",
            "value that ends with a tab",
            "connection",
            "keep-alive",
            "proxy-connection",
            "transfer-encoding",
            "upgrade",
            "te other than trailers",
            "unknown pseudo-header",
            "pseudo-header of responses",
            "pseudo-header after a field",
            ":method missing",
            ":scheme missing",
            ":path missing",
            ":method twice",
            ":scheme twice",
            ":path twice",
            ":authority twice",
            "empty :path",
            ":path without a slash",
            "host that is not the authority",
            ":method GET",
            "content-type of something else",
            "content-type that begins alike",
            "a timeout that is none",
            "no content-type",
        },
    ),
    "its HPACK forgives": (
        NOTHING,
        {
            "Huffman padding of more than 7 bits",
            "Huffman end of string",
            "table resized after a field",
        },
    ),
    "it ends the call where we end the connection": (
        "reset",
        {"continuations without end"},
    ),
}
"""Why grpcio, which answers clients that are not ours, reacts otherwise than the RFC says."""
