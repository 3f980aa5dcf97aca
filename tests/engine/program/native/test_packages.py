"""Native code that is found on disk is what was made, or it is not run."""

from __future__ import annotations

import os

from curvd_server.engine.program.native import packages
from curvd_server.engine.program.native.packages import Packages, is_sound


def test_code_that_rotted_is_not_run_but_made_again(tmp_path):
    made, package = tmp_path / "made", tmp_path / "code.pt2"
    assert not is_sound(package)
    package.write_bytes(b"code")
    assert not is_sound(package)  # of an older server, without a seal
    made.write_bytes(b"code")
    Packages(tmp_path).keep(made, package)
    assert is_sound(package)
    package.write_bytes(b"cod\x64")
    assert not is_sound(package)


def test_the_oldest_make_room_with_their_seals(tmp_path, monkeypatch):
    monkeypatch.setattr(packages, "_KEPT", 2)
    kept, made = Packages(tmp_path / "kept"), tmp_path / "made"
    for age, text in enumerate("abcd"):
        made.write_text(text)
        kept.keep(made, kept.path(text))
        os.utime(kept.path(text), (age, age))
    here = sorted(path for path in (tmp_path / "kept").iterdir())
    stay = [kept.path("c"), kept.path("d")]
    assert here == sorted(stay + [path.with_suffix(".sha256") for path in stay])
    assert all(is_sound(path) for path in stay)


def test_what_a_killed_server_left_half_compiled_is_removed(tmp_path):
    (tmp_path / "tmpabc").mkdir()
    (tmp_path / "tmpabc" / "made.pt2").touch()
    (tmp_path / "kept.pt2").touch()
    Packages(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["kept.pt2"]
