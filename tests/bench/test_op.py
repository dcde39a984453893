"""The op benchmark runs, and what it writes is enough to repeat it."""

import json
import statistics
from pathlib import Path

import pytest

from powertrain.bench.op import main, median_ratio
from powertrain.bench.provenance import provenance
from powertrain.schema import ConfigError


def test_writes_rows_and_environment(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "results" / "op.json"
    arguments = ["--tokens", "64", "100", "--heads", "2", "--key-heads", "1", "--dim", "8", "--repeats", "3"]
    assert main([*arguments, "--device", "cpu", "--output", str(output)]) == 0
    result = json.loads(output.read_text())
    assert [row["tokens"] for row in result["rows"]] == [64, 100]
    for row in result["rows"]:
        for kind in ("forward", "forward_backward"):
            power, sdpa = row[f"power_{kind}_times_ms"], row[f"sdpa_{kind}_times_ms"]
            assert len(power) == len(sdpa) == row["repeats"] == 3
            assert min(*power, *sdpa) > 0
            assert row[f"power_{kind}_ms"] == statistics.median(power)
            assert row[f"sdpa_{kind}_ms"] == statistics.median(sdpa)
            # Of an odd number of repeats the median is one of the ratios: above 1 where ours was the faster.
            assert row[f"{kind}_speedup"] == sorted(b / a for a, b in zip(power, sdpa, strict=True))[1]
    assert result["command"].startswith("powertrain bench op --tokens 64 100")
    assert result["problem"]["key_heads"] == 1
    assert result["torch"]
    assert "speedup" in capsys.readouterr().out
    figure = output.with_suffix(".png")
    figure.unlink()
    assert main(["--draw", "--output", str(output)]) == 0
    assert figure.stat().st_size > 0


def test_a_speedup_is_the_median_ratio_of_neighbouring_runs() -> None:
    assert median_ratio([1.0, 2.0, 10.0], [2.0, 2.0, 30.0]) == 2.0


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["--tokens", "64", "0"], "--tokens 0 is not allowed: it must be at least 1"),
        (["--heads", "0"], "--heads 0 is not allowed"),
        (["--key-heads", "-1"], "--key-heads -1 is not allowed"),
        (["--heads", "3", "--key-heads", "2"], "--key-heads 2 does not divide --heads 3"),
        (["--threads", "0"], "--threads 0 is not allowed"),
        (["--repeats", "0"], "--repeats 0 is not allowed"),
        (["--device", "gpu"], "--device gpu is not allowed: this machine has cpu"),
        (["--device", "cuda:99"], "--device cuda:99 is not allowed"),
    ],
)
def test_what_cannot_be_measured_is_one_sentence(given: list[str], words: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=words):
        main([*given, "--output", str(tmp_path / "op.json")])


def test_without_git_a_record_has_no_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert provenance("op", ["--dim", "8"])["commit"] is None


def test_unknown_arguments_exit_with_usage() -> None:
    with pytest.raises(SystemExit) as error:
        main(["--degree", "2"])
    assert error.value.code == 2
