"""The house has one staircase: files import from their own folder and from those below it, never from above."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# From top to bottom. "" is hov2/ itself: the method and its leaves.
FOLDERS = ["scripts", "toy", "tools", "evaluation", "engine", "data", "model", ""]
FILES = sorted([*ROOT.glob("*.py"), *ROOT.glob("hov2/**/*.py")])


def floor_of(module):
    """The number of the folder that a module such as "hov2.model.prefix" or "train_grpo" is in."""
    parts = module.split(".")
    if parts[0] != "hov2":
        return FOLDERS.index("scripts")
    in_a_folder = len(parts) > 1 and (ROOT / "hov2" / parts[1]).is_dir()
    return FOLDERS.index(parts[1] if in_a_folder else "")


def imported(path):
    """The modules of hov2, and the scripts, that a file imports, anywhere in it."""
    scripts = {script.stem for script in ROOT.glob("*.py")}
    modules = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}:{node.lineno}: relative import"
            modules |= {f"{node.module}.{alias.name}" for alias in node.names}  # `from hov2 import grpo`, too
    return {module for module in modules if module.split(".")[0] in {"hov2", *scripts}}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_only_downwards(path):
    own = floor_of(".".join(path.relative_to(ROOT).with_suffix("").parts))
    upwards = {module for module in imported(path) if floor_of(module) < own}
    assert not upwards, f"{path.relative_to(ROOT)} imports {upwards}"


@pytest.mark.parametrize(
    "module, banned",
    [
        ("grpo", "transformers"),
        ("rewards", "transformers"),
        ("answers", "transformers"),
        ("spans", "transformers"),
        ("config", "transformers"),
        ("config_help", "torch"),
        ("tools.report", "transformers"),
        ("tools.report", "torch"),
    ],
)
def test_imports_without(module, banned):
    code = f"import sys; sys.modules[{banned!r}] = None; import hov2.{module}"  # None makes any import of it fail
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
