"""A client and a server of gRPC on python-hyper's h2, which shares no line with ours."""

import contextlib
import socket
import threading

import h2.config
import h2.connection
import h2.events
import h2.settings

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
FIELDS = [
    (":method", "POST"),
    (":scheme", "http"),
    (":authority", "localhost"),
    ("te", "trailers"),
    ("content-type", "application/grpc"),
]


class Peer:
    """One connection, and what waits for the other side's windows.

    Args:
        sock: Connected.
        client: Whether this end makes the calls.
        window: Bytes of data that this end takes before it says that it read them.
        padding: Bytes that are added to each frame of data.
    """

    def __init__(self, sock, *, client, window, padding=None):
        config = h2.config.H2Configuration(
            client_side=client, header_encoding="utf-8", validate_inbound_headers=True
        )
        self.sock, self._padding = sock, padding
        self.connection = h2.connection.H2Connection(config)
        self.connection.initiate_connection()
        # In force when the other side has acknowledged it: until then it may send more.
        first_window = h2.settings.SettingCodes.INITIAL_WINDOW_SIZE
        self.connection.update_settings({first_window: window})
        self._waiting, self._came = {}, b""
        self._preface = 0 if client else len(PREFACE)
        self.flush()

    def flush(self):
        """Send what is to be sent."""
        self.sock.sendall(self.connection.data_to_send())

    def send(self, stream, data, conclude):
        """Send data as the windows allow; then conclude."""
        self._waiting[stream] = [memoryview(data), conclude]
        self._move()

    def _move(self):
        for stream, (data, conclude) in list(self._waiting.items()):
            while data:
                room = self.connection.local_flow_control_window(stream)
                room -= (self._padding or 0) + 1
                size = min(
                    room, self.connection.max_outbound_frame_size - 256, len(data)
                )
                if size <= 0:
                    break
                piece = bytes(data[:size])
                self.connection.send_data(stream, piece, pad_length=self._padding)
                data = data[size:]
            self._waiting[stream][0] = data
            if not data:
                del self._waiting[stream]
                conclude()
        self.flush()

    def events(self):
        """What the other side does, until it is gone; data is acknowledged at once.

        h2 takes no window below zero, as it may be when a smaller one is acknowledged behind
        data. So each frame is looked at for itself, and the windows are widened by what came.
        """
        with contextlib.suppress(ConnectionError):
            while came := self.sock.recv(1 << 16):
                for frame in self._frames(came):
                    for event in self.connection.receive_data(frame):
                        if isinstance(event, h2.events.DataReceived):
                            self._widen(event)
                        yield event
                self._move()

    def _frames(self, came):
        """Cut what came into frames; a part of one is kept for later."""
        self._came += came
        while len(self._came) >= 9:
            size = self._preface or 9 + int.from_bytes(self._came[:3], "big")
            if len(self._came) < size:
                return
            frame, self._came, self._preface = self._came[:size], self._came[size:], 0
            yield frame

    def _widen(self, event):
        """Take back what data took off the windows."""
        size = event.flow_controlled_length
        if size:
            self.connection.increment_flow_control_window(size)
            if event.stream_ended is None:
                self.connection.increment_flow_control_window(size, event.stream_id)


class Client(Peer):
    """Makes calls.

    Args:
        target: Where the server is.
        window: See `Peer`.
    """

    def __init__(self, target, *, window=65535, padding=None):
        host, _, port = target.rpartition(":")
        sock = socket.create_connection((host, int(port)), timeout=30)
        super().__init__(sock, client=True, window=window, padding=padding)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.sock.close()

    def begin(self, path, data):
        """Begin a call; its stream."""
        stream = self.connection.get_next_available_stream_id()
        self.connection.send_headers(stream, [(":path", path), *FIELDS])
        self.send(stream, data, lambda: self.connection.end_stream(stream))
        return stream

    def results(self, count):
        """The data and the status of as many calls, by stream."""
        data, status = {}, {}
        for event in self.events():
            stream = getattr(event, "stream_id", None)
            if isinstance(event, h2.events.DataReceived):
                data[stream] = data.get(stream, b"") + event.data
            elif isinstance(
                event, h2.events.ResponseReceived | h2.events.TrailersReceived
            ):
                found = dict(event.headers).get("grpc-status")
                status |= {stream: found} if found else {}
            elif isinstance(event, h2.events.StreamReset):
                status.setdefault(stream, f"reset {event.error_code}")
            elif isinstance(event, h2.events.ConnectionTerminated):
                raise AssertionError(f"the server left: {event}")
            if len(status) == count:
                break
        return data, status


class Echo:
    """A server that sends each request back, in a thread of its own.

    Args:
        window: See `Peer`.
        padding: See `Peer`.
    """

    def __init__(self, *, window=65535, padding=None):
        self._options = {"window": window, "padding": padding}
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.target = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self.calls, self.resets, self.failure = 0, [], None
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self):
        sock, _ = self._listener.accept()
        with sock:
            sock.settimeout(30)
            peer = Peer(sock, client=False, **self._options)
            try:
                self._answer(peer)
            except Exception as error:
                self.failure = error

    def _answer(self, peer):
        data = {}
        for event in peer.events():
            stream = getattr(event, "stream_id", None)
            if isinstance(event, h2.events.RequestReceived):
                self.calls += 1
                data[stream] = bytearray()
            elif isinstance(event, h2.events.DataReceived):
                data[stream] += event.data
            elif isinstance(event, h2.events.StreamReset):
                self.resets.append(event.error_code)
            elif isinstance(event, h2.events.StreamEnded):
                self._echo(peer, stream, bytes(data.pop(stream)))

    def _echo(self, peer, stream, data):
        headers = [(":status", "200"), ("content-type", "application/grpc")]
        peer.connection.send_headers(stream, headers)
        end = [("grpc-status", "0")]
        peer.send(
            stream,
            data,
            lambda: peer.connection.send_headers(stream, end, end_stream=True),
        )

    def close(self):
        """Wait for the end; what went wrong is raised."""
        self._listener.close()
        self._thread.join(30)
        if self.failure is not None:
            raise self.failure
