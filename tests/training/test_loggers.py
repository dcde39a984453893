import collections
import csv
import json
import math
import struct
import time
import zlib

import pytest

from powertrain.training.config import LoggerConfig
from powertrain.training.loggers import JsonlLogger, build_loggers, wandb_mode
from powertrain.training.plots import log_ticks, plot_curve
from powertrain.training.records import read_metrics, truncate_metrics
from tests.training.fakes import run_tiny
from tests.training.test_resume import Crash, Do, crash


def read_wandb(path):
    """Return what an offline W&B file holds: LevelDB log framing around protobuf records."""
    from wandb.proto import wandb_internal_pb2 as pb

    data = path.read_bytes()
    found = collections.defaultdict(list)
    if len(data) < 7:
        return found
    magic = struct.unpack("<4sHB", data[:7])
    assert magic[0] == b":W&B"
    assert magic[1] == 0xBEE1
    position, parts = 7, b""
    while position + 7 <= len(data):
        left = 32768 - position % 32768
        if left < 7:
            position += left
            continue
        checksum, length, kind = struct.unpack("<IHB", data[position : position + 7])
        payload = data[position + 7 : position + 7 + length]
        if kind == 0 or len(payload) < length:
            break
        assert zlib.crc32(bytes([kind]) + payload) == checksum
        position += 7 + length
        parts = payload if kind in (1, 2) else parts + payload
        if kind in (1, 4):
            record = pb.Record()
            record.ParseFromString(parts)
            found[record.WhichOneof("record_type")].append(record)
    return found


def name_of(item):
    return item.key or ".".join(item.nested_key)


@pytest.fixture
def without_key(monkeypatch, tmp_path):
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))


def test_wandb_is_offline_without_a_key_and_never_asks(without_key, monkeypatch, tmp_path):
    assert wandb_mode(LoggerConfig()) == "offline"
    monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
    assert wandb_mode(LoggerConfig()) == "online"
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert wandb_mode(LoggerConfig()) == "disabled"
    assert wandb_mode(LoggerConfig(wandb_mode="offline")) == "offline"


def test_a_key_in_netrc_counts(without_key, monkeypatch, tmp_path):
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password secret\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert wandb_mode(LoggerConfig()) == "online"


def test_the_offline_wandb_file_holds_the_run(without_key, tmp_path):
    config = LoggerConfig(wandb=True, wandb_project="p", wandb_group="g", wandb_tags=("a", "b"), wandb_job_type="j")
    run_tiny(tmp_path / "run", steps=4, logger=config)
    files = list((tmp_path / "run" / "wandb").glob("offline-run-*/run-*.wandb"))
    assert len(files) == 1
    # W&B's own process writes the file, and may still do so after the run has ended.
    deadline = time.monotonic() + 60
    while not (found := read_wandb(files[0]))["exit"] and time.monotonic() < deadline:
        time.sleep(0.1)
    assert found["exit"][0].exit.exit_code == 0
    run = found["run"][0].run
    assert (run.run_id, run.display_name, run.project, run.run_group, run.job_type) == ("run", "run", "p", "g", "j")
    assert list(run.tags) == ["a", "b"]
    assert {name_of(u): json.loads(u.value_json) for u in run.config.update}["seed"] == 0
    history = [{name_of(i): json.loads(i.value_json) for i in r.history.item} for r in found["history"]]
    for record in read_metrics(tmp_path / "run"):
        assert any(all(row.get(key) == value for key, value in record.items()) for row in history), record
    axes = {(m.metric.glob_name or m.metric.name): m.metric.step_metric for m in found["metric"]}
    assert {"step", "tokens", "flops", "seconds"} <= set(axes)
    assert axes["train/*"] == axes["val/*"] == axes["power/*"] == "tokens"


def test_csv_equals_the_json_lines_also_after_a_resume(tmp_path):
    config = LoggerConfig(csv=True)
    with pytest.raises(Crash):
        run_tiny(tmp_path / "run", steps=6, logger=config, callbacks=[Do(5, crash)])
    run_tiny(tmp_path / "run", steps=6, logger=config)
    with (tmp_path / "run" / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    records = read_metrics(tmp_path / "run")
    assert len(rows) == len(records) == 8
    for row, record in zip(rows, records, strict=True):
        assert {k: float(v) for k, v in row.items() if v} == pytest.approx(record)


def test_tensorboard_holds_the_scalars(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run_tiny(tmp_path / "run", steps=4, logger=LoggerConfig(tensorboard=True))
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    records = [r for r in read_metrics(tmp_path / "run") if "train/loss" in r]
    scalars = [(e.step, e.value) for e in events.Scalars("train/loss")]
    assert scalars == [(r["step"], pytest.approx(r["train/loss"])) for r in records]


def test_tensorboard_that_is_not_installed_is_said(tmp_path, monkeypatch):
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'powertrain\[tensorboard\]'"):
        build_loggers(LoggerConfig(tensorboard=True), tmp_path, "id", {}, start_step=0)


def test_json_lines_have_null_for_what_json_cannot_hold(tmp_path):
    JsonlLogger(tmp_path, "id").log_metrics({"a": math.inf, "b": math.nan, "c": 1.0}, step=3)
    assert read_metrics(tmp_path) == [{"step": 3, "a": None, "b": None, "c": 1.0}]


def test_truncation_drops_later_records_and_a_torn_line(tmp_path):
    logger = JsonlLogger(tmp_path, "id")
    for step in (1, 2, 3):
        logger.log_metrics({"x": float(step)}, step=step)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "x"')
    assert [r["step"] for r in read_metrics(tmp_path)] == [1, 2, 3]
    truncate_metrics(tmp_path, 2)
    assert [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [1, 2]
    truncate_metrics(tmp_path / "nothing", 2)


def test_the_curve_is_drawn_from_the_records(tmp_path):
    run_tiny(tmp_path / "run", steps=6)
    from matplotlib.figure import Figure

    drawn = []
    original = Figure.savefig

    def keep(self, *args, **kwargs):
        drawn.append(self)
        return original(self, *args, **kwargs)

    Figure.savefig = keep
    try:
        path = plot_curve(tmp_path / "run")
    finally:
        Figure.savefig = original
    assert path == tmp_path / "run" / "plots" / "loss.png"
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    records = read_metrics(tmp_path / "run")
    lines = {line.get_label().split(",")[0]: line for line in drawn[0].axes[0].get_lines()}
    for label, key in (("training", "train/loss"), ("validation", "val/loss")):
        points = [(r["tokens"], r[key]) for r in records if key in r]
        assert list(zip(*lines[label].get_data(), strict=True)) == points
    (perplexity,) = drawn[0].axes[0].child_axes  # of losses however close to each other
    shown = [y for y in perplexity.get_yticks() if perplexity.get_ylim()[0] <= y <= perplexity.get_ylim()[1]]
    assert len(shown) >= 4


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [
        (3.0, 4e4, [10, 100, 1000, 10000]),
        (2.0, 120, [3, 10, 30, 100]),
        (4.0, 250, [5, 10, 20, 50, 100, 200]),
        (0.9, 6, [1, 1.2, 1.5, 2, 3, 5]),
        (7.5, 14.9, [8, 10, 12, 14]),
        (8.81, 9.04, [8.85, 8.9, 8.95, 9]),
    ],
)
def test_a_logarithmic_axis_has_four_labels_at_the_least(low, high, ticks):
    assert log_ticks(low, high) == pytest.approx(ticks)


def test_a_run_without_records_has_no_curve(tmp_path):
    with pytest.raises(ValueError, match="no loss"):
        plot_curve(tmp_path)
