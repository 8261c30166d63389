"""An exported model in vLLM: are its greedy tokens those of hov2?

    python benchmarks/serving.py write MODEL OUT    with hov2: MODEL as a full model without a talker, prompts and tokens
    python benchmarks/serving.py serve OUT          with vLLM: the same prompts, under three mm_processor_kwargs
    python benchmarks/serving.py chat OUT URL       the questions in text as chat messages, to vLLM's server of OUT/model

MODEL is a thinker's folder, such as that of `python benchmarks/real_lm.py graft`. Both compute in float32, where no two
logits are equal. `serve` needs an environment of its own, which docs/evaluation.md describes.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np

TEXTS = ("What is 21 + 9?", "Name three animals.", "Is the sun hot?", "Write a sentence about rain.")
CLIPS = ((2, 112, 84), (3, 84, 112), (4, 140, 112), (5, 112, 112))  # seconds, width, height
TOKENS = 24  # of a completion
MIN_PIXELS, MAX_PIXELS = 4 * 28 * 28, 16 * 28 * 28


# ---- With hov2 -------------------------------------------------------------------------------------------------------


def write(model, out):
    """Writes OUT/model, OUT/prompts.json with hov2's tokens, and what it read of each clip as OUT/clip-N.npz."""
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    import torch
    from media import make_clip

    from hov2.config import MediaConfig
    from hov2.data.inputs import InputMaker
    from hov2.data.media import read_media
    from hov2.data.samples import Sample
    from hov2.model.encoder import Encoder
    from hov2.model.rollout import generate, sampling_for
    from hov2.model.thinker import Policy, load_thinker, load_tokenizer
    from hov2.model.weights import export
    from hov2.prompts import load_prompts

    settings = MediaConfig(min_pixels=MIN_PIXELS, max_pixels=MAX_PIXELS)
    out.mkdir(parents=True, exist_ok=True)
    thinker = load_thinker(model, torch.float32)
    tokenizer = load_tokenizer(model)
    export(Policy(thinker), out / "model", model, torch.float32, "omni", settings)
    samples = [Sample(text, text, "free-form", None, "", "text") for text in TEXTS]
    for number, (seconds, width, height) in enumerate(CLIPS):
        path = out / f"clip-{number}.mp4"
        make_clip(path, seconds, width, height, 25, "libx264", {}, "aac")
        media = read_media(path, min_pixels=MIN_PIXELS, max_pixels=MAX_PIXELS)
        frames = media.frames.permute(0, 2, 3, 1).numpy()
        np.savez(path.with_suffix(".npz"), frames=frames, audio=media.audio.numpy(), fps=media.sample_fps)
        question = "What can be seen and heard?"
        samples.append(Sample(path.stem, question, "free-form", None, "", "video", {"video": str(path)}))
    make = InputMaker(tokenizer, load_prompts(), settings)
    encode = Encoder(thinker, torch.device("cpu"))
    sampling = sampling_for(tokenizer, thinker.config, max_completion_length=TOKENS, temperature=0.0)
    prompts = []
    for sample in samples:
        prompt = encode(make(sample))
        rollout = generate(thinker, [prompt], 1, sampling, [None])[0]
        tokens = rollout.completion_ids[0][rollout.completion_mask[0]].tolist()
        prompts.append({"id": sample.id, "ids": prompt.ids.tolist(), "tokens": tokens, "media": bool(sample.paths)})
    (out / "prompts.json").write_text(json.dumps(prompts))


# ---- With vLLM -------------------------------------------------------------------------------------------------------


def serve(out):
    """Prints how many completions, and how many prompts, are equal, with what is said of clips and without."""
    from vllm import LLM, SamplingParams

    llm = LLM(str(out / "model"), dtype="float32", max_model_len=2048, max_num_seqs=1, enforce_eager=True)
    tokenizer = llm.get_tokenizer()
    sampling = SamplingParams(temperature=0, max_tokens=TOKENS, skip_special_tokens=False)
    for said in (("min_pixels", "max_pixels", "fps"), ("min_pixels", "max_pixels"), ()):
        counts = {}
        for prompt in json.loads((out / "prompts.json").read_text()):
            request = {"prompt": unexpanded(tokenizer.decode(prompt["ids"]))}
            if prompt["media"]:
                clip = np.load(out / f"{prompt['id']}.npz")
                fps = float(clip["fps"])
                request["multi_modal_data"] = {"video": [clip["frames"]], "audio": [(clip["audio"], 16000)]}
                values = {"min_pixels": MIN_PIXELS, "max_pixels": MAX_PIXELS, "fps": fps}
                request["mm_processor_kwargs"] = {key: values[key] for key in said}
            result = llm.generate(request, sampling, use_tqdm=False)[0]
            kind = "video with sound" if prompt["media"] else "text"
            count = counts.setdefault(kind, {"prompts": 0, "prompts equal": 0, "answers equal": 0})
            count["prompts"] += 1
            count["prompts equal"] += result.prompt_token_ids == prompt["ids"]
            count["answers equal"] += list(result.outputs[0].token_ids) == prompt["tokens"]
        print(f"mm_processor_kwargs with {', '.join(said) or 'nothing'}: {counts}", flush=True)


def unexpanded(text):
    """The prompt with one placeholder for each medium, as vLLM takes it."""
    for token in ("<|VIDEO|>", "<|AUDIO|>"):
        first, *rest = text.split(token)
        if rest:
            text = first + token + rest[-1]
    return text


# ---- With vLLM's server ----------------------------------------------------------------------------------------------


def chat(out, url):
    """Prints how many answers over HTTP are equal; URL is the server's base, such as http://localhost:8000/v1."""
    import requests
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(out / "model")
    equal = 0
    prompts = [prompt for prompt in json.loads((out / "prompts.json").read_text()) if not prompt["media"]]
    for prompt in prompts:
        body = {
            "model": str(out / "model"),
            "messages": messages_of(tokenizer.decode(prompt["ids"])),
            "temperature": 0,
            "max_tokens": TOKENS,
        }
        response = requests.post(f"{url}/chat/completions", json=body, timeout=120)
        response.raise_for_status()
        answer = response.json()["choices"][0]["message"]["content"]
        equal += answer == tokenizer.decode(prompt["tokens"], skip_special_tokens=True)
    print(f"text: {len(prompts)} questions, answers equal: {equal}")


def messages_of(text):
    """The messages of a chat in ChatML, without the turn of the assistant that it ends with."""
    messages = []
    for turn in text.split("<|im_start|>")[1:-1]:
        role, content = turn.split("\n", 1)
        messages.append({"role": role, "content": content.removesuffix("\n").removesuffix("<|im_end|>")})
    return messages


def main(argv=None):
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    writing = commands.add_parser("write")
    writing.add_argument("model")
    serving = commands.add_parser("serve")
    chatting = commands.add_parser("chat")
    for command in (writing, serving, chatting):
        command.add_argument("out", type=Path)
    chatting.add_argument("url")
    arguments = parser.parse_args(argv)
    if arguments.command == "write":
        write(arguments.model, arguments.out)
    elif arguments.command == "serve":
        serve(arguments.out)
    else:
        chat(arguments.out, arguments.url)


if __name__ == "__main__":
    main()
