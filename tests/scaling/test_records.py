import dataclasses
import json
import math

import pytest

from powertrain.scaling.recipe import CONVENTIONS
from powertrain.scaling.records import RecordStore, Start, from_json, table, to_json
from powertrain.schema import ConfigError

from .synthetic import make_records


@pytest.fixture(scope="module")
def records():
    return make_records(budgets=(1e15, 3e15), factors=(1.0,), documents=20)


def test_a_record_survives_its_file(records):
    for record in records[:3]:
        assert from_json(to_json(record)) == record
    started = dataclasses.replace(records[0], starts=(Start(0, "cpu", 2, {"commit": "a"}),))
    assert from_json(to_json(started)) == started


def test_a_cell_is_recorded_once(tmp_path, records):
    store = RecordStore(tmp_path / "records")
    assert store.append(records[0])
    assert records[0].cell in store
    again = dataclasses.replace(records[0], seconds=1.0)
    assert not store.append(again)
    assert store.read() == [records[0]]
    assert not list(store.directory.glob(".*")), "no temporary file is left"


def test_records_are_read_in_the_order_of_their_cells(tmp_path, records):
    store = RecordStore(tmp_path)
    for record in reversed(records):
        store.append(record)
    assert [r.cell for r in store.read()] == sorted(r.cell for r in records)
    assert store.finished() == {r.cell for r in records}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda v: v.update(version=99), "version 99"),
        (lambda v: v.update(losss=1.0), "did you mean 'loss'"),
        (lambda v: v.pop("loss"), "missing option loss"),
        (lambda v: v.update(loss=1.0), "is not the mean"),
        (lambda v: v["flops_per_token"].pop("executed"), "executed"),
        (lambda v: v["document_tokens"].pop(), "document_tokens"),
        (lambda v: v.update(document_numbers=[1]), "document_numbers"),
        (lambda v: v["document_tokens"].__setitem__(0, 0), "document_tokens must be at least 1"),
        (lambda v: v.update(loss=math.nan), "loss=nan must be a number above 0"),
        (lambda v: v.update(loss=-1.0, document_loss=[], document_tokens=[]), "loss=-1"),
        (lambda v: v.update(seconds=math.inf), "seconds=inf"),
        (lambda v: v.update(parameters=0), "parameters=0"),
        (lambda v: v["flops_per_token"].update(executed=math.nan), "executed=nan"),
        (lambda v: v["document_loss"].__setitem__(0, math.nan), "is not the mean nan"),
        (lambda v: v["position_loss"][0].__setitem__(0, math.inf), "must be finite"),
        (lambda v: v["position_loss"][0].pop(), "columns"),
        (lambda v: v["curve"]["loss"].__setitem__(0, math.nan), "must be finite"),
        (lambda v: v["curve"]["loss"].pop(), "curve must be lists of one length"),
        (lambda v: v.update(curve=[]), "curve must be lists of one length"),
    ],
)
def test_a_record_that_cannot_be_trusted_is_refused(tmp_path, records, change, words):
    values = json.loads(to_json(records[0]))
    change(values)
    path = tmp_path / f"{records[0].cell}.json"
    path.write_text(json.dumps(values))
    with pytest.raises(ConfigError, match=words) as error:
        RecordStore(tmp_path).read()
    assert path.name in str(error.value)


def test_a_record_that_is_no_text_is_named(tmp_path):
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match=r"binary\.json: .*decode"):
        RecordStore(tmp_path).read()


def test_a_renamed_record_is_refused(tmp_path, records):
    (tmp_path / "another.json").write_text(to_json(records[0]))
    with pytest.raises(ConfigError, match="holds the record of cell"):
        RecordStore(tmp_path).read()


def test_the_table_has_one_row_per_cell_with_every_convention(records):
    rows = table(reversed(records)).to_pylist()
    assert len(rows) == len(records)
    assert rows == table(records).to_pylist()
    by_cell = {r.cell: r for r in records}
    for row in rows:
        record = by_cell[row["cell"]]
        assert row["perplexity"] == pytest.approx(math.exp(record.loss))
        for convention in CONVENTIONS:
            assert row[f"flops ({convention})"] == record.tokens * record.flops_per_token[convention]
