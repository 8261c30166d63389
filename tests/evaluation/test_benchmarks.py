"""The three benchmarks: reading the published layouts, the columns and averages, letters, and the toy's copies."""

import json
import os
import unicodedata

import pytest

from hov2 import toy
from hov2.config import EvalConfig
from hov2.config_io import load_config
from hov2.data.formats import DataError
from hov2.data.media import read_media
from hov2.evaluation import benchmarks
from hov2.evaluation.benchmarks import (
    PUBLISHED,
    columns,
    groups,
    lenient_letter,
    missing_clips,
    read_benchmark,
    strict_letter,
)
from hov2.evaluation.tables import render
from tests.support.evalkit import benchmark_record

INTENT = {
    "problem": "Why does he laugh?",
    "problem_type": "multiple choice",
    "options": ["A.joy", "B.spite"],
    "solution": "<answer>B</answer>",
    "answer": "B",
    "data_type": "video",
    "video": "a_trimmed-out.mp4",
    "Type": "Why",
    "qid": "q1",
}
DAILY = {
    "Question": "What was heard?",
    "Choice": ["A. a bell", "B. a cat", "C. rain", "D. talk"],
    "Answer": "B",
    "video_id": "Ec_lQ",
    "Type": "Event Sequence",
    "content_parent_category": "Lifestyle",
    "content_fine_category": "Skin",
    "video_category": "Howto & Style",
    "video_duration": "30s",
}
TASK = {
    "task_domain": "Understanding",
    "task_type": "Spatial Relation",
    "question": "Where?",
    "candidates": ["A. left", "B. right", "C. above", "D. below"],
    "answer": "B",
}
WORLD = {
    "dvOk": {
        "video_id": "dvOk",
        "video_duration": "60s",
        "duration": "1-2min",
        "domain": "Music",
        "sub_category": "Covers",
        "audio_class": ["Music", "Speech"],
        "video_caption": "A long text.",
        "task0": TASK,
        "task10": {**TASK, "answer": "D"},
        "task2": {**TASK, "candidates": TASK["candidates"][:3], "answer": "C"},
    }
}
FILES = {"intentbench": "qa.json", "daily-omni": "qa.json", "worldsense": "worldsense_qa.json"}


def publish(folder, name, content, *clips):
    """Writes a benchmark's questions file, and empty files for its clips; returns the folder."""
    for clip in clips:
        (folder / clip).parent.mkdir(parents=True, exist_ok=True)
        (folder / clip).touch()
    (folder / FILES[name]).write_text(content if isinstance(content, str) else json.dumps(content))
    return folder


# ---- reading ----


def test_intentbench(tmp_path):
    missing = {key: value for key, value in INTENT.items() if key not in ("qid", "Type", "solution", "data_type")}
    moved = {key: value for key, value in missing.items() if key != "video"} | {"path": "here.mp4"}
    emotion = {**INTENT, "problem_type": "emer_ov_mc", "solution": "<answer>A,B</answer>", "answer": "A,B"}
    judge = {**INTENT, "problem_type": "judge", "options": None, "solution": "<answer>No</answer>", "qid": 7}
    folder = publish(
        tmp_path,
        "intentbench",
        [INTENT, missing, missing, moved, emotion, judge],
        "videos/a_trimmed-out.mp4",
        "here.mp4",
    )
    samples = read_benchmark("intentbench", folder)
    assert [s.id for s in samples] == ["q1", "a_trimmed-out.mp4", "a_trimmed-out.mp4#3", "here.mp4", "q1#5", "7"]
    first = samples[0]
    assert (first.problem, first.options, first.solution) == (
        INTENT["problem"],
        ("A.joy", "B.spite"),
        "<answer>B</answer>",
    )
    assert first.extra == {"answer": "B", "Type": "Why", "qid": "q1"} and first.source == str(tmp_path / "qa.json")
    assert first.paths == {"video": str(tmp_path / "videos/a_trimmed-out.mp4")} and first.data_type == "video"
    assert samples[1].solution == "<answer>B</answer>" and samples[3].paths == {"video": str(tmp_path / "here.mp4")}
    assert samples[5].options is None


def test_daily_omni(tmp_path):
    bare = {key: value for key, value in DAILY.items() if not key.startswith("content")} | {"Explaination": "so"}
    content = [DAILY, bare, {**DAILY, "video_id": "other"}]
    samples = read_benchmark(
        "daily-omni", publish(tmp_path, "daily-omni", content, "Videos/Ec_lQ/Ec_lQ_video.mp4", "other/other_video.mp4")
    )
    assert [s.id for s in samples] == ["Ec_lQ::1", "Ec_lQ::2", "other::3"]
    assert samples[0].paths == {"video": str(tmp_path / "Videos/Ec_lQ/Ec_lQ_video.mp4")}
    assert samples[2].paths == {"video": str(tmp_path / "other/other_video.mp4")}  # an unpacked layout without Videos/
    assert samples[0].problem == "What was heard?" and samples[0].options == tuple(DAILY["Choice"])
    assert samples[0].solution == "<answer>B</answer>" and samples[0].problem_type == "multiple choice"
    assert samples[0].extra["Type"] == "Event Sequence" and samples[1].extra["Explaination"] == "so"


def test_worldsense(tmp_path):
    samples = read_benchmark("worldsense", publish(tmp_path, "worldsense", WORLD))
    assert [s.id for s in samples] == ["dvOk::task0", "dvOk::task2", "dvOk::task10"]
    assert [len(s.options) for s in samples] == [4, 3, 4]
    assert samples[0].paths == {"video": str(tmp_path / "videos/dvOk.mp4")}  # not there: where it should be
    assert samples[1].solution == "<answer>C</answer>"
    assert samples[0].extra == {
        "video_id": "dvOk",
        "video_duration": "60s",
        "duration": "1-2min",
        "domain": "Music",
        "sub_category": "Covers",
        "audio_class": ["Music", "Speech"],
        "task_domain": "Understanding",
        "task_type": "Spatial Relation",
    }


def test_options_get_letters_where_they_have_none(tmp_path):
    options = ["a bell", "B. a cat", "(C) rain", "D:talk"]
    [sample] = read_benchmark("daily-omni", publish(tmp_path, "daily-omni", [{**DAILY, "Choice": options}]))
    assert sample.options == ("A. a bell", "B. a cat", "(C) rain", "D:talk")


def test_an_answer_in_the_options_own_words_is_its_letter(tmp_path):
    record = {**DAILY, "Choice": ["Vitamin A", "zinc", "Vitamin C", "iron"], "Answer": "Vitamin C"}
    [sample] = read_benchmark("daily-omni", publish(tmp_path, "daily-omni", [record]))
    assert sample.solution == "<answer>C</answer>"


@pytest.mark.parametrize(
    "change, message",
    [
        ({"Question": "Why \ud83d"}, "Question: '.ud83d' is half of a surrogate pair"),
        ({"content_parent_category": "\ud83d"}, "content_parent_category: '.ud83d' is half of a surrogate pair"),
        ({"video_id": "https://x.org/a"}, "path: 'https://x.org/a' is a URL; only local files are read"),
        ({"Answer": "Vitamin D"}, "Answer: 'Vitamin D' is none of the 4 in 'Choice'"),
    ],
)
def test_faults_of_records_are_those_of_training_data(tmp_path, change, message):
    publish(tmp_path, "daily-omni", [DAILY, {**DAILY, **change}])
    with pytest.raises(DataError, match=rf"qa\.json: record 2: {message}"):
        read_benchmark("daily-omni", tmp_path)


def test_a_benchmark_in_lines_or_with_a_byte_order_mark_is_read(tmp_path):
    for name, content in (("daily-omni", [DAILY]), ("worldsense", WORLD)):
        expected = read_benchmark(name, publish(tmp_path, name, content))
        (tmp_path / FILES[name]).write_text(json.dumps(content), encoding="utf-8-sig")
        assert read_benchmark(name, tmp_path) == expected
    lines = json.dumps(DAILY) + "\n" + json.dumps(DAILY)
    assert len(read_benchmark("daily-omni", publish(tmp_path, "daily-omni", lines))) == 2


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("intentbench", "[", "not valid JSON"),
        ("intentbench", {"a": INTENT}, "expected a list of records"),
        ("intentbench", [], "expected a list of records, not empty"),
        ("intentbench", [INTENT, 5], "record 2: expected an object, got int"),
        ("intentbench", [{**INTENT, "video": ""}], "record 1: video: expected text, got ''"),
        ("intentbench", [{**INTENT, "problem": " "}], "record 1: problem: expected text"),
        ("intentbench", [{**INTENT, "problem_type": "essay"}], "record 1: problem_type: unknown 'essay'"),
        ("intentbench", [{**INTENT, "solution": "<answer></answer>"}], "record 1: solution: "),
        ("intentbench", [{**INTENT, "solution": "", "answer": None}], "record 1: answer: expected text, got None"),
        (
            "intentbench",
            [{**INTENT, "options": "A. x"}],
            "record 1: options: expected a list of texts or null, got 'A. x'",
        ),
        ("intentbench", [{**INTENT, "options": None}], "record 1: options: 'multiple choice' needs them"),
        (
            "intentbench",
            [{**INTENT, "problem": "<|VIDEO|>?"}],
            "record 1: problem: <|VIDEO|> has the form of a special",
        ),
        ("daily-omni", [DAILY, {**DAILY, "video_id": None}], "record 2: video_id: expected text, got None"),
        ("daily-omni", [{"video_id": "x"}], "record 1: missing field 'Question'"),
        ("daily-omni", [{**DAILY, "Answer": "?"}], "record 1: Answer: "),
        ("worldsense", [WORLD], "expected an object of videos"),
        ("worldsense", {"v": 3}, "video v: expected an object, got int"),
        ("worldsense", {"v": {"domain": "Music"}}, "video v: missing field 'task0'"),
        (
            "worldsense",
            {"v": {"task0": TASK, "task1": {**TASK, "candidates": ["A. a", "B. b", "C. c"], "answer": "D"}}},
            "video v: task1: answer: 'D' is none of the 3 in 'candidates'",
        ),
    ],
)
def test_bad_files_are_one_error(tmp_path, name, content, message):
    publish(tmp_path, name, content)
    with pytest.raises(DataError) as error:
        read_benchmark(name, tmp_path)
    assert str(error.value).startswith(f"{tmp_path / FILES[name]}: {message}")


def test_unknown_benchmark_and_missing_file(tmp_path):
    with pytest.raises(DataError, match="unknown benchmark 'mmlu'; known: intentbench, daily-omni, worldsense"):
        read_benchmark("mmlu", tmp_path)
    with pytest.raises(DataError, match="worldsense_qa.json: can't be read: .* worldsense is published with that file"):
        read_benchmark("worldsense", tmp_path)


# ---- clips ----


def clips_of(folder, name, content, *clips):
    """The clips, relative to the benchmark's folder, that its questions find."""
    samples = read_benchmark(name, publish(folder, name, content, *clips))
    return [os.path.relpath(sample.paths["video"], folder) for sample in samples]


@pytest.mark.parametrize(
    "there",
    [
        "a_trimmed-out.mp4",
        "videos/a_trimmed-out.mp4",
        "videos/videos/a_trimmed-out.mp4",  # unpacked in a folder of that name
        "Videos/inner/A_Trimmed-Out.MP4",
    ],
)
def test_a_clip_is_found_by_name_wherever_its_archive_was_unpacked(tmp_path, there):
    assert clips_of(tmp_path, "intentbench", [INTENT], there, "videos/b_trimmed-out.mp4") == [there]


def test_unicode_forms_of_a_name_are_one_name(tmp_path):
    composed, decomposed = (unicodedata.normalize(form, "Été.mp4") for form in ("NFC", "NFD"))
    assert composed != decomposed
    for number, (said, there) in enumerate([(composed, decomposed), (decomposed, composed.upper())]):
        folder = tmp_path / str(number)
        folder.mkdir()
        assert clips_of(folder, "intentbench", [INTENT | {"video": said}], f"videos/{there}") == [f"videos/{there}"]


def test_of_several_candidates_the_exact_one_is_meant_and_else_none(tmp_path):
    asked = [INTENT | {"video": "a.mp4"}]
    assert clips_of(tmp_path, "intentbench", asked, "other/a.mp4", "videos/A.mp4") == ["other/a.mp4"]
    assert clips_of(tmp_path, "intentbench", asked, "videos/a.mp4") == ["videos/a.mp4"]  # where it is published
    with pytest.raises(DataError, match=r"record 1: clip 'A.MP4': .*other/a.mp4 or .*videos/A.mp4 or .*videos/a.mp4\?"):
        read_benchmark("intentbench", publish(tmp_path, "intentbench", [INTENT | {"video": "A.MP4"}]))


def test_the_folder_is_listed_once(tmp_path, monkeypatch):
    for number in range(20):
        (tmp_path / f"Videos/v{number}").mkdir(parents=True)
        (tmp_path / f"Videos/v{number}/v{number}_video.mp4").touch()
    listings, scandir = [], os.scandir
    monkeypatch.setattr(os, "scandir", lambda folder: listings.append(folder) or scandir(folder))
    content = [DAILY | {"video_id": f"v{number % 20}"} for number in range(100)]
    samples = read_benchmark("daily-omni", publish(tmp_path, "daily-omni", content))
    assert len(listings) == 1 + 1 + 20 and all(os.path.exists(sample.paths["video"]) for sample in samples)


def test_missing_clips_are_named_with_where_they_were_looked_for(tmp_path):
    content = [DAILY, DAILY | {"video_id": "x"}, DAILY | {"video_id": "x"}, DAILY | {"video_id": "y"}]
    samples = read_benchmark("daily-omni", publish(tmp_path, "daily-omni", content, "Ec_lQ/Ec_lQ_video.mp4"))
    assert missing_clips(samples, tmp_path) == (
        f"2 of 3 clips are nowhere in {tmp_path}, nor in folders up to 3 below it: x_video.mp4, y_video.mp4"
    )
    assert missing_clips(samples[:1], tmp_path) == ""


# ---- columns ----


@pytest.mark.parametrize(
    "fields, column, rule",
    [
        ({"extra": {"Type": "Why"}, "problem": "How?"}, "Why", "Type"),
        ({"extra": {"Type": " who/which "}}, "Who/Which", "Type"),
        ({"extra": {"Type": "Which"}}, "Who/Which", "Type"),
        ({"extra": {"Type": "others"}}, "Other", "Type"),
        ({"extra": {"Type": "deception"}, "problem_type": "judge"}, "Deception", "Type"),
        ({"problem_type": "judge"}, "Deception", "problem type"),
        ({"problem_type": "emer_ov_mc", "problem": "What does she feel?"}, "Emotion", "problem type"),
        ({"extra": {"Type": "long video"}, "problem": "In the clip, what's that?"}, "What", "question word"),
        ({"extra": {"Type": None}, "problem": "Who says why?"}, "Why", "question word"),
        ({"problem": "Why, and how, and at what?"}, "What", "question word"),
        ({"problem": "When does she say how?"}, "How", "question word"),
        ({"problem": "Which one, and when?"}, "When", "question word"),
        ({"problem": "Whose hat is it?"}, "Who/Which", "question word"),
        ({"problem": "WHEN does he stop?"}, "When", "question word"),
        ({"problem": "Where is the showman?"}, "How", "question word"),
        ({"problem": "Does the somewhat tired man agree?"}, "What", "question word"),
        ({"problem": "Where is he? Does he agree?"}, "Other", "question word"),
    ],
)
def test_intentbench_goes_by_type_then_problem_type_then_question_word(fields, column, rule):
    assert benchmarks.intent_column(benchmark_record(1, **fields)) == (column, rule)


def test_intentbench_columns():
    records = [
        benchmark_record(1, {"Type": "Why"}),
        benchmark_record(0, {"Type": "Why"}),
        benchmark_record(0.5, problem_type="emer_ov_mc"),
        benchmark_record(1, problem_type="judge"),
        benchmark_record(1, problem="How so?"),
        benchmark_record(None, {"Type": "Why"}),
    ]
    paper = columns("intentbench", records)["paper"]
    assert list(paper) == ["Why", "How", "What", "When", "Who/Which", "Other", "Emotion", "Deception", "Avg"]
    assert paper["Why"] == (0.5, 2) and paper["Emotion"] == (0.5, 1) and paper["What"] == (None, 0)
    assert paper["Avg"] == (0.7, 5)  # over questions: a mean of columns would be 0.75; the unanswered one is left out
    text = render("intentbench", records)
    assert "Columns by: Type (3 questions), problem type (2 questions), question word (1 questions)" in text


def test_daily_omni_columns():
    records = [
        benchmark_record(1, {"Type": "Context Understanding", "video_duration": "30s", "video_category": "Comedy"}),
        benchmark_record(0, {"Type": "Context understanding", "video_duration": "60s", "video_category": "Comedy"}),
        benchmark_record(0, {"Type": "Comparative", "video_duration": "60s", "video_category": "Autos"}),
        benchmark_record(1, {"Type": "A new type"}),
    ]
    tables = columns("daily-omni", records)
    assert tables["paper"]["Ctx"] == (0.5, 2) and tables["paper"]["Comp"] == (0, 1)
    assert tables["paper"]["30s"] == (1, 1) and tables["paper"]["60s"] == (0, 2) and tables["paper"]["Avg"] == (0.5, 4)
    assert list(tables["type"])[-2:] == ["Reasoning", "A new type"] and tables["type"]["A new type"] == (1, 1)
    assert tables["category"] == {"Autos": (0, 1), "Comedy": (0.5, 2), "(not given)": (1, 1)}
    assert tables["duration"]["(not given)"] == (1, 1)
    text = render("daily-omni", records)
    assert "by category" in text and "by type" in text  # the latter has a column that the paper's table hasn't
    assert "by type" not in render("daily-omni", records[:3])


def test_worldsense_columns_and_audio_classes_of_several_labels():
    music = {"domain": "Music", "task_domain": "Reasoning", "task_type": "Causal", "duration": "<1min"}
    records = [
        benchmark_record(1, music | {"audio_class": ["Speech", "Music"]}),
        benchmark_record(0, music | {"audio_class": ["Music"]}),
        benchmark_record(1, {"domain": "Tech and science", "duration": ">8min", "audio_class": "event"}),
        benchmark_record(0, {"audio_class": ["Music", "Music"]}),
        benchmark_record(1, {"audio_class": []}),
    ]
    tables = columns("worldsense", records)
    assert list(tables) == ["paper", "domain", "task domain", "task type", "duration", "audio class", "letters"]
    assert list(tables["paper"]) == ["Tech", "Cult", "Daily", "Film", "Perf", "Games", "Sports", "Music", "Avg"]
    assert tables["paper"]["Music"] == (0.5, 2) and tables["paper"]["Tech"] == (1, 1)
    assert tables["paper"]["Avg"] == (0.6, 5)
    assert tables["audio class"] == {
        "Speech": (1, 1),
        "Event": (1, 1),
        "Music": (pytest.approx(1 / 3), 3),
        "(not given)": (1, 1),
    }
    assert tables["duration"]["<1min"] == (0.5, 2) and tables["duration"][">8min"] == (1, 1)
    assert tables["task domain"]["Reasoning"] == (0.5, 2) and tables["task domain"]["Recognition"] == (None, 0)
    assert tables["task type"] == {"Causal": (0.5, 2), "(not given)": (pytest.approx(2 / 3), 3)}
    assert groups("worldsense", records)["paper"]["Music"] == records[:2]


# ---- letters ----


@pytest.mark.parametrize(
    "text, strict, lenient",
    [
        ("B", "B", "B"),
        (" b. words", "B", None),
        ("C. a cat", "C", "C"),
        ("(B)", None, "B"),
        ("", None, None),
        ("The answer is B", None, "B"),
        ("The best answer is: D.", None, "D"),
        ("Answer: C", "A", "C"),
        ("a", "A", None),
        ("Best answer: C", "B", "C"),
        ("The correct option is C", None, "C"),
        ("I think it is D", None, "D"),
        ("system\nYou\nassistant\nD", "D", "D"),
        ("none of them fits what one can see and hear here", None, None),
    ],
)
def test_letters_by_the_official_rules(text, strict, lenient):
    assert (strict_letter(text), lenient_letter(text)) == (strict, lenient)


def test_both_letter_scores_are_over_the_multiple_choice_questions():
    records = [
        benchmark_record(1, answer="B"),
        benchmark_record(1, answer="(B)"),
        benchmark_record(0, answer="C"),
        benchmark_record(1, answer="No", problem_type="judge"),
        benchmark_record(None, answer=None, completion=None, error="no file"),
        benchmark_record(1, answer=None, completion="B it is"),
        benchmark_record(0.5, samples=[{"answer": "b", "completion": ""}, {"answer": "D", "completion": ""}]),
    ]
    letters = columns("intentbench", records)["letters"]
    assert letters == {"strict": (0.5, 5), "lenient": (0.6, 5)}
    assert render("intentbench", records).endswith(
        "5 multiple choice questions: "
        "strict (Daily-Omni's 2025 script for Qwen2.5-Omni) 50.00, lenient (WorldSense's) 60.00"
    )


# ---- the toy's ----


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("toy") / "world"
    toy.build_world(folder, seed=3, train_clips=4, rl_clips=4, eval_clips=40, sft_samples=200)
    return folder


def test_the_toy_writes_itself_out_in_the_published_layouts(world):
    questions = {r["id"]: r for r in json.loads((world / "eval.json").read_text())}
    samples = {name: read_benchmark(name, world / name) for name in PUBLISHED}
    assert {name: len(found) for name, found in samples.items()} == {
        "intentbench": 120,
        "daily-omni": 32,
        "worldsense": 32 + 24,
    }  # webm clips only in IntentBench
    for sample in samples["intentbench"]:
        original = questions[sample.id]
        assert (sample.problem, sample.problem_type) == (original["problem"], original["problem_type"])
        assert sample.solution in original["solution"]
    assert {len(s.options) for s in samples["worldsense"]} == {3, 4}
    for found in samples.values():
        assert all(os.path.isfile(s.paths["video"]) for s in found)
        assert read_media(found[0].paths["video"], fps=8.0, max_frames=8).audio is not None
    link = next((world / "worldsense" / "videos").iterdir())
    assert not os.path.isabs(os.readlink(link)) and link.resolve().parent == (world / "clips").resolve()


def test_the_toy_fills_the_paper_s_columns(world):
    for name in PUBLISHED:
        records = [
            benchmark_record(1, s.extra, s.problem, s.problem_type, solution=s.solution)
            for s in read_benchmark(name, world / name)
        ]
        assert all(count for _, count in columns(name, records)["paper"].values()), name


@pytest.mark.parametrize("name", PUBLISHED)
def test_toy_configs_and_prepare(name, tmp_path, monkeypatch):
    config = load_config(EvalConfig, f"configs/toy/eval_{name}.json")
    assert (config.benchmark, config.benchmark_root) == (name, str(toy.WORLD / name))
    built = []
    monkeypatch.setattr(toy.run, "ROOT", tmp_path / "toy")
    monkeypatch.setattr(toy.run, "WORLD", tmp_path / "toy" / "world")
    monkeypatch.setattr(toy.run, "build_world", lambda: built.append("world"))
    monkeypatch.setattr(toy.run, "run_script", lambda *_: None)
    config.benchmark_root = str(tmp_path / "elsewhere" / name)
    toy.prepare(config)
    assert not built
    config.benchmark_root = str(tmp_path / "toy" / "world" / name)
    toy.prepare(config)
    assert built == ["world"]
