"""A module may be anywhere; what is sent is on the host."""

import pytest
from support.places import everywhere, here

torch = pytest.importorskip("torch")


@everywhere
def test_a_module_elsewhere_is_copied_to_the_host_before_it_trains_on():
    from curvd.watching.snapshot import Snapshot

    net = torch.nn.Linear(3, 2).to(here())
    snapshot = Snapshot(net.state_dict)
    for number in (1.0, 2.0):
        with torch.no_grad():
            net.weight.fill_(number)
            snapshot.take()
            net.weight.fill_(-1.0)  # behind the copy, where the device has a queue
        weight = snapshot.values()["weight"]
        assert weight.device.type == "cpu"
        assert weight.tolist() == [[number] * 3] * 2
