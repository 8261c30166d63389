"""Whole runs of train_sft.py and train_grpo.py: 1 process equals 2, accumulation one batch, resume going on."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.support.helpers import synth_clip, tiny_thinker, tiny_tokenizer

ROOT = Path(__file__).resolve().parent.parent
STEPS = 3


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """A folder with a tiny model, clips, data and configs, and the runs that the tests compare."""
    lab = tmp_path_factory.mktemp("lab")
    tiny_thinker(layers=2).save_pretrained(lab / "model")
    tiny_tokenizer().save_pretrained(lab / "model")
    write_data(lab)
    base = {
        "model": str(lab / "model"),
        "data": [{"path": str(lab / "data.jsonl")}],
        "output_dir": "",
        "max_steps": STEPS,
        "num_train_epochs": 2,
        "learning_rate": 1e-4,
        "media": {"fps": 4, "max_frames": 4},
        "prompts": None,
    }
    grpo = base | {
        "prompts_per_step": 4,
        "num_generations": 4,
        "num_iterations": 2,
        "max_completion_length": 10,
        "top_k": 0,
        "reward_weights": {"format": 1.0, "accuracy": 1.0, "context": 1.0},
        "judge": {"url": "http://stand-in"},
    }
    (lab / "sft.json").write_text(json.dumps(base | {"samples_per_step": 4}))
    (lab / "grpo.json").write_text(json.dumps(grpo))
    (lab / "broken.mp4").write_bytes(b"no clip")
    write_data(lab, "held_out.jsonl", broken=5)
    evaluation = {
        "model": base["model"],
        "output_dir": "",
        "data": [{"path": str(lab / "held_out.jsonl")}],
        "media": base["media"],
        "max_completion_length": 6,
        "batch_size": 3,
    }
    (lab / "eval.json").write_text(json.dumps(evaluation))
    launch(lab, 1, single_process_runs(lab))
    killed_after_two_steps(lab, "dapo-1", "1-to-2")
    launch(
        lab,
        2,
        [
            run(lab, "eval", "eval-2"),
            run(lab, "sft", "sft-2"),
            run(lab, "grpo", "1-to-2", "resume=auto"),
            *(run(lab, "grpo", f"{kind}-2", f"loss_type={kind}", "save_steps=1") for kind in LOSSES),
        ],
    )
    return lab


LOSSES = ("dapo", "grpo", "dr_grpo")


def single_process_runs(lab):
    held_out = json.dumps([{"path": str(lab / "held_out.jsonl")}])
    runs = [
        run(lab, "eval", "eval-1"),
        run(lab, "sft", "held-out", f"eval_data={held_out}", "eval_steps=2", "eval_max_completion_length=6"),
        run(lab, "sft", "sft-1"),
        run(lab, "sft", "sft-batch", "prompts_per_forward=4"),
        run(lab, "sft", "sft-prompt", "train_on_prompt=true", "max_steps=1"),
    ]
    for kind in LOSSES:
        runs.append(run(lab, "grpo", f"{kind}-1", f"loss_type={kind}", "save_steps=1"))
        runs.append(run(lab, "grpo", f"{kind}-batch", f"loss_type={kind}", "prompts_per_forward=3"))
    runs.append(
        run(
            lab,
            "grpo",
            "switches",
            "beta=0.0",
            "scale_rewards=true",
            "judged_advantage=full",
            "span=before_tag",
            "max_steps=1",
            "gate_threshold=0.4",
        )
    )
    runs.append(run(lab, "grpo", "masked", "mask_truncated_completions=true", "max_steps=1", "max_completion_length=1"))
    runs.append(run(lab, "grpo", "dapo-chunks", "completions_per_forward=3", "profile_steps=[1]"))
    runs.append(run(lab, "grpo", "counted", "max_steps=1", "num_iterations=1", "prompts_per_forward=2"))
    runs.append(run(lab, "grpo", "zero-beta-counted", "max_steps=1", "beta=0.0"))
    return runs


def run(lab, script, name, *overrides):
    """One entry of train_runs.py's list, writing to lab/name."""
    return [script, str(lab / f"{script}.json"), [f"output_dir={lab / name}", *overrides]]


def launch(lab, processes, runs):
    """Runs them all under torchrun (or plainly, for one process); a failure shows the output."""
    (lab / "runs.json").write_text(json.dumps(runs))
    launcher = (
        [sys.executable]
        if processes == 1
        else [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    )
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [*launcher, str(ROOT / "tests" / "support" / "train_runs.py"), str(lab / "runs.json")],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return done.stdout


def write_data(lab, name="data.jsonl", broken=None):
    """Eight samples: clips with and without sound, an image, text; the clip of sample number `broken` can't be read."""
    records = []
    for i in range(8):
        kind = ("video", "video", "image", "text")[i % 4]
        record = {
            "id": f"s{i}",
            "problem": "What does the speaker intend?" + " Well?" * i,
            "problem_type": "multiple choice",
            "options": ["A. joke", "B. threat"],
            "data_type": kind,
            "solution": f"<context>A man smiles {i}.</context><think>He is joking.</think>"
            f"<answer>{'AB'[i % 2]}</answer>",
        }
        if kind == "video":
            synth_clip(lab / f"{i}.mp4", sound=i % 4 == 0, seed=i)
            record["path"] = "broken.mp4" if i == broken else f"{i}.mp4"
        if kind == "image":
            record["path"] = Path(synth_clip(lab / f"{i}.png", seed=i)).name
        records.append(record)
    (lab / name).write_text("".join(json.dumps(r) + "\n" for r in records))


def metrics(lab, name):
    """The run's lines of metrics.jsonl, without what depends on the clock."""
    lines = [json.loads(line) for line in (lab / name / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.startswith("time/")} for line in lines]


def assert_same_run(lab, a, b, relative=1e-4):
    """Equal metrics and weights, up to float32's rounding in another order of summation."""
    first, second = metrics(lab, a), metrics(lab, b)
    assert len(first) == len(second) == STEPS and first[0].keys() == second[0].keys()
    for x, y in zip(first, second):
        for name in x:
            assert y[name] == pytest.approx(x[name], rel=relative, abs=2e-6), (x["step"], name)
    before = load_file(lab / "model" / "model.safetensors")
    mine, theirs = (load_file(lab / name / "model" / "model.safetensors") for name in (a, b))
    moved = max((mine[key] - before[key]).abs().max() for key in mine)
    assert moved > 1e-5, "training changed nothing"
    for key in mine:
        assert (mine[key] - theirs[key]).abs().max() <= 0.05 * moved, key


@pytest.mark.parametrize("kind", LOSSES)
def test_two_processes_equal_one(lab, kind):
    assert_same_run(lab, f"{kind}-1", f"{kind}-2")
    assert max(abs(line["loss"]) for line in metrics(lab, f"{kind}-1")) > 1e-3
    assert max(line["kl"] for line in metrics(lab, f"{kind}-1")) > 0


@pytest.mark.parametrize("kind", LOSSES)
def test_accumulation_equals_one_batch(lab, kind):
    assert_same_run(lab, f"{kind}-1", f"{kind}-batch")


def test_completions_in_chunks_equal_all_at_once(lab):
    assert_same_run(lab, "dapo-1", "dapo-chunks")


def test_a_profiled_step_leaves_a_trace_with_its_parts(lab):
    assert [path.name for path in (lab / "dapo-chunks").glob("trace-*")] == ["trace-1-rank0.json"]
    events = json.loads((lab / "dapo-chunks" / "trace-1-rank0.json").read_text())["traceEvents"]
    assert {"rollout", "logps", "update"} <= {event["name"] for event in events}
    assert any(event["name"].startswith("aten::") for event in events)


def test_nothing_is_computed_twice_in_a_step(lab):
    counts = json.loads((lab / "counted" / "counts.json").read_text())
    prompts, completions = map(sum, zip(*next(value for name, value in counts if name == "items_of_step")))
    assert [value for name, value in counts if name == "_prefill"] == [prompts]  # each prompt once
    of_towers = [[value for name, value in counts if name == tower] for tower in ("_visual", "_audio")]
    assert len(of_towers[0]) == len(of_towers[1]) == 4 and sum(of_towers[0]) > 0  # once for each of the step's prompts
    rows = [value for name, value in counts if name == "decode"]
    assert len(rows) == 4 and sum(rows) == 2 * (prompts + completions)  # two batches: the reference's, the update's
    logps = [value for name, value in counts if name == "chunked_token_logps"]
    assert sum(logps) == 2 * completions  # none of prompt tokens


def test_the_judge_works_while_the_reference_does(lab):
    names = [name for name, _ in json.loads((lab / "counted" / "counts.json").read_text())]
    last_asked = len(names) - 1 - names[::-1].index("submit")
    assert last_asked < names.index("decode") < names.index("wait_for_scores")


def test_without_kl_there_is_no_reference(lab):
    counts = json.loads((lab / "zero-beta-counted" / "counts.json").read_text())
    assert [value for name, value in counts if name == "load_reference"] == [False]
    assert len([1 for name, _ in counts if name == "decode"]) == 2 * 4  # two iterations over four batches, no more


def test_sft_is_the_same_however_it_is_split(lab):
    assert_same_run(lab, "sft-1", "sft-2")
    assert_same_run(lab, "sft-1", "sft-batch")


def test_frozen_towers_stay_as_they_were(lab):
    before, after = (load_file(lab / name / "model.safetensors") for name in ("model", "dapo-1/model"))
    for key in before:
        if key.startswith(("visual.", "audio_tower.")):
            assert (before[key] == after[key]).all(), key
    assert any((before[key] != after[key]).any() for key in before)


def killed_after_two_steps(lab, name, copy):
    """A copy of a run as if it had been killed after two steps; what it saved after the second can't be used."""
    shutil.copytree(lab / name, lab / copy)
    for folder in ("checkpoint-3", "model"):
        shutil.rmtree(lab / copy / folder)
    data = lab / copy / "checkpoint-2" / "__0_0.distcp"  # of two ranks, the second looks at this file
    data.write_bytes(data.read_bytes()[:-1] + b"?")


@pytest.fixture(scope="module")
def resumed(lab):
    """Runs that go on from their first step, on one process; what was printed."""
    killed_after_two_steps(lab, "dapo-1", "resumed")
    killed_after_two_steps(lab, "dapo-2", "2-to-1")
    return launch(lab, 1, [run(lab, "grpo", name, "save_steps=1", "resume=auto") for name in ("resumed", "2-to-1")])


def test_resumed_run_equals_uninterrupted_one(lab, resumed):
    assert f"warning: {lab / 'resumed' / 'checkpoint-2'} is passed over: __0_0.distcp is not as" in resumed
    assert f"resumed from {lab / 'resumed' / 'checkpoint-1'}" in resumed
    assert metrics(lab, "resumed") == metrics(lab, "dapo-1")
    a, b = (load_file(lab / name / "model" / "model.safetensors") for name in ("dapo-1", "resumed"))
    assert all((a[key] == b[key]).all() for key in a)
    dumps = [(lab / name / "rollouts.jsonl").read_text() for name in ("dapo-1", "resumed")]
    assert dumps[0] == dumps[1]


@pytest.mark.parametrize("before, after", [("dapo-1", "1-to-2"), ("dapo-2", "2-to-1")])
def test_resumed_on_another_number_of_processes_the_run_is_the_same(lab, resumed, before, after):
    def sampled(name):
        lines = [json.loads(line) for line in (lab / name / "rollouts.jsonl").read_text().splitlines()]
        return [(line["step"], line["sample"], [c["token_ids"] for c in line["completions"]]) for line in lines]

    assert_same_run(lab, before, after)
    assert (lab / after / "earlier-1" / "checkpoint-2").exists()
    assert sampled(before) == sampled(after) and len(sampled(after)) == STEPS * 4
    for x, y in zip(metrics(lab, before), metrics(lab, after)):
        assert abs(x["loss"] - y["loss"]) < 1e-5


def test_dump_holds_every_token_with_its_credit(lab):
    records = [json.loads(line) for line in (lab / "dapo-1" / "rollouts.jsonl").read_text().splitlines()]
    assert len(records) == STEPS * 4
    for record in records:
        assert record["sample"].startswith("s") and len(record["completions"]) == 4
        for completion in record["completions"]:
            n = len(completion["token_ids"])
            assert completion["token_ends"][-1] == len(completion["text"])
            assert {len(values) for values in completion["tokens"].values()} == {n}
            assert {
                "logp",
                "old_logp",
                "ref_logp",
                "ratio",
                "kl",
                "clipped",
                "credit/completion",
                "credit/context",
            } <= completion["tokens"].keys()
    full = [c["tokens"]["credit/completion"][0] for c in records[0]["completions"]]
    assert abs(sum(full)) < 1e-4 and max(full) > 0  # rewards minus their mean


def test_train_on_prompt_counts_the_prompts_text_too(lab):
    assert metrics(lab, "sft-prompt")[0]["tokens"] > metrics(lab, "sft-1")[0]["tokens"] + 40


def test_other_switches_run(lab):
    line = metrics(lab, "switches")[0]
    assert line["kl"] == 0 and line["beta"] == 0 and line["rewards/context/mean"] is not None and line["loss"] != 0


def test_masked_truncated_completions_teach_nothing(lab):
    line = metrics(lab, "masked")[0]
    assert line["completions/clipped_ratio"] == 1 and line["kl"] is None
    assert line["loss"] == 0 and line["grad_norm"] == 0


def test_export_loads_in_transformers(lab):
    from transformers import AutoTokenizer, Qwen2_5OmniThinkerForConditionalGeneration

    model = Qwen2_5OmniThinkerForConditionalGeneration.from_pretrained(lab / "dapo-1" / "model")
    saved = load_file(lab / "dapo-1" / "model" / "model.safetensors")
    assert (model.lm_head.weight == saved["lm_head.weight"]).all()
    assert AutoTokenizer.from_pretrained(lab / "dapo-1" / "model").convert_tokens_to_ids("<|im_end|>") is not None


def test_evaluation_is_the_same_on_two_processes(lab):
    one, two = ((lab / name / "predictions.jsonl").read_text() for name in ("eval-1", "eval-2"))
    assert one == two
    records = [json.loads(line) for line in one.splitlines()]
    assert [r["id"] for r in records] == [f"s{i}" for i in range(8)]
    assert all(r["truncated"] and r["no_answer"] and r["format"] == 0 for r in records if not r["error"])


def test_an_unreadable_clip_costs_one_question_and_is_named(lab):
    records = [json.loads(line) for line in (lab / "eval-1" / "predictions.jsonl").read_text().splitlines()]
    assert [r["id"] for r in records if r["error"]] == ["s5"]
    assert "broken.mp4" in records[5]["error"] and records[5]["accuracy"] is None
    results = json.loads((lab / "eval-1" / "results.json").read_text())
    assert (results["questions"], results["unreadable"], results["no_answer"], results["accuracy"]) == (8, 1, 7, 0.0)


def test_held_out_questions_are_asked_on_time_and_the_best_kept(lab):
    lines = metrics(lab, "held-out")
    assert ["eval/accuracy" in line for line in lines] == [False, True, True]  # every 2 steps, and after the last
    assert lines[1]["eval/unreadable"] == 1
    best, final = (load_file(lab / "held-out" / name / "model.safetensors") for name in ("best", "model"))
    assert best.keys() == final.keys()
    assert (best["lm_head.weight"] != final["lm_head.weight"]).any()  # of equals, the first is kept


BAD_INPUT = {
    "unknown key 'num_generation'; did you mean 'num_generations'?": ["num_generation=4"],
    "no judge at http://127.0.0.1:9/v1": ["judge.url=http://127.0.0.1:9/v1", "judge.max_retries=0"],
    "nowhere/at/all: no such folder": ["model=nowhere/at/all"],
    "nowhere.jsonl: no such data file": ['data=[{"path": "nowhere.jsonl"}]'],
}


def test_bad_input_ends_a_script_with_one_clear_line(lab):
    without_judge = ["judge=null", 'reward_weights={"format": 1, "accuracy": 1}']
    processes = {}  # all at once, since most of their time goes into imports
    for number, (message, overrides) in enumerate(BAD_INPUT.items()):
        command = [sys.executable, "train_grpo.py", str(lab / "grpo.json"), f"output_dir={lab / 'bad'}-{number}"]
        command += overrides if "judge" in message else [*overrides, *without_judge]
        processes[message] = subprocess.Popen(
            command,
            cwd=ROOT,
            env=os.environ | {"HF_HUB_OFFLINE": "1"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
    for message, process in processes.items():
        stderr = process.communicate(timeout=120)[1]
        errors = [line for line in stderr.splitlines() if line.startswith("error: ")]
        assert process.returncode == 1 and len(errors) == 1 and message in errors[0] and "Traceback" not in stderr


@pytest.mark.docs
@pytest.mark.parametrize("name", ["dapo-1", "held-out"])
def test_every_metric_is_documented(lab, name):
    text = (ROOT / "docs" / "metrics.md").read_text()
    metrics = [json.loads(line) for line in (lab / name / "metrics.jsonl").read_text().splitlines()]
    for key in set().union(*metrics) - {"step"}:
        general = re.sub(r"^rewards/\w+/", "rewards/NAME/", re.sub(r"^judge/faults/\w+", "judge/faults/KIND", key))
        assert f"`{general}`" in text, key
