"""`python -m hov2.toy`: the toy's three stages with an evaluation after each, or the ablations of the method on it."""

import argparse
import json
import shutil
import time

from hov2 import toy
from hov2.evaluation.results import table
from hov2.toy.ablation import ABLATION, STEPS, ablate, read_variants


def main():
    """Builds the world, runs the three stages with an evaluation after each, prints and writes what came out."""
    parser = argparse.ArgumentParser(prog="python -m hov2.toy", description="The whole method on synthetic clips.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="shorter: shows that everything runs, not that it learns")
    parser.add_argument("--no-judge-rewards", action="store_true", help="context and logic rewards weigh 0 in stage 2")
    parser.add_argument("--ablate", nargs="?", const=ABLATION, metavar="FILE",
                        help=f"instead: the variants of FILE, by default {ABLATION}, as a table and a figure")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of --ablate; default: 0 1 2")
    args = parser.parse_args()
    if args.ablate:
        return ablate(args.ablate, args.seeds, args.quick)
    started = time.monotonic()
    variant = read_variants(ABLATION)["no-judge-rewards" if args.no_judge_rewards else "full"]
    shutil.rmtree(toy.ROOT, ignore_errors=True)
    toy.build_world(seed=args.seed, **(toy.QUICK_WORLD if args.quick else {}))
    with toy.RuleJudge() as judge:
        for step, own in steps_of_run():
            print(f"\n=== {own.get('output_dir', step)} ===", flush=True)
            toy.run_script(step, toy.settings_of(step, variant, args.seed, args.quick, judge.url) | own)
    predictions = {stage: toy.read_predictions(toy.ROOT / stage / "eval/predictions.jsonl") for stage in toy.SCRIPTS}
    summary = {"seed": args.seed, "quick": args.quick, "judge_rewards": not args.no_judge_rewards,
               "stages": {stage: toy.scores_of(by_file["eval"]) for stage, by_file in predictions.items()},
               "swap": {sense: toy.swap_scores(predictions["stage3"], sense) for sense in toy.SENSES},
               "questions_left": {stage: len(path.read_text().splitlines()) for stage, path in toy.FILTERED.items()},
               "seconds": round(time.monotonic() - started, 1)}
    (toy.ROOT / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    print(format_summary(summary))


def steps_of_run():
    """Yields (step, its own settings): filters and stages, and after each stage an evaluation of its model.

    That of the last one is on the swapped clips too.
    """
    for step in STEPS[:-1]:
        yield step, {}
        if step in toy.SCRIPTS:
            files = toy.EVAL_FILES if step == "stage3" else toy.EVAL_FILES[:1]
            yield "eval", {"model": str(toy.ROOT / step / "model"), "output_dir": str(toy.ROOT / step / "eval"),
                           "data": [{"path": str(file)} for file in files]}


def format_summary(summary):
    """The summary as text: a row a stage, then the swap test."""
    rows = [("", *toy.SCORES, *toy.QUESTIONS)]
    for stage, row in summary["stages"].items():
        scores = [*(row[name] for name in toy.SCORES), *row["by_problem_type"].values()]
        rows.append((stage, *("-" if score is None else f"{score:.3f}" for score in scores)))
    questions = summary["stages"]["stage3"]["questions"]
    lines = [f"\ngreedy answers to {questions} held-out questions, {', '.join(toy.MAIN_TYPES)}", table(rows)]
    for sense, row in summary["swap"].items():
        lines.append(f"with the {sense} of a clip of the other kind: format {row['format']:.3f}, "
                     f"{row['changed_to_fit']:.3f} of {row['questions']} intent answers change to the one that fits")
    left = [f"{count} questions for {stage}" for stage, count in summary["questions_left"].items()]
    lines += [f"the difficulty filter left {', '.join(left)}", f"{summary['seconds']:.0f} s; details in {toy.ROOT}"]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
