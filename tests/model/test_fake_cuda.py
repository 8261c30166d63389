"""The 7B's sizes on fake CUDA tensors: shapes, types and devices as on a GPU, no numbers, and no GPU needed.

A fake tensor has no value, so that whatever needs one (and on a GPU would wait for it) raises an error. Left out are the
towers: transformers reads the clip's grid from the device; tests/model/test_cuda.py runs them where there is a GPU.
"""

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch._subclasses.fake_tensor import DataDependentOutputException

from hov2.config import LoRAConfig
from hov2.grpo import grpo_loss, sampling_kl
from hov2.model import rollout as rollouts
from hov2.model.encoder import Prompt
from hov2.model.lora import add_lora
from hov2.model.prefix import group_logps
from hov2.model.versions import checkpoint_activations
from hov2.tools import plan

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not torch.backends.cuda.is_built(), reason="this torch was built without CUDA"),
]
CUDA = torch.device("cuda", 0)
G, C, LENGTHS = 8, 64, (2048, 1999)


class LowerRight:
    """Stands for torch's causal_lower_right: a mask that takes no memory."""

    def __init__(self, queries, keys):
        self.shape = queries, keys


def flash_attention(query, key, value, attn_mask=None, is_causal=False, scale=None, enable_gqa=False):
    """What a GPU would choose for all of hov2's attention; without one torch can't ask which kernels there are."""
    assert query.dtype == key.dtype == value.dtype == torch.bfloat16 and enable_gqa
    assert is_causal if attn_mask is None else attn_mask.shape == (query.shape[2], key.shape[2])
    return torch.ops.aten._scaled_dot_product_flash_attention(query, key, value, 0.0, True, False, scale=scale)[0]


@pytest.fixture
def fake(monkeypatch):
    """The thinker with adapters, and two prompts, on fake CUDA."""
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", flash_attention)
    monkeypatch.setattr("hov2.model.prefix.causal_lower_right", LowerRight)
    thinker = plan.published_thinker("Qwen/Qwen2.5-Omni-7B")
    add_lora(thinker, LoRAConfig())
    for name, parameter in thinker.named_parameters():
        if ".lora_" in name:  # as FSDP hands them to the layers
            parameter.data = parameter.data.bfloat16()
    with FakeTensorMode(allow_non_fake_inputs=True):
        thinker.to_empty(device=CUDA)
        prompts = []
        for length in LENGTHS:
            ids = torch.zeros(length, dtype=torch.long, device=CUDA)
            features = torch.empty(1024, 3584, dtype=torch.bfloat16, device=CUDA)
            prompts.append(Prompt(ids, torch.zeros(3, length, dtype=torch.long, device=CUDA), features, features[:300]))
        yield thinker, prompts


def test_log_probs_and_loss(fake):
    thinker, prompts = fake
    thinker.train()
    checkpoint_activations(thinker, True)
    completions = [torch.zeros(G, C, dtype=torch.long, device=CUDA) for _ in prompts]
    logps, entropies = group_logps(thinker, prompts, completions, 0.9, 128)
    for values in (*logps, *entropies):
        assert (values.shape, values.dtype, values.device) == ((G, C), torch.float32, CUDA)
    mask = torch.ones(G, C, dtype=torch.bool, device=CUDA)
    loss, metrics = grpo_loss(
        logps[0], logps[0].detach(), logps[0].detach(), torch.zeros(G, C, device=CUDA), mask, num_items=mask.sum()
    )
    kl = sampling_kl(logps[0], logps[0].detach(), mask)
    for number in (loss, kl, *metrics.values()):
        assert (number.shape, number.device) == ((), CUDA)
    assert loss.requires_grad


@pytest.mark.parametrize("decoding", ["fixed", "shrinking"])
def test_decoding_waits_for_the_device_only_where_rows_leave(fake, monkeypatch, decoding):
    thinker, prompts = fake
    finished = []

    def noise(generators, num_generations, batch, width):  # a generator on CUDA needs CUDA
        return torch.empty(len(generators) * num_generations, width, device=batch.device).exponential_()[batch]

    monkeypatch.setattr(rollouts, "_noise", noise)
    monkeypatch.setattr(rollouts, "_finish", lambda *parts: finished.append(parts))

    def generate(length):
        sampling = rollouts.Sampling(
            length,
            [5, 6],
            6,
            torch.tensor([1, 2, 3]),
            temperature=0.9,
            top_k=50,
            logps=1,
            answer_states=torch.zeros(152064, 10, dtype=torch.long),
            decoding=decoding,
        )
        rollouts.generate(thinker, prompts, G, sampling, [None, None])

    generate(rollouts.LEAVE_EVERY - 1)
    (ids, is_end, logps), (_, _, none) = finished
    assert (ids.shape, is_end.dtype, logps.dtype) == ((G, rollouts.LEAVE_EVERY - 1), torch.bool, torch.float32)
    assert {x.device for x in (ids, is_end, logps)} == {CUDA} and none is None
    with pytest.raises(DataDependentOutputException) as waited:
        generate(rollouts.LEAVE_EVERY + 1)
    assert any(entry.name == "generate" and "tolist" in str(entry.statement) for entry in waited.traceback)
