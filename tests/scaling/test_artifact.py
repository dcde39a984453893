"""The report as a W&B artifact: written offline, without a key and without a prompt."""

import time

from powertrain.scaling.artifact import log_report
from powertrain.scaling.report import write
from powertrain.training.config import LoggerConfig

from . import synthetic


def test_the_report_becomes_an_offline_artifact(tmp_path, monkeypatch):
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
    for name in ("CACHE", "DATA", "CONFIG"):
        monkeypatch.setenv(f"WANDB_{name}_DIR", str(tmp_path / name.lower()))
    write({"README.md": b"# page", "figures/x-1.svg": b"<svg/>"}, tmp_path / "report")
    logger = LoggerConfig(wandb_project="theirs", wandb_entity="team")
    said = log_report(synthetic.recipe(), logger, tmp_path / "report", tmp_path / "sweep")
    assert said == "W&B artifact synthetic-report (offline)"
    (run,) = (tmp_path / "sweep").glob("wandb/offline-run-*/run-*.wandb")
    # W&B's service may still be writing when the call has returned.
    deadline = time.monotonic() + 60
    while b"figures/x-1.svg" not in (content := run.read_bytes()) and time.monotonic() < deadline:
        time.sleep(0.2)
    for text in (b"synthetic-report", b"README.md", b"figures/x-1.svg", b"theirs", b"team"):
        assert text in content
