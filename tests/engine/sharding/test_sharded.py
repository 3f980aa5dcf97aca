"""Parameters in shards over processes: the unmodified engine against eager torch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.sharded_ranks import together, truth


@pytest.fixture(scope="module")
def told(tmp_path_factory) -> list[dict[str, Any]]:
    """What two processes say that share a transformer."""
    return together(tmp_path_factory.mktemp("ranks"))


def test_gathering_and_scattering_are_each_others_derivative_in_both_modes(told):
    assert [each["derivatives"] for each in told] == [[True] * 6] * 2


def test_products_and_gradients_on_shards_are_those_of_eager_torch(told):
    for kind in ("hessian", "ggn", "gradient"):
        want = truth(kind)
        for attempt in ("", " first", " kept"):
            rows = [
                torch.tensor(each["products"][kind + attempt], dtype=torch.float64)
                for each in told
                if kind + attempt in each["products"]
            ]
            assert all(torch.equal(rows[0], row) for row in rows)
            for row in rows:
                assert float((row - want).norm() / want.norm()) < 1e-12


def test_a_process_holds_its_shards_and_no_whole_parameter(told):
    for rank, each in enumerate(told):
        held = each["held"]
        print(f"rank {rank}: {held}")
        assert held["gathered"] > 100
        assert held["alive"] == 0
        assert held["kept_batches"] == 2
        assert held["shards"] <= 0.501
        assert held["shards"] + held["kept"] <= 0.6


def test_uneven_data_is_refused_on_all_processes(told):
    for each in told:
        assert "[2, 1] mini-batches" in each["uneven"]
        assert "cut the data evenly" in each["uneven"]
