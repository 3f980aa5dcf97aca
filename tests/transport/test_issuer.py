"""Tokens of an issuer: who is let in, and everything that is not."""

import base64
import datetime
import hashlib
import hmac
import json
import logging

import jwt
import numpy as np
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from support.fake_device import FakeDevice

import curvd
from curvd.errors import InvalidSpec, Unauthenticated
from curvd_server.app import serve_in_thread
from curvd_server.config import ServerConfig
from curvd_server.transport.issuer import Issuer, Why, read

ISSUER, AUDIENCE = "https://login.example.org/", "curvd"
NOW = 1.9e9
RSA = rsa.generate_private_key(public_exponent=65537, key_size=2048)
OTHER_RSA = rsa.generate_private_key(public_exponent=65537, key_size=2048)
EC, ED = ec.generate_private_key(ec.SECP256R1()), ed25519.Ed25519PrivateKey.generate()
TEXT = f"""
issuer = "{ISSUER}"
audience = "{AUDIENCE}"
jwks = "jwks.json"
algorithms = ["RS256", "ES256", "EdDSA"]
leeway_s = 30
name = "preferred_username"
groups = "groups"
roles = "realm_access.roles"
role_values = {{ operator = ["curvd-admin"] }}
"""


class Clock:
    """Seconds that a test sets."""

    now = NOW

    def __call__(self):
        return self.now


def jwk(key, kid, **more):
    """The public half of a key, as issuers publish it."""
    kinds = {
        rsa.RSAPrivateKey: jwt.algorithms.RSAAlgorithm,
        ec.EllipticCurvePrivateKey: jwt.algorithms.ECAlgorithm,
        ed25519.Ed25519PrivateKey: jwt.algorithms.OKPAlgorithm,
    }
    (kind,) = (k for t, k in kinds.items() if isinstance(key, t))
    return json.loads(kind.to_jwk(key.public_key())) | {"kid": kid, **more}


KEYS = [jwk(RSA, "one", use="sig"), jwk(EC, "two", alg="ES256"), jwk(ED, "three")]


def written(path, text):
    new = path.with_suffix(".new")
    new.write_text(text)
    new.chmod(0o600)
    new.rename(path)
    return path


def issuer(folder, keys=KEYS, text=TEXT, **clocks):
    written(folder / "jwks.json", json.dumps({"keys": keys}))
    path = written(folder / "issuer.toml", text)
    return Issuer(path, **({"clock": Clock()} | clocks))


def signed(key=RSA, algorithm="RS256", kid="one", *, headers=(), **changes):
    """A token; a claim that is changed to None is left out."""
    claims = {
        "iss": ISSUER,
        "aud": AUDIENCE,
        "exp": int(NOW) + 600,
        "iat": int(NOW) - 10,
        "sub": "0123",
        "preferred_username": "ann",
        "groups": ["vision"],
        "realm_access": {"roles": ["other", "curvd-admin"]},
    } | changes
    claims = {name: value for name, value in claims.items() if value is not None}
    named = {} if kid is None else {"kid": kid}
    return jwt.encode(claims, key, algorithm, named | dict(headers))


@pytest.mark.parametrize(
    ("key", "algorithm", "kid"),
    [(RSA, "RS256", "one"), (EC, "ES256", "two"), (ED, "EdDSA", "three")],
)
def test_a_token_that_is_right_says_who_calls(tmp_path, key, algorithm, kid):
    found = issuer(tmp_path).identity(signed(key, algorithm, kid))
    assert (found.name, found.is_operator) == ("ann", True)
    assert found.roles == {"user", "operator"} and found.groups == {"vision"}


def test_claims_are_read_as_issuers_write_them(tmp_path):
    known = issuer(tmp_path)
    plain = known.identity(signed(realm_access=None, groups=None))
    assert plain.roles == {"user"} and not plain.groups
    several = known.identity(signed(aud=["other", AUDIENCE], groups="a b"))
    assert several.groups == {"a", "b"}
    # What nothing can be shared with gives its bearer nothing, and takes nothing from him.
    distinguished = "CN=" + "x" * 200
    unnameable = ["@x", "*", "", distinguished, "a\n", 5, "a"]
    assert known.identity(signed(groups=unnameable)).groups == {"a"}
    # A claim whose own name has dots, as a URL.
    text = TEXT.replace("realm_access.roles", "https://example.org/roles")
    url = issuer(tmp_path, text=text)
    token = signed(**{"https://example.org/roles": "curvd-admin x"})
    assert url.identity(token).is_operator


def forged(header, claims, signature):
    """A token whose parts are what a stranger likes."""
    parts = [json.dumps(part).encode() for part in (header, claims)]
    text = b".".join(
        base64.urlsafe_b64encode(part).rstrip(b"=") for part in (*parts, signature)
    )
    return text.decode()


def claims_of(token):
    return jwt.decode(token, options={"verify_signature": False})


def with_public_key_as_secret():
    """RFC 8725, 2.1: signed by HMAC, with the issuer's public key as the secret."""
    secret = RSA.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    header = {"alg": "HS256", "typ": "JWT", "kid": "one"}
    token = forged(header, claims_of(signed()), b"")
    signature = hmac.digest(secret, token.rstrip(".").encode(), hashlib.sha256)
    return token + base64.urlsafe_b64encode(signature).rstrip(b"=").decode()


def tampered():
    head, _, tail = signed().split(".")
    claims = claims_of(signed()) | {"preferred_username": "eve"}
    middle = base64.urlsafe_b64encode(json.dumps(claims).encode()).rstrip(b"=")
    return f"{head}.{middle.decode()}.{tail}"


REFUSED = {
    "nothing": ("", Why.MALFORMED),
    "no token": ("not.a.token", Why.MALFORMED),
    "bytes": ("\udce9\x00", Why.MALFORMED),
    "deep": (
        base64.urlsafe_b64encode(b'{"alg":' + b"[" * 30_000).decode() + ".e30.eA",
        Why.MALFORMED,
    ),
    "no object": (forged([], {}, b"x"), Why.MALFORMED),
    "none": (
        forged({"alg": "none", "kid": "one"}, claims_of(signed()), b""),
        Why.ALGORITHM,
    ),
    "None": (
        forged({"alg": "None", "kid": "one"}, claims_of(signed()), b"x"),
        Why.ALGORITHM,
    ),
    "a list": (
        forged({"alg": ["RS256"], "kid": "one"}, claims_of(signed()), b"x"),
        Why.ALGORITHM,
    ),
    "confusion": (with_public_key_as_secret(), Why.ALGORITHM),
    "not pinned": (signed(RSA, "RS384"), Why.ALGORITHM),
    "another kind of key": (signed(RSA, "RS256", "two"), Why.ALGORITHM),
    "another key": (signed(OTHER_RSA), Why.SIGNATURE),
    "tampered": (tampered(), Why.SIGNATURE),
    "unsigned": (signed().rpartition(".")[0] + ".", Why.SIGNATURE),
    "no kid": (signed(kid=None), Why.KEY),
    "unknown kid": (signed(kid="four"), Why.KEY),
    "a kid that is a path": (signed(kid="../../etc/passwd"), Why.KEY),
    "its own key": (
        signed(OTHER_RSA, headers={"jwk": jwk(OTHER_RSA, "one")}),
        Why.SIGNATURE,
    ),
    "a key elsewhere": (
        signed(OTHER_RSA, headers={"jku": "http://127.0.0.1:1/jwks"}),
        Why.SIGNATURE,
    ),
    "critical": (signed(headers={"crit": ["exp"]}), None),
    "issuer": (signed(iss="https://other.example.org/"), Why.ISSUER),
    "no issuer": (signed(iss=None), Why.CLAIMS),
    "audience": (signed(aud="other"), Why.AUDIENCE),
    "no audience": (signed(aud=None), Why.CLAIMS),
    "expired": (signed(exp=int(NOW) - 31), Why.EXPIRED),
    "no expiry": (signed(exp=None), Why.CLAIMS),
    "a text as expiry": (signed(exp="tomorrow"), Why.CLAIMS),
    "an endless expiry": (
        signed(exp=float("inf")),
        Why.CLAIMS,
    ),
    "not yet": (signed(nbf=int(NOW) + 31), Why.EARLY),
    "of the future": (signed(iat=int(NOW) + 31), Why.EARLY),
    "nobody": (signed(preferred_username=None), Why.CLAIMS),
    "a number": (signed(preferred_username=7), Why.CLAIMS),
    "a group": (signed(preferred_username="@vision"), Why.CLAIMS),
}


@pytest.mark.parametrize("token, why", REFUSED.values(), ids=REFUSED.keys())
def test_everything_else_is_refused_and_nothing_of_it_repeated(tmp_path, token, why):
    known = issuer(tmp_path)
    for _ in range(2):  # what was refused is not remembered as good
        with pytest.raises(
            Unauthenticated, match="the token does not let you"
        ) as caught:
            known.identity(token)
        assert why is None or caught.value.metadata["why"] == why
        said = str(caught.value) + str(caught.value.metadata)
        assert not [p for p in token.split(".") if len(p) > 8 and p in said]


def test_whatever_becomes_of_a_token_on_its_way_it_is_refused(tmp_path):
    known, random, good = issuer(tmp_path), np.random.default_rng(0), signed()
    for _ in range(500):
        at, to = random.integers(len(good)), chr(random.integers(1, 0x100))
        bad = good[:at] + to * random.integers(0, 3) + good[at + 1 :]
        try:
            found = known.identity(bad)
        except Unauthenticated:
            continue
        # The last bits of base64 may be none of the signature's.
        assert at == len(good) - 1 or bad == good
        assert found.name == "ann"


def test_clocks_may_be_apart_and_a_token_that_was_good_expires(tmp_path):
    clock = Clock()
    known = issuer(tmp_path, clock=clock)
    early, late = signed(nbf=int(NOW) + 29), signed(exp=int(NOW) - 29)
    for token in (early, late, signed()):
        assert known.identity(token).name == "ann"
    clock.now = NOW + 629
    assert known.identity(signed()).name == "ann"
    clock.now = NOW + 631
    for token in (late, signed()):
        with pytest.raises(Unauthenticated) as caught:
            known.identity(token)
        assert caught.value.metadata["why"] == Why.EXPIRED


def test_rotated_keys_count_at_once_and_withdrawn_ones_no_more(tmp_path, caplog):
    ticks = Clock()
    known = issuer(tmp_path, monotonic=ticks)
    old, new = signed(), signed(OTHER_RSA, kid="new")
    assert known.identity(old).name == "ann"
    with pytest.raises(Unauthenticated):
        known.identity(new)
    keys = tmp_path / "jwks.json"
    written(keys, json.dumps({"keys": [jwk(OTHER_RSA, "new")]}))
    # Nobody has waited, but the key is one that nobody knew.
    assert known.identity(new).name == "ann"
    with pytest.raises(Unauthenticated) as caught:
        known.identity(old)  # though it had been verified
    assert caught.value.metadata["why"] == Why.KEY
    # What cannot be read changes nothing, and is complained of once.
    with caplog.at_level(logging.INFO, "curvd_server"):
        for broken in ("{", '{"keys": []}', json.dumps({"keys": [{"kty": "oct"}]})):
            written(keys, broken)
            for _ in range(3):
                ticks.now += 2
                assert known.identity(new).name == "ann"
    assert sum("keys not read" in line for line in caplog.messages) == 3
    written(keys, json.dumps({"keys": KEYS}))
    ticks.now += 2
    assert known.identity(old).name == "ann"


def test_as_many_tokens_as_you_like_are_remembered_no_further(tmp_path, monkeypatch):
    monkeypatch.setattr("curvd_server.transport.issuer._MOST_KNOWN", 3)
    known = issuer(tmp_path)
    for number in range(10):
        known.identity(signed(jti=str(number)))
    assert len(known._verified) == 3


@pytest.mark.parametrize("leeway_s", ["0", "1", "0.0", "0.5", "600"])
def test_clocks_may_be_apart_as_long_as_is_said(tmp_path, leeway_s):
    text = TEXT.replace("leeway_s = 30", f"leeway_s = {leeway_s}")
    known = issuer(tmp_path, text=text)
    apart_s = float(leeway_s)
    assert known.identity(signed(exp=NOW - apart_s + 0.1)).name == "ann"
    with pytest.raises(Unauthenticated):
        known.identity(signed(exp=NOW - apart_s - 0.1))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (("RS256", "HS256"), "algorithm 'HS256' .* only hold public keys"),
        (("RS256", "none"), "algorithm 'none'"),
        (("leeway_s = 30", "leeway_s = 3000"), r"must be in \[0, 600\], got 3000"),
        ((f'audience = "{AUDIENCE}"', ""), "lacks audience"),
        (("leeway_s = 30", "leeway_s = true"), "leeway_s in .* cannot be True"),
        (("leeway_s", "leeway"), "sets what does not exist: leeway"),
        (('operator = ["curvd-admin"]', 'root = ["x"]'), "got root = "),
        (('operator = ["curvd-admin"]', "operator = [1]"), "got operator = "),
        ((f'"{AUDIENCE}"', "7"), "audience in .* cannot be 7"),
        (("issuer", "issuer ="), "is no TOML"),
    ],
)
def test_a_file_that_makes_no_sense_is_refused(tmp_path, change, said):
    with pytest.raises(InvalidSpec, match=said):
        issuer(tmp_path, text=TEXT.replace(*change))


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ([], "no public key for signatures"),
        ([jwk(RSA, "one", use="enc")], "no public key for signatures"),
        ([jwk(RSA, "one"), jwk(EC, "one")], "two keys of the name"),
        ([{"kty": "oct", "k": "AAAA", "kid": "one"}], "has a key that is secret"),
        (
            [json.loads(jwt.algorithms.RSAAlgorithm.to_jwk(RSA)) | {"kid": "one"}],
            "has a key that is secret",
        ),
        ([7], "no JWK set"),
    ],
)
def test_keys_that_cannot_be_meant_are_refused(tmp_path, keys, said):
    with pytest.raises(InvalidSpec, match=said):
        issuer(tmp_path, keys)


def test_files_that_others_may_write_to_are_refused(tmp_path):
    issuer(tmp_path)
    for name in ("jwks.json", "issuer.toml"):
        (tmp_path / name).chmod(0o620)
        with pytest.raises(InvalidSpec, match="let themselves in: chmod go-w"):
            Issuer(tmp_path / "issuer.toml")
        (tmp_path / name).chmod(0o600)
    assert read(tmp_path / "issuer.toml").leeway_s == 30


@pytest.mark.parametrize("transport", ["direct", "grpcio"])
def test_a_server_lets_in_whom_the_issuer_knows(tmp_path, transport, caplog):
    written(tmp_path / "jwks.json", json.dumps({"keys": KEYS}))
    now = int(datetime.datetime.now(datetime.UTC).timestamp())
    tokens = {
        name: signed(
            preferred_username=name, exp=now + 3600, iat=now, realm_access=None
        )
        for name in ("ann", "ben")
    }
    config = ServerConfig(
        listen="127.0.0.1:0",
        drain_s=0.0,
        data_dir=tmp_path / "data",
        issuer=written(tmp_path / "issuer.toml", TEXT),
    )
    with (
        caplog.at_level(logging.INFO, "curvd_server"),
        serve_in_thread(config, device=FakeDevice()) as target,
    ):

        def client(token):
            return curvd.connect(
                target,
                config=curvd.ClientConfig(
                    transport=transport,
                    token=token,
                    retry=curvd.RetryConfig(give_up_s=0),
                ),
            )

        with client(tokens["ann"]) as ann, client(tokens["ben"]) as ben:
            state = {"a": np.ones(2), "b": np.ones(3)}
            made = ann.register_model("two", {}, state)
            assert made.owner == "ann" and [m.id for m in ann.models()] == [made.id]
            assert ben.models() == []
        bad = signed(exp=now - 3600, iat=now - 7200)
        for token, why in ((bad, "expired"), (None, "malformed")):
            with client(token) as stranger, pytest.raises(Unauthenticated):
                stranger.models()
            dropped = [line for line in caplog.messages if '"dropped"' in line]
            assert f'"why": "{why}"' in dropped[-1]
            assert '"unauthenticated"' in dropped[-1]
        assert not [line for line in caplog.messages if bad.rpartition(".")[2] in line]


def test_one_way_to_call_at_a_time(tmp_path):
    with pytest.raises(InvalidSpec, match="give tokens or issuer, not both"):
        ServerConfig(data_dir=tmp_path, tokens=tmp_path / "t", issuer=tmp_path / "i")
