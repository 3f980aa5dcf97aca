"""A watch beside a training: what it copies, when, and what it does about errors.

The server is a fake that keeps what was uploaded, so that what arrived can be compared with
what was there at the step. Values of a real one are in `test_values.py`.
"""

import csv
import logging
import subprocess
import sys
import threading

import numpy as np
import pytest
from safetensors.numpy import load
from support import fake_service
from support.client_fixtures import QUICK

import curvd

torch = pytest.importorskip("torch")
nn = torch.nn


class Net(nn.Sequential):
    """A module that fits the sessions of the fake; its steps are easy to tell apart."""

    def __init__(self):
        super().__init__(nn.Linear(8, 3, dtype=torch.float64))

    def fill(self, number):
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.fill_(number)


def first_entry(session):
    """Something that needs the server."""
    return float((session.hessian() @ np.eye(27)[0])[0])


@pytest.fixture
def net():
    return Net()


@pytest.fixture
def session(target):
    with curvd.connect(target, config=QUICK) as client:
        yield client.create_session("m", "d", loss="mse", dtype="F64")


@pytest.fixture
def follow(session, net):
    """Make watches that end with the test."""
    made = []

    def make(module=net, session=session, **options):
        made.append(curvd.watch(session, module, **{"metrics": first_entry, **options}))
        return made[-1]

    yield make
    for watch in made:
        watch.close()


def uploads(service):
    """What arrived, in order: by parameter."""
    return [load(bytes(held)) for held in service.uploads.values()]


def rows_of(path):
    return list(csv.DictReader(path.read_text().splitlines()))


def trained(net, optimizer, steps=1):
    for _ in range(steps):
        net(torch.ones(2, 8, dtype=torch.float64)).sum().backward()
        optimizer.step()


def test_one_line_follows_an_optimiser_that_is_made_later(net, follow):
    watch = follow(every=3)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for _ in range(7):
        trained(net, optimizer)
        assert watch.wait()
    assert [(r.step, r.version) for r in watch.readings] == [(3, 2), (6, 3)]
    assert watch.readings[0].values == {"first_entry": fake_service.MATRIX[0, 0]}
    assert (watch.skipped, watch.errors) == (0, 0)


def test_no_snapshot_is_torn_by_a_training_that_never_pauses(service, net, follow):
    """Every step writes its number into every element, while snapshots are being sent."""
    enough = threading.Event()

    def look(reading):
        if len(watch.readings) == 300:
            enough.set()

    metrics = {"nothing": lambda session: 0.0}
    watch = follow(every=1, metrics=metrics, to=look)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.0)

    def train():
        steps = 0
        while not enough.is_set():
            steps += 1
            net.fill(steps)
            optimizer.step()

    training = threading.Thread(target=train)
    training.start()
    training.join()
    watch.close()
    skipped = [reading.skipped for reading in watch.readings]
    assert min(skipped) >= 0
    assert len(skipped) + sum(skipped) == watch.readings[-1].step
    arrived = uploads(service)
    assert len(arrived) == len(watch.readings) >= 300
    for reading, values in zip(watch.readings, arrived, strict=True):
        elements = np.concatenate([v.reshape(-1) for v in values.values()])
        np.testing.assert_array_equal(elements, np.full(27, reading.step))


def test_what_is_being_sent_is_not_written(net):
    from curvd.watching.handover import Handover
    from curvd.watching.snapshot import Snapshot

    handover = Handover(Snapshot(net.state_dict))
    net.fill(1)
    handover.offer(1)
    assert handover.next().step == 1
    sending = handover.values()["0.bias"]
    net.fill(2)
    assert not handover.offer(2)
    assert sending.tolist() == [1.0] * 3
    handover.sent()
    assert handover.offer(3)
    assert sending.tolist() == [2.0] * 3  # the same memory: there is one copy
    handover.done()
    assert handover.next().step == 3


def test_the_newest_snapshot_wins_while_one_is_asked_about(net, follow):
    asking, go_on = threading.Semaphore(0), threading.Semaphore(0)

    def slow(session):
        asking.release()
        go_on.acquire()
        return 1.0

    watch = follow(every=1, metrics=slow)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    trained(net, optimizer)
    asking.acquire()
    trained(net, optimizer, steps=4)
    for _ in range(2):
        go_on.release()
    assert watch.wait()
    assert [(r.step, r.skipped) for r in watch.readings] == [(1, 0), (5, 3)]
    assert watch.skipped == 3


def test_steps_are_those_of_the_optimisers_that_train_the_module(net, follow):
    watch = follow(every=1)
    other = nn.Linear(2, 2)
    stranger = torch.optim.SGD(other.parameters(), lr=0.1)
    both = [torch.optim.SGD([p], lr=0.1) for p in net.parameters()]
    trained(net, stranger, steps=3)
    assert watch.wait() and not watch.readings
    for _ in range(2):
        for optimizer in both:
            trained(net, optimizer)
            assert watch.wait()
    assert [r.step for r in watch.readings] == [1, 2]


def test_a_step_that_a_gradient_scaler_leaves_out_is_none(net, follow):
    watch = follow(every=1)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu")
    for factor in (1.0, float("inf"), 1.0):
        optimizer.zero_grad()
        loss = net(torch.ones(2, 8, dtype=torch.float64)).sum() * factor
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        assert watch.wait()
    assert [r.step for r in watch.readings] == [1, 2]


def test_a_training_may_say_its_steps_itself(net, follow):
    watch = follow(every=2)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for _ in range(5):
        trained(net, optimizer)
        watch.step()
        assert watch.wait()
    assert [r.step for r in watch.readings] == [2, 4]
    watch.step(101)  # one that is resumed
    assert watch.wait()
    assert watch.readings[-1].step == 101


def test_optimisers_may_be_chosen(net, follow):
    weight, bias = (torch.optim.SGD([p], lr=0.1) for p in net.parameters())
    watch = follow(every=1, optimizer=bias)
    trained(net, weight, steps=3)
    trained(net, bias)
    assert watch.wait()
    assert [r.step for r in watch.readings] == [1]
    with pytest.raises(curvd.InvalidSpec, match="takes optimisers of torch, got a int"):
        follow(optimizer=3)


def test_a_server_that_is_away_costs_readings_and_is_said_once(
    service, net, follow, caplog
):
    watch = follow(every=1)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    with caplog.at_level(logging.INFO, "curvd"):
        service.fail("UpdateParameters", curvd.Unavailable("away"), times=3)
        for _ in range(4):
            trained(net, optimizer)
            assert watch.wait()
    assert [(r.step, r.skipped) for r in watch.readings] == [(4, 3)]
    assert watch.errors == 3
    assert isinstance(watch.last_error, curvd.Unavailable)
    first, last = (record.message for record in caplog.records)
    assert "a reading failed, Unavailable: away; the training goes on" in first
    assert last.endswith("a reading works again after 3 errors")


def test_a_watch_goes_on_when_its_server_is_back(service, net, follow, tmp_path):
    address = f"unix:{tmp_path}/s"
    with fake_service.serving(service, address=address):
        client = curvd.connect(address, config=QUICK)
        session = client.create_session("m", "d", loss="mse", dtype="F64")
        watch = follow(session=session, every=1)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        trained(net, optimizer)
        assert watch.wait() and len(watch.readings) == 1
    for _ in range(5):
        trained(net, optimizer)
        assert watch.wait()
    assert (len(watch.readings), watch.errors) == (1, 5)
    with fake_service.serving(service, address=address):
        trained(net, optimizer)
        assert watch.wait()
    assert [r.step for r in watch.readings] == [1, 7]
    client.close()


def test_snapshots_are_spared_while_a_server_is_away(service, net):
    from curvd.watching.handover import Handover
    from curvd.watching.snapshot import Snapshot

    now = [0.0]
    handover = Handover(Snapshot(net.state_dict), clock=lambda: now[0])
    handover.offer(1)
    handover.next()
    handover.done(failed_for_s=5.0)
    assert not handover.offer(2)
    assert handover.wait(0.0)  # nothing was taken
    now[0] = 5.0
    assert handover.offer(3)
    due = handover.next()
    assert (due.step, due.skipped) == (3, 1)


def test_a_snapshot_that_found_no_room_is_taken_at_the_next_step_that_has(net, follow):
    watch = follow(every=10)
    room = watch._handover._changed
    for step in range(1, 26):
        with room:
            watch._handover._is_sending = 10 <= step < 14 or 20 <= step < 22
        watch.step()
        assert watch.wait()
    assert [(r.step, r.skipped) for r in watch.readings] == [(14, 0), (22, 0)]
    with room:
        watch._handover._is_sending = True
    watch.step(30)
    watch.step(40)
    with room:
        watch._handover._is_sending = False
    watch.step(41)
    assert watch.wait()
    assert (watch.readings[-1].step, watch.readings[-1].skipped) == (41, 1)


@pytest.mark.filterwarnings("ignore:`torch.jit.script")
def test_an_optimiser_whose_step_is_compiled_is_heard(net, follow):
    watch = follow(every=2)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    net(torch.ones(1, 8, dtype=torch.float64)).sum().backward()
    step = torch.compile(lambda: optimizer.step(), backend="eager")
    for _ in range(4):
        step()
        assert watch.wait()
    assert [r.step for r in watch.readings] == [2, 4]


def test_a_session_that_is_gone_ends_the_watch_and_the_log_says_so(
    net, session, follow, caplog
):
    watch = follow(every=1)
    session.delete()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    trained(net, optimizer, steps=3)
    assert watch.wait()
    assert watch.closed
    assert isinstance(watch.last_error, curvd.SessionNotFound)
    assert caplog.messages[-1].endswith("the training goes on, and the watch ends")


def test_a_metric_that_fails_takes_no_other_with_it(net, follow, caplog):
    def broken(session):
        raise ZeroDivisionError

    watch = follow(every=1, metrics=[first_entry, broken])
    trained(net, torch.optim.SGD(net.parameters(), lr=0.1), steps=1)
    assert watch.wait()
    assert list(watch.readings[0].values) == ["first_entry"]
    assert watch.errors == 1
    assert "metric 'broken' failed, ZeroDivisionError" in caplog.text


def test_a_snapshot_that_fails_does_not_end_the_training(net, follow):
    state = net.state_dict(keep_vars=True)
    gone = []

    def tensors():
        if gone:
            raise RuntimeError("freed")
        return state

    watch = follow(tensors, every=1)
    gone.append(True)
    watch.step()
    assert watch.wait()
    assert (len(watch.readings), watch.errors) == (0, 1)


def test_readings_become_a_table_that_a_resumed_training_goes_on_with(
    net, follow, tmp_path
):
    path = tmp_path / "runs" / "curvature.csv"
    with pytest.raises(curvd.InvalidSpec, match=r"runs is no folder; make it first"):
        follow(every=1, metrics={"a": first_entry}, to=path)
    assert not path.parent.exists()
    path.parent.mkdir()
    metrics = {"a": first_entry, "b": lambda session: (2.5, 0.5)}
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for _ in range(2):
        with follow(every=1, metrics=metrics, to=path) as watch:
            trained(net, optimizer)
            assert watch.wait()
            rows = rows_of(path)  # complete before it is closed
    assert [row["step"] for row in rows] == ["1", "1"]
    assert [row["version"] for row in rows] == ["2", "3"]
    assert float(rows[0]["a"]) == fake_service.MATRIX[0, 0]
    assert (rows[0]["a_error"], rows[0]["b"], rows[0]["b_error"]) == ("", "2.5", "0.5")
    with pytest.raises(curvd.InvalidSpec, match=r"curvature.csv has other columns"):
        follow(to=path)


def test_readings_become_curves_of_tensorboard(net, follow, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing import event_accumulator as events
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(tmp_path / "theirs")
    metrics = {"a": lambda session: (1.5, 0.25)}
    to = [tmp_path / "ours", writer]
    with follow(every=2, metrics=metrics, to=to) as watch:
        for _ in range(4):
            trained(net, torch.optim.SGD(net.parameters(), lr=0.1), steps=0)
            watch.step()
            assert watch.wait()
    writer.add_scalar("mine", 1.0, 1)  # which is still open
    writer.close()
    for folder in ("ours", "theirs"):
        found = events.EventAccumulator(str(tmp_path / folder)).Reload()
        curve = [(e.step, e.value) for e in found.Scalars("curvature/a")]
        assert curve == [(2, 1.5), (4, 1.5)]
        assert [e.value for e in found.Scalars("curvature/a_error")] == [0.25, 0.25]


def test_what_cannot_be_written_costs_no_reading(net, follow, caplog):
    seen = []

    def full(reading):
        raise OSError("disk full")

    watch = follow(every=1, to=[full, seen.append])
    watch.step()
    assert watch.wait()
    assert tuple(seen) == watch.readings
    assert len(seen) == watch.errors == 1
    assert "full failed, OSError: disk full" in caplog.text


def test_the_next_watch_of_a_session_takes_over(net, follow):
    first = follow(every=1)
    second = follow(every=1)
    assert first.closed
    trained(net, torch.optim.SGD(net.parameters(), lr=0.1))
    assert second.wait()
    assert (len(first.readings), len(second.readings)) == (0, 1)


def test_leaving_a_with_reads_what_was_taken(net, follow):
    with follow(every=1) as watch:
        trained(net, torch.optim.SGD(net.parameters(), lr=0.1))
    assert watch.closed and [r.step for r in watch.readings] == [1]
    trained(net, torch.optim.SGD(net.parameters(), lr=0.1))
    assert len(watch.readings) == 1
    watch.close()


def test_closing_breaks_off_what_takes_too_long(net, session):
    asking = threading.Event()
    never = threading.Event()

    def endless(session):
        asking.set()
        never.wait()

    watch = curvd.watch(session, net, every=1, metrics=endless)
    watch.step()
    asking.wait()
    watch.close(wait_s=0.0)
    assert watch.closed
    never.set()


ENDING = """
import sys, numpy, torch, curvd
net = torch.nn.Sequential(torch.nn.Linear(8, 3, dtype=torch.float64))
session = curvd.connect(sys.argv[1]).create_session("m", "d", loss="mse", dtype="F64")
def entry(session):
    return float((session.hessian() @ numpy.eye(27)[0])[0])
curvd.watch(session, net, every=1, metrics=entry, to=sys.argv[2])
torch.optim.SGD(net.parameters(), lr=0.1).step()
"""


def test_a_watch_ends_with_its_process_and_loses_nothing(target, tmp_path):
    path = tmp_path / "curvature.csv"
    command = [sys.executable, "-c", ENDING, target, path]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stderr) == (0, "")
    assert [row["step"] for row in rows_of(path)] == ["1"]


FORKING = """
import os, sys, numpy, torch, curvd
from torch.utils.data import DataLoader, Dataset
net = torch.nn.Sequential(torch.nn.Linear(8, 3, dtype=torch.float64))
session = curvd.connect(sys.argv[1]).create_session("m", "d", loss="mse", dtype="F64")
optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
watch = curvd.watch(session, net, every=1, metrics={"version": lambda s: s.info.version})

class Points(Dataset):
    def __len__(self):
        return 8
    def __getitem__(self, index):
        optimizer.step()  # in a worker: nobody is to take it for the training's
        watch.step()
        watch.close()
        return torch.ones(8, dtype=torch.float64)

for _ in range(2):
    for batch in DataLoader(Points(), batch_size=2, num_workers=2):
        net(batch).sum().backward()
        optimizer.step()
        assert watch.wait()
child = os.fork()
if not child:
    sys.exit(0)  # by atexit, which is the parent's
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
assert not watch.closed
watch.close()
print([reading.step for reading in watch.readings], watch.errors)
"""


def test_workers_of_a_data_loader_and_forked_children_leave_it_alone(target):
    command = [sys.executable, "-W", "ignore", "-c", FORKING, target]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "[1, 2, 3, 4, 5, 6, 7, 8] 0\n"


def test_a_module_is_found_in_what_it_is_wrapped_in(net, follow, service, tmp_path):
    class Training(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = net
            self.other = nn.Linear(2, 2)

    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1
    )
    try:
        parallel = nn.parallel.DistributedDataParallel(net)
        wrapped = [Training(), parallel, torch.compile(net, backend="eager")]
    finally:
        torch.distributed.destroy_process_group()
    for number, module in enumerate(wrapped, start=1):
        net.fill(number)
        watch = follow(module, every=1)
        watch.step()
        assert watch.wait()
    for number, values in enumerate(uploads(service), start=1):
        assert sorted(values) == ["0.bias", "0.weight"]
        assert (values["0.bias"] == number).all()


def test_the_float32_copies_of_an_optimiser_may_be_watched(net, follow, service):
    half = Net().to(torch.bfloat16)
    master = {n: p.detach().double() for n, p in half.named_parameters()}
    master["0.bias"][0] = 1 + 2.0**-20  # which bfloat16 does not have
    optimizer = torch.optim.SGD(master.values(), lr=0.1)
    watch = follow(master, every=1)
    optimizer.step()
    assert watch.wait() and len(watch.readings) == 1
    assert uploads(service)[0]["0.bias"][0] == 1 + 2.0**-20


def test_a_module_in_half_precision_is_sent_as_it_is(net, follow, service):
    half = Net().to(torch.bfloat16)
    watch = follow(half, every=1)
    watch.step()
    assert watch.wait() and len(watch.readings) == 1
    np.testing.assert_array_equal(
        uploads(service)[0]["0.weight"], half[0].weight.detach().float().numpy()
    )


def test_memory_is_for_one_copy_and_tied_parameters_have_one():
    from curvd.watching.snapshot import Snapshot

    net = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 5, bias=False))
    net[1].weight = net[0].weight
    snapshot = Snapshot(net.state_dict)
    snapshot.take()
    (first,) = snapshot.values().values()
    with torch.no_grad():
        net[0].weight.fill_(7.0)
    snapshot.take()
    (second,) = snapshot.values().values()
    assert second is first and (second == 7.0).all()


def test_a_tensor_of_another_layout_in_memory_is_copied_in_order(follow, service):
    weight = torch.arange(24.0, dtype=torch.float64).reshape(8, 3).T
    bias = torch.zeros(6, dtype=torch.float64)[::2]
    watch = follow({"0.weight": weight, "0.bias": bias}, every=1)
    watch.step()
    assert watch.wait() and len(watch.readings) == 1
    np.testing.assert_array_equal(uploads(service)[0]["0.weight"], weight.numpy())


class Sharded:
    """What stands for a DTensor: it has a shape, and a whole elsewhere."""

    shape = (3, 8)

    def full_tensor(self):
        raise NotImplementedError


WRONG = {
    "another module": (
        lambda: {"module": nn.Linear(2, 2)},
        r"not the module of the session, which has parameters 0\.weight \[3, 8\]",
    ),
    "two that fit": (
        lambda: {"module": nn.ModuleDict({"a": Net(), "b": Net()})},
        "several parts have the session's parameters: a, b; watch one of them",
    ),
    "no module": (lambda: {"module": 3}, "follows a module, .* got a int"),
    "a sharded one": (
        lambda: {"module": {"0.weight": Sharded(), "0.bias": torch.ones(3)}},
        r"'0\.weight' is sharded \(a DTensor\).*gather them",
    ),
    "no session": (lambda: {"session": 3}, "needs a session of .* got a int"),
    "no steps": (lambda: {"every": 0}, "every must be at least 1 step, got 0"),
    "no metric": (lambda: {"metrics": ()}, "needs a metric: one of sharpness"),
    "an unknown metric": (
        lambda: {"metrics": "sharp"},
        "unknown metric 'sharp'; known: sharpness, ggn_sharpness, trace",
    ),
    "one that is nameless": (
        lambda: {"metrics": [lambda session: 1.0]},
        "has no name: write metrics={'name': function}",
    ),
    "one twice": (
        lambda: {"metrics": ("loss", "loss")},
        "metrics need different names, got loss, loss",
    ),
    "no outlet": (lambda: {"to": 3}, r"readings go to a path \(.csv.* got a int"),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_cannot_be_watched_is_said_at_once(follow, what):
    options, said = WRONG[what]
    with pytest.raises(curvd.InvalidSpec, match=said):
        follow(**options())


def test_without_tensorboard_the_extra_is_named(follow, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install .*'\.\[tensorboard\]'"):
        follow(to=tmp_path)


def test_it_says_how_it_goes(net, follow):
    watch = follow(every=5)
    assert repr(watch) == "<Watch every 5 steps, 0 readings, 0 skipped, 0 errors>"
    watch.step(5)
    assert watch.wait()
    assert "1 readings, 0 skipped, 0 errors, last <Reading of step 5: first_" in repr(
        watch
    )
