"""Ablations: `python -m hov2.toy --ablate [FILE]` runs variants of the method on the toy, and draws what came out.

FILE (configs/toy/ablation.json if none is named) maps each variant's name to `what` it is, in words, to the `steps`
that it takes (default: STEPS, each a config in configs/toy) and, by step, to what it sets in that config. What seed and
settings make equal is run once: variants share every step up to the first that differs. Two steps run at a time, one
process and one core each: a step then takes two thirds of the processor time that it takes on two processes. Finished
steps are kept, so that an interrupted run goes on; after a change of other files than FILE, delete the folder.

In runs/toy_<FILE's name>: <that name>.json, .md (a table) and .svg (a figure), and a folder of all steps for each seed.
"""

import json
import shutil
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from html import escape
from pathlib import Path
from typing import Any

from hov2.evaluation.results import mean
from hov2.toy.rule_judge import RuleJudge
from hov2.toy.run import (
    QUICK_WORLD,
    STEPS,
    notes_on_figures,
    read_predictions,
    run_script,
    scores_of,
    settings_of,
)
from hov2.toy.world import CONFIGS, ROOT, build_world

ABLATION = str(CONFIGS / "ablation.json")
STYLE = """text { font: 12px sans-serif; fill: #222 } .axis { stroke: #bbb } .mark { stroke: #1f5fa8; fill: #1f5fa8 }
@media (prefers-color-scheme: dark) {
text { fill: #ddd } .axis { stroke: #555 } .mark { stroke: #7db4f0; fill: #7db4f0 } }"""

Variant = dict[str, Any]  # what, why, steps; {step: its settings}
Places = dict[str, Path]  # {step: its folder}
Columns = dict[str, list[float]]  # {measure: its value for each seed}


# ---------------------------------------------------------------------------------------------- running


def ablate(file: Path | str, seeds: list[int], quick: bool = False) -> None:
    """Run the variants of `file` for each of the seeds; write and print the table. SystemExit if a step fails."""
    started = time.monotonic()
    variants = read_variants(file)
    title = Path(file).stem
    root = Path(f"{ROOT}_{title}{'_quick' if quick else ''}")
    for seed in seeds:
        world = root / f"seed{seed}/world"
        if not (world / "world.json").exists():
            build_world(world, seed, **(QUICK_WORLD if quick else {}))

    places = {seed: step_folders(variants, root / f"seed{seed}") for seed in seeds}
    with RuleJudge() as judge:
        for step in STEPS:  # of all runs: each needs those before it
            run_steps(step, runs_with(step, variants, places), quick, judge.url)

    results = {}
    for name in variants:
        of_seeds = [measures_of(places[seed][name]["eval"]) for seed in seeds]
        results[name] = columns_of(of_seeds)
    seconds = round(time.monotonic() - started, 1)
    summary = {"seeds": seeds, "quick": quick, "seconds": seconds, "variants": variants, "results": results}

    rows = {variants[name].get("what", name): columns for name, columns in results.items()}
    table = "\n\n".join([as_table(rows, seeds), *notes_on_figures(quick)])
    (root / f"{title}.json").write_text(json.dumps(summary, indent=2) + "\n")
    (root / f"{title}.md").write_text(table + "\n")
    (root / f"{title}.svg").write_text(as_figure(rows) + "\n")
    print(f"\n{table}\n\n{seconds / 60:.0f} minutes; table and figure in {root}")


def read_variants(file: Path | str) -> dict[str, Variant]:
    """Read a file of variants, {name: variant}; SystemExit for a key or a step that there is not."""
    variants = json.loads(Path(file).read_text())
    known = ("what", "why", "steps", *STEPS)
    for name, variant in variants.items():
        for key in [*variant, *variant.get("steps", ())]:
            if key not in known:
                raise SystemExit(f"{file}: {name}: unknown key or step {key!r}; known: {', '.join(known)}")
    return variants


def step_folders(variants: dict[str, Variant], folder: Path) -> dict[str, Places]:
    """Return the folders of each variant's steps.

    A step's folder is in that of the first variant which has the same settings up to that step.
    """
    owners: dict[str, str] = {}  # {settings up to a step: the first variant that has them}
    folders = {}
    for name, variant in variants.items():
        places = {}
        for step in variant.get("steps", STEPS):
            owner = owners.setdefault(settings_until(variant, step), name)
            places[step] = folder / owner / step
        folders[name] = places
    return folders


def settings_until(variant: Variant, step: str) -> str:
    """Return what a variant sets in its steps up to `step`, as text."""
    steps = list(variant.get("steps", STEPS))
    so_far = steps[: steps.index(step) + 1]
    return json.dumps([(name, variant.get(name)) for name in so_far])


def runs_with(
    step: str, variants: dict[str, Variant], places: dict[int, dict[str, Places]]
) -> list[tuple[Places, Variant, int]]:
    """Return places, variant and seed of the runs that take a step, one of those that share the step's folder."""
    found = {}
    for seed, of_seed in places.items():
        for name, of_run in of_seed.items():
            if step in of_run:
                found.setdefault(of_run[step], (of_run, variants[name], seed))
    return list(found.values())


def run_steps(step: str, runs: list[tuple[Places, Variant, int]], quick: bool, judge_url: str) -> None:
    """Run a step of several runs, two at a time. After a failure none begins any more."""

    def run_one(run: tuple[Places, Variant, int]) -> None:
        places, variant, seed = run
        run_step(step, places, variant, seed, quick, judge_url)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(run_one, runs))  # the list asks for every result, so that a failure is raised here


def run_step(step: str, places: Places, variant: Variant, seed: int, quick: bool, judge_url: str) -> None:
    """Run configs/toy/{step}.json with what the variant sets; paths in runs/toy become those of `places`.

    Beside the step's folder: what it printed (.log) and, once it has ended, its settings (.done).
    """
    folder = places[step]
    key = settings_until(variant, step)
    log = folder.with_suffix(".log")
    done = folder.with_suffix(".done")
    if done.exists() and done.read_text() == key:
        return
    shutil.rmtree(folder, ignore_errors=True)
    done.unlink(missing_ok=True)
    folder.parent.mkdir(parents=True, exist_ok=True)

    config = json.loads((CONFIGS / f"{step}.json").read_text())
    settings = {option: config[option] for option in ("model", "output_dir", "data", "filter") if option in config}
    settings |= settings_of(step, variant, seed, quick, judge_url)
    text = json.dumps(settings)
    of_run = places | {"world": folder.parents[1] / "world"}
    for name, place in of_run.items():
        text = text.replace(f'"{ROOT / name}', f'"{place}')

    started = time.monotonic()
    try:
        with log.open("w") as output:
            run_script(step, json.loads(text), processes=1, output=output)
    except subprocess.CalledProcessError as error:
        raise SystemExit(f"{folder}: exit code {error.returncode}; {log} says why") from None
    done.write_text(key)
    print(f"{folder}: {time.monotonic() - started:.0f} s", flush=True)


# ---------------------------------------------------------------------------------------------- results


def measures_of(folder: Path) -> dict[str, float | None]:
    """Return {measure: value in [0, 1]} of an evaluation; the context score is None where no answer has a context."""
    predictions = read_predictions(folder / "predictions.jsonl")
    scores = scores_of(predictions)
    described = any("<context>" in (prediction["completion"] or "") for prediction in predictions)
    return {
        "accuracy": scores["accuracy"],
        "intents": scores["by_problem_type"]["multiple choice"],
        "voice fits face?": scores["by_problem_type"]["judge"],
        "context score": scores["context"] if described else None,
    }


def columns_of(of_seeds: list[dict[str, float | None]]) -> Columns:
    """Return {measure: its values over the seeds, without those that are unknown}."""
    columns = {}
    for name in of_seeds[0]:
        columns[name] = [measures[name] for measures in of_seeds if measures[name] is not None]
    return columns


def as_table(rows: dict[str, Columns], seeds: list[int]) -> str:
    """Return {variant: its columns} as markdown: the mean over the seeds, and the lowest to the highest."""
    titles = list(next(iter(rows.values())))
    lines = [["variant", *titles], ["---"] * (len(titles) + 1)]
    for name, columns in rows.items():
        lines.append([name, *(_spread(values) for values in columns.values())])
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"{table}\n\nMean over the seeds {', '.join(map(str, seeds))} (lowest to highest)."


def _spread(values: list[float]) -> str:
    """Return the mean of the values, and the lowest to the highest, as a cell of a table."""
    if not values:
        return "-"
    if len(values) == 1:
        return f"{values[0]:.3f}"
    return f"{mean(values):.3f} ({min(values):.3f} to {max(values):.3f})"


def as_figure(rows: dict[str, Columns], left: int = 270, width: int = 110, gap: int = 24, line: int = 26) -> str:
    """Return {variant: its columns} as SVG, with a panel from 0 to 1 for each measure.

    In it, a small tick is a seed; a line spans them all, with a tall tick at the mean.
    """
    titles = list(next(iter(rows.values())))
    parts = []
    for column, title in enumerate(titles):
        x = left + column * (width + gap)
        parts += [_text(x, 14, title), _text(x, 30, "0 to 1")]
        for row, (name, columns) in enumerate(rows.items()):
            y = 44 + line * row
            if column == 0:
                parts.append(_text(0, y + 4, escape(name)))
            parts.append(f'<path class="axis" d="M{x} {y}h{width}m0 -4v8m{-width} -8v8"/>')
            places = [x + width * value for value in columns[title]]
            if places:
                span = f"M{min(places):.1f} {y}H{max(places):.1f}M{mean(places):.1f} {y - 7}v14"
                ticks = "".join(f"M{place:.1f} {y - 3}v6" for place in places)
                parts.append(f'<path class="mark" d="{span}{ticks}"/>')
    size = f"{left + len(titles) * (width + gap)} {48 + line * len(rows)}"
    start = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="-8 -4 {size}">'
    return "\n".join([start, f"<style>{STYLE}</style>", *parts, "</svg>"])


def _text(x: int, y: int, words: str) -> str:
    return f'<text x="{x}" y="{y}">{words}</text>'
