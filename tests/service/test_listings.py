"""What is registered is listed: page by page, oldest first, with what needs it."""

import sqlite3
import time

import numpy as np
import pytest
import raw
from support.served import server

from curvd.errors import InvalidSpec
from curvd.v1 import session_service_pb2 as session_pb
from curvd_server.service import listings
from curvd_server.storage import Catalogue

STATE = raw.file_of({"a": np.ones(2), "b": np.ones(3)})
POINTS = raw.file_of({"x": np.ones((40, 2)), "y": np.ones(40)})


def models(channel, **fields):
    return raw.call(channel, "ListModels", session_pb.ListModelsRequest(**fields))


def datasets(channel, **fields):
    return raw.call(channel, "ListDatasets", session_pb.ListDatasetsRequest(**fields))


def test_pages_have_everything_once_and_oldest_first(tmp_path):
    with server(tmp_path) as channel:
        made = [
            raw.register_dataset(channel, POINTS, batch_size=size).dataset.id
            for size in range(1, 12)
        ]
        seen, token = [], ""
        while True:
            page = datasets(channel, page_size=4, page_token=token)
            assert len(page.datasets) <= 4
            seen += [dataset.id for dataset in page.datasets]
            token = page.next_page_token
            if not token:
                break
        assert seen == made
        # To register it again, or to share it, makes it no younger.
        raw.register_dataset(channel, POINTS, batch_size=1)
        assert [dataset.id for dataset in datasets(channel).datasets] == made


def test_a_page_goes_on_where_the_last_one_ended_even_if_that_is_gone(tmp_path):
    with server(tmp_path) as channel:
        made = [
            raw.register_dataset(channel, POINTS, batch_size=size).dataset.id
            for size in range(1, 6)
        ]
        first = datasets(channel, page_size=2)
        for name in made[:2]:
            gone = session_pb.DeleteDatasetRequest(dataset_id=name)
            raw.call(channel, "DeleteDataset", gone)
        rest = datasets(channel, page_token=first.next_page_token)
        assert [dataset.id for dataset in rest.datasets] == made[2:]
        assert not rest.next_page_token


def test_a_list_says_size_and_age_and_what_needs_it(tmp_path):
    before = time.time()
    with server(tmp_path) as channel:
        model = raw.register_model(channel, "two", "{}", STATE).model
        dataset = raw.register_dataset(channel, POINTS).dataset
        assert not models(channel).models[0].session_ids
        sessions = [raw.create(channel, model.id, dataset.id).id for _ in range(2)]
    with server(tmp_path) as channel:  # and all of it after a restart
        (listed,) = models(channel).models
        assert (listed.id, listed.state_bytes) == (model.id, len(STATE))
        assert listed.create_time == model.create_time
        assert before - 1 <= listed.create_time.ToNanoseconds() / 1e9 <= time.time()
        assert list(listed.session_ids) == sessions and not listed.other_sessions
        (listed,) = datasets(channel).datasets
        assert (listed.id, listed.total_bytes) == (dataset.id, len(POINTS))
        assert list(listed.session_ids) == sessions
        end = session_pb.DeleteSessionRequest(session_id=sessions[0])
        raw.call(channel, "DeleteSession", end)
        assert list(models(channel).models[0].session_ids) == sessions[1:]


def test_what_was_registered_before_ages_were_known_has_none(tmp_path):
    with server(tmp_path) as channel:
        model = raw.register_model(channel, "two", "{}", STATE).model
        model.ClearField("create_time")
    for name in ("catalogue.sqlite", "catalogue.mirror.sqlite"):
        with sqlite3.connect(tmp_path / name) as db:
            db.execute("UPDATE models SET record = ?", (model.SerializeToString(),))
    with server(tmp_path) as channel:
        # The seal says that this is not what was written: nobody knows whose it is.
        assert not models(channel).models
    catalogue = Catalogue(tmp_path / "catalogue.sqlite")
    db = catalogue._db
    ((row, _),) = db.rows("models")
    db.write(db.put("models", row))
    catalogue.close()
    with server(tmp_path) as channel:
        (listed,) = models(channel).models
        assert listed.id == model.id and not listed.HasField("create_time")


@pytest.mark.parametrize("token", ["x", "-1", "1.0", "٣", "9" * 19])
def test_a_token_that_no_page_has_named_is_refused(tmp_path, token):
    with server(tmp_path) as channel:
        for ask in (models, datasets):
            with pytest.raises(InvalidSpec, match="which no page has named"):
                ask(channel, page_token=token)


def test_a_page_fits_into_a_message_and_has_at_least_one():
    large = session_pb.Model(config_json="x" * (3 << 20))
    small = session_pb.Model(config_json="x" * (1 << 19))
    page = listings.Page(0)
    page.fill([(7, large), (8, small)])
    assert (len(page.messages), page.token) == (1, "7")
    page = listings.Page(0)
    page.fill((number, small) for number in range(10))
    assert (len(page.messages), page.token) == (3, "2")
    read = []
    page = listings.Page(2)
    page.fill(
        (read.append(number) or number, session_pb.Model()) for number in range(9)
    )
    assert (len(page.messages), page.token, read) == (2, "1", [0, 1, 2])
