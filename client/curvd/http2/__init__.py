"""HTTP/2 as gRPC uses it (RFC 9113), for payloads that are received and sent in place.

`frames` knows the bytes, `messages` cuts the data of a stream into messages, `line` is
one connection on a socket that never waits, `exchange` one call on it. Waiting is left
to the callers: the blocking client, the asyncio client and the server.
"""
