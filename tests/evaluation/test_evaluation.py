"""Answering questions: order, samples, journal, going on after a kill, system prompts, the filter's file, scripts."""

import json
import os
import random
import re
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

import evaluate
from hov2 import scoring, toy
from hov2.config import ConfigError, EvalConfig, GRPOConfig, JudgeConfig, Source
from hov2.config_io import config_from_argv, load_config
from hov2.data.formats import DataError
from hov2.data.samples import Sample
from hov2.evaluation.evaluator import Evaluator
from hov2.evaluation.journal import Journal, longest_first
from hov2.evaluation.records import Completion, answer_record
from hov2.judge import Judge
from hov2.model.thinker import load_tokenizer
from hov2.prompts import PromptsError, load_prompts
from tests.evaluation.conftest import KINDS, QUESTIONS
from tests.support.helpers import tiny_tokenizer
from tests.support.judge_faults import FaultyJudge

ROOT = Path(__file__).resolve().parents[2]


def sample(name="s", paths=None, kind="multiple choice", **extra):
    return Sample(
        id=name,
        problem="What?",
        problem_type=kind,
        options=("A. one", "B. two"),
        solution=f"<answer>{KINDS[kind]}</answer>",
        data_type="text",
        paths=paths or {},
        extra=extra,
    )


# ---- Order and answers ----


def test_longest_first(tmp_path):
    for name, size in (("small", 10), ("large", 1000), ("medium", 100)):
        (tmp_path / name).write_bytes(b"x" * size)
    files = [{"video": str(tmp_path / name)} for name in ("small", "large", "missing", "medium")]
    by_size = [sample(), *(sample(paths=f) for f in files), sample()]
    assert longest_first(by_size) == [2, 4, 1, 0, 3, 5]
    said = [
        sample(video_duration="30s"),
        sample(video_duration="60s", duration="1-2min"),
        sample(duration=45.5),
        sample(paths=files[1], duration="1-2min"),
        sample(video_duration="60s"),
    ]
    assert longest_first(said) == [1, 4, 2, 0, 3]  # seconds first, then sizes


@pytest.mark.parametrize(
    "kind, text, parsed",
    [
        ("multiple choice", "<think>C</think><answer>B</answer>", "B"),
        ("multiple choice", "It is B", "B"),  # without a block, the whole text
        ("multiple choice", "", None),
        ("emer_ov_mc", "<answer>C, A</answer>", "A,C"),
        ("judge", "<answer>Yes, it is</answer>", "yes"),
        ("numerical", "<answer>3.0</answer>", "3"),
        ("free-form", "<answer>a man\nsmiles</answer>", "a man\nsmiles"),
    ],
)
def test_parsed_answers(kind, text, parsed):
    scores = {"accuracy": 1.0 if parsed else 0.0, "format": 0.0}
    scored = answer_record(sample(kind=kind), Completion(text, None), scores)
    assert (scored["parsed"], scored["no_answer"], scored["truncated"]) == (parsed, "<answer>" not in text, None)


def test_records_of_one_and_of_several_answers(evaluator, samples):
    summary, records = evaluator().evaluate(samples)
    assert [r["id"] for r in records] == [f"q{i}" for i in range(QUESTIONS)]
    assert [r["id"] for r in records if r["error"]] == ["q7"] and "broken.mp4" in records[7]["error"]
    assert "samples" not in records[0] and records[5]["extra"] == {"topic": 2}
    assert summary["unreadable"] == 1 and summary["answers"] == QUESTIONS - 1
    summary, several = evaluator(num_samples=4, temperature=1.0).evaluate(samples)
    assert summary["answers"] == 4 * (QUESTIONS - 1) and {"mean@4", "pass@4", "majority@4"} <= summary.keys()
    assert several[7]["error"] and several[7].keys() == records[7].keys()
    for r in several[:7]:
        assert len(r["samples"]) == 4 and len({a["completion"] for a in r["samples"]}) > 1
        assert r["completion"] in [a["completion"] for a in r["samples"]]


def test_sampled_answers_do_not_depend_on_the_batches(evaluator, samples):
    settings = {"num_samples": 2, "temperature": 1.0, "top_k": 50, "top_p": 0.9}
    runs = [evaluator(batch_size=size, **settings).evaluate(samples) for size in (1, 5, QUESTIONS)]
    assert runs[0] == runs[1] == runs[2]


def test_training_rewards_give_nothing_without_an_answer_block(evaluator):
    assert evaluator(training_rewards=True).scorer.evaluation is False and evaluator().scorer.evaluation is True


def test_a_judge_that_is_down_is_waited_for(evaluator, monkeypatch):
    monkeypatch.setattr(scoring, "HEARTBEAT", 0.02)
    with FaultyJudge(["500", None]) as server:
        run = evaluator().run
        run.judge = Judge(JudgeConfig(url=server.url, concurrency=1, max_retries=0), load_prompts())
        _, records = Evaluator(run, max_completion_length=8, batch_size=3).evaluate(
            [sample(str(i), kind="free-form") for i in range(3)]
        )
        assert all(record["accuracy"] is not None for record in records)
        assert server.injected == {"500": 1} and server.asked == 5  # 3, the small question, and the first one's again


# ---- The journal ----


def test_going_on_answers_only_what_is_not_there(evaluator, samples, tmp_path, monkeypatch, capsys):
    whole = evaluator().evaluate(samples)
    assert evaluator().evaluate(samples, Journal(tmp_path, {"seed": 0}, samples)) == whole
    path = tmp_path / "answers" / "rank-0.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    assert len(lines) == 1 + QUESTIONS and lines[0] == "\n"
    path.write_text("".join(lines[:14]) + lines[14][:40])  # four batches, one answer of the fifth, and a part of one
    asked, answer = [], Evaluator._answer
    monkeypatch.setattr(
        Evaluator,
        "_answer",
        lambda self, samples, batch, loading: (asked.append(batch), answer(self, samples, batch, loading))[1],
    )
    assert evaluator().evaluate(samples, Journal(tmp_path, {"seed": 0}, samples)) == whole
    assert asked == [longest_first(samples)[i : i + 3] for i in range(12, QUESTIONS, 3)]  # whole batches, the same ones
    assert capsys.readouterr().out == "going on with the answers to 12 of 24 questions\n"
    asked.clear()
    assert evaluator().evaluate(samples, Journal(tmp_path, {"seed": 0}, samples)) == whole and not asked


def test_answers_of_another_rank_count_too(evaluator, samples, tmp_path):
    whole = evaluator().evaluate(samples, Journal(tmp_path, {}, samples))
    folder = tmp_path / "answers"
    lines = (folder / "rank-0.jsonl").read_text().splitlines(keepends=True)
    (folder / "rank-0.jsonl").rename(folder / "rank-5.jsonl")
    (folder / "rank-5.jsonl").write_text("".join(lines[7:]))
    assert evaluator().evaluate(samples, Journal(tmp_path, {}, samples)) == whole
    assert len((folder / "rank-0.jsonl").read_text().split("\n")[1:]) == 6


def test_another_protocol_is_refused_or_set_aside(samples, tmp_path):
    Journal(tmp_path, {"temperature": 0.0, "media": {"fps": 2.0}}, samples).append({0: {"id": "q0"}})
    (tmp_path / "results.json").write_text("{}")
    (tmp_path / "notes.txt").write_text("not ours")
    with pytest.raises(ConfigError, match=r"another protocol: temperature was 0.0 and is 0.5\. .*resume=false"):
        Journal(tmp_path, {"temperature": 0.5, "media": {"fps": 2.0}}, samples)
    with pytest.raises(ConfigError, match="questions and clips was '[0-9a-f]{16}' and is "):
        Journal(tmp_path, {"temperature": 0.0, "media": {"fps": 2.0}}, samples[1:])
    assert Journal(tmp_path, {"temperature": 0.0, "media": {"fps": 2.0}}, samples).read() == {0: {"id": "q0"}}
    assert Journal(tmp_path, {"temperature": 0.5}, samples, resume=False).read() == {}
    assert sorted(p.name for p in (tmp_path / "earlier-1").iterdir()) == ["answers", "results.json"]
    assert (tmp_path / "notes.txt").exists()
    Journal(tmp_path, {"temperature": 0.9}, samples, resume=False)
    assert (tmp_path / "earlier-2").exists()


def test_other_weights_in_the_same_place_are_another_protocol(world):
    before = evaluate.weights_of(str(world / "model"))
    assert list(before) == ["model.safetensors"] and evaluate.weights_of(str(world / "model")) == before
    os.utime(world / "model" / "model.safetensors")
    assert evaluate.weights_of(str(world / "model")) != before


# ---- evaluate.py ----


def config(world, **values):
    return EvalConfig(**{"model": str(world / "qwen_model"), "output_dir": "o", "data": [Source("d.jsonl")]} | values)


TEMPLATE = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nA text of the model's own.<|im_end|>\n"
    "{% endif %}{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
)


def test_system_prompts(world, tmp_path):
    tokenizer = tiny_tokenizer()
    assert evaluate.system_text(config(world), tokenizer, "default") == "default"
    assert evaluate.system_text(config(world, system_prompt="none"), tokenizer, "default") == ""
    (tmp_path / "system.txt").write_text("Answer at once.\n")
    named = config(world, system_prompt=str(tmp_path / "system.txt"))
    assert evaluate.system_text(named, tokenizer, "default") == "Answer at once."
    with pytest.raises(PromptsError, match="expected hov2, none, qwen or a text file; qwne"):
        evaluate.system_text(config(world, system_prompt="qwne"), tokenizer, "default")


def test_system_prompt_of_the_models_chat_template(world):
    qwen = config(world, system_prompt="qwen")
    folder = world / "qwen_model"
    (folder / "config.json").write_text("{}")
    with pytest.raises(PromptsError, match="no chat template .* put the text into a file"):
        evaluate.system_text(qwen, load_tokenizer(folder), "default")
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": TEMPLATE}))  # where processors had it
    assert evaluate.system_text(qwen, tiny_tokenizer(), "default") == "A text of the model's own."
    (folder / "chat_template.json").unlink()
    (folder / "chat_template.jinja").write_text(TEMPLATE.replace("own", "tokenizer"))
    (folder / "config.json").write_text((world / "model" / "config.json").read_text())
    assert evaluate.system_text(qwen, load_tokenizer(folder), "default") == "A text of the model's tokenizer."


@pytest.mark.parametrize(
    "values, message",
    [
        ({"data": []}, "data, benchmark: expected one of the two"),
        ({"benchmark": "daily-omni", "benchmark_root": "x"}, "data, benchmark: expected one of the two"),
        ({"data": [], "benchmark": "daily-omni"}, "expected both, or neither"),
        ({"data": [], "benchmark": "dailyomni"}, "'dailyomni' is not one of 'intentbench', 'daily-omni', 'worldsense'"),
        ({"num_samples": 8}, "num_samples: 8 greedy answers are one answer"),
        ({"num_samples": 0}, "num_samples: at least 1, got 0"),
        ({"top_p": 0}, "top_p: expected more than 0, got 0"),
        ({"senses": []}, "senses: expected at least one of video, audio"),
        ({"senses": ["sound"]}, "senses[0]: 'sound' is not one of 'video', 'audio'"),
        ({"filter": {"output": "x.jsonl"}}, "filter: needs num_samples of at least 2"),
        ({"filter": {"output": "x.json"}}, "filter: output: expected a file that ends in .jsonl"),
        (
            {"filter": {"output": "x.jsonl", "min_share": 0.8}},
            "filter: min_share, max_share: expected 0 <= min_share < max_share <= 1",
        ),
    ],
)
def test_configs_that_cannot_be_evaluated_are_refused(tmp_path, values, message):
    path = tmp_path / "eval.json"
    path.write_text(json.dumps({"model": "m", "output_dir": "o", "data": [{"path": "d.jsonl"}]} | values))
    with pytest.raises(ConfigError, match=re.escape(message)):
        load_config(EvalConfig, path)


ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def start(*arguments, **environment):
    """evaluate.py as a process of its own."""
    return subprocess.Popen(
        [sys.executable, "evaluate.py", *map(str, arguments)],
        cwd=ROOT,
        text=True,
        env=ENVIRONMENT | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def start_two(*arguments):
    """Two ranks of evaluate.py, as torchrun would start them; here none watches over the other."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    return [
        start(
            *arguments,
            RANK=str(rank),
            LOCAL_RANK=str(rank),
            WORLD_SIZE="2",
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(port),
        )
        for rank in range(2)
    ]


@pytest.fixture(scope="module")
def config_file(world):
    path = world / "eval.json"
    path.write_text(
        json.dumps(
            {
                "model": str(world / "model"),
                "output_dir": str(world / "out"),
                "data": [{"path": str(world / "data.jsonl")}],
                "media": {"fps": 4, "max_frames": 4},
                "max_completion_length": 8,
                "batch_size": 2,
                "temperature": 1.0,
                "num_samples": 4,
            }
        )
    )
    return path


def test_whole_runs_and_their_comparison(world, config_file):
    kept = world / "kept.jsonl"
    process = start(config_file, f"filter.output={kept}")  # a random model has no right answer
    out, err = process.communicate(timeout=200)
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert process.returncode == 1 and len(errors) == 1, err[-3000:]
    assert "no question has a share of right answers between 0.0 and 0.75; nothing is left" in errors[0]
    assert "majority@4" in out and "too hard" in out and "not asked: q7: " in out
    results = json.loads((world / "out" / "results.json").read_text())
    protocol = results["protocol"]
    assert (protocol["num_samples"], protocol["temperature"], protocol["rewards"]) == (4, 1.0, "training")
    assert protocol["media"] == {
        "fps": 4.0,
        "max_frames": 4,
        "min_pixels": 3136,
        "max_pixels": 100352,
        "interleave_audio": False,
    }
    assert results["questions"] == QUESTIONS and "mean@4" in results["intervals"]
    assert (world / "out" / "results.txt").read_text().strip() in out and not kept.exists()
    shown, _ = start("--compare", world / "out", world / "out").communicate(timeout=200)
    assert "B - A: +0.000" in shown and "majority@4" in shown
    for folders, message in (
        ([world / "out", world / "nowhere"], "nowhere: not the folder of a finished evaluation"),
        ([world / "out"], "expected evaluate.py --compare FOLDER FOLDER"),
        ([world / "out", world / "out", "omit=x"], r"\[only=FILE\] \[exclude=FILE\]"),
    ):
        with pytest.raises(ValueError, match=message):
            evaluate.compare(list(map(str, folders)))
    (world / "few.txt").write_text("q1\nq2\n\nq7\n")
    shown = evaluate.compare([str(world / "out"), str(world / "out"), f"only={world / 'few.txt'}"])
    assert shown.startswith("over 3 of 24 questions:\n  21 left out by the lists `only` and `exclude`\nA: ")
    assert re.search(r"\nall +3 ", shown) and "of 3 questions in both" in shown

    # its own answers, scored once more
    predictions = world / "out" / "predictions.jsonl"
    arguments = evaluate.score_arguments(str(predictions), [str(config_file), f"filter.output={kept}"])
    with pytest.raises(DataError, match="nothing is left"):
        evaluate.score(config_from_argv(EvalConfig, arguments, None), str(predictions))
    assert predictions.read_text() == (world / "out" / "predictions-scored" / "predictions.jsonl").read_text()
    again = json.loads((world / "out" / "predictions-scored" / "results.json").read_text())
    assert again.pop("protocol")["answers"] == str(predictions) and again == {
        key: value for key, value in results.items() if key != "protocol"
    }


def wait_for_answers(folder, running):
    """Waits until the answers in `folder` grow, or `running()` is false."""

    def size():
        return sum(path.stat().st_size for path in folder.glob("answers/rank-*.jsonl"))

    before, limit = size(), time.monotonic() + 60
    while size() == before and running() and time.monotonic() < limit:
        time.sleep(0.002)


@pytest.mark.slow
def test_five_kills_of_the_toy_s_evaluation_on_two_processes(tmp_path):
    toy.build_world(tmp_path / "world", train_clips=8, rl_clips=8, eval_clips=16, sft_samples=200)
    with toy.RuleJudge() as judge:
        five_kills(tmp_path, judge.url)


def five_kills(folder, judge_url):
    whole, cut = folder / "whole", folder / "cut"
    settings = (
        "configs/toy/eval.json",
        f"model={folder / 'world/model'}",
        "batch_size=1",
        f"judge.url={judge_url}",
        f"prompts={Path('configs/toy/prompts.json').resolve()}",
        "temperature=1",
        "num_samples=2",
        'data=[{"path": "%s"}]' % (folder / "world/eval.json"),
    )
    assert [p.wait(200) for p in start_two(*settings, f"output_dir={whole}")] == [0, 0]
    rng, killed = random.Random(), 0
    for number in range(5):
        ranks = start_two(*settings, f"output_dir={cut}")
        if number:  # but for once, after it has begun to answer
            wait_for_answers(cut, lambda: any(p.poll() is None for p in ranks))  # noqa: B023, it runs right here
        time.sleep(rng.uniform(0, 0.3))
        killed += all(p.poll() is None for p in ranks)
        for process in ranks:
            process.kill()
        assert all(p.wait(200) is not None for p in ranks)
    assert killed >= 3
    assert [p.wait(200) for p in start_two(*settings, f"output_dir={cut}")] == [0, 0]
    for name in ("results.json", "predictions.jsonl", "results.txt"):
        assert (cut / name).read_bytes() == (whole / name).read_bytes()


def test_held_out_questions_are_scored_by_the_configs_format_rule(evaluator):
    asked = evaluator()
    assert asked.scorer.format_rule == "strict"  # an EvalConfig has no such key
    config = load_config(GRPOConfig, ROOT / "configs/stage3.json", ["format_rule=released"])
    again = Evaluator(SimpleNamespace(**vars(asked.run) | {"config": config}), max_completion_length=8, batch_size=3)
    assert again.scorer.format_rule == "released"
