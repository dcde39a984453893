"""The arrows of docs/architecture.md, read from the imports of the code itself."""

import ast
from pathlib import Path

import pytest

import powertrain

PACKAGE = Path(powertrain.__file__).parent

# Which parts of powertrain each part may import at all, lazily or not.
MAY_IMPORT = {
    "version": set(),
    "schema": set(),
    "locks": set(),
    "files": set(),
    "cache_directory": set(),
    "wording": set(),
    "divisors": set(),
    "processes": set(),
    "native": {"schema", "locks", "files", "cache_directory"},
    "ops": {"native"},
    "models": {"ops", "divisors"},
    "data": {"wording", "processes", "files", "cache_directory"},
    "training": {"models", "data", "ops", "locks", "files", "wording", "divisors", "processes"},
    "inference": {"models", "ops", "data", "config", "training", "run_status", "files"},
    "config": {"schema", "models", "data", "training", "cluster", "wording"},
    "cluster": {"schema", "config", "native", "run_status", "locks", "files"},
    "run_status": {"files"},
    "train": {
        *("config", "run_status", "schema", "models", "data", "training", "cluster", "wording", "divisors"),
        *("processes", "files"),
    },
    "train_cli": {
        *("train", "config", "run_status", "schema", "data", "training", "inference", "cluster", "ops", "wording"),
        "processes",
    },
    "runs": {"cluster", "run_status"},
    "scaling": {
        *("train", "config", "schema", "models", "data", "training", "inference", "cluster", "ops", "wording"),
        "files",
    },
    "bench": {"version", "schema", "ops", "models", "native", "training", "config"},
    "cli": {"version", "schema", "train_cli", "inference", "runs", "scaling", "bench", "native"},
    "__main__": {"cli"},
    "__init__": {"version", "ops"},
}
# Third-party packages that only some places may know.
ONLY_IN = {
    "hydra": {"config.py", "train.py", "scaling"},
    "omegaconf": {"config.py", "train.py", "scaling"},
    "wandb": {"training/loggers.py", "scaling"},
    "lightning": {"training", "data", "train.py", "bench/distributed.py"},
    "datasets": {"data"},
    "tokenizers": {"data"},
    "matplotlib": {"training", "scaling", "bench"},
}


def modules():
    return sorted(p for p in PACKAGE.rglob("*.py") if "_share" not in p.parts)


def imports(path: Path) -> list[str]:
    """Return every module that a file imports anywhere, relative imports resolved, as dotted names."""
    found = []
    parts = ["powertrain", *path.relative_to(PACKAGE).parent.parts]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = parts[: len(parts) - node.level + 1] if node.level else []
            module = ".".join([*base, node.module] if node.module else base)
            found += [f"{module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")) == "import_module":
            found += [a.value for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str)]
    return found


def part(path: Path) -> str:
    first = path.relative_to(PACKAGE).parts[0]
    return first.removesuffix(".py")


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_follow_the_arrows(path):
    here = part(path)
    assert here in MAY_IMPORT, f"{here} has no row in MAY_IMPORT and docs/architecture.md"
    for name in imports(path):
        top, *rest = name.split(".")
        if top == "powertrain" and rest and rest[0] not in (here, "__version__"):
            assert rest[0] in MAY_IMPORT[here], f"{path.name} of {here} imports powertrain.{rest[0]}"
        if top in ONLY_IN:
            place = path.relative_to(PACKAGE).as_posix()
            assert any(place == allowed or place.startswith(allowed + "/") for allowed in ONLY_IN[top]), (
                f"{place} imports {top}, which only {sorted(ONLY_IN[top])} may"
            )


def test_the_rules_name_only_parts_that_exist():
    present = {part(p) for p in modules()}
    assert present <= set(MAY_IMPORT)
    named = set(MAY_IMPORT) | set().union(*MAY_IMPORT.values())
    assert named - present == set(), "rows for parts that no longer exist"


def test_a_forbidden_import_is_seen(tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), "PACKAGE", tmp_path)
    (tmp_path / "ops").mkdir()
    bad = tmp_path / "ops" / "x.py"
    bad.write_text("def f():\n    from ..models import gpt\n    import wandb\n")
    assert imports(bad) == ["powertrain.models.gpt", "wandb"]
    with pytest.raises(AssertionError, match=r"imports powertrain\.models"):
        test_imports_follow_the_arrows(bad)


@pytest.mark.parametrize("module", ["cli", "config", "schema", "inference.cli"])
def test_light_modules_do_not_import_torch(module):
    import subprocess
    import sys

    code = f"import sys, powertrain.{module}; sys.exit('torch' in sys.modules or 'lightning' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
