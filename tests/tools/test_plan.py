"""The memory plan against bytes counted from tensors and from the allocator, on tiny thinkers."""

import math
import sys

import pytest
import torch

from hov2.config import EvalConfig, GRPOConfig, LoRAConfig, SFTConfig
from hov2.engine.optim import make_optimizer
from hov2.model.lora import add_lora
from hov2.model.prefix import group_logps
from hov2.model.rollout import _Cache
from hov2.model.thinker import set_training
from hov2.model.versions import media_model_of
from hov2.tools.plan import held, kv_bytes, main, plan, rollout, shapes_of, update
from tests.support.helpers import tiny_thinker
from tests.support.modelkit import policy_of, random_completions, random_prompts
from tests.support.sharding_runs import held_bytes, peak_bytes

FLOAT = 4  # the tiny thinkers compute in float32


def config_of(kind=GRPOConfig, **values):
    return kind(model="m", output_dir="o", data=[], **values)


def trainer(policy):
    """(forward and backward over one group, to be called; the row's tokens)."""
    prompts, completions = random_prompts(policy.thinker, 1, frames=32, side=6), random_completions(1, 4, (100,))

    def train():
        logps, _ = policy(group_logps, prompts, completions, 1.0, 32)
        logps[0].sum().backward()

    return train, len(prompts[0].ids) + 400


@pytest.mark.parametrize("lora", [None, LoRAConfig(rank=4)])
def test_what_is_held_all_the_time_is_exact(lora):
    policy, config = policy_of(tiny_thinker()), config_of(lora=lora)
    planned = held(shapes_of(policy.thinker, lora), config, gpus=1, width=FLOAT)
    set_training(policy, True, False)
    optimizer = make_optimizer(policy, config)
    trainer(policy)[0]()
    optimizer.step()
    towers = [media_model_of(policy.thinker).visual, media_model_of(policy.thinker).audio_tower]
    assert planned["towers"] == sum(p.nbytes for tower in towers for p in tower.parameters())
    assert planned["weights"] == sum(p.nbytes for p in policy.parameters()) - planned["towers"]
    assert planned["gradients"] == sum(p.grad.nbytes for p in policy.parameters() if p.grad is not None)
    moments = [value for state in optimizer.state.values() for name, value in state.items() if name != "step"]
    assert planned["optimizer"] == sum(value.nbytes for value in moments)
    assert held(shapes_of(policy.thinker), config_of(optimizer_states="cpu"), gpus=1)["optimizer"] == 0
    assert (planned["reference"] == 0) == bool(lora)  # LoRA's is the policy with its adapters off


@pytest.mark.parametrize("layers, hidden", [(2, 64), (6, 64), (4, 128)])
@pytest.mark.parametrize("checkpointing", [True, False])
def test_the_update_s_peak_is_within_15_percent(layers, hidden, checkpointing):
    policy = policy_of(tiny_thinker(layers=layers, hidden=hidden, vocab=2000))
    config = config_of(SFTConfig, gradient_checkpointing=checkpointing, logprob_chunk=32)
    set_training(policy, True, checkpointing)
    shapes, (train, tokens) = shapes_of(policy.thinker), trainer(policy)
    _, peak = peak_bytes(train)
    parts = update(shapes, config, tokens, accumulates=False, gpus=1, width=FLOAT)
    planned = parts["activations"] + parts["log-prob chunk"] + held(shapes, config, 1, FLOAT)["gradients"]
    assert planned == pytest.approx(peak, rel=0.15)


def test_keys_and_values_are_exact():
    thinker = policy_of(tiny_thinker()).thinker
    prompts, (generations, length) = random_prompts(thinker, 2), (3, 7)
    shapes, lengths = shapes_of(thinker), [len(p.ids) for p in prompts]
    cache, kv_heads, size = _Cache(lengths, generations, length), 2, shapes.kv // 2
    for number, prompt in enumerate(prompts):
        query, key = (torch.zeros(1, heads, len(prompt.ids), size) for heads in (4, kv_heads))
        for layer in range(shapes.layers):
            cache.attend_prefill(number, layer, query, key, key, 1.0)
    kept = [*cache.own_keys, *cache.own_values, *cache.prompt_keys, *cache.prompt_values]
    tokens = 2 * (8 * math.ceil(max(lengths) / 8) + generations * length)  # prompts padded to the longest
    assert kv_bytes(shapes, tokens, FLOAT) == sum(tensor.nbytes for tensor in kept)


def test_shares_shrink_with_gpus_and_accumulation_keeps_whole_gradients():
    shapes, config = shapes_of(tiny_thinker()), config_of()
    one, eight = (plan(shapes, config, gpus, prompt_tokens=100) for gpus in (1, 8))
    assert eight["always"]["weights"] == one["always"]["weights"] // 8
    assert eight["always"]["towers"] == one["always"]["towers"]
    assert eight["update"]["gradients kept whole"] == 0  # a prompt a rank: one backward pass
    four = plan(shapes, config, 4, prompt_tokens=100)
    assert four["update"]["gradients kept whole"] == 4 * shapes.trained
    assert rollout(shapes, config, 2, 100)["KV cache"] == kv_bytes(shapes, 2 * (100 + 8 * 1024))


def test_completions_that_go_through_in_parts_need_fewer_tokens_at_a_time():
    shapes, all_at_once = shapes_of(tiny_thinker()), config_of()
    whole, in_parts = (plan(shapes, config_of(completions_per_forward=k), 8, 100)["update"] for k in (8, 3))
    assert whole == plan(shapes, all_at_once, 8, 100)["update"] and whole["gradients kept whole"] == 0
    expected = update(shapes, all_at_once, 100 + 3 * 1024, accumulates=True, gpus=8)
    assert in_parts == expected and in_parts["gradients kept whole"] == 4 * shapes.trained


def test_evaluation_holds_weights_alone_and_decodes_all_samples_of_a_batch():
    shapes = shapes_of(tiny_thinker())
    config = EvalConfig(model="m", output_dir="o", data=["d"], batch_size=3, num_samples=4, temperature=1.0)
    phases = plan(shapes, config, 2, prompt_tokens=100)
    assert phases["always"] == {"weights": shapes.decoder, "towers": 2 * shapes.towers}
    assert phases["rollout"]["KV cache"] == kv_bytes(shapes, 3 * 100 + 12 * 2048)


def test_lora_trains_its_adapters_only():
    thinker = tiny_thinker()
    add_lora(thinker, LoRAConfig(rank=2))
    adapters = sum(p.numel() for name, p in thinker.named_parameters() if ".lora_" in name)
    shapes = shapes_of(tiny_thinker(), LoRAConfig(rank=2))
    assert shapes.trained == adapters and shapes.lora and not shapes_of(tiny_thinker()).lora


def run(monkeypatch, capsys, *arguments):
    """The exit code (or the error) of the command, and what it printed."""
    monkeypatch.setattr(sys, "argv", ["plan", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    return ended.value.code, capsys.readouterr().out


def test_command_for_a_model_that_is_not_there(monkeypatch, capsys):
    code, said = run(monkeypatch, capsys, "configs/stage2.json", "--gpus", "8", "--memory", "80")
    assert code == 0 and "GiB of 74.51: fits" in said
    assert "runs/stage1/model (not there yet; the sizes of Qwen/Qwen2.5-Omni-7B, which it comes from), 8 GPUs" in said


def test_what_does_not_fit_and_what_can_not_be_planned(monkeypatch, capsys, tmp_path):
    tiny_thinker().save_pretrained(tmp_path)
    model = f"model={tmp_path}"
    code, said = run(monkeypatch, capsys, "configs/stage2.json", "--gpus", "1", "--memory", "0.01", model)
    assert code == 1 and "doesn't fit" in said and said.startswith(f"{tmp_path}, 1 GPU, prompts of 8192 tokens")
    assert run(monkeypatch, capsys, "configs/stage2.json", model, "--gpus", "1", "lora={}")[0] == 0
    code, _ = run(monkeypatch, capsys, "configs/toy/stage2.json")
    assert code == "error: configs/toy/stage2.json: expected a config that has max_prompt_length, in tokens"
    assert run(monkeypatch, capsys, "configs/toy/stage2.json", model, "max_prompt_length=100")[0] == 0


def test_held_bytes_of_the_test_kit_and_the_plan_agree():
    policy = policy_of(tiny_thinker())
    parts = held(shapes_of(policy.thinker), config_of(beta=0.0), 1, FLOAT)
    assert held_bytes(policy) == parts["weights"] + parts["towers"]
