"""What can be configured about a server: each setting once, units in the names.

`curvd_server.cli` makes options of the fields, and the table of docs/server.md. `server` has
all of them; `limits` and `tls` are groups of their own, which others are handed alone, and
`addresses`, `files` and `libraries` judge what single settings say.

May import `transport`, whose limits of connections are settings, too, and whose `Callers` say
who may call; must not know who is configured.
"""

from curvd_server.config.addresses import address_of, is_local
from curvd_server.config.libraries import LIBRARIES, check_libraries
from curvd_server.config.limits import LimitsConfig
from curvd_server.config.server import DEFAULT_LISTEN, MESSAGE_BYTES, ServerConfig
from curvd_server.config.tls import TlsConfig

__all__ = [
    "DEFAULT_LISTEN",
    "LIBRARIES",
    "MESSAGE_BYTES",
    "LimitsConfig",
    "ServerConfig",
    "TlsConfig",
    "address_of",
    "check_libraries",
    "is_local",
]
