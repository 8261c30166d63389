"""The pages, compared with the code: names, links, quoted lines, commands, figures, recipes. All of it is marked `docs`,
so that whoever changes the code can leave the pages for later: python -m pytest -m "not docs"."""

import ast
import importlib.util
import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from evaluate import score_arguments
from hov2.answers import PROBLEM_TYPES, check_reference
from hov2.config import EvalConfig, GRPOConfig, SFTConfig
from hov2.config_help import config_keys
from hov2.config_io import config_from_argv, load_config
from hov2.data.formats import CONVERTERS
from hov2.data.samples import to_sample
from hov2.tools import report
from tests.support.helpers import tiny_thinker, tiny_tokenizer
from tests.support.reportkit import write_run

pytestmark = pytest.mark.docs

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.glob("*.md"))]
EACH_PAGE = pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
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


def anchors(text):
    """The names that links to a page's headings use."""
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@EACH_PAGE
def test_named_functions_and_linked_files_exist(path):
    text = path.read_text(encoding="utf-8")
    for file, name in NAMED.findall(text):
        assert name in definitions(file), f"{path.name}: {file} has no {name}"
    for file, anchor in re.findall(r"\]\(([^)#:]*)(?:#([^)]*))?\)", text):
        target = path.parent / file if file else path
        assert target.exists(), f"{path.name}: no file {file}"
        if anchor:
            assert anchor in anchors(target.read_text(encoding="utf-8")), (
                f"{path.name}: {file} has no heading #{anchor}"
            )


@EACH_PAGE
def test_named_files_and_config_keys_exist(path):
    if path.name == "experiments.md":  # a log of earlier days, with their names
        return
    text = path.read_text(encoding="utf-8")
    for file in re.findall(r"`((?:hov2|configs|tests|docs|benchmarks|\.ci)/[\w./-]+)[`:]", text):
        assert (ROOT / file).exists(), f"{path.name}: no file {file}"
    known = set()
    for config_class in (SFTConfig, GRPOConfig, EvalConfig):
        known |= {key.name for key in config_keys(config_class)}
    overridden = re.findall(r"`([a-z_]+(?:\.[a-z_]+)*)=", text)
    nested = re.findall(r"`((?:media|judge|lora|alarms|filter)\.[a-z_]+)`", text)
    for key in overridden + nested:
        assert key in known, f"{path.name}: no config key {key}"


@EACH_PAGE
def test_formulas_survive_markdown(path):
    """Markdown takes a backslash before a sign for its own escape, so that `\\,` would reach the formula as a comma."""
    text = re.sub(r"```.*?```|`[^`\n]*`", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
    for formula in re.findall(r"\$\$.+?\$\$|\$[^$\n]+\$", text):
        assert not re.search(r"\\[^A-Za-z]", formula), f"{path.name}: {formula}"


def test_the_code_names_pages_and_headings_that_exist():
    for path in [*ROOT.glob("*.py"), *ROOT.glob("hov2/**/*.py")]:
        named = re.findall(r'docs/([\w-]+\.md)(?:, "([^"]+)")?', path.read_text(encoding="utf-8"))
        for name, heading in named:
            assert re.search(rf"^#+ {re.escape(heading)}", page(name), re.MULTILINE), f"{path}: {name} has no {heading}"


def test_switches_that_restore_the_released_code_are_config_keys():
    rows = [line.split(" | ") for line in page("released-vs-paper.md").splitlines() if line.startswith("| ")]
    switches = [switch for row in rows for switch in re.findall(r"`([\w.]+): ([^`]+)`", row[-2])]
    assert len(switches) > 10
    for key, value in switches:
        kind, config = {"train_on_prompt": (SFTConfig, "stage1"), "temperature": (EvalConfig, "eval_intentbench")}.get(
            key, (GRPOConfig, "stage2")
        )
        load_config(kind, ROOT / "configs" / f"{config}.json", [f"{key}={value}"])


def test_experiments_are_dated_and_newest_first():
    dates = re.findall(r"^## (\d{4}-\d\d-\d\d): ", page("experiments.md"), re.MULTILINE)
    assert len(dates) == len(re.findall(r"^## ", page("experiments.md"), re.MULTILINE)) > 5
    assert dates == sorted(dates, reverse=True)


def test_the_report_explains_metrics_in_the_words_of_the_page():
    rows = re.findall(r"^\| (`.+?) \| (.+?) \|", page("metrics.md"), re.MULTILINE)
    said = {}
    for names, text in rows:
        for name in re.findall(r"`([^`]+)`", names):
            said[name] = text.replace("`", "")
    path = Path(report.__file__).with_name("metrics.json")
    assert said == json.loads(path.read_text(encoding="utf-8")), f"{path} and docs/metrics.md differ"


def test_the_page_on_data_names_every_format_and_type_and_its_examples_are_read():
    text = page("data.md")
    table = text[text.index("| problem type |") : text.index("## How clips are read")]
    assert set(re.findall(r"^\| `(.+?)` \|", table, re.MULTILINE)) == PROBLEM_TYPES.keys()
    assert {*re.findall(r'"format": "([\w-]+)"', text), "hov2"} == CONVERTERS.keys()
    records = re.findall(r'^{"problem":.*}$', text, re.MULTILINE)
    assert len(records) == 4
    for number, record in enumerate(records, 1):
        sample = to_sample(json.loads(record), number, "mine.jsonl", ROOT)
        check_reference(sample.solution, sample.problem_type)
    for entry in re.findall(r'{"(?:format|path)": "[^{}]*}', text):
        load_config(GRPOConfig, ROOT / "configs/stage2.json", [f"data=[{entry}]"])


@EACH_PAGE
def test_defaults_in_brackets_are_those_of_the_config(path):
    defaults = {}
    for key in config_keys(GRPOConfig):
        defaults[key.name.rpartition(".")[2]] = key.default
    found = re.findall(r"`(?:[a-z]+\.)?([a-z_]+)` \(([\d.]+)( %)?\)", path.read_text(encoding="utf-8"))
    for name, number, percent in found:
        value = float(number) / 100 if percent else float(number)
        assert float(defaults[name]) == value, f"{path.name}: {name} is {defaults[name]} by default"


# --- commands ---------------------------------------------------------------------------------------------------------

SCRIPTS = {
    "train_sft.py": (SFTConfig, "stage1"),
    "train_grpo.py": (GRPOConfig, "stage2"),
    "evaluate.py": (EvalConfig, "eval"),
}


def parts_of(line):
    """The simple commands of a shell line, each as its words; also of what `bash -c` is given."""
    words = shlex.split(line.replace(";", " ; "), comments=True)
    part = []
    for word in [*words, ";"]:
        if word in (";", "&&"):
            yield part
            part = []
        elif " " in word and "torchrun" in word:
            yield from parts_of(word)
        else:
            part.append(word)


def commands(text, languages):
    """All simple commands of a page's blocks of code in these languages, each as its words."""
    found = []
    for language, block in re.findall(r"^```(\w*)\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
        if language in languages:
            for line in block.replace("\\\n", " ").splitlines():
                if re.match(r"(python3?|torchrun|srun|pip|git|cd|\.) ", line):
                    found.extend(part for part in parts_of(line) if part)
    return found


def config_of(words):
    """The config that a command of one of the three scripts names, with its overrides."""
    script = next(word for word in words if word in SCRIPTS)
    config_class, default = SCRIPTS[script]
    arguments = words[words.index(script) + 1 :]
    if arguments[:1] == ["--score"]:
        return config_from_argv(config_class, score_arguments(arguments[1], arguments[2:]), None)
    if arguments[:1] == ["--senses"]:
        arguments = arguments[1:]
    overrides = [word for word in arguments if "=" in word]
    paths = [word for word in arguments if "=" not in word] or [f"configs/toy/{default}.json"]
    assert len(paths) == 1, words
    return load_config(config_class, ROOT / paths[0], overrides)


@EACH_PAGE
def test_commands_name_what_there_is(path):
    if path.name in ("experiments.md", "recipes.md"):  # a log of earlier days; commands for a changed hov2, run below
        return
    text = path.read_text(encoding="utf-8")
    inline = [shlex.split(line) for line in re.findall(r"`((?:python|torchrun) [^`]+)`", text)]
    for words in commands(text, ("", "bash")) + inline:
        options = {word for word in words if word.startswith("--")}
        if set(words) & SCRIPTS.keys():
            if not options & {"--help", "--compare"}:
                config_of(words)
        elif words[:2] == ["python", "-m"] and words[2].startswith("hov2"):
            origin = Path(importlib.util.find_spec(words[2]).origin)
            sources = [origin, *origin.parent.glob("__main__.py")]
            source = "".join(file.read_text(encoding="utf-8") for file in sources)
            for option in options:
                assert f'"{option}"' in source, f"{path.name}: {words[2]} has no {option}"
            for word in words[3:]:
                assert not word.startswith("configs/") or (ROOT / word).exists(), f"{path.name}: no {word}"
        elif words[0] == "python":
            for word in words[1:]:
                named = re.match(r"(?:tests|docs|benchmarks)/[\w./]+", word)
                assert not named or (ROOT / named[0]).exists(), f"{path.name}: no {word}"


NOT_RUN = {  # the README's commands that the tests leave to others, with the reason
    "git clone URL hov2": "needs the network",
    "cd hov2": "belongs to it",
    "python3 -m venv .venv": "is what .ci/run does",
    ". .venv/bin/activate": "is what .ci/run does",
    "pip install -r requirements.txt": "is what .ci/run does, with the rest of requirements-dev.txt",
    "python -m hov2.toy": "is what .ci/run does, with --quick",
    "pip install -r requirements-dev.txt": "is what .ci/run does",
    "python -m pytest": "is what runs this",
}


def test_the_readme_is_one_page_and_its_commands_run(tmp_path):
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.encode()) <= 10_000
    ci = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    for command in ("python3 -m venv", "-r requirements-dev.txt", "python -m hov2.toy", "python -m pytest"):
        assert command in ci
    of_a_real_run = []
    for words in commands(text, ("bash",)):
        if words[0] == "torchrun":
            of_a_real_run.append(words)
        elif words[:3] == ["python", "-m", "hov2.tools.report"]:
            run_the_report(words, tmp_path)
        else:
            assert " ".join(words) in NOT_RUN, f"README.md: nothing runs {words}"
    follows_from_the_one_before(of_a_real_run)


def run_the_report(words, folder):
    """The command as it stands, in a folder where its run is one of the report's tests."""
    write_run(folder / words[3])
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, *words[1:]], cwd=folder, env=environment, check=True)
    assert "<html" in (folder / words[-1]).read_text(encoding="utf-8")


def follows_from_the_one_before(real_run):
    """The six commands need 8 GPUs and the published data; each has to find what those before it leave."""
    assert len(real_run) == 6
    made = set()
    for words in real_run:
        script = next(word for word in words if word in SCRIPTS)
        config = config_of(words)
        needed = {path for path in [config.model, *(source.path for source in config.data)] if path.startswith("runs/")}
        assert needed <= made, f"{words}: nothing before makes {needed - made}"
        if script == "evaluate.py":
            made.add(config.filter.output if config.filter else None)
        else:
            made.add(f"{config.output_dir}/model")


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
