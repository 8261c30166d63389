"""What only a GPU can show: `python -m pytest -m cuda tests/model/test_cuda.py` (no PyAV needed), also by benchmarks/gpu.py."""

import gc

import pytest
import torch

from hov2 import distributed
from hov2.config import ConfigError, LoRAConfig
from hov2.grpo import sampling_kl
from hov2.model import rollout as rollouts
from hov2.model.encoder import Encoder
from hov2.model.lora import add_lora
from hov2.model.prefix import group_logps
from hov2.model.rollout import generate, make_generator, sampling_for
from hov2.model.thinker import Policy, tower_parameters
from tests.support.helpers import tiny_thinker, tiny_tokenizer
from tests.support.modelkit import random_completions, random_inputs, separate_logps, use_hov2_attention

pytestmark = pytest.mark.cuda
CUDA = torch.device("cuda", 0)


@pytest.fixture(scope="module", autouse=True)
def gpu():
    """Without one there is nothing to show; with one it is set up as the scripts do."""
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    distributed.setup("cuda")
    yield
    distributed.cleanup()


def thinker_on(device, dtype=torch.float32, **sizes):
    """The same tiny thinker on any device; heads of 16 numbers, which flash kernels take."""
    return use_hov2_attention(tiny_thinker(**sizes)).to(device, dtype)


def prompts_of(thinker, count=3, **shape):
    """Prompts of unequal lengths, with media."""
    encoder = Encoder(thinker, next(thinker.parameters()).device)
    return [encoder(random_inputs(seed=i, text_length=4 + 7 * i, **shape)) for i in range(count)]


def on(device, tensors):
    return [tensor.to(device) for tensor in tensors]


def logps_of(thinker, count=3):
    """[(G, C)] log-probs of the same completions, in float32 on the CPU."""
    completions = on(next(thinker.parameters()).device, random_completions(count, lengths=(7, 5, 6)))
    with torch.no_grad():
        logps, _ = group_logps(thinker, prompts_of(thinker, count), completions, temperature=0.9)
    return on("cpu", logps)


def settings(thinker, **kwargs):
    return sampling_for(tiny_tokenizer(), thinker.config, **{"max_completion_length": 44} | kwargs)


def rollouts_of(thinker, decoding, step=0, generations=4, **kwargs):
    prompts = prompts_of(thinker)
    generators = [make_generator(CUDA, 0, step, i) for i in range(len(prompts))]
    return generate(thinker, prompts, generations, settings(thinker, decoding=decoding, **kwargs), generators)


def peaked(thinker):
    """Sure of itself, and ending a turn now and then, so that rows leave at different times."""
    with torch.no_grad():
        thinker.lm_head.weight *= 20
        thinker.lm_head.weight[thinker.config.text_config.eos_token_id] *= 2.0
    return thinker


@pytest.mark.parametrize("heads", ["grouped", "grouped, in bfloat16"])
def test_a_shared_prefix_equals_separate_rows(heads):
    thinker = thinker_on(CUDA)
    inputs, completions = [random_inputs(seed=i) for i in range(2)], random_completions(2)
    plain = tiny_thinker()  # transformers' own attention, on the CPU
    expected = [
        torch.stack([separate_logps(plain, given, row, 0.9) for row in rows])
        for given, rows in zip(inputs, completions)
    ]
    thinker = thinker if heads == "grouped" else thinker.bfloat16()
    encoder = Encoder(thinker, CUDA)
    ours, _ = group_logps(thinker, [encoder(given) for given in inputs], on(CUDA, completions), 0.9)
    tolerance = 1e-4 if heads == "grouped" else 5e-2
    for a, b in zip(expected, ours):
        torch.testing.assert_close(b.cpu(), a.detach(), atol=tolerance, rtol=0)


def test_gradients_equal_the_cpus():
    gradients = []
    for device in ("cpu", CUDA):
        thinker = thinker_on(device)
        completions = on(device, random_completions(2))
        logps, _ = group_logps(thinker, prompts_of(thinker, 2), completions, 0.9)
        sum((part * part).sum() for part in logps).backward()
        gradients.append({name: p.grad.cpu() for name, p in thinker.named_parameters() if p.grad is not None})
    largest = max(gradient.abs().max() for gradient in gradients[0].values())
    assert gradients[0].keys() == gradients[1].keys() and len(gradients[0]) > 10
    for name, expected in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], expected, atol=float(largest) * 1e-4, rtol=0)


def test_log_probs_in_float32_equal_the_cpus():
    for ours, expected in zip(logps_of(thinker_on(CUDA)), logps_of(thinker_on("cpu"))):
        torch.testing.assert_close(ours, expected, atol=1e-4, rtol=0)


def test_log_probs_in_bfloat16_are_near_those_in_float32():
    for ours, expected in zip(logps_of(thinker_on(CUDA, torch.bfloat16)), logps_of(thinker_on("cpu"))):
        torch.testing.assert_close(ours, expected, atol=5e-2, rtol=0)


@pytest.mark.parametrize("side", [2, 3, 5])  # with windows of equal and of unequal sizes
def test_towers_in_bfloat16_are_near_those_in_float32(side):
    thinkers = thinker_on("cpu"), thinker_on(CUDA, torch.bfloat16)
    expected, ours = (prompts_of(thinker, 1, side=side, mel_frames=230)[0] for thinker in thinkers)
    for a, b in ((expected.visual, ours.visual), (expected.audio, ours.audio)):
        torch.testing.assert_close(b.float().cpu(), a, atol=3e-2 * float(a.abs().max()), rtol=0)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_graph_s_tokens_are_those_of_single_kernels(monkeypatch, temperature):
    monkeypatch.setattr(rollouts, "OWN_KEYS", 16)  # several graphs
    thinker = peaked(thinker_on(CUDA))
    expected = rollouts_of(thinker, "shrinking", temperature=temperature, logps=3)
    assert len({int(length) for rollout in expected for length in rollout.completion_mask.sum(1)}) > 1
    for decoding in ("fixed", "graph"):
        for a, b in zip(expected, rollouts_of(thinker, decoding, temperature=temperature, logps=3)):
            assert a.completion_ids.tolist() == b.completion_ids.tolist()
            torch.testing.assert_close(a.sampling_logps, b.sampling_logps, atol=1e-4, rtol=0)
    assert not rollouts._no_graph


def test_a_graph_sees_the_weights_of_its_own_rollout():
    thinker = thinker_on(CUDA)
    first = rollouts_of(thinker, "graph")
    with torch.no_grad():
        for parameter in thinker.parameters():
            parameter.mul_(1.5)
    changed, expected = rollouts_of(thinker, "graph"), rollouts_of(thinker, "fixed")
    assert [r.completion_ids.tolist() for r in changed] == [r.completion_ids.tolist() for r in expected]
    assert [r.completion_ids.tolist() for r in changed] != [r.completion_ids.tolist() for r in first]


def test_rollouts_take_no_more_memory_each_time(monkeypatch):
    monkeypatch.setattr(rollouts, "OWN_KEYS", 16)
    thinker, taken = thinker_on(CUDA), []
    for step in range(6):
        rollouts_of(thinker, "graph", step)
        gc.collect()
        taken.append(torch.cuda.memory_reserved())
    assert taken[-1] == taken[1], taken
    assert not rollouts._no_graph


def test_a_step_of_decoding_doesnt_wait_for_the_device():
    thinker = thinker_on(CUDA)
    prompt = prompts_of(thinker, 1)
    sampling = settings(thinker, max_completion_length=rollouts.LEAVE_EVERY - 1, temperature=0.9, top_k=5)
    generators, waits = [make_generator(CUDA, 0)], []
    run = rollouts._Step.__call__

    def strict(step, token, position, t):
        if t == 3:  # eager, capture, replay are over
            waits.append(torch.cuda.get_sync_debug_mode())
            torch.cuda.set_sync_debug_mode("error")
        return run(step, token, position, t)

    finish = rollouts._finish

    def lenient(*args):
        torch.cuda.set_sync_debug_mode("default")
        return finish(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rollouts._Step, "__call__", strict)
        patch.setattr(rollouts, "_finish", lenient)
        try:
            generate(thinker, prompt, 4, sampling, generators)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert waits


def test_what_is_sampled_in_bfloat16_is_what_is_trained():
    thinker = thinker_on(CUDA, torch.bfloat16, hidden=256)
    prompts = prompts_of(thinker)
    for rollout, prompt in zip(rollouts_of(thinker, "graph", temperature=0.9, logps=3), prompts):
        with torch.no_grad():
            logps = group_logps(thinker, [prompt], [rollout.completion_ids], 0.9)[0][0]
        assert 0 <= sampling_kl(logps, rollout.sampling_logps, rollout.completion_mask) < 1e-3


def test_a_sharded_policy_decodes_as_a_graph():
    thinker = peaked(thinker_on(CUDA))
    expected = rollouts_of(thinker, "fixed")
    add_lora(thinker, LoRAConfig(rank=4))
    for name, parameter in thinker.named_parameters():
        if ".lora_" in name:
            parameter.data.zero_() if name.endswith("b") else parameter.data.normal_()
    mesh = distributed.make_mesh(CUDA)
    policy = distributed.shard(Policy(thinker), mesh, torch.float32, tower_parameters(thinker))
    with torch.no_grad(), distributed.unsharded(policy):
        ours = policy(lambda whole: rollouts_of(whole, "graph"))
    assert [r.completion_ids.tolist() for r in ours] == [r.completion_ids.tolist() for r in expected]
    assert not rollouts._no_graph


def test_where_capturing_fails_decoding_goes_on(monkeypatch, capsys):
    thinker = thinker_on(CUDA)
    expected = rollouts_of(thinker, "fixed")
    monkeypatch.setattr(rollouts, "_no_graph", [])
    run = rollouts._Step._run

    def waits(step, *args):
        hidden = run(step, *args)
        if torch.cuda.is_current_stream_capturing():
            hidden.sum().item()  # not allowed in a graph
        return hidden

    monkeypatch.setattr(rollouts._Step, "_run", waits)
    for _ in range(2):
        ours = rollouts_of(thinker, "graph")
        assert [r.completion_ids.tolist() for r in ours] == [r.completion_ids.tolist() for r in expected]
    assert capsys.readouterr().out.count("without a CUDA graph") == 1
    torch.cuda.synchronize()


def test_objects_are_gathered_and_settings_are_made():
    assert distributed.gather_objects({"rank": 0}) == [{"rank": 0}]
    assert distributed.global_sum(torch.ones(3, device=CUDA)).tolist() == [1.0] * 3
    assert not torch.backends.cuda.cudnn_sdp_enabled()


def test_more_processes_than_gpus_are_refused(monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(torch.cuda.device_count() + 1))
    for name in ("auto", "cuda"):
        with pytest.raises(ConfigError, match="a GPU for each process"):
            distributed.device_of(name)
    assert distributed.device_of("cpu").type == "cpu"
