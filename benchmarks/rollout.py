"""Decoding several prompts together against one after the other: tokens per CPU second, prefill included.

    python benchmarks/rollout.py                      4 prompts of different lengths x 8 completions, two vocabularies
    python benchmarks/rollout.py --vocab 2048 --json FILE

Both are `hov2.model.rollout.generate`, once with all prompts and once with one at a time. The towers' work is done before: it
is the same. Then the tokens of both are compared, sampled (each prompt has its own generator) and greedy.
"""

import argparse

import kit
import torch
from thinker import random_inputs, random_thinker, sampling_for, use_hov2_attention

from hov2.model.encoder import Encoder
from hov2.model.rollout import generate, make_generator
from hov2.model.versions import decoder_of

WAYS = ("one by one", "together")


def make_prompts(thinker, job):
    """Encoded prompts of different lengths: 3/4, 1, 1 and 7/6 of the media in `job` and ever more text, and so on."""
    encoder = Encoder(thinker, torch.device("cpu"))
    sizes = [(9, 12, 12, 14)[i % 4] / 12 for i in range(job.prompts)]
    texts = [job.text_tokens + 30 * (i % 4) for i in range(job.prompts)]
    return [
        encoder(
            random_inputs(
                job.vocab,
                int(job.video_tokens * size) // 64 * 64 or job.video_tokens,
                int(job.audio_tokens * size),
                text,
                seed=i,
            )
        )
        for i, (size, text) in enumerate(zip(sizes, texts))
    ]


def rollouts(thinker, prompts, way, sampling, job):
    """Token ids of each prompt's completions, [(G, T)], sampled the named way."""
    generators = [make_generator("cpu", 0, i) for i in range(len(prompts))]
    if way == "together":
        found = generate(thinker, prompts, job.generations, sampling, generators)
    else:
        found = [
            generate(thinker, [prompt], job.generations, sampling, [generator])[0]
            for prompt, generator in zip(prompts, generators)
        ]
    return [rollout.completion_ids for rollout in found]


def measure(thinker, prompts, way, job):
    """CPU seconds of one run, {"prefill", "decode"}, and the tokens (prompts * G, T)."""
    clock = kit.Clock()
    decoder = decoder_of(thinker)

    def begin(_, arguments, keywords):
        clock.enter("prefill" if keywords["inputs_embeds"].shape[1] > 1 else "decode")

    handles = (decoder.register_forward_pre_hook(begin, with_kwargs=True), decoder.register_forward_hook(clock.leave))
    with clock("decode"):
        tokens = rollouts(thinker, prompts, way, sampling_for(job.vocab, job.completion_tokens), job)
    for handle in handles:
        handle.remove()
    return dict(clock.cpu), torch.cat(tokens)


def run(job):
    """All figures of one vocabulary, as they go into the JSON file."""
    thinker = use_hov2_attention(random_thinker(job.vocab, job.layers, job.hidden))
    prompts = make_prompts(thinker, job)
    short = argparse.Namespace(**vars(job) | {"completion_tokens": 4})
    runs, sampled = {way: [] for way in WAYS}, {}
    for way in WAYS:
        measure(thinker, prompts, way, short)  # warms up
    for _, way in kit.interleaved(WAYS, job.repeats):
        seconds, sampled[way] = measure(thinker, prompts, way, job)
        runs[way].append(seconds)
    sampling = sampling_for(job.vocab, job.completion_tokens, temperature=0)
    greedy = {way: torch.cat(rollouts(thinker, prompts, way, sampling, job)) for way in WAYS}
    tokens = len(prompts) * job.generations * job.completion_tokens
    ways = {}
    for way in WAYS:
        prefill, decode = (kit.median([r[phase] for r in runs[way]]) for phase in ("prefill", "decode"))
        total = kit.median([sum(r.values()) for r in runs[way]])
        ways[way] = {
            "prefill": prefill,
            "decode": decode,
            "cpu": total,
            "runs": [sum(r.values()) for r in runs[way]],
            "decode_rate": tokens / decode,
            "rate": tokens / total,
        }
    return {
        "job": vars(job),
        "prompt_tokens": [len(p.ids) for p in prompts],
        "ways": ways,
        "equal": {"sampled": equal_share(sampled), "greedy": equal_share(greedy)},
    }


def equal_share(tokens):
    """The share of completions whose tokens are all the same in both ways; tokens: {way: (rows, T)}."""
    one, together = tokens.values()
    return float((one == together).all(1).float().mean())


def report(result):
    """Prints the table of one vocabulary."""
    one, together = (result["ways"][way] for way in WAYS)
    job = result["job"]
    print(
        f"\n{kit.machine()}; V={job['vocab']}, prompts of {result['prompt_tokens']} tokens x {job['generations']} "
        f"completions of {job['completion_tokens']}, medians of {job['repeats']}"
    )
    rows = [
        ("prefill, CPU s", "prefill"),
        ("decode, CPU s", "decode"),
        ("both, CPU s", "cpu"),
        ("tokens a CPU s, decode", "decode_rate"),
        ("tokens a CPU s", "rate"),
    ]
    kit.print_table(
        ["", *WAYS, "gain"],
        [
            [name, one[key], together[key], together[key] / one[key] if "rate" in key else one[key] / together[key]]
            for name, key in rows
        ],
    )
    print(
        "completions with the same tokens in both: "
        + ", ".join(f"{name} {share:.0%}" for name, share in result["equal"].items())
    )


def arguments(argv=None):
    """The command line."""
    parser = argparse.ArgumentParser(description="Prompts decoded together against one after the other.")
    parser.add_argument("--vocab", type=int, nargs="+", default=[2048, 32768])
    sizes = {
        "prompts": 4,
        "generations": 8,
        "video-tokens": 1024,
        "audio-tokens": 375,
        "text-tokens": 160,
        "completion-tokens": 128,
        "layers": 6,
        "hidden": 256,
        "repeats": 3,
        "threads": 1,
    }
    for name, default in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--json", metavar="FILE")
    return parser.parse_args(argv)


def main(argv=None):
    """Runs, prints, and writes the JSON file if there is to be one."""
    asked = arguments(argv)
    torch.set_num_threads(asked.threads)
    results = []
    for vocab in asked.vocab:
        results.append(run(argparse.Namespace(**vars(asked) | {"vocab": vocab})))
        report(results[-1])
    kit.write_json(asked.json, results)


if __name__ == "__main__":
    main()
