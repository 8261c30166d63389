"""The embedded default: a small social world, a judge for it, and `python -m hov2.toy`, the whole method on a CPU.

A clip is a second of a drawn face before a coloured wall, with a voice-like tone; real mp4 and webm files. The face
smiles or frowns, the tone rises or falls, and what the speaker means follows from the two together: neither picture
nor sound can tell alone. All problem types are asked; multiple choice, judge and emer_ov_mc are the ones that count.

The cold start's solutions have two flaws on purpose, each in most samples and independent of the other:
- the context calls the wall plain instead of naming its colour (a cue is left out; no answer depends on it);
- reasoning and answer follow a shortcut, judging by the face alone.
So after stage 1 the greedy model has both bad habits. The accuracy reward can mend the second, but only the context
reward sees the first: without the judge's rewards it stays (`--no-judge-rewards`). Questions of the type judge, whose
shortcut is the strongest habit, are left for stage 3.

`RuleJudge` is no language model: it counts words. It stands in for one so that the real client asks a real HTTP server.

    python -m hov2.toy [--seed N] [--quick] [--no-judge-rewards]
"""

import json
import os
import random
import re
import shutil
import socket
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import av
import numpy as np
import torch
from tqdm import tqdm
from transformers import Qwen2_5OmniThinkerConfig, Qwen2_5OmniThinkerForConditionalGeneration, Qwen2Tokenizer

from hov2.answers import block_text
from hov2.config import Source
from hov2.data.samples import read_samples
from hov2.evaluation.results import mean
from hov2.prompts import load_prompts, render

ROOT = Path("runs/toy")  # the configs in configs/toy name the same places
WORLD = ROOT / "world"
CONFIGS = Path("configs/toy")
SCRIPTS = {"stage1": "train_sft.py", "stage2": "train_grpo.py", "stage3": "train_grpo.py"}
FILTERED = {"stage2": ROOT / "filter_stage2/kept.jsonl", "stage3": ROOT / "filter_stage3/kept.jsonl"}
EVAL_FILES = [WORLD / "eval.json", WORLD / "swapped_sound.json", WORLD / "swapped_picture.json"]
PROCESSES = 2
QUICK_WORLD = {"train_clips": 128, "rl_clips": 32, "eval_clips": 32}
QUICK_STEPS = {"stage1": 60, "stage2": 4, "stage3": 3}

# "signs": rows of dots; "questions": by problem type, with the answer by face and voice, and "reasons" of the whole and
# of the shortcut, worded apart so that one habit can change without the other; "codecs": {ending: video codec and its
# options, audio codec}; "benchmarks": how the questions are copied in the benchmarks' layouts, with labels in turn, as
# the toy has no like of them; "judge": the words that its rules know; "model": the thinker's config, whose towers tell
# faces and tones apart the better for large weights (0.15); "token ids": the tokens that it names.
DATA = json.loads(Path(__file__).with_name("toy.json").read_text(encoding="utf-8"))
WALLS, QUESTIONS, CODECS = DATA["walls"], DATA["questions"], DATA["codecs"]
FACES, VOICES, SIGNS = ("smile", "frown"), ("rising", "falling"), tuple(DATA["signs"])
SENSES = ("sound", "picture")
SCORES = ("accuracy", "format", "context")
FRAMES, FPS, SIZE, RATE, SECONDS = 8, 8, 56, 16000, 0.4

MAIN_TYPES = ("multiple choice", "judge", "emer_ov_mc")
OTHER_TYPES = tuple(kind for kind in QUESTIONS if kind not in MAIN_TYPES)
PLAIN_WALL = 0.8  # share of the cold start's contexts that leave the wall's colour out
SHORTCUT = {"multiple choice": 0.6, "emer_ov_mc": 0.6, "judge": 0.85}  # share of its answers that go by the face alone


# ---------------------------------------------------------------------------------------------- clips


def draw_clip(face, wall, sign, rng):
    """Frames (FRAMES, SIZE, SIZE, 3) uint8: the mouth takes its shape in the first half; place, size, colours vary."""
    y, x = np.mgrid[0:SIZE, 0:SIZE].astype(np.float32)
    ramp = np.stack([x - SIZE / 2, 0 * x, y - SIZE / 2], -1)  # without it, tokens of a plain wall look alike everywhere
    room = np.array(WALLS[wall]) + rng.normal(0, 8, 3) + ramp
    dots = np.array([list(row) for row in DATA["signs"][sign]]) == "1"
    room[SIZE - 12:SIZE - 2, 2:16][dots.repeat(2, 0).repeat(2, 1)] = 245
    (cx, cy), r = SIZE / 2 + rng.uniform(-3, 3, 2), rng.uniform(20, 24)
    skin = np.array([220, 180, 140]) * rng.uniform(0.75, 1.1) + rng.normal(0, 8, 3)
    room[(x - cx) ** 2 + (y - cy) ** 2 < r * r] = skin
    for side in (-1, 1):
        room[(x - cx - side * 0.38 * r) ** 2 + (y - cy + 0.3 * r) ** 2 < (0.13 * r) ** 2] = 25
    bend, u, frames = rng.uniform(0.35, 0.5) * r * (1 if face == "smile" else -1), (x - cx) / (0.55 * r), []
    for t in range(FRAMES):
        middle = cy + 0.45 * r + bend * (0.5 + 0.5 * min(1, 2 * t / FRAMES)) * (0.5 - u * u)
        mouth = (abs(u) < 1) & (abs(y - middle) < 0.14 * r)
        frame = np.where(mouth[..., None], (110, 20, 30), room) + rng.normal(0, 6, room.shape)
        frames.append(frame.clip(0, 255).astype(np.uint8))
    return np.stack(frames)


def speak(voice, rng):
    """SECONDS of a tone with harmonics, float32 at RATE, whose pitch rises or falls by more than half."""
    t = np.arange(int(RATE * SECONDS)) / RATE
    way = t / SECONDS if voice == "rising" else 1 - t / SECONDS
    phase = 2 * np.pi * np.cumsum(rng.uniform(170, 240) * rng.uniform(1.5, 1.8) ** way) / RATE
    tilt = rng.uniform(0.8, 1.6)
    wave = sum(np.sin(h * phase + rng.uniform(0, 6)) / h**tilt for h in range(1, 11))
    wave *= np.minimum(1, np.minimum(t, SECONDS - t) / 0.04)
    wave *= rng.uniform(0.2, 0.35) / abs(wave).max()
    return (wave + rng.normal(0, 0.003, len(t))).astype(np.float32)


def write_clip(path, frames, wave):
    """Encodes frames and sound to `path`; the ending, mp4 or webm, decides how."""
    video_codec, options, audio_codec = CODECS[path.suffix[1:]]
    with av.open(str(path), "w") as container:
        video = container.add_stream(video_codec, rate=FPS, options=options)
        video.width, video.height, video.pix_fmt, video.codec_context.thread_count = SIZE, SIZE, "yuv420p", 1
        audio = container.add_stream(audio_codec, rate=RATE, layout="mono")
        for image in frames:
            container.mux(video.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(video.encode(None))
        sound = av.AudioFrame.from_ndarray(wave[None], format="fltp", layout="mono")
        sound.sample_rate, sound.pts = RATE, 0
        container.mux(audio.encode(sound))
        container.mux(audio.encode(None))


# ---------------------------------------------------------------------------------------------- questions


def make_clip(split, number, rng):
    """A clip's description: every combination of face, voice, wall, sign and container comes equally often in 64.

    `picture` and `sound` are the seeds that the rest of either is drawn from.
    """
    container, sign, wall, voice, face = np.unravel_index(number % 64, (2, 2, 4, 2, 2))
    return {"name": f"{split}-{number:04d}.{list(CODECS)[container]}", "face": FACES[face], "voice": VOICES[voice],
            "wall": list(WALLS)[wall], "sign": SIGNS[sign], "picture": rng.randrange(2**31),
            "sound": rng.randrange(2**31)}


def true_answer(kind, clip, voice=None):
    """The right answer to the question of type `kind`; `voice` replaces the clip's own (the shortcut's view)."""
    return QUESTIONS[kind]["answers"][clip["face"]][voice or clip["voice"]].format(**clip)


def solution(kind, clip, plain_wall=False, shortcut=False):
    """A completion for the clip's question; the two flags put in the cold start's flaws."""
    face, voice, question = clip["face"], clip["voice"], QUESTIONS[kind]
    answer = true_answer(kind, clip, voice=VOICES[FACES.index(face)] if shortcut else None)
    options = dict(option.split(". ") for option in question["options"] or ())
    claim = " and ".join(options[letter] for letter in answer.split(",")) if options else answer
    reason = question["reasons"][shortcut].format(**clip)
    context = f"A {face}, a {voice} voice, a {'plain' if plain_wall else clip['wall']} wall."
    return f"<context>{context}</context><think>{reason}: {claim}.</think><answer>{answer}</answer>"


def record(kind, clip, **flaws):
    """A sample in the project's data format; its id is made of the clip and the type."""
    question = QUESTIONS[kind]
    return {"id": f"{clip['name']}/{kind}", "problem": question["problem"], "problem_type": kind,
            "options": question["options"],
            "solution": solution(kind, clip, **flaws), "data_type": "video", "path": f"clips/{clip['name']}"}


def sft_records(clips, count, rng):
    """The cold start: `count` samples, flawed, one in seven of another type than the main ones."""
    records = []
    for i in range(count):
        kind = rng.choice(OTHER_TYPES if i % 7 == 0 else MAIN_TYPES)
        records.append(record(kind, clips[i % len(clips)], plain_wall=rng.random() < PLAIN_WALL,
                              shortcut=rng.random() < SHORTCUT.get(kind, 0)))
    return records


def rl_records(clips):
    """For RL, without flaws: the first half asks for intents and feelings, the second mostly what that left out, judge.

    Two questions about each clip in each half; one in twenty is of another type than the main ones.
    """
    halves = [("multiple choice", "emer_ov_mc"), ("judge", "judge", "judge", "multiple choice", "emer_ov_mc")]
    records = []
    for types in halves:
        for i, clip in enumerate(clips + clips):
            kind = types[(i + i // len(clips)) % len(types)] if i % 20 else OTHER_TYPES[i // 20 % len(OTHER_TYPES)]
            records.append(record(kind, clip))
    return records


def swapped(clips, sense):
    """Each clip with the sound, or the picture, of the next clip whose voice, or face, has the other value."""
    taken = {"sound": ("voice", "sound"), "picture": ("face", "wall", "sign", "picture")}[sense]
    others = []
    for i, clip in enumerate(clips):
        partner = next(other for other in clips[i:] + clips[:i] if other[taken[0]] != clip[taken[0]])
        others.append(clip | {key: partner[key] for key in taken} | {"name": f"swapped-{sense}-{clip['name']}"})
    return others


# ---------------------------------------------------------------------------------------------- building


def build_world(folder=WORLD, seed=0, *, train_clips=384, rl_clips=96, eval_clips=144, sft_samples=7680):
    """Writes clips, data files and the untrained model with its tokenizer to `folder`; equal seeds give equal worlds.

    Data: train_sft.json, train_sft_no_context.json (the same without contexts), train_rl.json, eval.json,
    swapped_sound.json and swapped_picture.json (the intent questions of eval.json, with the sound or the picture of a
    clip that has the other voice or face). `world.json` is written last.
    """
    folder, rng = Path(folder), random.Random(seed)
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "clips").mkdir(parents=True)
    train, rl, held_out = ([make_clip(split, i, rng) for i in range(count)] for split, count in
                           (("train", train_clips), ("rl", rl_clips), ("eval", eval_clips)))
    swaps = {sense: swapped(held_out, sense) for sense in SENSES}
    others = [record(OTHER_TYPES[i % len(OTHER_TYPES)], clip) for i, clip in enumerate(held_out[:60])]
    files = {
        "train_sft": sft_records(train, sft_samples, rng),
        "train_rl": rl_records(rl),
        "eval": [record(kind, clip) for kind in MAIN_TYPES for clip in held_out] + others,
        **{f"swapped_{sense}": [record("multiple choice", clip) for clip in clips] for sense, clips in swaps.items()},
    }
    files["train_sft_no_context"] = [r | {"solution": r["solution"].split("</context>")[1]} for r in files["train_sft"]]
    for name, records in files.items():
        (folder / f"{name}.json").write_text(json.dumps(records, indent=0))
    for clip in tqdm([*train, *rl, *held_out, *swaps["sound"], *swaps["picture"]], desc="toy world", unit="clip"):
        frames = draw_clip(clip["face"], clip["wall"], clip["sign"], np.random.default_rng(clip["picture"]))
        write_clip(folder / "clips" / clip["name"], frames, speak(clip["voice"], np.random.default_rng(clip["sound"])))
    samples = read_samples([Source(str(folder / f"{name}.json")) for name in ("train_sft", "eval")])
    prompts = load_prompts(CONFIGS / "prompts.json")
    texts = [sample.solution for sample in samples] + [render(prompts.chat(sample)) for sample in samples]
    tokenizer = make_tokenizer(texts)
    tokenizer.save_pretrained(folder / "model")
    make_thinker(tokenizer, seed).save_pretrained(folder / "model")
    write_benchmarks(folder, files["eval"])
    (folder / "world.json").write_text(json.dumps({"seed": seed}))


def write_benchmarks(folder, records):
    """Writes the main ones of `records` once more in the layouts of IntentBench, Daily-Omni, WorldSense.

    toy.json describes them. In each folder are links to the world's clips; WorldSense asks some questions again with
    three options.
    """
    questions = []
    for r in records:
        answer, clip = block_text(r["solution"], "answer"), Path(r["path"])
        questions.append(r | {"answer": answer, "solution": f"<answer>{answer}</answer>",
                              "clip": clip.name, "stem": clip.stem})
    for name, layout in DATA["benchmarks"].items():
        root, chosen = folder / name, [r for r in questions if r["problem_type"] in layout["types"]
                                       and r["clip"].endswith(tuple(layout["formats"]))]
        content = [_entry(layout, number, r) for number, r in enumerate(chosen)]
        for place, clip in {layout["clip"].format(**r): r["path"] for r in chosen}.items():
            link = root / place
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(os.path.relpath(folder / clip, link.parent))
        if "task" in layout:
            content = {entry["video_id"]: entry for entry in content}
        (root / layout["file"]).write_text(json.dumps(content, indent=0))


def _entry(layout, number, r):
    """Question `r` with a benchmark's own fields and labels; each label goes to four at a time, of the four intents."""
    entry = {theirs: r[ours] for theirs, ours in layout["fields"].items()}
    if r["problem_type"] == "multiple choice":
        labels = {key: values[number // 4 % len(values)] for key, values in layout["labels"].items()}
        entry |= {key: label for key, label in labels.items() if label}
    if "task" in layout:
        entry["task0"] = task = _entry(layout["task"], number, r)
        if r["answer"] != "D":
            entry["task1"] = task | {"candidates": r["options"][:3]}
    return entry


def make_tokenizer(texts, size=512):
    """A byte-level BPE tokenizer of Qwen's kind, with `size` tokens and merges learned from `texts`.

    As with Qwen's own, tags are ordinary text: they split over tokens and merge with their neighbours ("><", ">A").
    """
    names = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    plain = [re.sub(r"<\|\w+\|>", "\n", text) for text in texts]
    learned = Qwen2Tokenizer(vocab={"<|endoftext|>": 0}, merges=[], **names).train_new_from_iterator(plain, size)
    bpe = json.loads(learned.backend_tokenizer.to_str())["model"]
    tokenizer = Qwen2Tokenizer(vocab=bpe["vocab"], merges=[tuple(pair) for pair in bpe["merges"]],
                               extra_special_tokens=DATA["media tokens"], **names)
    tokenizer.add_tokens(["<|im_start|>", "<|im_end|>"], special_tokens=True)
    return tokenizer


def make_thinker(tokenizer, seed):
    """An untrained Qwen2.5-Omni-Thinker of about a million weights for this tokenizer.

    Its frozen towers are random too: what they put out still tells faces and tones apart.
    """
    ids = {name: tokenizer.convert_tokens_to_ids(token) for name, token in DATA["token ids"].items()}
    torch.manual_seed(seed)
    text_config = DATA["model"]["text_config"] | {"vocab_size": len(tokenizer)}
    config = Qwen2_5OmniThinkerConfig(**DATA["model"] | {"text_config": text_config}, **ids)
    return Qwen2_5OmniThinkerForConditionalGeneration(config)


# ---------------------------------------------------------------------------------------------- the judge

CUES = (set(FACES), set(VOICES), set(WALLS))
CLAIMS, SYNONYMS = set(DATA["judge"]["claims"]), [set(group) for group in DATA["judge"]["synonyms"]]


def rule_score(texts):
    """The score of the texts that a judge's message holds between its marks (prompts.py), {"reference": ...} and so on.

    context: 5 times the share of the reference's cues (face, voice, wall) that the candidate names, each without
    another of its kind. logic: a point each for naming a face, naming a voice, naming only cues that the description
    has, naming one of each kind at most, and reaching a claim. consistency: 5 times the share of the reference's words
    that the answer has. synonyms: pairs by a table. None for other texts.
    """
    words = {name: set(re.findall(r"\w+", text)) for name, text in texts.items()}
    match words:
        case {"reference": given, "candidate": found}:
            asked = [kind for kind in CUES if given & kind]
            return 5 * sum(found & kind == given & kind for kind in asked) / max(1, len(asked))
        case {"description": seen, "reasoning": thought}:
            faces, voices, walls = named = [thought & kind for kind in CUES]
            return sum([bool(faces), bool(voices), faces | voices | walls <= seen,
                        all(len(of_kind) < 2 for of_kind in named), bool(thought & CLAIMS)])
        case {"reference": given, "answer": said}:
            return 5 * len(given & said) / max(1, len(given))
        case {"first list": first, "second list": second}:
            return sum(min(len(first & group), len(second & group)) for group in SYNONYMS)
    return None


class RuleJudge(ThreadingHTTPServer):
    """A rule-based judge (no language model) behind an OpenAI-compatible HTTP server on loopback, in a thread.

    It serves until the process ends, or the block `with RuleJudge() as judge: judge.url`; port 0 takes a free one.
    """

    request_queue_size = 128  # a step's requests come at once

    def __init__(self, port=0):
        super().__init__(("127.0.0.1", port), _JudgeHandler)
        self.url = f"http://127.0.0.1:{self.server_port}/v1"
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def __exit__(self, *_):
        self.shutdown()
        self.server_close()


class _JudgeHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"  # keeps connections open
    wbufsize = -1  # headers and body in one packet

    def do_POST(self):
        """Answers a chat completion with a score; a question without texts (the client's first one) with 5."""
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        question = body["messages"][-1]["content"]
        texts = re.findall(r"^\[([^\]]+)\]\n(.*?)\n\[End of ", question, re.DOTALL | re.MULTILINE)
        score = rule_score({name.lower(): text for name, text in texts}) if texts else 5
        message = {"role": "assistant", "content": "no rule for this" if score is None else f"{score:.4g}"}
        reply = json.dumps({"model": "hov2-toy-rules", "choices": [{"message": message}]}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(reply)))
        self.end_headers()
        self.wfile.write(reply)

    def log_message(self, *_):
        """Quiet."""


# ---------------------------------------------------------------------------------------------- running


def prepare(config):
    """What the three scripts call first: if `config` reads the toy's data, makes what isn't there yet.

    That is the world, the judge (in this process), and the model of an earlier stage or the questions that the
    difficulty filter left, by running that stage or that filter.
    """
    read = [Path(source.path) for source in config.data] + [Path(getattr(config, "benchmark_root", None) or "")]
    if not any(path.is_relative_to(ROOT) for path in read):
        return
    if not (WORLD / "world.json").exists():
        print(f"the toy's world is not there: building it in {WORLD}", flush=True)
        build_world()
    if config.judge is not None and not _answers(config.judge.url):
        RuleJudge(urlsplit(config.judge.url).port)
        print(f"rule-based toy judge at {config.judge.url}", flush=True)
    makers = {ROOT / stage / "model": stage for stage in SCRIPTS}
    makers |= {path: f"filter_{stage}" for stage, path in FILTERED.items()}
    for path, step in makers.items():
        if path in (Path(config.model), *read) and not path.exists():
            print(f"{path} is not there: running {step} first", flush=True)
            run_script(step)


def _answers(url):
    parts = urlsplit(url)
    with socket.socket() as probe:
        return probe.connect_ex((parts.hostname, parts.port)) == 0


def run_script(step, settings=None, processes=PROCESSES, output=None):
    """Runs the script of a step with configs/toy/{step}.json and {option: value} `settings`.

    On so many processes of one thread; several run under torchrun. What is printed goes to the file `output`, if there
    is one. CalledProcessError if it fails.
    """
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    options = [f"{name}={json.dumps(value)}" for name, value in (settings or {}).items()]
    command = [sys.executable, *(torchrun if processes > 1 else []), SCRIPTS.get(step, "evaluate.py"),
               str(CONFIGS / f"{step}.json"), *options]
    subprocess.run(command, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=output, stderr=output)


def settings_of(step, variant, seed, quick, judge_url):
    """{option: value} of a step in a run with `seed`, at last what the `variant` ({step: settings}) sets."""
    settings = {"seed": seed} | ({} if step == "stage1" else {"judge.url": judge_url})
    if step == "eval":
        settings["data"] = [{"path": str(file)} for file in EVAL_FILES]
    if quick and step in QUICK_STEPS:
        settings["max_steps"] = QUICK_STEPS[step]
    return settings | variant.get(step, {})


def read_predictions(path):
    """{data file's name: its predictions} of an evaluation."""
    by_file = {}
    for prediction in map(json.loads, path.read_text().splitlines()):
        by_file.setdefault(Path(prediction["source"]).stem, []).append(prediction)
    return by_file


def scores_of(predictions):
    """Accuracy, format and context score over the main types, and accuracy by problem type."""
    main = [p for p in predictions if p["problem_type"] in MAIN_TYPES]
    return {"questions": len(main), **{name: mean(p[name] for p in main) for name in SCORES},
            "by_problem_type": {kind: mean(p["accuracy"] for p in predictions if p["problem_type"] == kind)
                                for kind in QUESTIONS}}


def swap_scores(predictions, sense):
    """Of the intent questions whose clips got another sound or picture: how many answers changed to what then fits."""
    before, after = {p["id"]: p["answer"] for p in predictions["eval"]}, predictions[f"swapped_{sense}"]
    fits = [p["accuracy"] == 1 and p["answer"] != before[p["id"].removeprefix(f"swapped-{sense}-")] for p in after]
    return {"questions": len(after), "format": mean(p["format"] for p in after), "changed_to_fit": mean(fits)}
