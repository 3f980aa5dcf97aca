"""Checkpoints that the server reads itself make the version that their values make."""

import json

import pytest

torch = pytest.importorskip("torch")
from click.testing import CliRunner  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from support import ranks  # noqa: E402
from torch import nn  # noqa: E402

import curvd  # noqa: E402
from curvd.cli.commands import main  # noqa: E402
from curvd_server.app import serve_in_thread  # noqa: E402
from curvd_server.config import ServerConfig  # noqa: E402

DATA = torch.randn(20, 8), torch.randint(0, 3, (20,))
LOSS = nn.CrossEntropyLoss()


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture(scope="module")
def target(root, tmp_path_factory):
    config = ServerConfig(
        listen="127.0.0.1:0",
        data_dir=tmp_path_factory.mktemp("data"),
        checkpoints_root=root,
    )
    with serve_in_thread(config) as served:
        yield served


@pytest.fixture
def session(target):
    with (
        curvd.connect(target) as client,
        client.session_for(ranks.net(0), LOSS, DATA, batch_size=10) as opened,
    ):
        yield opened


@pytest.fixture
def plain(session):
    """The digest of the same parameters, sent by the client."""
    session.update_parameters(ranks.state(1))
    digest = session.info.parameters_digest
    session.update_parameters(ranks.state(0))
    assert session.info.parameters_digest != digest
    return digest


@pytest.fixture(scope="module")
def sharded(root):
    """Two files of safetensors and their index, as libraries write them."""
    state = {f"model.{name}": value for name, value in ranks.state(1).items()}
    names, folder = list(state), root / "hub" / "step-1"
    folder.mkdir(parents=True)
    files = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    halves = [names[:1], names[1:]]
    for file, half in zip(files, halves, strict=True):
        save_file({name: state[name] for name in half}, folder / file, {"format": "pt"})
    weight_map = {
        name: file for file, half in zip(files, halves, strict=True) for name in half
    }
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return "hub/step-1"


def test_a_sharded_checkpoint_makes_the_version_of_its_values(session, plain, sharded):
    assert session.update_parameters(checkpoint=sharded) == 4
    assert session.info.parameters_digest == plain


def test_a_checkpoint_of_two_ranks_makes_the_version_of_its_values(
    session, plain, target, root, tmp_path
):
    """FSDP2 shards its tensors unevenly; the state of the step is passed over."""
    ranks.together(
        "save_checkpoint",
        target,
        session.id,
        tmp_path,
        OUT=str(root / "dcp" / "step-100"),
    )
    assert session.update_parameters(checkpoint="dcp/step-100") == 4
    assert session.info.parameters_digest == plain


def test_a_session_begins_with_a_checkpoint(target, plain, sharded):
    with curvd.connect(target) as client:
        begun = client.session_for(
            ranks.net(0), LOSS, DATA, batch_size=10, checkpoint=sharded
        )
        assert begun.info.parameters_digest == plain
        begun.delete()
        before = len(client.sessions())
        with pytest.raises(curvd.CheckpointNotFound):
            client.session_for(
                ranks.net(0), LOSS, DATA, batch_size=10, checkpoint="hub/step-2"
            )
        assert len(client.sessions()) == before


async def test_the_asyncio_client_names_checkpoints_too(target, plain, sharded):
    async with curvd.aio.connect(target) as client:
        begun = await client.session_for(
            ranks.net(0), LOSS, DATA, batch_size=10, checkpoint=sharded
        )
        assert begun.info.parameters_digest == plain
        assert await begun.update_parameters(checkpoint=sharded) == 3
        with pytest.raises(curvd.CheckpointNotFound):
            await client.session_for(
                ranks.net(0), LOSS, DATA, batch_size=10, checkpoint="nowhere"
            )
        await begun.delete()


def test_what_does_not_fit_leaves_the_old_version(session, root, sharded):
    before = session.refresh()
    save_file(dict(list(ranks.state(1).items())[:3]), root / "short.safetensors")
    with pytest.raises(curvd.StateMismatch, match=r"lacks 1 parameters .*: 2\.bias"):
        session.update_parameters(checkpoint="short")
    save_file(ranks.state(1) | {"0.bias": torch.ones(9)}, root / "wide.safetensors")
    with pytest.raises(curvd.StateMismatch, match=r"0\.bias \[9\] instead of \[7\]"):
        session.update_parameters(checkpoint="wide")
    with pytest.raises(curvd.VersionMismatch):
        session.update_parameters(checkpoint=sharded, expected_version=7)
    with pytest.raises(curvd.InvalidSpec, match="the name of a checkpoint"):
        session.update_parameters(checkpoint="../data/catalogue.sqlite")
    now = session.refresh()
    assert now.parameters_digest == before.parameters_digest
    assert now.version == before.version


def test_a_checkpoint_of_several_copies_is_named_with_its_prefix(session, plain, root):
    twice = {f"ema.{n}": v for n, v in ranks.state(1).items()}
    twice |= {f"model.{n}": v for n, v in ranks.state(2).items()}
    save_file(twice, root / "twice.safetensors")
    with pytest.raises(curvd.InvalidSpec, match=r"2 times, with 'ema\.', 'model\.'"):
        session.update_parameters(checkpoint="twice")
    session.update_parameters(checkpoint="twice", prefix="ema.")
    assert session.info.parameters_digest == plain


def test_an_update_has_values_or_a_checkpoint(session):
    with pytest.raises(curvd.InvalidSpec, match="got neither"):
        session.update_parameters()
    with pytest.raises(curvd.InvalidSpec, match="got both"):
        session.update_parameters(ranks.state(1), checkpoint="one")


def test_the_command_line_brings_a_session_to_a_checkpoint(
    target, session, plain, sharded, tmp_path
):
    def run(*args):
        given = [str(arg) for arg in args]
        return CliRunner().invoke(main, ["update", session.id, target, *given])

    shown = run("--checkpoint", sharded)
    assert shown.exit_code == 0, shown.output
    assert shown.output.startswith(f"version 4, parameters {plain[:12]}")
    save_file(ranks.state(0), tmp_path / "own.safetensors")
    facts = json.loads(run("--file", tmp_path / "own.safetensors", "--json").output)
    assert facts["version"] == 5
    assert facts["parameters_digest"] != plain
    failed = run("--checkpoint", "nowhere")
    assert (failed.exit_code, "no checkpoint 'nowhere'" in failed.output) == (1, True)


def test_a_server_without_a_folder_says_so(live_target):
    with (
        curvd.connect(live_target) as client,
        client.session_for(ranks.net(0), LOSS, DATA, batch_size=10) as session,
        pytest.raises(curvd.CheckpointNotFound, match="name one with checkpoints_root"),
    ):
        session.update_parameters(checkpoint="one")
