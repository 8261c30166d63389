"""`python -m hov2.toy`: the toy's three stages with an evaluation after each, or the ablations of the method on it."""

import argparse
import json
import shutil
import time

from hov2 import toy
from hov2.toy.ablation import ABLATION, ablate


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
    started, predictions = time.monotonic(), {}
    shutil.rmtree(toy.ROOT, ignore_errors=True)
    toy.build_world(seed=args.seed, **(toy.QUICK_WORLD if args.quick else {}))
    with toy.RuleJudge() as judge:
        for stage in toy.SCRIPTS:
            predictions[stage] = run_stage(stage, args, judge.url)
    summary = {"seed": args.seed, "quick": args.quick, "judge_rewards": not args.no_judge_rewards,
               "stages": {stage: toy.scores_of(by_file["eval"]) for stage, by_file in predictions.items()},
               "swap": {sense: toy.swap_scores(predictions["stage3"], sense) for sense in toy.SENSES},
               "questions_left": {stage: len(path.read_text().splitlines()) for stage, path in toy.FILTERED.items()},
               "seconds": round(time.monotonic() - started, 1)}
    (toy.ROOT / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    print(format_summary(summary))


def run_stage(stage, args, judge_url):
    """Filters, trains and evaluates, after the last stage on the swapped clips too; returns the predictions."""
    common = [f"seed={args.seed}"] + ([f"judge.url={judge_url}"] if stage != "stage1" else [])
    overrides = [f"max_steps={toy.QUICK_STEPS[stage]}"] if args.quick else []
    if stage == "stage2" and args.no_judge_rewards:
        overrides += ["reward_weights.context=0", "reward_weights.logic=0"]
    if stage in toy.FILTERED:
        print(f"\n=== {stage}: the difficulty filter ===", flush=True)
        toy.run_script("evaluate.py", f"filter_{stage}", *common)
    print(f"\n=== {stage}: {toy.SCRIPTS[stage]} ===", flush=True)
    toy.run_script(toy.SCRIPTS[stage], stage, *common, *overrides)
    folder, files = toy.ROOT / stage, toy.EVAL_FILES if stage == "stage3" else toy.EVAL_FILES[:1]
    data = json.dumps([{"path": str(file)} for file in files])
    print(f"\n=== {stage}: evaluate.py ===", flush=True)
    toy.run_script("evaluate.py", "eval", f"seed={args.seed}", f"judge.url={judge_url}", f"model={folder / 'model'}",
                   f"data={data}", f"output_dir={folder / 'eval'}")
    return toy.read_predictions(folder / "eval/predictions.jsonl")


def format_summary(summary):
    """The summary as text: a row a stage, then the swap test."""
    kinds = [*toy.MAIN_TYPES, *toy.OTHER_TYPES]
    lines = ["", f"greedy answers to {summary['stages']['stage3']['questions']} held-out questions of the main types",
             f"{'':8}{'accuracy':>9}{'format':>8}{'context':>9} |" + "".join(f"{kind:>17}" for kind in toy.MAIN_TYPES)
             + " |" + "".join(f"{kind:>11}" for kind in toy.OTHER_TYPES)]
    for stage, row in summary["stages"].items():
        cells = [f"{row['by_problem_type'][kind]:>{17 if kind in toy.MAIN_TYPES else 11}.3f}" for kind in kinds]
        lines.append(f"{stage:8}{row['accuracy']:>9.3f}{row['format']:>8.3f}{row['context']:>9.3f} |"
                     + "".join(cells[:3]) + " |" + "".join(cells[3:]))
    for sense, row in summary["swap"].items():
        lines.append(f"with the {sense} of a clip of the other kind: format {row['format']:.3f}, "
                     f"{row['changed_to_fit']:.3f} of {row['questions']} intent answers change to the one that fits")
    left = [f"{count} questions for {stage}" for stage, count in summary["questions_left"].items()]
    lines.append(f"the difficulty filter left {', '.join(left)}")
    lines.append(f"{summary['seconds']:.0f} s; details in {toy.ROOT}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
