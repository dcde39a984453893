"""What `make setup` says while it installs."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# Makes an environment whose Python is this script again, and notes when it is asked to install.
PYTHON = """\
#!/bin/sh
case "$2" in
  venv) mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
  pip) echo pip is at work ;;
esac
"""


@pytest.mark.skipif(shutil.which("make") is None, reason="there is no make")
def test_setup_says_that_it_installs_before_it_does_and_nothing_else(tmp_path):
    python = tmp_path / "python"
    python.write_text(PYTHON)
    python.chmod(0o755)
    venv = tmp_path / "venv"
    command = ["make", "--no-print-directory", "setup", f"PYTHON={python}", f"VENV={venv}"]
    inherited = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")}

    def said() -> list[str]:
        return subprocess.run(
            command, cwd=ROOT, env=inherited, capture_output=True, text=True, check=True
        ).stdout.splitlines()

    assert said() == [f"installing into {venv}, a minute or two", "pip is at work"]
    assert not any("installing" in line for line in said())
