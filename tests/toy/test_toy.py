"""The embedded toy: its world is the same every time and balanced, its judge follows its rules over real HTTP."""

import json
import random
import sys
from collections import Counter
from fnmatch import fnmatch
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from hov2 import toy
from hov2.answers import block_text
from hov2.config import EvalConfig, GRPOConfig, JudgeConfig, MediaConfig, SFTConfig, Source
from hov2.config_io import load_config
from hov2.data.inputs import InputMaker
from hov2.data.media import read_media
from hov2.data.samples import read_samples
from hov2.evaluation.senses import compare_senses
from hov2.judge import CompletionJudge, Judge
from hov2.model.thinker import load_thinker, load_tokenizer
from hov2.prompts import load_prompts
from hov2.rewards import Completion, accuracy_reward, context_reward, format_reward, logic_reward
from hov2.spans import span_masks, token_bytes_of
from hov2.toy import __main__ as command
from tests.support.evalkit import record

SMALL = {"train_clips": 16, "rl_clips": 8, "eval_clips": 8, "sft_samples": 400}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("toy") / "world"
    toy.build_world(folder, seed=3, **SMALL)
    return folder


@pytest.fixture(scope="module")
def judge():
    with toy.RuleJudge() as server:
        yield Judge(JudgeConfig(url=server.url), load_prompts())


def clips(count=64):
    return [toy.make_clip("test", i, random.Random(i)) for i in range(count)]


def test_equal_seeds_give_equal_worlds(world, tmp_path):
    toy.build_world(tmp_path / "again", seed=3, **SMALL)
    files = [p for p in world.rglob("*") if p.is_file() and p.suffix != ".webm"]  # webm files have random ids inside
    for path in files:
        assert (tmp_path / "again" / path.relative_to(world)).read_bytes() == path.read_bytes(), path.name
    toy.build_world(tmp_path / "other", seed=4, **SMALL)
    assert (tmp_path / "other" / "train_sft.json").read_bytes() != (world / "train_sft.json").read_bytes()


@pytest.mark.parametrize("key", ["face", "voice", "wall", "sign"])
def test_every_value_comes_with_every_intent_equally_often(key):
    counts = Counter((clip[key], toy.true_answer("multiple choice", clip), clip["name"][-4:]) for clip in clips())
    assert len(set(counts.values())) == 1


def test_neither_sense_alone_answers_the_question_of_intent():
    for key in ("face", "voice"):
        answers = Counter((clip[key], toy.true_answer("multiple choice", clip)) for clip in clips())
        assert len(answers) == 4 and set(answers.values()) == {16}  # two intents for each value, equally often


def test_files_are_read_as_written(world):
    for path in sorted((world / "clips").iterdir())[:6]:
        media = read_media(path, fps=8.0, max_frames=8)
        assert media.frames.shape == (8, 3, 56, 56) and media.sample_fps == pytest.approx(8, rel=0.02), path.name
        assert media.audio is not None and 0.35 < len(media.audio) / 16000 < 0.65, path.name


def test_references_of_rl_and_evaluation_are_right_and_the_cold_start_is_flawed(world):
    for name in ("train_rl", "eval"):
        for sample in read_samples([Source(str(world / f"{name}.json"))]):
            assert format_reward(sample.solution) == 1 and "plain" not in sample.solution
    flawed = read_samples([Source(str(world / "train_sft.json"))])
    plain = np.mean(["plain" in block_text(s.solution, "context") for s in flawed])
    assert plain == pytest.approx(toy.PLAIN_WALL, abs=0.07)
    assert {s.problem_type for s in flawed} == set(toy.QUESTIONS)
    bare = read_samples([Source(str(world / "train_sft_no_context.json"))])
    assert [s.solution for s in bare] == [s.solution[s.solution.index("<think>") :] for s in flawed]


def after_the_context(text):
    return text[text.index("<think>") :]


def test_the_cold_start_takes_the_shortcut_as_often_as_it_should_and_whatever_the_wall(world):
    taken = {kind: [] for kind in toy.SHORTCUT}
    plain = {True: [], False: []}  # by whether the shortcut is taken
    for sample in read_samples([Source(str(world / "train_sft.json"))]):
        kind = sample.problem_type
        number = int(sample.id.removeprefix("train-")[:4])
        clip = toy.make_clip("train", number, random.Random(0))  # the number alone decides on face and voice
        said = after_the_context(sample.solution)
        whole = after_the_context(toy.solution(kind, clip))
        if kind not in toy.SHORTCUT:
            assert said == whole
            continue
        by_face = after_the_context(toy.solution(kind, clip, shortcut=True))
        assert said in (whole, by_face)
        taken[kind].append(said == by_face)
        plain[said == by_face].append("plain" in sample.solution)
    for kind, share in toy.SHORTCUT.items():
        assert np.mean(taken[kind]) == pytest.approx(share, abs=0.08), kind
    for walls in plain.values():
        assert np.mean(walls) == pytest.approx(toy.PLAIN_WALL, abs=0.08)


@pytest.mark.parametrize("kind", toy.MAIN_TYPES)
def test_the_shortcut_is_right_where_the_voice_agrees_with_the_face_and_only_there(kind):
    for clip in clips(8):
        agrees = (clip["face"] == "smile") == (clip["voice"] == "rising")
        reward = accuracy_reward(toy.solution(kind, clip, shortcut=True), toy.solution(kind, clip), kind)
        assert (reward == 1) == agrees


def test_tags_split_over_tokens_and_merge_with_their_neighbours(world):
    tokenizer, text = load_tokenizer(str(world / "model")), toy.solution("multiple choice", clips(1)[0])
    ids = tokenizer(text).input_ids
    pieces = [tokenizer.decode([i]) for i in ids]
    assert "".join(pieces) == text and len(pieces) < 40
    assert "</think>" not in pieces and "><" in pieces
    masks = span_masks(token_bytes_of(tokenizer, ids))
    assert 0 < masks["context"].sum() < masks["think"].sum() < len(ids)


def test_the_thinker_loads_and_its_prompts_are_short(world):
    tokenizer, prompts = load_tokenizer(str(world / "model")), load_prompts("configs/toy/prompts.json")
    thinker = load_thinker(str(world / "model"), torch.float32)
    assert thinker.config.text_config.vocab_size == len(tokenizer)
    for sample in read_samples([Source(str(world / "eval.json"))]):
        inputs = InputMaker(tokenizer, prompts, MediaConfig(fps=8.0, max_frames=8))(sample)
        assert inputs.shape.second_per_grid == pytest.approx(0.25, rel=0.02) and len(inputs.prompt_ids) < 110


@pytest.mark.parametrize(
    "candidate, score",
    [
        ("A smile, a falling voice, a red wall.", 1),
        ("A smile, a falling voice, a plain wall.", 2 / 3),
        ("A smile, a rising voice, a red wall.", 2 / 3),
        ("A smile and a frown, a red or a blue wall.", 0),
        ("Nothing.", 0),
    ],
)
def test_context_rule(judge, candidate, score):
    reference = "<context>A smile, a falling voice, a red wall.</context>"
    asked = CompletionJudge(judge)
    sample = SimpleNamespace(solution=reference)
    value = context_reward(Completion(f"<context>{candidate}</context>", sample, asked))
    assert asked.reply.error is None and value == pytest.approx(score, abs=1e-3)


@pytest.mark.parametrize(
    "think, score",
    [
        ("The smile with a falling voice: mockery.", 1),
        ("The smile: thanks.", 0.8),
        ("The frown: anger.", 0.6),
        ("Hm.", 0.4),
    ],
)
def test_logic_rule(judge, think, score):
    text = f"<context>A smile, a falling voice, a red wall.</context><think>{think}</think>"
    assert logic_reward(Completion(text, None, CompletionJudge(judge))) == pytest.approx(score)


def test_consistency_and_synonyms_rules(judge):
    asks = CompletionJudge(judge)
    assert asks.consistency("a smile and a falling voice", "a smile and a falling voice") == 1
    assert asks.consistency("a frown", "a smile and a falling voice") < 0.5
    assert asks.synonyms({"happy", "tired"}, {"warm", "tired"}) == 1
    assert asks.synonyms({"stern", "tired"}, {"warm", "tired"}) == 0.5


def test_the_judge_answers_the_first_call_and_gives_no_score_for_what_it_does_not_know(judge):
    judge.check()
    assert toy.rule_score({"something": "else"}) is None


def test_the_last_evaluation_is_with_either_sense_alone_too(monkeypatch):
    commands = []
    monkeypatch.setattr(toy.run.subprocess, "run", lambda command, **_: commands.append(command))
    steps = dict(command.steps_of_run())
    assert list(steps)[-1] == "senses" and steps["senses"]["output_dir"] == "runs/toy/stage3/eval"
    toy.run.run_script("senses", steps["senses"], processes=1)
    assert commands[0][1:4] == ["evaluate.py", "--senses", "configs/toy/eval.json"]


def test_prepare_leaves_other_configs_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(toy.run, "build_world", lambda *_: pytest.fail("built a world"))
    toy.prepare(SFTConfig(model="m", output_dir=str(tmp_path), data=[Source("data/other.json")]))


def test_a_new_run_sets_its_own_earlier_one_aside_and_leaves_the_reader_s(tmp_path, monkeypatch):
    (tmp_path / "configs").symlink_to(Path("configs").resolve())
    monkeypatch.chdir(tmp_path)
    own = ["world/world.json", "filter_stage2/kept.jsonl", "stage2/metrics.jsonl", "stage3/model/x", "summary.json"]
    own += ["eval/answers/protocol.json", "eval_worldsense/results.json"]  # of that model, by evaluate.py
    others = ["thin/config.json", "stage2_thin/metrics.jsonl", "evaluation/x", "world2/world.json", "notes.txt"]
    for name in own + others:
        path = toy.ROOT / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)

    def first_step(*_):
        raise KeyboardInterrupt  # the run ends here

    monkeypatch.setattr(sys, "argv", ["hov2.toy", "--quick"])
    monkeypatch.setattr(command, "build_world", lambda **_: (toy.WORLD / "clips").mkdir(parents=True))
    monkeypatch.setattr(command, "run_script", first_step)
    for number in (1, 2):
        with pytest.raises(KeyboardInterrupt):
            command.main()
        assert {name: (toy.ROOT / "earlier-1" / name).read_text() for name in own} == {name: name for name in own}
        assert {name: (toy.ROOT / name).read_text() for name in others} == {name: name for name in others}
        kept = {name.partition("/")[0] for name in others} | {f"earlier-{n + 1}" for n in range(number)}
        assert {path.name for path in toy.ROOT.iterdir()} == kept | {"world"}
    assert (toy.ROOT / "earlier-2/world/clips").is_dir()


def test_the_configs_of_a_run_write_only_what_the_next_run_sets_aside():
    for step, settings in command.steps_of_run():
        name = "eval" if step == "senses" else step
        config = json.loads((toy.CONFIGS / f"{name}.json").read_text()) | settings
        for place in [config["output_dir"], config.get("filter", {}).get("output", config["output_dir"])]:
            assert Path(place).relative_to(toy.ROOT).parts[0] in toy.run.WRITTEN


def test_evaluations_of_the_toy_s_model_go_aside_with_it():
    for path in toy.CONFIGS.glob("eval*.json"):
        folder = Path(json.loads(path.read_text())["output_dir"])
        assert folder.parent == toy.ROOT and any(fnmatch(folder.name, pattern) for pattern in toy.run.WRITTEN)


@pytest.mark.parametrize("quick", [True, False])
def test_the_table_says_what_its_figures_are_worth(quick):
    scores = {"questions": 2, "accuracy": 0.5, "format": 1.0, "context": None}
    stage = scores | {"by_problem_type": dict.fromkeys(toy.QUESTIONS, 0.25)}
    records = [record("q1", 1.0), record("q2", 1.0)]
    senses = compare_senses({"both": records, "picture": records, "sound": [record("q1", 0.0, parsed="B"), records[1]]})
    summary = {"quick": quick, "stages": {"stage3": stage}, "senses": senses}
    text = command.format_summary(summary | {"questions_left": {"stage2": 7}, "seconds": 3})
    assert "without the picture 1 of 2 answers are others" in text
    assert "differ a little from one CPU to another" in text
    assert ("--quick: these figures show that everything runs, and nothing else" in text) == quick


def test_configs_and_code_name_the_same_places():
    for stage, cls in (("stage1", SFTConfig), ("stage2", GRPOConfig), ("stage3", GRPOConfig)):
        config = load_config(cls, f"configs/toy/{stage}.json")
        data = toy.FILTERED.get(stage, toy.WORLD / "train_sft.json")
        assert config.output_dir == str(toy.ROOT / stage) and [source.path for source in config.data] == [str(data)]
    for stage, path in toy.FILTERED.items():
        config = load_config(EvalConfig, f"configs/toy/filter_{stage}.json")
        assert config.filter.output == str(path) and config.data[0].path == str(toy.WORLD / "train_rl.json")
    assert json.loads((toy.CONFIGS / "eval.json").read_text())["model"] == str(toy.ROOT / "stage3" / "model")
