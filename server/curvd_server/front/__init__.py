"""Where connections come in: those of our clients are served without a copy.

`listening` has the port, `recognise` tells from the first bytes who calls, `link` serves
our clients' connections itself, `calls` runs grpcio's handlers on them, and `relay`
passes all others to grpcio.
"""
