"""The house has one staircase: a module imports only from lower floors; the light ones load without transformers."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FLOORS = [
    {"config", "prompts", "media", "spans", "rewards", "grpo", "logps", "results", "formats"},
    {"distributed", "media_cache", "report"},
    {"guard", "weights", "optim"},
    {"model", "log"},
    {"prefix", "judge", "checkpoint", "data"},
    {"rollout", "scoring", "setup", "benchmarks"},
    {"evaluation"},
    {"toy"},
    {"train_sft", "train_grpo", "evaluate", "ask", "check", "plan"},
    {"data.__main__", "toy.ablation", "toy.__main__"},
]
DOORS = FLOORS[-2]  # what a user runs
FLOOR = {module: number for number, modules in enumerate(FLOORS) for module in modules}
FILES = {path.stem: path for path in [*ROOT.glob("hov2/[!_]*.py"), *ROOT.glob("*.py")]}
FILES |= {path.parent.name: path for path in ROOT.glob("hov2/*/__init__.py")}
FILES |= {f"{path.parent.name}.{path.stem}": path for path in ROOT.glob("hov2/*/*.py") if path.stem != "__init__"}


def imported(path):
    """The names of hov2's modules that a file imports, anywhere in it; scripts importing each other count too."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}:{node.lineno}: relative import"
            names_module = node.module == "hov2"  # from hov2 import grpo
            targets = [f"hov2.{alias.name}" for alias in node.names] if names_module else [node.module]
        else:
            continue
        names |= {target.removeprefix("hov2.").split(".")[0] for target in targets if target.startswith("hov2.")}
        names |= {target for target in targets if target in DOORS}
    return names


@pytest.mark.parametrize("module", sorted(FILES))
def test_imports_only_downwards(module):
    assert module in FLOOR, f"{module}.py has no floor: give it one here and in the docs"
    upwards = {name for name in imported(FILES[module]) if FLOOR[name] >= FLOOR[module]}
    assert not upwards, f"{module} (floor {FLOOR[module]}) imports {upwards}"


@pytest.mark.parametrize("module, banned", [
    ("grpo", "transformers"), ("rewards", "transformers"), ("spans", "transformers"), ("config", "transformers"),
    ("report", "transformers"), ("report", "torch"),
    ("formats", "transformers"), ("formats", "torch"), ("formats", "pyarrow"),
])
def test_imports_without(module, banned):
    if module not in FILES:
        pytest.skip(f"no {module}.py yet")
    code = f"import sys; sys.modules[{banned!r}] = None; import hov2.{module}"  # None makes any import of it fail
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
