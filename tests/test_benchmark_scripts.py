"""The benchmarks at tiny sizes: their other ways compute what hov2 computes, and each script prints its table."""

import argparse
import json
import math
import sys
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import flops
import gpu
import grpo_step
import launches
import media
import rollout
import scaling
import variants
from thinker import random_completions, sampling_for

from hov2.model.encoder import Encoder
from hov2.model.thinker import Policy
from hov2.model.versions import decoder_of
from hov2.tools import plan

TINY = [
    "--video-tokens",
    "128",
    "--audio-tokens",
    "10",
    "--text-tokens",
    "12",
    "--completion-tokens",
    "6",
    "--generations",
    "3",
    "--layers",
    "2",
    "--hidden",
    "128",
    "--repeats",
    "1",
]


def tiny_job(*more):
    return grpo_step.arguments(["--vocab", "320", "--completions-run", "3", *TINY, *more])


def way_of(name, job):
    grpo_step.setup(name, job)
    return grpo_step.way


@pytest.mark.parametrize("iterations", ["1", "2"])
def test_log_probs_and_gradients_of_the_other_ways_equal_hov2s(iterations):
    job, found = tiny_job("--iterations", iterations), {}
    for name in grpo_step.WAYS:
        way_of(name, job)
        found[name] = grpo_step.step(job, 0)
        assert sorted(found[name]["logps"]) == [0, 1, 2] and found[name]["norm"] > 0
        assert (found[name]["cpu"].get("old", 0) > 0) == (name != "hov2" and iterations == "2")
    assert not torch.equal(found["hov2"]["logps"][0], found["hov2"]["reference"][0])  # the reference is another model
    for name in ("released", "batched"):
        difference = grpo_step.differences([found[name]], [found["hov2"]])
        assert difference["logps"] < 3e-6 and difference["reference"] < 3e-6 and difference["norm"] < 1e-5, name


def test_greedy_tokens_are_the_same_in_all_ways():
    job = tiny_job("--completion-tokens", "48")
    sampling = sampling_for(job.vocab, 48, temperature=0)
    tokens = {}
    for name in grpo_step.WAYS:
        way = way_of(name, job)
        way.policy.eval()
        with torch.no_grad():
            tokens[name] = way.sample(2, sampling, 0).tolist()
    assert len(set(tokens["hov2"][0])) > 5
    assert tokens["released"] == tokens["batched"] == tokens["hov2"]


def test_counted_flops_are_those_of_a_forward_pass():
    job = tiny_job()
    way, given = way_of("batched", job), random_completions(job.vocab, 3, 6)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        way.logps(way.policy, given)
    counts = {name: sum(ops.values()) for name, ops in counter.get_flop_counts().items()}
    decoder = next(name for name, module in way.policy.named_modules() if module is decoder_of(way.policy))
    whole = counts[f"{type(way.policy).__name__}.{decoder}"]
    length = len(way.inputs.prompt_ids) + 6
    units = grpo_step.units_of(job, towers=0)
    expected = 3 * (units.token * length + units.pair * length**2)  # this backend computes the masked half too
    assert whole == pytest.approx(expected, rel=1e-3)  # transformers 5.17 makes its rotary angles by a product
    assert counts[f"{type(way.policy).__name__}.lm_head"] == 3 * 6 * units.head  # of completions alone


def test_flops_of_a_step_by_hand():
    units = flops.Units(token=10, pair=1, head=100, towers=1000)
    found = flops.step_flops(units, prompt=3, tokens=2, generations=2, iterations=1)
    # prefill 3 tokens, 6 pairs; a row of 5 tokens, 15 pairs; the group 7 tokens, 6 + 2 * (2 * 3 + 3) pairs; 4 positions
    assert found["hov2"] == {
        "towers": 1000,
        "prefill": 36,
        "decode": 2 * (10 + 3 + 1) + 4 * 100,
        "reference": 94 + 400,
        "old": 0,
        "forward": 494,
        "backward": 3 * 494,
    }
    assert found["batched"]["forward"] == 2 * (65 + 200) and found["released"]["forward"] == 2 * (65 + 500)
    assert found["released"]["towers"] == 2 * 3 * 1000 and found["released"]["backward"] == 2 * (3 * 65 + 2 * 500)


def test_flops_prints_the_7bs_table(capsys):
    flops.main([])
    out = capsys.readouterr().out
    assert out.startswith("P=3523, T=600, G=8") and "| total" in out


def test_grpo_step_prints_its_table(capsys, tmp_path):
    file = tmp_path / "out.json"
    grpo_step.main(["--vocab", "320", "--ways", "hov2", "--sharded", "--json", str(file), *TINY])
    out = capsys.readouterr().out
    assert "| CPU seconds" in out and "GFLOP a CPU second" in out
    assert json.loads(file.read_text())["ways"]["hov2"]["cpu"] > 0


def test_rollout_prints_its_table(capsys):
    rollout.main(["--vocab", "320", *TINY])
    out = capsys.readouterr().out
    assert "| tokens a CPU s " in out and "sampled 100%, greedy 100%" in out


def test_media_prints_its_table(capsys, tmp_path):
    file = tmp_path / "out.json"
    media.main(["--synthesise", "vp9.webm", "--scale", "0.1", "--repeats", "1", "--json", str(file)])
    assert "| vp9.webm" in capsys.readouterr().out
    clip = json.loads(file.read_text())["clips"]["vp9.webm"]
    assert clip["hov2"]["frames"] == [4, 3, 224, 420] and clip["hov2"]["samples"] == 32000


def test_scaling_prints_its_table(capsys):
    scaling.main(
        [
            "--points",
            "2",
            "--video",
            "16",
            "--tokens",
            "4",
            "--generations",
            "2",
            "--vocab",
            "320",
            "--layers",
            "1",
            "--hidden",
            "64",
            "--repeats",
            "1",
            "--axes",
            "tokens",
            "vocab",
        ]
    )
    out = capsys.readouterr().out
    assert "| completion tokens" in out and "vocabulary: " in out


def test_exponent_of_known_powers():
    sizes = (1, 2, 4, 8)
    assert scaling.exponent(sizes, [3 * s for s in sizes]) == pytest.approx(1)
    assert scaling.exponent(sizes, [s**2 / 7 for s in sizes]) == pytest.approx(2)
    assert scaling.exponent(sizes, [5, 5, 5, 5]) == pytest.approx(0)
    assert math.isnan(scaling.exponent(sizes, [1, 2, 3, 0]))


def test_variants_of_an_update_have_the_same_gradient():
    job, norms = argparse.Namespace(video_tokens=64, completion_tokens=6), []
    for name in ("default", "completions_per_forward 2", "logprob_chunk 32", "gradient_checkpointing false"):
        variants.setup(name, 320, job)
        norms.append(variants.update()["norm"])
    assert norms[0] > 0 and max(abs(norm / norms[0] - 1) for norm in norms) < 1e-4


@pytest.mark.slow
def test_launches_are_within_their_limits(capsys, tmp_path):
    file = tmp_path / "out.json"
    launches.main(["--json", str(file)])
    assert "| 8 x 8 |" in capsys.readouterr().out
    for found in json.loads(file.read_text()):
        limit = 1650 if found["rows"] == "1 x 8" else 1750
        assert 500 < sum(found["step"].values()) <= limit + 28 * 14 * found["lora"]  # two more a layer with adapters
        assert found["step"]["bmm"] == 4 * 28


@pytest.mark.slow  # a minute
def test_gpu_runs_whole_at_tiny_sizes(tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        gpu.main(["--tiny", "--out", str(tmp_path)])
    out = capsys.readouterr().out
    assert ended.value.code == 0, out
    results = json.loads((tmp_path / "results.json").read_text())
    assert list(results) == list(gpu.PARTS) and (tmp_path / "results.md").read_text().strip() in out
    for rows in ("1 x 3", "8 x 3", "1 x 3, LoRA", "8 x 3, LoRA"):
        assert f"| {rows} |" in out and results["decoding"][rows]["graph"] > 0
    assert results["decoding"]["8 x 3"]["transformers"] > 0
    for way in ("hov2", "batched", "released"):
        assert results[way]["seconds"]["backward"] > 0 and results[way]["grad_norm"] > 0
    assert results["hov2"]["sampling_kl"] < 1e-6 and results["hov2"]["plan_gib"]["rollout"] > 0


def test_a_part_that_fails_takes_nothing_with_it(tmp_path, monkeypatch, capsys):
    done = {"device": {"error": "RuntimeError: no driver"}, "hov2": {"error": "no time was left"}}
    monkeypatch.setattr(gpu, "in_process", lambda part, *_: done[part])
    with pytest.raises(SystemExit) as ended:
        gpu.main(["--out", str(tmp_path), "--parts", "device", "hov2"])
    assert ended.value.code == "failed: device, hov2"
    assert json.loads((tmp_path / "results.json").read_text()) == done
    assert "device failed: RuntimeError: no driver" in capsys.readouterr().out


def test_the_7b_s_prompt_has_its_own_media_tokens():
    policy = Policy(plan.published_thinker("Qwen/Qwen2.5-Omni-7B"))
    inputs = gpu.own_inputs(policy, gpu.Sizes())
    config, ids = policy.thinker.config, inputs.prompt_ids.tolist()
    assert (ids.count(config.video_token_id), ids.count(config.audio_token_id)) == (1024, 500) and len(ids) == 2000
    positions = Encoder(policy.thinker, torch.device("cpu"))._positions(inputs)
    assert positions.shape == (3, 2000) and int(positions.max()) < 2000 - 1024 + 16 * 2 + 500
