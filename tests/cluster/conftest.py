import os
import stat
import sys
from pathlib import Path

import pytest

from tests.cluster.slurm_cluster import SlurmCluster, why_not


@pytest.fixture(scope="session")
def slurm(tmp_path_factory):
    """A running Slurm of four nodes; its commands work in this process and in those it starts."""
    reason = why_not()
    if reason is not None:
        if os.environ.get("POWERTRAIN_REQUIRE_SLURM") == "1":
            pytest.fail(f"POWERTRAIN_REQUIRE_SLURM=1 and no Slurm: {reason}")
        pytest.skip(reason)
    with pytest.MonkeyPatch.context() as patch, SlurmCluster(tmp_path_factory.mktemp("slurm")) as cluster:
        patch.setenv("SLURM_CONF", cluster.environment["SLURM_CONF"])
        for name in [name for name in os.environ if name.startswith("SLURM_") and name != "SLURM_CONF"]:
            patch.delenv(name)
        yield cluster


@pytest.fixture
def stub(tmp_path, monkeypatch):
    """Return a function that puts a command of Slurm's on PATH that prints `answer` and records how it was called."""
    directory = tmp_path / "stubs"
    directory.mkdir()
    monkeypatch.setenv("PATH", str(directory), prepend=os.pathsep)

    def put(name: str, answer: str = "", code: int = 0, error: str = "") -> Path:
        record = directory / f"{name}.calls"
        path = directory / name
        path.write_text(
            f"#!{sys.executable} -I\n"
            "import json, os, sys\n"
            f"with open({str(record)!r}, 'a') as file:\n"
            "    file.write(json.dumps({'argv': sys.argv[1:], 'env': dict(os.environ)}) + chr(10))\n"
            f"sys.stdout.write({answer!r}); sys.stderr.write({error!r}); sys.exit({code})\n"
        )
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
        return record

    return put
