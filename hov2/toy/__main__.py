"""`python -m hov2.toy`: the toy's three stages with an evaluation after each, or the ablations of the method on it."""

import argparse
import json
import time
from collections.abc import Iterator
from typing import Any

from hov2.evaluation.results import table
from hov2.evaluation.senses import format_senses
from hov2.toy.ablation import ABLATION, ablate, read_variants
from hov2.toy.rule_judge import RuleJudge
from hov2.toy.run import (
    FILTERED,
    QUICK_NOTE,
    QUICK_WORLD,
    SCORES,
    SCRIPTS,
    STEPS,
    SUMMARY,
    Settings,
    notes_on_figures,
    read_predictions,
    run_script,
    scores_of,
    set_earlier_run_aside,
    settings_of,
)
from hov2.toy.world import MAIN_TYPES, QUESTIONS, ROOT, build_world


def main() -> None:
    """Do what the command line asks for."""
    args = read_arguments()
    if args.quick:
        print(QUICK_NOTE, flush=True)
    if args.ablate:
        ablate(args.ablate, args.seeds, args.quick)
    else:
        run_stages(args.seed, args.quick, judge_rewards=not args.no_judge_rewards)


def read_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m hov2.toy", description="The whole method on synthetic clips.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="shorter: shows that everything runs, not that it learns")
    parser.add_argument("--no-judge-rewards", action="store_true", help="context and logic rewards weigh 0 in stage 2")
    parser.add_argument(
        "--ablate",
        nargs="?",
        const=ABLATION,
        metavar="FILE",
        help=f"instead: the variants of FILE, by default {ABLATION}, as a table and a figure",
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of --ablate; default: 0 1 2")
    return parser.parse_args()


def run_stages(seed: int, quick: bool, judge_rewards: bool) -> None:
    """Build the world, run the three stages with an evaluation after each, print and write what came out."""
    started = time.monotonic()
    variant = read_variants(ABLATION)["full" if judge_rewards else "no-judge-rewards"]
    set_earlier_run_aside()
    build_world(seed=seed, **(QUICK_WORLD if quick else {}))
    with RuleJudge() as judge:
        for step, own in steps_of_run():
            print(f"\n=== {own.get('output_dir', step)} ===", flush=True)
            run_script(step, settings_of(step, variant, seed, quick, judge.url) | own)

    predictions = {stage: read_predictions(ROOT / stage / "eval/predictions.jsonl") for stage in SCRIPTS}
    senses = json.loads((ROOT / "stage3/eval/senses.json").read_text())
    summary = {
        "seed": seed,
        "quick": quick,
        "judge_rewards": judge_rewards,
        "stages": {stage: scores_of(of_stage) for stage, of_stage in predictions.items()},
        "senses": senses,
        "questions_left": {stage: len(path.read_text().splitlines()) for stage, path in FILTERED.items()},
        "seconds": round(time.monotonic() - started, 1),
    }
    SUMMARY.write_text(json.dumps(summary, indent=2) + "\n")
    print(format_summary(summary))


def steps_of_run() -> Iterator[tuple[str, Settings]]:
    """Yield each step and its own settings: filters and stages, and after each stage an evaluation of its model.

    That of the last one is with either sense alone, too.
    """
    for step in STEPS[:-1]:
        yield step, {}
        if step in SCRIPTS:
            folder = ROOT / step
            evaluation = "senses" if step == "stage3" else "eval"
            yield evaluation, {"model": str(folder / "model"), "output_dir": str(folder / "eval")}


def format_summary(summary: dict[str, Any]) -> str:
    """Return the summary as text: a row for each stage, then what the last one's model can tell by either sense."""
    questions = summary["stages"]["stage3"]["questions"]
    rows = [("", *SCORES, *QUESTIONS)]
    for stage, row in summary["stages"].items():
        scores = [row[name] for name in SCORES]
        scores += row["by_problem_type"].values()
        cells = ["-" if score is None else f"{score:.3f}" for score in scores]
        rows.append((stage, *cells))
    lines = [f"\ngreedy answers to {questions} held-out questions, {', '.join(MAIN_TYPES)}", table(rows)]
    lines += notes_on_figures(summary["quick"])

    lines += ["", "after stage 3, with a clip's picture and sound, with its picture alone, with its sound alone"]
    lines.append(format_senses(summary["senses"]))
    left = [f"{count} questions for {stage}" for stage, count in summary["questions_left"].items()]
    lines.append(f"the difficulty filter left {', '.join(left)}")
    lines.append(f"{summary['seconds']:.0f} s; details in {ROOT}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
