"""An option is declared once: methods, requests, commands and documents are made of it."""

import dataclasses
import inspect
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

import curvd
from curvd.cli import query_commands
from curvd.cli.commands import main
from curvd.contract import QUERIES, RPCS, choices_of, query_messages, settings_of

ROOT = Path(__file__).parents[2]
PAIRS = [
    (curvd.RemoteOperator, curvd.AsyncOperator),
    (curvd.Session, curvd.AsyncSession),
]


def test_every_query_of_the_contract_has_options():
    assert set(QUERIES) == {
        rpc.name for rpc in RPCS.values() if rpc.service.endswith("QueryService")
    }


@pytest.mark.parametrize("rpc", QUERIES)
@pytest.mark.parametrize("client", [0, 1])
def test_a_method_takes_the_options_of_its_query(rpc, client):
    query = QUERIES[rpc]
    owner = next(pair for pair in PAIRS if hasattr(pair[0], query.method))[client]
    taken = inspect.signature(getattr(owner, query.method)).parameters
    ours = inspect.signature(query.options).parameters
    assert {name: taken[name] for name in ours} == ours
    assert set(taken) - set(ours) <= {"self", "b", "inputs", "priors", "queries", "v"}
    doc = inspect.getdoc(getattr(owner, query.method))
    flat = re.sub(r"\s+", " ", doc)
    for name, (_, known) in settings_of(query.options).items():
        assert f" {name}: {known.help}" in flat


def other(options, name):
    """A value that an option may have and that is not its default."""
    field, known = settings_of(options)[name]
    if name in choices_of(options):
        return next(m for m in choices_of(options)[name] if m is not field.default)
    if field.type == "bool":
        return not field.default
    if ends := known.range_of(field):
        return ends[1]
    return "a name"


@pytest.mark.parametrize("rpc", QUERIES)
def test_options_survive_the_wire(rpc):
    kind, message = QUERIES[rpc].options, query_messages.request_type(rpc)
    carried = query_messages.carried(kind, message.DESCRIPTOR)
    asked = kind(**{name: other(kind, name) for name in carried})
    request = message()
    query_messages.write(asked, request)
    again = query_messages.read(kind, message.FromString(request.SerializeToString()))
    assert again == asked
    assert all(getattr(again, n) != getattr(kind(), n) for n in carried)


@pytest.mark.parametrize("rpc", QUERIES)
def test_what_a_request_leaves_out_is_the_default_of_the_contract(rpc):
    kind, message = QUERIES[rpc].options, query_messages.request_type(rpc)
    said = {"k": 1} if rpc == "Eigsh" else {}
    found = query_messages.read(kind, message(**said))
    # The contract says 100 samples, whatever they are samples of.
    ours = {"probes": 100} if rpc == "LogDet" else {}
    assert found == kind(**said, **ours)


def test_a_number_of_pairs_has_no_default_on_the_wire():
    with pytest.raises(curvd.InvalidSpec, match="k must be at least 1, got 0"):
        query_messages.read(
            curvd.contract.EigshOptions, query_messages.request_type("Eigsh")()
        )


BOUNDED = [
    (query.options, name)
    for query in QUERIES.values()
    for name, (field, known) in settings_of(query.options).items()
    if known.range_of(field)
]


@pytest.mark.parametrize(("options", "name"), BOUNDED)
def test_a_value_out_of_its_range_is_refused_with_name_value_and_limit(options, name):
    field, known = settings_of(options)[name]
    low, high = known.range_of(field)
    options(**{name: high})
    outside = [math.nan, math.inf, -math.inf, high * 2 + 1, low - 1]
    if known.positive:
        outside.append(0)
    for value in outside:
        if math.isfinite(value) and low <= value <= high and not known.positive:
            continue  # the type has nothing below its low end
        with pytest.raises(
            curvd.InvalidSpec,
            match=rf"^{name} must be .+, got {re.escape(repr(value))}",
        ):
            options(**{name: value})


def test_a_choice_that_there_is_not_is_refused_with_those_there_are():
    for query in QUERIES.values():
        for name, kind in choices_of(query.options).items():
            known = ", ".join(map(re.escape, kind))
            with pytest.raises(
                curvd.InvalidSpec, match=f"unknown {name} 'none'; known: {known}"
            ):
                query.options(**{name: "none"})


def test_options_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        curvd.contract.TraceOptions().samples = 3


@pytest.mark.parametrize(
    "query", [q for q in QUERIES.values() if q.command], ids=lambda q: q.command
)
def test_help_shows_every_flag_with_its_default(query):
    shown = CliRunner().invoke(main, [query.command, "--help"], terminal_width=200)
    assert shown.exit_code == 0, shown.output
    flat = re.sub(r"\s+", " ", shown.output)
    command = main.commands[query.command]
    flags = {p.name: p for p in command.params}
    for name, (field, known) in settings_of(query.options).items():
        if known.wire == "" or name == "damping":
            continue  # it stays with the client, or is the operator's own
        default = query.terminal.get(name, field.default)
        assert flags[name].default == getattr(default, "value", default)
        assert known.help.replace("`", "") in flat


def test_the_documents_show_the_options():
    """`python -c "from curvd.cli import query_commands as q; print(q.table())"` prints it."""
    text = (ROOT / "docs/client.md").read_text()
    shown = re.search(r"<!-- options -->\n(.*?)\n<!-- end -->", text, re.S)
    assert shown is not None
    assert shown[1] == query_commands.table()


TYPED = """
import curvd
def ask(H: curvd.RemoteOperator, A: curvd.AsyncOperator) -> None:
    reveal_type(H.eigsh)
    reveal_type(A.trace)
    H.eigsh(3, which="both")
    H.solve([1.0], damping=0.1)
    H.trace(relative_errors=0.1)
    H.solve()
    H.logdet(steps="many")
def make(session: curvd.Session, other: curvd.AsyncSession) -> None:
    reveal_type(session.kfac)
    reveal_type(other.ggn)
    session.fisher(samples=3)
"""


def test_a_type_checker_sees_the_options(tmp_path):
    pytest.importorskip("mypy")
    script = tmp_path / "asks.py"
    script.write_text(TYPED)
    checked = subprocess.run(
        [sys.executable, "-m", "mypy", script], cwd=ROOT, capture_output=True, text=True
    ).stdout
    lines = checked.splitlines()
    eigsh, trace, kfac, ggn = (line for line in lines if "Revealed" in line)
    assert "k: int =, *" in eigsh and "which: " in eigsh and "Eigenpairs" in eigsh
    assert "samples: int =" in trace and "Coroutine[Any, Any, curvd.remote.qu" in trace
    assert "fisher: " in kfac and kfac.endswith(
        '-> curvd.remote.operator.RemoteOperator"'
    )
    assert "mc_samples: int =" in ggn and 'AsyncOperator"' in ggn
    unknown, missing, wrong, other = (line for line in lines if ": error: " in line)
    assert 'Unexpected keyword argument "samples"' in other
    assert 'Unexpected keyword argument "relative_errors"' in unknown
    assert "Too few arguments" in missing
    assert 'incompatible type "str"; expected "int"' in wrong


def test_a_query_stands_in_four_files():
    """Those that CONTRIBUTING.md names; generated code, tests and documents aside."""
    files = [
        *ROOT.glob("proto/**/*.proto"),
        *(f for f in ROOT.glob("client/curvd/**/*.py") if f.parent.name != "v1"),
        *ROOT.glob("server/curvd_server/**/*.py"),
    ]
    found = {
        str(f.relative_to(ROOT))
        for f in files
        if re.search(r"gradient_?norms", f.read_text(), re.I)
    }
    assert found == {
        "proto/curvd/v1/query_service.proto",
        "client/curvd/contract/query_options/data_points.py",
        "client/curvd/remote/queries/data_points.py",
        "server/curvd_server/engine/data_points/gradient_norms.py",
    }
