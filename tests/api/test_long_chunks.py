"""Chunks travel joined between our own ends, and short to everybody else."""

import numpy as np
import pytest
from support.served import server

import curvd
from curvd.http2 import LONGEST_CHUNK, messages


@pytest.mark.parametrize("transport", ["direct", "grpcio"])
def test_an_upload_arrives_whole(tmp_path, monkeypatch, transport):
    monkeypatch.setattr(messages, "_QUICK_BYTES_PER_S", 0)
    sizes, check = [], messages.Reader._check_size

    def noted(reader, longest):
        sizes.append(reader._size)
        check(reader, longest)

    monkeypatch.setattr(messages.Reader, "_check_size", noted)
    x = np.random.default_rng(0).standard_normal((4, 1_600_000), dtype=np.float32)
    config = curvd.ClientConfig(transport=transport)
    with (
        server(tmp_path) as channels,
        curvd.connect(channels.target, config=config) as client,
    ):
        # The server compares SHA-256 digests.
        dataset = client.register_dataset(
            {"x": x, "y": np.zeros((4, 1), "f4")},
            inputs=["x"],
            target="y",
            batch_size=1,
        )
        assert dataset.id
    longest = max(sizes, default=0)
    if transport == "direct":
        assert 4 << 20 < longest <= LONGEST_CHUNK + 16
    else:
        assert longest < 4 << 20
