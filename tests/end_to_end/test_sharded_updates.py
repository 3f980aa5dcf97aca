"""Parameters that several ranks hold: one update, the same as that of a plain state dict."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")
from support import ranks  # noqa: E402
from torch import nn  # noqa: E402

import curvd  # noqa: E402


@pytest.fixture
def session(live_target):
    data = torch.randn(20, 8), torch.randint(0, 3, (20,))
    with (
        curvd.connect(live_target) as client,
        client.session_for(
            ranks.net(0), nn.CrossEntropyLoss(), data, batch_size=10
        ) as opened,
    ):
        yield opened


@pytest.fixture
def plain(session):
    """The digest of the same parameters, sent whole."""
    session.update_parameters(ranks.state(1))
    digest = session.info.parameters_digest
    session.update_parameters(ranks.state(0))
    return digest


@pytest.fixture
def together(session, live_target, tmp_path):
    def run(name):
        return ranks.together(name, live_target, session.id, tmp_path)

    return run


@pytest.mark.parametrize(
    "name", ["update_fsdp", "update_fsdp_async", "update_ddp", "update_placed"]
)
def test_ranks_make_the_version_that_a_plain_state_dict_makes(
    together, session, plain, name
):
    before = session.info.version
    assert session.info.parameters_digest != plain
    found = together(name)
    updates = 2 if name == "update_ddp" else 1
    assert found == [[before + updates, plain]] * 2 or (
        name == "update_ddp" and found[0] == [before + updates, plain]
    )
    assert session.refresh().version == before + updates
    assert session.info.parameters_digest == plain
    # What was computed before is there with the new values.
    same = np.concatenate([v.numpy().ravel() for v in ranks.state(1).values()])
    assert np.isfinite(session.hessian() @ same).all()


def test_a_partial_sum_is_refused_on_every_rank(together, session):
    found = together("update_partial")
    for kind, text in found:
        assert kind == "InvalidTensors"
        assert "'0.bias' is a partial sum on each rank" in text
        assert "redistribute(placements=[Replicate()])" in text
    assert session.refresh().version == 1


def test_where_one_rank_fails_nothing_changes_and_a_second_attempt_succeeds(
    together, session, plain
):
    before = session.info.version
    first, second = together("one_rank_fails_first")
    kind, text = first[0]
    assert kind == "Unavailable"
    assert "rank 1 failed, so nothing is committed (KeyError: 'stop')" in text
    assert second[0] == "KeyError('stop')"
    assert first[1:] == second[1:] == [before, before + 1, plain]


def test_a_rank_that_dies_leaves_the_old_version(together, session, plain):
    before = session.refresh()
    found, died = together("one_rank_dies")
    assert died is None
    (kind, text), version = found
    assert kind == "Unavailable"
    assert "a rank of this update is gone" in text
    assert version == before.version
    assert session.refresh().parameters_digest == before.parameters_digest
    assert together("update_fsdp") == [[before.version + 1, plain]] * 2


def test_what_the_server_refuses_every_rank_hears(together, session):
    first, second = together("refused_by_the_server")
    assert first[0] == second[0] == "VersionMismatch"
    assert "is at version 1, not 99" in first[1]
    assert "rank 0 failed" in second[1]
    assert session.refresh().version == 1


def test_dtensors_of_one_process_need_no_other(session, plain, tmp_path, live_target):
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    dist.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1
    )
    try:
        mesh = init_device_mesh("cpu", (1,))
        values = {
            name: distribute_tensor(value, mesh, [Shard(0)])
            for name, value in ranks.state(1).items()
        }
        session.update_parameters(values)
        sharded = nn.Linear(8, 3)
        sharded.weight = nn.Parameter(
            distribute_tensor(sharded.weight.detach(), mesh, [Shard(0)])
        )
        with (
            curvd.connect(live_target) as client,
            pytest.raises(
                curvd.InvalidSpec, match="call session_for before fully_shard"
            ),
        ):
            client.session_for(sharded, "cross_entropy", None, batch_size=1)
    finally:
        dist.destroy_process_group()
    assert session.info.parameters_digest == plain
