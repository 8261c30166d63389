"""Published training sets, in miniature and in their published layout, read as samples."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from hov2.config import EvalConfig, GRPOConfig, SFTConfig, Source
from hov2.config_io import load_config
from hov2.data import formats
from hov2.data.formats import DataError
from hov2.data.media import read_media
from hov2.data.samples import read_samples
from tests.support.helpers import synth_clip

CONFIGS = Path(__file__).parents[2] / "configs"
FULL = "<context>She smiles.</context><think>So she is glad.</think><answer>{}</answer>"


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")
    return str(path)


def read(path, name, **entry):
    return read_samples([Source(str(path), format=name, **entry)])


def refused(path, name, **entry):
    with pytest.raises(DataError) as error:
        read(path, name, **entry)
    return str(error.value)


# ---- HumanOmniV2 ----


def emer(number):
    name = f"MER24/sample_{number:08d}.mp4"
    return {
        "problem": "What emotions did the doctor initially display?",
        "problem_type": "emer_ov_mc",
        "options": ["A. Urgent", "B. Happy", "C. Relaxed", "D. Understanding", "E. Admiration", "F. Approve"],
        "solution": FULL.format("B,C"),
        "answer": "B,C",
        "data_type": "video",
        "clean_list": ["Relaxed", "Happy"],
        "video": name,
        "path": name,
    }


def social_iq(number):
    return {
        "problem": "Why does she laugh?",
        "problem_type": "multiple choice",
        "options": ["A. joy", "B. fear", "C. scorn", "D. habit"],
        "solution": FULL.format("A"),
        "answer": "A",
        "data_type": "video",
        "path": f"social_iq/clip{number}_ot2mU.mp4",
    }


def rewritten(number):
    if number % 2:
        return {
            "problem": "How many bars are there?",
            "problem_type": "numerical",
            "answer": "3",
            "data_type": "image",
            "path": f"Video-R1-data/Chart/{number}.png",
            "solution": FULL.format("3"),
        }
    return {
        "problem": "What falls?",
        "problem_type": "free-form",
        "answer": "a cup",
        "data_type": "video",
        "path": f"./Video-R1-data/CLEVRER/{number}.mp4",
        "solution": FULL.format("a cup"),
        "options": None,
    }


def intent_train(folder, counts=(3, 2, 5)):
    for name, make, count in zip(formats.INTENT_TRAIN, (emer, social_iq, rewritten), counts):
        write(folder / name, [make(number) for number in range(count)])
    return folder


def test_humanomniv2_file_and_folder(tmp_path):
    folder = intent_train(tmp_path / "IntentTrain")
    first, *_ = read(folder / "emer_rewrite.json", "humanomniv2")
    assert first.id == "emer_rewrite.json:1" and first.solution == FULL.format("B,C") and len(first.options) == 6
    assert first.paths == {"video": str(folder / "MER24/sample_00000000.mp4")}
    assert first.extra == {"answer": "B,C", "clean_list": ["Relaxed", "Happy"]}
    samples = read(folder, "humanomniv2")
    assert [sample.id for sample in samples][2:6] == [
        "emer_rewrite.json:3",
        "social_iq_v2_rewrite.json:1",
        "social_iq_v2_rewrite.json:2",
        "Video-R1_rewrite.json:1",
    ]
    assert [sample.paths for sample in samples[-2:]] == [
        {"image": str(folder / "Video-R1-data/Chart/3.png")},
        {"video": str(folder / "Video-R1-data/CLEVRER/4.mp4")},
    ]
    assert len(read(folder, "humanomniv2", slice="last:50%")) == 5
    (folder / "Video-R1_rewrite.json").unlink()
    assert f"{folder}: the folder has no Video-R1_rewrite.json" in refused(folder, "humanomniv2")


def test_humanomniv2_videos_where_the_archive_unpacks_them(tmp_path):
    folder = intent_train(tmp_path)
    (folder / "videos/MER24").mkdir(parents=True)
    samples = read(folder, "humanomniv2")
    assert samples[0].paths == {"video": str(folder / "videos/MER24/sample_00000000.mp4")}
    assert samples[3].paths == {"video": str(folder / "social_iq/clip0_ot2mU.mp4")}  # as the file says
    (tmp_path / "media").mkdir()
    elsewhere = read(folder / "emer_rewrite.json", "humanomniv2", media_root=str(tmp_path / "media"))
    assert elsewhere[0].paths == {"video": str(tmp_path / "media/MER24/sample_00000000.mp4")}


def test_humanomniv2_with_video_alone_or_two_files(tmp_path):
    record = {key: value for key, value in emer(0).items() if key != "path"}
    both = social_iq(0) | {"path": {"image": "i.jpg", "audio": "a.wav"}, "data_type": "image"}
    first, second = read(write(tmp_path / "x.json", [record, both]), "humanomniv2")
    assert first.paths == {"video": str(tmp_path / "MER24/sample_00000000.mp4")}
    assert second.paths == {"image": str(tmp_path / "i.jpg"), "audio": str(tmp_path / "a.wav")}
    path = write(tmp_path / "x.json", [emer(0) | {"path": None, "video": None}])
    assert refused(path, "humanomniv2").startswith(f"{path}: record 1: path: expected a file, got None")


def test_stages_share_no_sample(tmp_path):
    """The shipped configs' slices of files with odd counts; and every count up to 40. Stage 2 takes what its difficulty
    filter leaves of the filter's own slices."""
    filtered = load_config(EvalConfig, CONFIGS / "filter_stage2.json")
    stages = [load_config(SFTConfig, CONFIGS / "stage1.json"), filtered]
    stage2 = load_config(GRPOConfig, CONFIGS / "stage2.json")
    assert [source.path for source in stage2.data] == [filtered.filter.output]
    assert all(source.format == "humanomniv2" for stage in stages for source in stage.data)
    folder = intent_train(tmp_path, (7, 13, 19))
    ids = []
    for stage in stages:
        sources = [replace(source, path=str(folder / Path(source.path).name)) for source in stage.data]
        ids.append([sample.id for sample in read_samples(sources, stage.seed)])
    assert (len(ids[0]), len(ids[1])) == (3 + 6 + 5, 3 + 6 + 13) and not set(ids[0]) & set(ids[1])
    for count in range(4, 40):  # fewer leave a slice of 30% without a sample
        path = write(tmp_path / "n.json", [rewritten(number) for number in range(count)])
        last, first = (
            {sample.id for sample in read(path, "humanomniv2", slice=slice_)} for slice_ in ("last:30%", "first:70%")
        )
        assert not last & first and len(last) + len(first) >= count - 1


# ---- Video-R1, AVQA-R1-6K ----


def video_r1(**fields):
    return {
        "problem_id": 2,
        "problem": "What appears on the screen?",
        "data_type": "video",
        "problem_type": "multiple choice",
        "options": ["A. a notification", "B. a command"],
        "solution": "<answer>A</answer>",
        "path": "./LLaVA-Video-178K/academic/1.mp4",
        "data_source": "LLaVA-Video-178K",
        **fields,
    }


def test_video_r1_rl_and_cot(tmp_path):
    image = video_r1(
        problem_type="numerical",
        options=[],
        data_type="image",
        path="./Chart/1.png",
        process="",
        solution="<answer>5</answer>",
    )
    rl = read(write(tmp_path / "Video-R1-260k.json", [video_r1(), image]), "video-r1")
    assert rl[0].paths == {"video": str(tmp_path / "LLaVA-Video-178K/academic/1.mp4")}
    assert rl[0].extra == {"problem_id": 2, "data_source": "LLaVA-Video-178K"}
    assert (rl[0].id, rl[0].solution) == ("Video-R1-260k.json:1", "<answer>A</answer>")
    assert (rl[1].options, rl[1].solution, rl[1].media_kinds) == (None, "<answer>5</answer>", ("image",))
    thought = "<think>Let me think, <answer>B</answer>? No.</think>"
    (cot,) = read(write(tmp_path / "Video-R1-COT-165k.json", [video_r1(process=thought)]), "video-r1")
    assert cot.solution == f"{thought}\n<answer>A</answer>" and "process" not in cot.extra
    path = write(tmp_path / "x.json", [video_r1(process="no tags")])
    message = refused(path, "video-r1")
    assert message.startswith(f"{path}: record 1: process: expected <think>...</think>, got 'no tags'")
    path = write(tmp_path / "x.json", [video_r1(process=thought, solution=None)])
    assert refused(path, "video-r1").startswith(f"{path}: record 1: solution: expected text, got None")


def test_bad_records_are_an_error_or_left_out(tmp_path):
    records = [video_r1(), video_r1(solution="<answer>?</answer>"), video_r1(), video_r1(), "text"]
    path = write(tmp_path / "x.json", records)
    message = refused(path, "video-r1")
    assert message.startswith(f"{path}: record 2: solution ") and "2 of 5 records can't be used" in message
    assert 'on_bad_record: "skip"' in message
    with pytest.warns(UserWarning, match=r"x\.json: 2 of 5 records left out; first: .*record 2: solution"):
        kept = read(path, "video-r1", on_bad_record="skip")
    assert [sample.id for sample in kept] == ["x.json:1", "x.json:3", "x.json:4"]
    with pytest.warns(UserWarning, match="1 of 2 records left out"):
        first, last = (read(path, "video-r1", on_bad_record="skip", slice=text) for text in ("first:2", "last:2"))
    assert ([s.id for s in first], [s.id for s in last]) == (["x.json:1"], ["x.json:4"])  # places are the file's


def test_avqa_r1(tmp_path):
    record = {
        "problem_id": 12,
        "problem": "What is the main source of sound?",
        "data_type": "image_audio",
        "problem_type": "multiple choice",
        "options": ["A. cat", "B. dog", "C. train", "D. rain"],
        "solution": "<answer>C</answer>",
        "data_source": "OmniInstruct_v1-AVQA",
        "path": {"image": "images/sample_12.jpg", "audio": "audios/sample_12.wav"},
    }
    split = tmp_path / "AVQA_R1/train"
    (sample,) = read(write(split / "omni_rl_format_train.json", [record]), "avqa-r1")
    assert sample.paths == {"image": str(split / "images/sample_12.jpg"), "audio": str(split / "audios/sample_12.wav")}
    assert sample.media_kinds == ("image", "audio") and sample.options[2] == "C. train"
    path = write(split / "x.json", [record | {"path": {"image": "a.jpg"}}])
    assert refused(path, "avqa-r1").startswith(f"{path}: record 1: path: expected an object with image and audio")


def test_unknown_format(tmp_path):
    assert refused(tmp_path, "video-r2").startswith(f"{tmp_path}: unknown format 'video-r2'; known: hov2, humanomniv2")


# ---- OmniInstruct ----


@pytest.fixture
def omni(tmp_path):
    """Writes a parquet file of the published columns; each row's image and sound are real ones."""
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    image, sound = (Path(synth_clip(tmp_path / name)).read_bytes() for name in ("i.png", "s.wav"))

    def make(rows, name="train-00000-of-00001.parquet"):
        (tmp_path / "data").mkdir(exist_ok=True)
        rows = [
            {"image": {"bytes": image, "path": "i.png"}, "audio": {"bytes": sound, "path": "s.wav"}, **row}
            for row in rows
        ]
        parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "data" / name)
        return str(tmp_path / "data" / name)

    return make


def test_omniinstruct_without_options(omni, tmp_path, monkeypatch):
    row = {"answer": "a train", "category_id": 4, "id": 17, "question": "What rings?", "video_id": 9, "category": "x"}
    path = omni([row, row | {"answer": "a bell"}])
    first, second = read(path, "omniinstruct")
    media = tmp_path / "data/train-00000-of-00001.media"
    assert first.paths == {"image": str(media / "000001.jpg"), "audio": str(media / "000001.wav")}
    assert (first.problem_type, first.options, second.solution) == ("free-form", None, "<answer>a bell</answer>")
    assert first.extra == {"answer": "a train", "category_id": 4, "video_id": 9, "category": "x"}
    assert first.id == "train-00000-of-00001.parquet:1" and first.problem == "What rings?"
    assert read_media(first.paths["image"]).frames.shape == (1, 3, 56, 56)  # PNG bytes under the name .jpg
    assert len(read_media(first.paths["audio"]).audio) == 16000
    assert sorted(file.name for file in media.iterdir()) == [
        "000001.jpg",
        "000001.wav",
        "000002.jpg",
        "000002.wav",
        "unpacked.json",
    ]

    with monkeypatch.context() as patched:  # a second reading writes nothing
        patched.setattr(formats, "_unpack", lambda *args: pytest.fail("unpacked again"))
        assert read(path, "omniinstruct") == [first, second]
    omni([row])  # another file of the same name: unpacked anew
    assert len(read(path, "omniinstruct")) == 1
    other = read(path, "omniinstruct", media_root=str(tmp_path / "cache"))
    assert Path(other[0].paths["image"]).is_relative_to(tmp_path / "cache") and Path(other[0].paths["image"]).is_file()


def test_omniinstruct_v1(omni):
    samples = [0.5] * 800
    row = {"answer": "dog", "options": ["cat", "dog", "rain"], "source": "AVQA", "question": "Who barks?"}
    arrays = {"audio": {"array": samples, "sampling_rate": 8000}}
    (sample,) = read(omni([row]), "omniinstruct")
    assert sample.options == ("A. cat", "B. dog", "C. rain") and sample.solution == "<answer>B</answer>"
    assert sample.problem_type == "multiple choice" and sample.extra == {"answer": "dog", "source": "AVQA"}
    (decoded,) = read(omni([row | arrays], "decoded.parquet"), "omniinstruct")
    sound = read_media(decoded.paths["audio"]).audio
    assert len(sound) == 1600 and abs(float(sound[800]) - 0.5) < 0.01


def test_omniinstruct_parts_are_one_data_set(omni, tmp_path):
    for part in range(3):
        omni([{"answer": f"{part}", "question": "q"}] * 3, f"train-{part:05d}-of-00003.parquet")
    omni([{"answer": "no", "question": "q"}], "valid-00000-of-00001.parquet")
    samples = read(tmp_path / "data/train-*.parquet", "omniinstruct", slice="first:50%")
    assert [sample.extra["answer"] for sample in samples] == ["0", "0", "0", "1"]
    assert "no file matches" in refused(tmp_path / "data/test-*.parquet", "omniinstruct")


def test_omniinstruct_bad_rows_and_files(omni, tmp_path):
    good = {"answer": "dog", "options": ["cat", "dog"], "question": "q"}
    for change, message in [
        ({"answer": "cow"}, "answer: 'cow' is none of the options"),
        ({"answer": None}, "answer: expected text, got None"),
        ({"question": " "}, "problem: expected text, got ' '"),
        ({"audio": None}, "audio: the parquet file doesn't hold it"),
        ({"image": {"bytes": None, "path": "i.png"}}, "image: the parquet file doesn't hold it"),
    ]:
        path = omni([good, good | change])
        for _ in range(2):  # also when it is unpacked already
            assert refused(path, "omniinstruct").startswith(f"{path}: record 2: {message}")
        with pytest.warns(UserWarning, match="1 of 2 records left out"):
            assert len(read(path, "omniinstruct", on_bad_record="skip")) == 1
    path = omni([{"question": "q", "reply": "a"}])
    assert refused(path, "omniinstruct").startswith(f"{path}: no column 'answer'; there are: image, audio, question")
    (tmp_path / "data/text.parquet").write_text("text")
    for name in ("text.parquet", "none.parquet"):
        assert refused(tmp_path / "data" / name, "omniinstruct").startswith(f"{tmp_path}/data/{name}: can't be read: ")


def test_omniinstruct_without_pyarrow(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    message = refused(tmp_path / "x.parquet", "omniinstruct")
    assert message == f"{tmp_path}/x.parquet: parquet needs pyarrow, which isn't installed (pip install pyarrow)"
