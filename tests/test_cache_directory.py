import pwd

import pytest

from powertrain.cache_directory import cache_directory
from powertrain.data.config import DataConfig
from powertrain.data.prepare import prepare
from powertrain.native import cache_root


def test_the_first_that_is_set_names_it(monkeypatch, tmp_path):
    for name in ("POWERTRAIN_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_directory() == tmp_path / ".cache" / "powertrain"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "x"))
    assert cache_directory() == tmp_path / "x" / "powertrain"
    monkeypatch.setenv("POWERTRAIN_CACHE", "")
    assert cache_directory() == tmp_path / "x" / "powertrain"
    monkeypatch.setenv("POWERTRAIN_CACHE", "~/y")
    assert cache_directory() == tmp_path / "y"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("POWERTRAIN_CACHE", "z")
    assert cache_directory() == tmp_path / "z"


def test_tokens_and_kernels_are_kept_in_it(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("POWERTRAIN_CACHE", "~/cache")
    (tmp_path / "a.txt").write_text("one text")
    config = DataConfig(source="text", files=(str(tmp_path / "a.txt"),), split="tail", val_fraction=0.5)
    assert prepare(config).directory.parent == tmp_path / "cache" / "data"
    assert cache_root() == tmp_path / "cache" / "kernels"


def test_without_a_home_it_says_what_to_set(monkeypatch):
    def unknown(_):
        raise KeyError("getpwuid(): uid not found")

    for name in ("POWERTRAIN_CACHE", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    with pytest.raises(ValueError, match=r"^~/.cache/powertrain: there is no such home .* set POWERTRAIN_CACHE to"):
        cache_directory()
