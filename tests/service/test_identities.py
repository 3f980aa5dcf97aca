"""Two callers on one server: what one has, does not exist for the other."""

import contextlib
import hashlib

import numpy as np
import pytest
import raw
from support.callers import calls_as
from support.requests import CONFIG, POINTS, SIZE, STATE, Requests
from support.served import As, Channels

from curvd.contract import Work
from curvd.contract.rpcs import RPCS
from curvd.errors import (
    CurvdError,
    DatasetNotFound,
    InvalidSpec,
    ModelNotFound,
    PermissionDenied,
    RequestIdReused,
    SessionNotFound,
    Unauthenticated,
    VectorNotFound,
)
from curvd.v1 import curvature_service_pb2 as curvature_pb
from curvd.v1 import session_service_pb2 as session_pb
from curvd_server.app import serve_in_thread
from curvd_server.config import ServerConfig
from curvd_server.system import EVERYBODY, Activities, Identity, Ongoing
from curvd_server.transport import token_file

TOKENS = {name: token_file.new_token() for name in ("alice", "bob", "carol", "olga")}

NO_SESSION, NO_MODEL = "0" * 14 + "-00000000", "0" * 64
RULES = {
    "RegisterModel": "bytes",
    "RegisterDataset": "bytes",
    "CreateSession": ModelNotFound,
    "OpenSession": ModelNotFound,
    "DeleteModel": ModelNotFound,
    "DeleteDataset": DatasetNotFound,
    "ListSessions": "own",
    "ListModels": "own",
    "ListDatasets": "own",
    "GetServerInfo": "open",
    **dict.fromkeys(
        [
            "GetSession",
            "RenewSession",
            "DeleteSession",
            "UpdateParameters",
            "MatVec",
            "MatMat",
            "Multiply",
            "Gradient",
            "PutVector",
            "GetVector",
            "ListVectors",
            "DeleteVector",
            "Eigsh",
            "Trace",
            "Diagonal",
            "FrobeniusNorm",
            "SpectralDensity",
            "Solve",
            "Sketch",
            "LogDet",
            "GradientNorms",
            "GradientGram",
            "GradientSquares",
            "JacobianProduct",
            "Influence",
            "OrthonormaliseVectors",
            "InnerProducts",
            "CombineVectors",
            "Predictive",
            "PosteriorSamples",
            "MarginalLikelihood",
        ],
        SessionNotFound,
    ),
}
"""What each RPC does with another's things: an error, as if they did not exist; or
`bytes`: it wants all bytes; `own`: it lists one's own; `open`: it has nothing of anybody."""


def write_tokens(path, **options):
    """Write the lines of all callers; `options` by name."""
    roles = {"olga": ("operator",)}
    lines = [
        token_file.line_of(
            name, token, roles=roles.get(name, ()), **options.get(name, {})
        )
        for name, token in TOKENS.items()
    ]
    new = path.with_suffix(".new")
    new.write_text("\n".join(lines) + "\n")
    new.chmod(0o600)
    new.rename(path)
    return path


@pytest.fixture
def serving(tmp_path):
    """Start a server that knows four callers; gives a channel for each by name."""
    tokens = write_tokens(tmp_path / "tokens", carol={"groups": ["vision"]})
    config = ServerConfig(
        listen="127.0.0.1:0",
        data_dir=tmp_path / "data",
        drain_s=0.0,
        compile_after_s=0,
        tokens=tokens,
    )

    @contextlib.contextmanager
    def start():
        with serve_in_thread(config) as target, Channels(target) as channels:
            yield {name: As(channels, token) for name, token in TOKENS.items()}

    return start


def refused(requests, name, change=lambda message: None):
    """What an RPC says to a right request about things of somebody else."""
    message, chunks = requests.right(name)
    if name == "DeleteSession":
        message.session_id = requests.session
    if name == "DeleteModel":
        message.model_id = requests.model
    if name == "DeleteDataset":
        message.dataset_id = requests.dataset
    change(message)
    with pytest.raises(CurvdError) as caught:
        requests.send(name, message, chunks)
    return caught.value


def registered(channel):
    """What a caller has listed: models and datasets."""
    models = raw.call(channel, "ListModels", session_pb.ListModelsRequest()).models
    asked = session_pb.ListDatasetsRequest()
    return list(models), list(raw.call(channel, "ListDatasets", asked).datasets)


def said(error, requests):
    """All that an error says, as if it were about things that never were."""
    text = f"{error} {sorted(error.metadata.items())} {error.retry_after_s}"
    for known, never in (
        (requests.session, NO_SESSION),
        (requests.model, NO_MODEL),
        (requests.dataset, NO_MODEL),
    ):
        text = text.replace(known, never)
    return text


def test_every_rpc_has_a_rule_for_things_of_others():
    assert RULES.keys() == RPCS.keys(), "say what the new RPC does with others' things"


@pytest.mark.usefixtures("answers")
def test_no_rpc_reaches_what_belongs_to_somebody_else(serving):
    with serving() as channels:
        mine = Requests(channels["alice"])
        theirs = mine.as_seen_by(channels["bob"])
        nobodys = theirs.as_seen_by(
            channels["bob"], session=NO_SESSION, model=NO_MODEL, dataset=NO_MODEL
        )
        for name, rule in RULES.items():
            if isinstance(rule, type):
                error, unknown = refused(theirs, name), refused(nobodys, name)
                assert type(error) is type(unknown) is rule, name
                # Not only the kind: nothing of it says that there is such a thing.
                assert said(error, mine) == said(unknown, mine), name
        # And it is still there, as it was, for its owner.
        np.testing.assert_array_equal(mine.product(), mine.product())
        assert not raw.call(
            channels["bob"], "ListSessions", session_pb.ListSessionsRequest()
        ).sessions
        (listed,) = raw.call(
            channels["alice"], "ListSessions", session_pb.ListSessionsRequest()
        ).sessions
        assert (listed.id, listed.owner, listed.version) == (mine.session, "alice", 1)
        assert registered(channels["bob"]) == ([], [])
        for what in registered(channels["alice"]):
            assert [(one.owner, one.session_ids) for one in what] == [
                ("alice", [mine.session])
            ]
        raw.call(channels["bob"], "GetServerInfo", session_pb.GetServerInfoRequest())


def test_a_dataset_of_somebody_else_does_not_exist_either(serving):
    with serving() as channels:
        mine = Requests(channels["alice"])
        model = raw.register_model(channels["bob"], "mlp", CONFIG, STATE).model
        assert (model.owner, model.id != mine.model) == ("bob", True)
        with pytest.raises(DatasetNotFound):
            raw.create(channels["bob"], model.id, mine.dataset)


def test_a_digest_proves_nothing(serving):
    with serving() as channels:
        Requests(channels["alice"])
        bob = channels["bob"]
        asked = session_pb.RegisterModelHeader(
            builder="mlp", config_json=CONFIG, state=raw.upload(STATE)
        )
        first = session_pb.RegisterModelRequest(header=asked)
        answer = raw.call(bob, "RegisterModel", [first])
        assert answer.upload_needed.committed_bytes == 0
        with pytest.raises(DatasetNotFound, match="upload them"):
            digest = hashlib.sha256(POINTS).hexdigest()
            announced = session_pb.Upload(digest=digest)
            header = session_pb.RegisterDatasetHeader(
                inputs=["x"], target="y", batch_size=4, tensors=announced
            )
            first = session_pb.RegisterDatasetRequest(header=header)
            raw.call(bob, "RegisterDataset", [first])
        # Whoever sends the bytes has them, and only once.
        his = raw.register_dataset(bob, POINTS).dataset
        assert his.owner == "bob"
        again = raw.call(bob, "RegisterDataset", [first]).dataset
        assert again.data_points == his.data_points


def test_who_has_deleted_what_he_sent_is_told_the_same_whoever_else_has_it(
    serving, tmp_path
):
    ask = session_pb.RegisterModelHeader(
        builder="mlp", config_json=CONFIG, state=raw.upload(STATE)
    )
    first = session_pb.RegisterModelRequest(header=ask)
    file = tmp_path / "data" / "blobs" / ask.state.digest

    def register(channel):
        return raw.register_model(channel, "mlp", CONFIG, STATE).model.id

    def delete(channel, model):
        asked = session_pb.DeleteModelRequest(model_id=model)
        raw.call(channel, "DeleteModel", asked)

    with serving() as channels:
        answers = []
        for others in ((), ("alice",), ("alice", "carol")):
            theirs = [(name, register(channels[name])) for name in others]
            delete(channels["bob"], register(channels["bob"]))
            answers.append(raw.call(channels["bob"], "RegisterModel", [first]))
            assert file.exists() == bool(others)
            for name, model in theirs:
                delete(channels[name], model)
            assert not file.exists()
    assert answers[1:] == answers[:1] * 2
    assert answers[0].upload_needed.committed_bytes == 0


def test_parameters_of_somebody_else_are_not_taken_by_their_digest(serving):
    with serving() as channels:
        mine, his = Requests(channels["alice"]), Requests(channels["bob"])
        message, chunks = mine.right("UpdateParameters")
        assert mine.send("UpdateParameters", message, chunks).version.version == 2
        message.header.session_id = his.session
        answer = his.send("UpdateParameters", message, ())
        assert answer.upload_needed.committed_bytes == 0
        assert his.send("UpdateParameters", message, chunks).version.version == 2


def test_wrong_bytes_under_a_digest_spoil_nobodys_upload(serving):
    with serving() as channels:
        half, whole = len(STATE) // 2, raw.upload(STATE)
        header = session_pb.RegisterModelHeader(
            builder="mlp", config_json=CONFIG, state=whole
        )
        first = session_pb.RegisterModelRequest(header=header)
        begun = raw.call(
            channels["alice"], "RegisterModel", [first, memoryview(STATE)[:half]]
        )
        assert begun.upload_needed.committed_bytes == half
        lies = memoryview(bytes(len(STATE)))
        with pytest.raises(CurvdError, match="nothing of them was kept"):
            raw.call(channels["bob"], "RegisterModel", [first, lies])
        asked = raw.call(channels["bob"], "RegisterModel", [first])
        assert asked.upload_needed.committed_bytes == 0
        header.state.offset = half
        rest = [session_pb.RegisterModelRequest(header=header)]
        made = raw.call(
            channels["alice"], "RegisterModel", [*rest, memoryview(STATE)[half:]]
        )
        assert made.model.owner == "alice"


def test_a_call_that_brings_two_tokens_is_nobodys(serving):
    tokens = [("authorization", f"Bearer {TOKENS[name]}") for name in ("alice", "bob")]
    with serving() as channels:
        ask = session_pb.ListModelsRequest()
        plain = channels["alice"]._channels
        with pytest.raises(Unauthenticated, match="one header authorization, got 2"):
            raw.call(plain, "ListModels", ask, metadata=tokens)
        raw.call(plain, "ListModels", ask, metadata=tokens[:1])


def test_what_is_shared_is_withdrawn_by_sharing_it_with_oneself(serving):
    with serving() as channels:

        def share(*names):
            return raw.register_model(
                channels["alice"], "mlp", CONFIG, STATE, share_with=names
            ).model

        model = share("bob")
        assert [m.id for m in registered(channels["bob"])[0]] == [model.id]
        assert share().shared_with == ["bob"]  # none: as before
        share("alice")
        assert registered(channels["bob"])[0] == []
        for everybody in ("*", "@*"):
            with pytest.raises(InvalidSpec, match="none means everybody"):
                share(everybody)


def test_a_request_id_is_its_callers_own(serving):
    with serving() as channels:
        mine, his = Requests(channels["alice"]), Requests(channels["bob"])
        made = [
            raw.create(r.channel, r.model, r.dataset, request_id="one")
            for r in (mine, his, mine)
        ]
        assert made[0].id == made[2].id != made[1].id
        assert [session.owner for session in made] == ["alice", "bob", "alice"]
        with pytest.raises(RequestIdReused):
            raw.create(
                channels["bob"], his.model, his.dataset, request_id="one", name="x"
            )


def shared(channels, *names):
    """A session of Alice's that others may use, and requests about it by name."""
    mine = Requests(channels["alice"])
    session = raw.create(
        channels["alice"], mine.model, mine.dataset, share_with=list(names)
    )
    mine.session = session.id
    return {name: mine.as_seen_by(channel) for name, channel in channels.items()}


@pytest.mark.usefixtures("answers")
@pytest.mark.parametrize("names", [("bob", "@vision")])
def test_who_shares_a_session_uses_it_and_does_not_change_it(serving, names):
    with serving() as channels:
        by = shared(channels, *names)
        wanted = by["alice"].product()
        for name in ("bob", "carol"):
            np.testing.assert_array_equal(by[name].product(), wanted)
            for rpc in ("RenewSession", "DeleteSession", "UpdateParameters"):
                error = refused(by[name], rpc)
                assert type(error) is PermissionDenied
                assert "belongs to 'alice'" in str(error)
            with pytest.raises(ModelNotFound):
                raw.create(by[name].channel, by[name].model, by[name].dataset)
            # An update of one is one of both, so it takes the owner of the parameters.
            with pytest.raises(PermissionDenied):
                raw.create(by[name].channel, "", "", shares_with=by[name].session)
        with pytest.raises(SessionNotFound):
            raw.create(Requests(channels["bob"]).channel, "", "", shares_with="x")
        assert type(refused(by["olga"], "MatVec")) is PermissionDenied


def test_lists_have_what_is_shared_and_name_nobody_elses_sessions(serving):
    with serving() as channels:
        mine = Requests(channels["alice"])
        raw.register_model(
            channels["alice"], "mlp", CONFIG, STATE, share_with=["bob", "@vision"]
        )
        his = raw.register_dataset(channels["bob"], POINTS).dataset.id
        made = raw.create(channels["bob"], mine.model, his).id
        seen = {
            name: [
                (model.id, list(model.session_ids), model.other_sessions)
                for model in registered(channel)[0]
            ]
            for name, channel in channels.items()
        }
        assert seen == {
            "alice": [(mine.model, [mine.session], 1)],
            "bob": [(mine.model, [made], 0)],
            "carol": [(mine.model, [], 0)],
            "olga": [(mine.model, [mine.session, made], 0)],
        }
        owners = [dataset.owner for dataset in registered(channels["olga"])[1]]
        assert owners == ["alice", "bob"]
        assert [d.id for d in registered(channels["bob"])[1]] == [his]


def test_vectors_and_results_in_a_shared_session_are_their_makers_own(serving):
    with serving() as channels:
        by = shared(channels, "bob")
        alice, bob = by["alice"], by["bob"]
        message, chunks = alice.right("PutVector")
        alice.send("PutVector", message, chunks)
        ask = curvature_pb.ListVectorsRequest(session_id=alice.session)
        assert len(raw.call(alice.channel, "ListVectors", ask).vectors) == 1
        assert not raw.call(bob.channel, "ListVectors", ask).vectors
        get = curvature_pb.GetVectorRequest(session_id=alice.session, name="v")
        with pytest.raises(VectorNotFound):
            raw.call(bob.channel, "GetVector", get)
        # The same request id, another operand: not "came before with other content".
        for requests, value in ((alice, 1.0), (bob, 2.0)):
            data = raw.file_of({"v": np.full(SIZE, value)})
            parts = raw.product("MatVec", alice.session, data, request_id="r")
            raw.call(requests.channel, "MatVec", parts)


def test_an_operator_sees_and_ends_everything(serving):
    with serving() as channels:
        mine = Requests(channels["alice"])
        every = session_pb.ListSessionsRequest()
        (seen,) = raw.call(channels["olga"], "ListSessions", every).sessions
        assert (seen.id, seen.owner) == (mine.session, "alice")
        end = session_pb.DeleteSessionRequest(session_id=mine.session)
        raw.call(channels["olga"], "DeleteSession", end)
        assert not raw.call(channels["alice"], "ListSessions", every).sessions


def test_what_belongs_to_whom_outlives_the_server(serving):
    with serving() as channels:
        mine = Requests(channels["alice"])
        wanted = mine.product()
    with serving() as channels:
        mine.channel = channels["alice"]
        np.testing.assert_array_equal(mine.product(), wanted)
        bob = mine.as_seen_by(channels["bob"])
        assert type(refused(bob, "MatVec")) is SessionNotFound
        asked = session_pb.RegisterModelHeader(
            builder="mlp", config_json=CONFIG, state=raw.upload(STATE)
        )
        first = session_pb.RegisterModelRequest(header=asked)
        known = raw.call(channels["alice"], "RegisterModel", [first])
        assert known.model.id == mine.model
        strange = raw.call(channels["bob"], "RegisterModel", [first])
        assert strange.upload_needed.committed_bytes == 0


def test_what_was_made_before_callers_had_names_is_the_operators(serving, tmp_path):
    config = ServerConfig(
        listen="127.0.0.1:0", data_dir=tmp_path / "data", drain_s=0.0, compile_after_s=0
    )
    with serve_in_thread(config) as target, Channels(target) as channels:
        old = Requests(channels)
        wanted = old.product()
    with serving() as channels:
        old.channel = channels["olga"]
        np.testing.assert_array_equal(old.product(), wanted)
        old.channel = channels["alice"]
        assert type(refused(old, "MatVec")) is SessionNotFound
        alices = Requests(channels["alice"])
    # Without a file of tokens, all is everybody's, as before.
    with serve_in_thread(config) as target, Channels(target) as channels:
        for session in (old.session, alices.session):
            old.channel, old.session = channels, session
            np.testing.assert_array_equal(old.product(), wanted)


def test_what_goes_on_of_others_is_not_listed():
    activities = Activities()
    ann, ben = Identity("ann"), Identity("ben")
    olga = Identity("olga", frozenset({"operator"}))
    with contextlib.ExitStack() as stack:
        for caller in (ann, ben, ben):
            with calls_as(caller):
                ongoing = Ongoing(Work.QUERY, caller.name, activities=activities)
            stack.enter_context(ongoing)
        seen = {}
        for caller in (ann, ben, olga, EVERYBODY, Identity()):
            with calls_as(caller):
                seen[caller.name] = [one.subject for one in activities.listed()]
            if caller is EVERYBODY:
                assert seen[""] == ["ann", "ben", "ben"]
    assert seen == {
        "ann": ["ann"],
        "ben": ["ben", "ben"],
        "olga": ["ann", "ben", "ben"],
        "": [],
    }
