"""The pages in docs/: every formula names a function and a test that exist, quoted lines are still in the code, recipes
apply and run, figures are those of docs/figures.py; and the claims of method.md that no other test holds."""

import ast
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from hov2.config import EvalConfig, GRPOConfig, SFTConfig
from hov2.config_io import load_config
from tests.support.helpers import tiny_thinker, tiny_tokenizer

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("*.md"))
NAMED = re.compile(r"`([\w/]+\.py)::(\w+)`")
FORMULA = re.compile(r"^\$\$(.+?)\$\$\n\n(.*)$", re.MULTILINE)


def page(name):
    return (DOCS / name).read_text(encoding="utf-8")


def definitions(path):
    """Names of the functions and classes of a file's top level, and of the classes' methods."""
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    bodies = [tree.body, *(node.body for node in tree.body if isinstance(node, ast.ClassDef))]
    kinds = ast.FunctionDef, ast.ClassDef
    return {node.name for body in bodies for node in body if isinstance(node, kinds)}


# --- links ------------------------------------------------------------------------------------------------------------


def test_every_formula_names_a_function_and_a_test():
    text = page("method.md")
    formulas = FORMULA.findall(text)
    assert len(formulas) == text.count("$$") // 2 >= 10
    for formula, below in formulas:
        paths = [path for path, _ in NAMED.findall(below)]
        assert any(path.startswith("tests/") for path in paths), f"no test below {formula}"
        assert any(not path.startswith("tests/") for path in paths), f"no function below {formula}"


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_named_functions_and_linked_files_exist(path):
    text = path.read_text(encoding="utf-8")
    for file, name in NAMED.findall(text):
        assert name in definitions(file), f"{path.name}: {file} has no {name}"
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text):
        assert (DOCS / target).exists(), f"{path.name}: no file {target}"


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_formulas_survive_markdown(path):
    """Markdown takes a backslash before a sign for its own escape, so that `\\,` would reach the formula as a comma."""
    text = re.sub(r"```.*?```|`[^`\n]*`", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
    for formula in re.findall(r"\$\$.+?\$\$|\$[^$\n]+\$", text):
        assert not re.search(r"\\[^A-Za-z]", formula), f"{path.name}: {formula}"


def test_switches_that_restore_the_released_code_are_config_keys():
    rows = [line.split(" | ") for line in page("released-vs-paper.md").splitlines() if line.startswith("| ")]
    switches = [switch for row in rows for switch in re.findall(r"`([\w.]+): ([^`]+)`", row[-2])]
    assert len(switches) > 10
    for key, value in switches:
        kind, config = {"train_on_prompt": (SFTConfig, "stage1"), "temperature": (EvalConfig, "eval")}.get(
            key, (GRPOConfig, "stage2")
        )
        load_config(kind, ROOT / "configs" / f"{config}.json", [f"{key}={value}"])


def test_experiments_are_dated_and_newest_first():
    dates = re.findall(r"^## (\d{4}-\d\d-\d\d): ", page("experiments.md"), re.MULTILINE)
    assert len(dates) == len(re.findall(r"^## ", page("experiments.md"), re.MULTILINE)) > 5
    assert dates == sorted(dates, reverse=True)


# --- walkthrough ------------------------------------------------------------------------------------------------------

HEADING = re.compile(r"(\d\. [A-Z]\w+)")


def test_the_walkthrough_quotes_train_grpo_under_the_same_headings():
    code = (ROOT / "train_grpo.py").read_text(encoding="utf-8").splitlines()
    in_code = [HEADING.search(line).group(1) for line in code if line.strip().startswith("# --- ")]
    text = page("walkthrough.md")
    assert re.findall(r"^## (.*)$", text, re.MULTILINE) == in_code
    known = {line.strip() for line in code} | {"...", ""}
    quoted = [
        line
        for block in re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
        for line in block.splitlines()
    ]
    assert len(quoted) > 30
    for line in quoted:
        assert line.strip() in known, f"train_grpo.py has no line {line.strip()!r} any more"


def test_figures_are_those_of_the_script_and_in_the_walkthrough():
    figures = runpy.run_path(str(DOCS / "figures.py"))["FIGURES"]
    assert {path.stem for path in (DOCS / "figures").glob("*.svg")} == figures.keys()
    for name, draw in figures.items():
        drawn = draw().svg()
        assert (DOCS / "figures" / f"{name}.svg").read_text() == drawn, f"{name}: run python docs/figures.py"
        ElementTree.fromstring(drawn)
        assert f"](figures/{name}.svg)" in page("walkthrough.md")


# --- recipes ----------------------------------------------------------------------------------------------------------


def recipes():
    """{title: {language: the text of its block}} of docs/recipes.md."""
    parts = re.split(r"^## ", page("recipes.md"), flags=re.MULTILINE)[1:]
    return {
        part.splitlines()[0]: dict(re.findall(r"^```(\w+)\n(.*?)^```", part, re.DOTALL | re.MULTILINE))
        for part in parts
    }


def test_recipes_apply_and_run(tmp_path):
    copies = []
    for number, (title, blocks) in enumerate(recipes().items()):
        assert len(blocks["diff"].splitlines()) < 30, title
        copy = tmp_path / f"recipe{number + 1}"
        shutil.copytree(ROOT / "hov2", copy / "hov2", ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "train_grpo.py", copy)
        applied = subprocess.run(
            ["git", "apply", "-"],
            cwd=copy,
            input=blocks["diff"],
            text=True,
            capture_output=True,
            env=os.environ | {"GIT_CEILING_DIRECTORIES": str(tmp_path)},
            check=False,
        )
        assert applied.returncode == 0, f"{title}: {applied.stderr}"
        (copy / "check.py").write_text(blocks["python"])
        (copy / "commands.txt").write_text(blocks["bash"])
        write_tiny_run(copy)
        copies.append(copy)
    assert len(copies) >= 3
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "support" / "recipe_runs.py"), *map(str, copies)],
        text=True,
        capture_output=True,
        timeout=240,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]


def write_tiny_run(folder):
    """The tiny model where the toy's would be, two questions in text, and a config of one step."""
    model = folder / "runs" / "toy" / "stage1" / "model"
    tiny_thinker(layers=2).save_pretrained(model)
    tiny_tokenizer().save_pretrained(model)
    samples = [
        {
            "problem": "What does he intend?" * n,
            "problem_type": "judge",
            "data_type": "text",
            "solution": "<answer>yes</answer>",
        }
        for n in (1, 2)
    ]
    (folder / "data.jsonl").write_text("".join(json.dumps(sample) + "\n" for sample in samples))
    config = {
        "model": "runs/toy/stage1/model",
        "output_dir": "runs/tiny",
        "data": [{"path": "data.jsonl"}],
        "max_steps": 1,
        "prompts_per_step": 2,
        "num_generations": 2,
        "max_completion_length": 6,
        "top_k": 0,
    }
    (folder / "tiny.json").write_text(json.dumps(config))
