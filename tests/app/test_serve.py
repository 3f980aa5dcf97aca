"""``curvd serve``: settings come from flags, the environment and files, and documents."""

import dataclasses
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

pytest.importorskip("torch")
import curvd_server.app
import curvd_server.trials
from curvd.cli.commands import main
from curvd_server import cli
from curvd_server.config import (
    LimitsConfig,
    ServerConfig,
    TlsConfig,
)

DOCUMENT = Path(__file__).parents[2] / "docs/server.md"


@pytest.fixture
def served(monkeypatch):
    """What `curvd serve` starts a server with."""
    seen = []
    monkeypatch.setattr(curvd_server.app, "serve", seen.append)
    monkeypatch.setattr(curvd_server.trials, "start", lambda: None)
    monkeypatch.setattr(cli, "tune_allocator", lambda: True)
    monkeypatch.setattr(cli, "silence_grpcio", lambda: None)
    monkeypatch.setattr(cli.preflight, "check", lambda config: None)
    return seen


def run(*args, env=None):
    return CliRunner(env=env).invoke(main, [str(a) for a in args])


@pytest.fixture
def file(tmp_path):
    def write(text, name="file"):
        path = tmp_path / name
        path.write_text(text)
        return path

    return write


def test_help_needs_no_torch_and_shows_variables_and_defaults():
    code = (
        "import sys; sys.modules.update(torch=None); "
        "from curvd.cli.commands import main; main(['serve', '--help'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    text = " ".join(done.stdout.split())
    assert "CURVD_DATA_DIR" in text
    assert "[default: 64 GiB]" in text


def test_options_that_are_not_given_are_left_to_the_server(served):
    assert run("serve").exit_code == 0
    assert served == [ServerConfig()]


def test_options_reach_the_server(served, file):
    pem, token = file("pem"), file("secret", "token")
    args = f"""
        --datasets-root {token.parent} --listen unix:/s --data-dir /d --device cpu
        --drain-s 1.5 --insecure --compile-after-s 0 --transport grpcio
        --tls-cert {pem} --tls-key {pem} --tls-client-ca {pem} --token-file {token}
        --builder a=m:f --builder b=m.n:g --log-level error
        --library timm:vit_* --library transformers:gpt2
        --threads 3 --devices cuda:0,cuda:1 --shards 8 --worker-patience-s 4
        --upload-bytes 123 --default-budget-bytes 4GiB --sessions 3 --stall-s 5
    """
    result = run("serve", *args.split())
    assert result.exit_code == 0, result.output
    assert served == [
        ServerConfig(
            listen="unix:/s",
            data_dir=Path("/d"),
            datasets_root=token.parent,
            device="cpu",
            threads=3,
            devices="cuda:0,cuda:1",
            shards=8,
            worker_patience_s=4.0,
            tls=TlsConfig(cert=pem, key=pem, client_ca=pem),
            token_file=token,
            insecure=True,
            builders={"a": "m:f", "b": "m.n:g"},
            libraries=("timm:vit_*", "transformers:gpt2"),
            limits=LimitsConfig(
                upload_bytes=123, sessions=3, default_budget_bytes=4 << 30
            ),
            connections=dataclasses.replace(ServerConfig().connections, stall_s=5.0),
            transport="grpcio",
            compile_after_s=0.0,
            drain_s=1.5,
            log_level="error",
        )
    ]


def test_flag_beats_environment_beats_file(served, file):
    config = file(
        'listen = "h:1"\ndata-dir = "/file"\nsessions = 1\nblock_bytes = "1GiB"\n'
        'insecure = true\nlibraries = ["timm:*", "torchvision:resnet18"]\n'
        '[builders]\na = "m:f"\n'
    )
    env = {"CURVD_DATA_DIR": "/env", "CURVD_SESSIONS": "2"}
    result = run("serve", "--config", config, "--sessions", 3, env=env)
    assert result.exit_code == 0, result.output
    (found,) = served
    assert found == ServerConfig(
        listen="h:1",
        data_dir=Path("/env"),
        limits=LimitsConfig(sessions=3, block_bytes=1 << 30),
        insecure=True,
        builders={"a": "m:f"},
        libraries=("timm:*", "torchvision:resnet18"),
    )


@pytest.mark.parametrize(
    ("args", "text"),
    [
        (["--tls-cert", __file__], "TLS needs both --tls-cert and --tls-key"),
        (["--tls-client-ca", __file__], "TLS needs both"),
        (["--builder", "name"], "expected NAME=module:callable"),
        (["--upload-bytes", "4GB"], "is not a size such as"),
        (["--config", __file__], "--config"),
        (["--token", "secret"], "--token-file"),
    ],
)
def test_mistakes_are_usage_errors(served, args, text):
    result = run("serve", *args)
    assert result.exit_code == 2
    assert text in " ".join(result.output.split())
    assert "secret" not in result.output
    assert served == []


def test_an_unknown_setting_in_a_file_is_named(served, file):
    result = run("serve", "--config", file("lisen = 'h:1'\n"))
    assert result.exit_code == 2
    assert "lisen" in result.output


ODD = (
    *("3", "-1", "1.5", "nan", "inf", "true", '""', '"x"', '"a\\u0000b"', "[]", "[1]"),
    *('["a"]', '[["a"]]', "{}", "{a = 1}", '{a = "b"}', "{a = {b = 2}}", "07:32:00"),
    *("1979-05-27T07:32:00Z", "9" * 400),
)
KEYS = [*sorted({o.name for o in cli.options()}), "builders", "libraries"]


@pytest.mark.parametrize("key", KEYS)
def test_a_file_says_of_a_wrong_value_what_is_right(served, file, key):
    for value in ODD:
        result = run("serve", "--config", file(f"{key} = {value}"))
        if result.exit_code == 0:
            continue
        assert isinstance(result.exception, SystemExit), (value, result.exc_info)
        text = " ".join(result.output.split())
        assert "Error: " in text
        names = {key, key.removesuffix("s"), key.replace("libraries", "library")}
        texts = text.replace("-", "_")
        assert any(name in texts for name in names), text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("builders = 3", "builders must be a table NAME = "),
        ('builders = "x"', "builders must be a table NAME = "),
        ("[builders]\na = 3", "builders must be a table NAME = "),
        ("libraries = 3", "libraries must be a list of strings, got 3"),
        ('data-dir = ["a", "b"]', "data-dir must be one value, got "),
        ("[device]\nname = 'cpu'", "device must be one value, got "),
        ("data-dir = 3", "data-dir must be a string without NUL, got 3"),
        ("insecure = 1", "insecure must be true or false, got 1"),
        ("threads = true", "threads must be a number, got True"),
        ("threads = 1.5", "'1.5' is not a valid integer"),
        ("threads = inf", "'inf' is not a valid integer"),
        ("stall_s = 07:32:00", "stall_s must be a number, got "),
        ("drain-s = 1\ndrain_s = 2", "sets drain_s twice"),
        ('builder = ["a=m:f"]\n[builders]\nb = "m:g"', "sets builder twice"),
        ("config = 'other'", "sets what does not exist: 'config'"),
        ("a = " + "[" * 10_000, "nests tables or lists too deeply"),
    ],
)
def test_a_mistake_in_a_file_is_a_usage_error(served, file, text, message):
    result = run("serve", "--config", file(text))
    assert result.exit_code == 2, result.exc_info
    assert message in " ".join(result.output.split())
    assert served == []


@pytest.mark.parametrize(
    "option",
    [o for o in cli.options() if o.type is not bool and o.name != "token"],
    ids=lambda o: o.flag,
)
def test_a_value_of_a_file_is_judged_as_that_of_the_flag(served, file, option):
    values = ["3", "1GiB", "x", "a=m:f", "timm:*", "", str(file("x"))]
    if "int" in str(option.type) or "float" in str(option.type):
        values += [3, 1.5, 20_000.0, 10**12]
    for value in values:
        flagged = run("serve", option.flag, value)
        text = f'"{value}"' if isinstance(value, str) else f"{value}"
        text = f"[{text}]" if option.is_repeated else text
        filed = run("serve", "--config", file(f"{option.name} = {text}", "toml"))
        assert filed.exit_code == flagged.exit_code, (filed.output, flagged.output)
        assert served[::2] == served[1::2]


def test_a_token_in_a_file_is_not_printed(served, file):
    result = run("serve", "--config", file("token = 271828"))
    assert result.exit_code == 2
    assert "token must be a string" in " ".join(result.output.split())
    assert "271828" not in result.output


def test_a_file_that_cannot_be_read_is_named(served, tmp_path):
    place = tmp_path / "socket"
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(place))
        result = run("serve", "--config", place)
    assert result.exit_code == 2, result.exc_info
    assert f"cannot read '{place}'" in "".join(result.output.splitlines())
    place = tmp_path / "bytes"
    place.write_bytes(b"\xff\xfe")
    result = run("serve", "--config", place)
    assert result.exit_code == 2
    assert "is no TOML: 'utf-8' codec can't decode byte 0xff" in result.output


def test_an_error_of_ours_is_one_line(served):
    result = run("serve", "--listen", "0.0.0.0:1")
    assert result.exit_code == 1
    assert re.fullmatch(r"Error: 0\.0\.0\.0:1 can be reached.*\n", result.output)


@pytest.mark.parametrize(
    "option",
    [o for o in cli.options() if o.setting.least is not None or o.setting.positive],
    ids=lambda o: o.flag,
)
def test_every_setting_is_judged_by_its_bounds(served, option):
    result = run("serve", option.flag, -1)
    assert result.exit_code != 0
    assert option.name in result.output.replace("-", "_")


def test_the_documents_show_the_settings():
    """`python -c "from curvd_server import cli; print(cli.table())"` prints the table."""
    text = DOCUMENT.read_text()
    shown = re.search(r"<!-- settings -->\n(.*?)\n<!-- end -->", text, re.S)
    assert shown is not None
    assert shown[1].strip() == cli.table()
