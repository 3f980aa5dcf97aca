"""Parameters in shards over processes: the unmodified engine against eager torch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.sharded_ranks import together, truth
from support.zoo import ANIMALS


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


def test_the_zoo_is_right_on_shards_and_its_wrong_animal_refused_by_name(told):
    for each in told:
        refused = {n: v for n, v in each["zoo"].items() if isinstance(v, str)}
        assert refused == {"raw_weight_norm": "direction"}
        assert len(each["zoo"]) == len(ANIMALS) + 1
        assert max(v for v in each["zoo"].values() if not isinstance(v, str)) < 1e-12


def test_a_process_holds_its_shards_and_no_whole_parameter(told):
    for rank, each in enumerate(told):
        held = each["held"]
        print(f"rank {rank}: {held}")
        assert held["gathered"] > 100
        assert held["alive"] == 0
        assert held["kept_batches"] == 2
        assert held["shards"] <= 0.501
        assert held["shards"] + held["kept"] <= 0.6


def test_a_process_without_a_mini_batch_for_a_step_adds_nothing(told):
    """Six of the eight data points; the others' process computes one and counts it not."""
    for kind in ("hessian", "ggn", "gradient"):
        want = truth(kind, range(6))
        for each in told:
            for attempt in ("", " first", " kept"):
                if kind + attempt in each["uneven"]:
                    row = torch.tensor(
                        each["uneven"][kind + attempt], dtype=torch.float64
                    )
                    assert float((row - want).norm() / want.norm()) < 1e-12


def test_processes_that_met_with_different_tensors_are_told(told):
    for each in told:
        assert "a model does whose path depends on its data" in each["strayed"]
