"""Ablations: `python -m hov2.toy --ablate [FILE]` runs variants of the method on the toy, and draws what came out.

FILE (configs/toy/ablation.json if none is named) maps each variant's name to `what` it is, in words, to the `steps`
that it takes (default: STEPS, each a config in configs/toy) and, by step, to what it sets in that config. What seed and
settings make equal is run once: variants share every step up to the first that differs. Two steps run at a time, one
process and one core each: a step then takes two thirds of the processor time that it takes on two processes. Finished
steps are kept, so that an interrupted run goes on; after a change of other files than FILE, delete the folder.

In runs/toy_<FILE's name>: <that name>.json, .md (a table) and .svg (a figure), and a folder of all steps for each seed.
"""

import json
import re
import shutil
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from html import escape
from pathlib import Path

from hov2 import toy

ABLATION = str(toy.CONFIGS / "ablation.json")
STEPS = ("stage1", "filter_stage2", "stage2", "filter_stage3", "stage3", "eval")
STYLE = """text { font: 12px sans-serif; fill: #222 } .axis { stroke: #bbb } .mark { stroke: #1f5fa8; fill: #1f5fa8 }
@media (prefers-color-scheme: dark) {
text { fill: #ddd } .axis { stroke: #555 } .mark { stroke: #7db4f0; fill: #7db4f0 } }"""


def ablate(file, seeds, quick=False):
    """Runs the variants of `file` for each of the seeds; writes and prints the table. SystemExit if a step fails."""
    started, variants, name = time.monotonic(), read_variants(file), Path(file).stem
    root = Path(f"{toy.ROOT}_{name}{'_quick' if quick else ''}")
    for seed in seeds:
        make_world(root / f"seed{seed}/world", seed, quick)
    runs = {(seed, variant): places for seed in seeds
            for variant, places in step_folders(variants, root / f"seed{seed}").items()}
    with toy.RuleJudge() as judge, ThreadPoolExecutor(2) as pool:
        for number in range(len(STEPS)):  # the n-th steps of all runs: each needs those before it
            jobs = {}
            for (seed, variant), places in runs.items():
                for step in list(places)[number:number + 1]:
                    jobs[places[step]] = (step, places, variants[variant], seed, quick, judge.url)
            list(pool.map(lambda job: run_step(*job), jobs.values()))
    results = {variant: columns_of([measures_of(runs[seed, variant]["eval"]) for seed in seeds])
               for variant in variants}
    summary = {"seeds": seeds, "quick": quick, "seconds": round(time.monotonic() - started, 1), "variants": variants,
               "results": results}
    rows = {variants[variant].get("what", variant): columns for variant, columns in results.items()}
    texts = {"json": json.dumps(summary, indent=2), "md": as_table(rows, seeds), "svg": as_figure(rows)}
    for ending, text in texts.items():
        (root / f"{name}.{ending}").write_text(text + "\n")
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


def make_world(folder, seed, quick):
    """The world of a seed, unless it is there, and once more its cold start without the context block."""
    if not (folder / "world.json").exists():
        toy.build_world(folder, seed, **(toy.QUICK_WORLD if quick else {}))
    text = re.sub("<context>.*?</context>", "", (folder / "train_sft.json").read_text())
    (folder / "train_sft_no_context.json").write_text(text)


def run_step(step, places, variant, seed, quick, judge_url):
    """Runs configs/toy/{step}.json with what the variant sets; paths in runs/toy become those of `places`.

    Beside the step's folder: its config (.json), what it printed (.log) and, once it has ended, its settings (.done).
    """
    folder, key, config = places[step], settings_until(variant, step), (toy.CONFIGS / f"{step}.json").read_text()
    own, log, done = (folder.with_suffix(ending) for ending in (".json", ".log", ".done"))
    if done.exists() and done.read_text() == key:
        return
    shutil.rmtree(folder, ignore_errors=True)
    done.unlink(missing_ok=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    settings = {"seed": seed} | ({"judge.url": judge_url} if '"judge"' in config else {})
    if step == "eval":
        settings["data"] = [{"path": str(file)} for file in toy.EVAL_FILES]
    if quick and step in toy.QUICK_STEPS:
        settings["max_steps"] = toy.QUICK_STEPS[step]
    texts = [config, *(f"{name}={json.dumps(value)}" for name, value in (settings | variant.get(step, {})).items())]
    for name, place in (places | {"world": folder.parents[1] / "world"}).items():
        texts = [text.replace(f'"{toy.ROOT / name}', f'"{place}') for text in texts]
    own.write_text(texts[0])
    started = time.monotonic()
    try:
        with log.open("w") as output:
            toy.run_script(toy.SCRIPTS.get(step, "evaluate.py"), own, *texts[1:], processes=1, output=output)
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
    for name, columns in rows.items():
        spreads = [f" ({min(v):.3f} to {max(v):.3f})" if len(v) > 1 else "" for v in columns.values()]
        lines.append([name, *(f"{sum(v) / len(v):.3f}{spread}" if v else "-"
                              for v, spread in zip(columns.values(), spreads))])
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"{table}\n\nMean over the seeds {', '.join(map(str, seeds))} (lowest to highest)."


def as_figure(rows, left=270, width=110, gap=24, line=26):
    """The same as SVG: a panel from 0 to 1 a measure; a dot a seed, a line over all of them, a tick at their mean."""
    text, titles = '<text x="{}" y="{}" text-anchor="{}">{}</text>'.format, list(next(iter(rows.values())))
    parts = [text(0, 48 + line * row, "start", escape(name)) for row, name in enumerate(rows)]
    for column, title in enumerate(titles):
        x = left + column * (width + gap)
        parts += [text(x, 14, "start", title), text(x, 30, "start", 0), text(x + width, 30, "end", 1)]
        for row, columns in enumerate(rows.values()):
            y, places = 44 + line * row, [x + width * value for value in columns[title]]
            parts.append(f'<path class="axis" d="M{x} {y}h{width}m0 -4v8m{-width} -8v8"/>')
            parts += [f'<circle class="mark" cx="{place:.1f}" cy="{y}" r="2.5"/>' for place in places]
            if places:
                mean = sum(places) / len(places)
                parts.append(f'<path class="mark" d="M{min(places):.1f} {y}H{max(places):.1f}M{mean:.1f} {y - 7}v14"/>')
    full, height = left + len(titles) * (width + gap), 48 + line * len(rows)
    return "\n".join([f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="-8 -4 {full} {height}">',
                      f"<style>{STYLE}</style>", *parts, "</svg>"])
