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

from hov2 import toy
from hov2.evaluation.results import mean

ABLATION = str(toy.CONFIGS / "ablation.json")
STEPS = ("stage1", "filter_stage2", "stage2", "filter_stage3", "stage3", "eval")
STYLE = """text { font: 12px sans-serif; fill: #222 } .axis { stroke: #bbb } .mark { stroke: #1f5fa8; fill: #1f5fa8 }
@media (prefers-color-scheme: dark) {
text { fill: #ddd } .axis { stroke: #555 } .mark { stroke: #7db4f0; fill: #7db4f0 } }"""


def ablate(file, seeds, quick=False):
    """Runs the variants of `file` for each of the seeds; writes and prints the table. SystemExit if a step fails."""
    started, variants, title = time.monotonic(), read_variants(file), Path(file).stem
    root = Path(f"{toy.ROOT}_{title}{'_quick' if quick else ''}")
    for seed in seeds:
        if not (root / f"seed{seed}/world/world.json").exists():
            toy.build_world(root / f"seed{seed}/world", seed, **(toy.QUICK_WORLD if quick else {}))
    runs = {(seed, name): places for seed in seeds
            for name, places in step_folders(variants, root / f"seed{seed}").items()}
    with toy.RuleJudge() as judge, ThreadPoolExecutor(2) as pool:
        for step in STEPS:  # of all runs: each needs those before it
            jobs = {places[step]: (step, places, variants[name], seed, quick, judge.url)
                    for (seed, name), places in runs.items() if step in places}
            list(pool.map(lambda job: run_step(*job), jobs.values()))
    results = {name: columns_of([measures_of(runs[seed, name]["eval"]) for seed in seeds]) for name in variants}
    summary = {"seeds": seeds, "quick": quick, "seconds": round(time.monotonic() - started, 1), "variants": variants,
               "results": results}
    rows = {variants[name].get("what", name): columns for name, columns in results.items()}
    texts = {"json": json.dumps(summary, indent=2), "md": as_table(rows, seeds), "svg": as_figure(rows)}
    for ending, text in texts.items():
        (root / f"{title}.{ending}").write_text(text + "\n")
    print(f"\n{texts['md']}\n\n{summary['seconds'] / 60:.0f} minutes; table and figure in {root}")


def read_variants(file):
    """{name: variant} of a file of variants; SystemExit for a key or a step that there is not."""
    variants, known = json.loads(Path(file).read_text()), ("what", "why", "steps", *STEPS)
    for name, variant in variants.items():
        if unknown := [key for key in [*variant, *variant.get("steps", ())] if key not in known]:
            raise SystemExit(f"{file}: {name}: unknown key or step {unknown[0]!r}; known: {', '.join(known)}")
    return variants


def step_folders(variants, folder):
    """{variant: {step: its folder}}: the folder of the first variant that has the same settings up to that step."""
    first = {}
    return {name: {step: folder / first.setdefault(settings_until(variant, step), name) / step
                   for step in variant.get("steps", STEPS)} for name, variant in variants.items()}


def settings_until(variant, step):
    """What a variant sets in its steps up to `step`, as text."""
    steps = list(variant.get("steps", STEPS))
    return json.dumps([(name, variant.get(name)) for name in steps[:steps.index(step) + 1]])


def run_step(step, places, variant, seed, quick, judge_url):
    """Runs configs/toy/{step}.json with what the variant sets; paths in runs/toy become those of `places`.

    Beside the step's folder: what it printed (.log) and, once it has ended, its settings (.done).
    """
    folder, key = places[step], settings_until(variant, step)
    log, done = folder.with_suffix(".log"), folder.with_suffix(".done")
    if done.exists() and done.read_text() == key:
        return
    shutil.rmtree(folder, ignore_errors=True)
    done.unlink(missing_ok=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    config = json.loads((toy.CONFIGS / f"{step}.json").read_text())
    named = {option: config[option] for option in ("model", "output_dir", "data", "filter") if option in config}
    text = json.dumps(named | toy.settings_of(step, variant, seed, quick, judge_url))
    for name, place in (places | {"world": folder.parents[1] / "world"}).items():
        text = text.replace(f'"{toy.ROOT / name}', f'"{place}')
    started = time.monotonic()
    try:
        with log.open("w") as output:
            toy.run_script(step, json.loads(text), processes=1, output=output)
    except subprocess.CalledProcessError as error:
        raise SystemExit(f"{folder}: exit code {error.returncode}; {log} says why") from None
    done.write_text(key)
    print(f"{folder}: {time.monotonic() - started:.0f} s", flush=True)


def measures_of(folder):
    """{measure: value in [0, 1]} of an evaluation; the context score is None where no answer has a context."""
    predictions = toy.read_predictions(folder / "predictions.jsonl")
    scores = toy.scores_of(predictions["eval"])
    described = any("<context>" in (p["completion"] or "") for p in predictions["eval"])
    return {"accuracy": scores["accuracy"], "intents": scores["by_problem_type"]["multiple choice"],
            "voice fits face?": scores["by_problem_type"]["judge"],
            "context score": scores["context"] if described else None,
            **{f"follows the {sense}": toy.swap_scores(predictions, sense)["changed_to_fit"] for sense in toy.SENSES}}


def columns_of(of_seeds):
    """{measure: its values over the seeds, without those that are unknown}."""
    return {name: [measures[name] for measures in of_seeds if measures[name] is not None] for name in of_seeds[0]}


def as_table(rows, seeds):
    """{variant: {measure: values}} as markdown: the mean over the seeds, and the lowest to the highest."""
    titles = list(next(iter(rows.values())))
    lines = [["variant", *titles], ["---"] * (len(titles) + 1)]
    lines += [[name, *map(_spread, columns.values())] for name, columns in rows.items()]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"{table}\n\nMean over the seeds {', '.join(map(str, seeds))} (lowest to highest)."


def _spread(values):
    if len(values) < 2:
        return f"{values[0]:.3f}" if values else "-"
    return f"{mean(values):.3f} ({min(values):.3f} to {max(values):.3f})"


def as_figure(rows, left=270, width=110, gap=24, line=26):
    """The same as SVG: a panel from 0 to 1 a measure; a small tick a seed, a line over all, a tall tick at the mean."""
    text, parts = '<text x="{}" y="{}">{}</text>'.format, []
    for column, title in enumerate(next(iter(rows.values()))):
        x = left + column * (width + gap)
        parts += [text(x, 14, title), text(x, 30, "0 to 1")]
        for row, (name, columns) in enumerate(rows.items()):
            y, places = 44 + line * row, [x + width * value for value in columns[title]]
            parts += [text(0, y + 4, escape(name)) if column == 0 else "",
                      f'<path class="axis" d="M{x} {y}h{width}m0 -4v8m{-width} -8v8"/>']
            if places:
                ticks = "".join(f"M{place:.1f} {y - 3}v6" for place in places)
                span = f"M{min(places):.1f} {y}H{max(places):.1f}M{mean(places):.1f} {y - 7}v14"
                parts.append(f'<path class="mark" d="{span}{ticks}"/>')
    size = f"{left + len(columns) * (width + gap)} {48 + line * len(rows)}"
    return "\n".join([f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="-8 -4 {size}">', f"<style>{STYLE}</style>",
                      *parts, "</svg>"])
