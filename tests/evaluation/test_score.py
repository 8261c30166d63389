"""Answers that are scored without a model, lists of questions, and evaluations with either sense alone."""

import json

import pytest

import evaluate
from hov2.config import EvalConfig, MediaConfig
from hov2.config_io import config_from_argv
from hov2.data.formats import DataError
from hov2.data.inputs import InputMaker
from hov2.evaluation.ids import answered, listed, read_answers, select
from hov2.evaluation.senses import compare_senses, format_senses
from hov2.prompts import load_prompts
from tests.support.evalkit import record
from tests.support.helpers import synth_clip, tiny_tokenizer

# ---- Lists ----


@pytest.mark.parametrize("text", ["b\n\n  c \n", '["b", "c"]'])
def test_lists_of_ids(tmp_path, text):
    path = tmp_path / "list"
    path.write_text(text)
    assert listed("abcd", str(path), None) == {"b", "c"}
    assert listed("abcd", None, str(path)) == {"a", "d"}
    assert listed("abcd", None, None) == set("abcd")
    numbers = tmp_path / "numbers.json"
    numbers.write_text("[1, 2]")
    assert listed(["1", "3", "2"], str(numbers), None) == {"1", "2"}


def test_lists_that_fit_no_questions(tmp_path):
    path = tmp_path / "list.txt"
    path.write_text("a\nx\ny\n")
    with pytest.raises(
        DataError, match=r"exclude: .*list.txt: 2 of its 3 ids are those of no question: x, y; ids here "
    ):
        listed("abc", None, str(path))
    path.write_text("a\nb")
    with pytest.raises(DataError, match="leave none of 2 questions"):
        listed("ab", None, str(path))
    for broken in ('["a"', None):
        if broken is None:
            path.unlink()
        else:
            path.write_text(broken)
        with pytest.raises(DataError, match=r"only: .*list.txt: expected ids, one a line or as a JSON list"):
            listed("ab", str(path), None)


# ---- Files of answers ----


def answers_file(folder, *lines):
    path = folder / "answers.jsonl"
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return str(path)


def test_answers_are_read_in_either_form(tmp_path):
    path = answers_file(
        tmp_path,
        {"id": "a", "text": "B"},
        {"id": 7, "completion": "C", "truncated": True, "accuracy": 0.0},
        {"id": "c", "samples": [{"text": "A"}, {"completion": ""}]},
        {"id": "d", "completion": None, "error": "d.mp4: no such file"},
    )
    given = read_answers(path)
    assert [completion.text for completion in given["a"].completions] == ["B"]
    assert (given["7"].completions[0].truncated, given["a"].completions[0].truncated) == (True, None)
    assert [completion.text for completion in given["c"].completions] == ["A", ""]
    assert given["d"].completions == [] and given["d"].error == "d.mp4: no such file"


@pytest.mark.parametrize(
    "lines, message",
    [
        ([{"id": "a", "text": "B"}, "{"], "record 2: not valid JSON"),
        ([["a", "B"]], "record 1: expected an object with an id and a text"),
        ([{"text": "B"}], "record 1: expected an object with an id and a text"),
        ([{"id": "a"}], "record 1: text: expected text, got None; leave the line out if there is no answer"),
        ([{"id": "a", "text": 3}], "record 1: text: expected text, got 3"),
        ([{"id": "a", "samples": []}], "record 1: samples: expected a list of objects with a text"),
        ([{"id": n % 2, "text": "B"} for n in range(4)], r"2 ids come more than once: 0, 1\. .* `samples`"),
    ],
)
def test_files_of_answers_that_cannot_be_scored(tmp_path, lines, message):
    with pytest.raises(DataError, match=message):
        read_answers(answers_file(tmp_path, *lines))


def test_what_is_missing_and_unknown_is_counted_and_named(tmp_path, samples):
    (tmp_path / "out.txt").write_text("q0\nq1\n")
    chosen, coverage = select(samples, None, str(tmp_path / "out.txt"))
    given = read_answers(
        answers_file(tmp_path, *({"id": f"q{n}", "text": "B"} for n in (1, 2, 3)), {"id": "zz", "text": "B"})
    )
    found, coverage = answered(chosen, given, coverage)
    assert [sample.id for sample in found] == ["q2", "q3"]
    assert coverage.text().splitlines() == [
        "over 2 of 24 questions:",
        "  2 left out by the lists `only` and `exclude`",
        "  20 without an answer, which are not scored as 0: q4, q5, q6, q7, q8 and 15 more",
        "WARNING: 1 answers are to no question here: zz",  # q1 is left out, which is no mistake
    ]
    given = read_answers(answers_file(tmp_path, {"id": "1", "text": "B"}))
    with pytest.raises(
        DataError, match="none of the 1 answers is to one of the 24 questions: their ids are like '1', "
    ):
        answered(samples, given, select(samples, None, None)[1])
    twice = [*samples, samples[3]]
    with pytest.raises(DataError, match="1 ids are those of several questions, .*: q3"):
        answered(twice, given, select(twice, None, None)[1])


# ---- evaluate.py --score ----


def score(file, *arguments):
    """What `evaluate.py --score file arguments` does; returns its folder."""
    config = config_from_argv(EvalConfig, evaluate.score_arguments(str(file), list(map(str, arguments))), None)
    evaluate.score(config, str(file))
    return file.with_suffix("").with_name(f"{file.stem}-scored")


def figures(folder):
    """What results.json says beside the protocol."""
    results = json.loads((folder / "results.json").read_text())
    return {key: value for key, value in results.items() if key != "protocol"}


def daily_omni(folder, clip):
    """A Daily-Omni of 12 questions about one clip."""
    (folder / "Videos").mkdir(parents=True)
    (folder / "Videos" / "v_video.mp4").symlink_to(clip)
    records = []
    for number in range(12):
        question = {"Question": f"Which, number {number}?", "Choice": ["A. a", "B. b", "C. c", "D. d"], "Answer": "B"}
        about = {"video_id": "v", "Type": "Reasoning", "video_duration": "30s", "video_category": "Comedy"}
        records.append(question | about)
    (folder / "qa.json").write_text(json.dumps(records))
    return folder


@pytest.mark.parametrize("num_samples", [1, 3])
@pytest.mark.parametrize("kind", ["data", "benchmark"])
def test_hov2_s_own_answers_score_the_same(kind, num_samples, tmp_path, world, evaluator, capsys):
    if kind == "data":
        questions = [f'data=[{{"path": "{world / "data.jsonl"}"}}]']
    else:
        root = daily_omni(tmp_path / "Daily-Omni", world / "1.mp4")
        questions = ["benchmark=daily-omni", f"benchmark_root={root}"]
    sampled = ["temperature=1.0", f"num_samples={num_samples}"]
    own = [f"model={world / 'model'}", f"output_dir={tmp_path / 'out'}", "max_completion_length=8"]
    (tmp_path / "out").mkdir()
    config = config_from_argv(EvalConfig, [*own, *sampled, *questions], None)
    evaluate.evaluate(config, evaluator().run)
    folder = score(tmp_path / "out" / "predictions.jsonl", *questions)
    assert figures(folder) == figures(tmp_path / "out")
    assert (folder / "predictions.jsonl").read_text() == (tmp_path / "out" / "predictions.jsonl").read_text()
    assert "answers of " in capsys.readouterr().out


def test_answers_of_others_to_a_benchmark(tmp_path, world, capsys):
    root = daily_omni(tmp_path / "Daily-Omni", world / "1.mp4")
    texts = ["B", "b.", "The answer is B", "Answer: C", "D"]
    lines = [{"id": f"v::{number}", "text": text} for number, text in enumerate(texts, 1)]
    file = tmp_path / "vllm.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    folder = score(file, "benchmark=daily-omni", f"benchmark_root={root}")
    out = capsys.readouterr().out
    assert "over 5 of 12 questions:\n  7 without an answer, which are not scored as 0: v::6, v::7" in out
    assert "this score is over 5: the score is partial" in out and "truncated: not known" in out
    found = figures(folder)
    assert (found["accuracy"], found["questions"], found["missing"], found["truncated"]) == (0.6, 5, 7, None)
    assert found["columns"]["letters"] == {"strict": [0.4, 5], "lenient": [0.4, 5]}
    (tmp_path / "some.json").write_text('["v::1", "v::4"]')
    folder = score(file, "benchmark=daily-omni", f"benchmark_root={root}", f"only={tmp_path / 'some.json'}")
    assert (figures(folder)["accuracy"], figures(folder)["left_out"], figures(folder)["missing"]) == (0.5, 10, 0)


# ---- Senses ----


def prompt_of(sample, senses, **settings):
    make = InputMaker(tiny_tokenizer(), load_prompts(), MediaConfig(fps=4, max_frames=4, **settings), senses=senses)
    inputs = make(sample)
    words = tiny_tokenizer().decode(inputs.prompt_ids)
    present = [name for name in ("VIDEO", "IMAGE", "AUDIO") if f"<|{name}|>" in words]
    assert (inputs.pixel_values is not None) == bool({"VIDEO", "IMAGE"} & set(present))
    assert (inputs.input_features is not None) == ("AUDIO" in present)
    return present, inputs.media_key


@pytest.mark.parametrize("interleave_audio", [False, True])
def test_what_is_left_out_never_reaches_the_prompt(tmp_path, samples, interleave_audio):
    synth_clip(tmp_path / "film.mp4", seconds=1, sound=True)
    synth_clip(tmp_path / "silent.mp4", seconds=1, sound=False)
    film = {"video": str(tmp_path / "film.mp4")}
    question = next(sample for sample in samples if sample.paths)

    def left(paths, *senses):
        asked = type(question)(**vars(question) | {"paths": paths})
        return prompt_of(asked, senses, interleave_audio=interleave_audio)[0]

    assert left(film, "video", "audio") == ["VIDEO", "AUDIO"]
    assert left(film, "video") == ["VIDEO"] and left(film, "audio") == ["AUDIO"]
    silent = {"video": str(tmp_path / "silent.mp4")}
    assert left(silent, "video") == ["VIDEO"] and left(silent, "audio") == []
    assert left({}, "audio") == []
    sound = {"audio": str(tmp_path / "film.mp4")}
    assert left(sound, "audio") == ["AUDIO"] and left(sound, "video") == []


def test_a_clip_s_encoding_is_kept_apart_by_sense(tmp_path, samples):
    synth_clip(tmp_path / "film.mp4", seconds=1, sound=True)
    question = next(sample for sample in samples if sample.paths)
    question = type(question)(**vars(question) | {"paths": {"video": str(tmp_path / "film.mp4")}})
    keys = {prompt_of(question, senses)[1] for senses in (("video", "audio"), ("video",), ("audio",))}
    assert len(keys) == 3


def views(picture, sound):
    """Records of four questions, all right with both senses, with these answers to them for either alone."""
    right = [record(f"q{n}", 1.0, kind="judge" if n == 3 else "multiple choice") for n in range(4)]

    def changed(answers):
        found = []
        for number, said in enumerate(answers):
            kind = right[number]["problem_type"]
            found.append(record(f"q{number}", float(said == "A"), kind=kind, parsed=said))
        return found

    return {"both": right, "picture": changed(picture), "sound": changed(sound)}


def test_the_table_of_senses_is_paired():
    found = compare_senses(views("AABA", "BBBA"))
    assert found["changed"] == {"picture": 1, "sound": 3} and found["pairs"] == {"picture": 4, "sound": 4}
    row = found["rows"]["multiple choice"]
    assert (row["questions"], row["both"], row["sound"]["accuracy"], row["sound"]["difference"]) == (3, 1.0, 0.0, -1.0)
    assert row["sound"]["interval"] == [-1.0, -1.0] and row["picture"]["difference"] == pytest.approx(-1 / 3)
    assert found["rows"]["judge"]["picture"]["difference"] == 0.0 and found["rows"]["all"]["questions"] == 4
    text = format_senses(found)
    assert "without the sound 1 of 4 answers are others" in text and "WARNING" not in text


def test_a_sense_that_changes_nothing_is_warned_of():
    records = views("AAAA", "BBBB")
    assert "WARNING: leaving the sound out changes no answer" in format_senses(compare_senses(records))
    records["picture"] = [record(f"q{n}", error="gone") for n in range(4)]  # nothing is known
    assert "WARNING" not in format_senses(compare_senses(records))


def test_three_evaluations_with_one_model(tmp_path, world, evaluator, monkeypatch, capsys):
    run = evaluator().run
    monkeypatch.setattr(evaluate, "load", lambda config: run)
    monkeypatch.setattr(evaluate.distributed, "cleanup", lambda: None)
    (tmp_path / "out").mkdir()
    arguments = [
        f"model={world / 'model'}",
        f"output_dir={tmp_path / 'out'}",
        f'data=[{{"path": "{world}/data.jsonl"}}]',
    ]
    evaluate.prove_senses(config_from_argv(EvalConfig, [*arguments, "max_completion_length=8"], None))
    out = capsys.readouterr().out
    assert "picture only  - both     95 % interval" in out and out.count("format: ") == 1
    found = json.loads((tmp_path / "out" / "senses.json").read_text())
    assert found["rows"]["all"]["questions"] == 24 and found["pairs"] == {"picture": 23, "sound": 23}
    for folder, senses in (("", ["video", "audio"]), ("picture_only", ["video"]), ("sound_only", ["audio"])):
        results = json.loads((tmp_path / "out" / folder / "results.json").read_text())
        assert results["protocol"]["senses"] == senses
    assert (tmp_path / "out" / "picture_only" / "results.txt").read_text().splitlines()[0].endswith("picture only")
