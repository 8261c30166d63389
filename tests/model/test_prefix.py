"""A group as one row equals G separate rows; chunked equals full; a cached encoding equals the plain forward."""

import pytest
import torch

from hov2.model.encoder import Encoder
from hov2.model.logps import chunked_token_logps, token_logps
from hov2.model.prefix import group_logps, pack
from hov2.model.versions import checkpoint_activations, media_model_of
from tests.support.helpers import tiny_thinker
from tests.support.modelkit import random_completions, random_inputs, separate_logps, use_hov2_attention

CASES = {
    "video and sound": {},
    "image and sound": {"kind": "image", "frames": 2},
    "sound": {"frames": 0},
    "video": {"mel_frames": 0},
    "text": {"frames": 0, "mel_frames": 0},
}


def both_ways(thinker, inputs, completions, temperature):
    """[(G, C)] the plain way and hov2's."""
    plain = [
        torch.stack([separate_logps(thinker, i, row, temperature) for row in c]) for i, c in zip(inputs, completions)
    ]
    encoder = Encoder(thinker, torch.device("cpu"))
    ours, _ = group_logps(thinker, [encoder(i) for i in inputs], completions, temperature, chunk=4)
    return plain, ours


@pytest.mark.parametrize("case", CASES)
def test_group_as_one_row_equals_separate_rows(case):
    thinker = use_hov2_attention(tiny_thinker())
    inputs = [random_inputs(seed=i, text_length=4 + i, **CASES[case]) for i in range(2)]
    completions = random_completions()
    plain, ours = both_ways(thinker, inputs, completions, temperature=0.9)
    for a, b in zip(plain, ours):
        assert b.shape == a.shape
        torch.testing.assert_close(b, a, atol=2e-6, rtol=0)
        torch.testing.assert_close(b[:, 0], a[:, 0], atol=2e-6, rtol=0)  # predicted by the prompt's last token


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_equal_separate_rows(checkpointing):
    inputs, completions = [random_inputs(seed=i) for i in range(2)], random_completions()
    random_weights = [torch.randn(c.shape, generator=torch.Generator().manual_seed(5)) for c in completions]
    gradients = []
    for way in (0, 1):
        thinker = use_hov2_attention(tiny_thinker())
        if checkpointing and way == 1:
            checkpoint_activations(thinker, True)
            thinker.train()
        logps = both_ways(thinker, inputs, completions, temperature=1.0)[way]
        sum((w * lp).sum() for w, lp in zip(random_weights, logps)).backward()
        gradients.append({n: p.grad for n, p in thinker.named_parameters() if p.requires_grad})
    assert gradients[0].keys() == gradients[1].keys()
    largest = max(g.abs().max() for g in gradients[0].values())
    for name, expected in gradients[0].items():
        assert expected is not None, name
        torch.testing.assert_close(
            gradients[1][name], expected, atol=float(largest) * 1e-5, rtol=0, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_interleaved_audio_positions_are_passed_on():
    thinker = use_hov2_attention(tiny_thinker())
    inputs = random_inputs(frames=4, mel_frames=40)
    ids = inputs.prompt_ids.tolist()
    # the time-aligned layout: both openings, video and audio tokens, both endings
    bos_v, eos_v = ids.index(thinker.config.vision_start_token_id), ids.index(thinker.config.vision_start_token_id) + 9
    bos_a, end = eos_v + 1, len(ids) - 5
    middle = ids[bos_v + 1 : eos_v] + ids[bos_a + 1 : end - 1]
    ids = ids[:bos_v] + [ids[bos_v], ids[bos_a]] + middle + [ids[end - 1], ids[eos_v]] + ids[end:]
    inputs.prompt_ids, inputs.shape.interleaved = torch.tensor(ids), True
    plain, ours = both_ways(thinker, [inputs], random_completions(1), temperature=1.0)
    torch.testing.assert_close(ours[0], plain[0], atol=2e-6, rtol=0)


def test_padding_of_a_completion_changes_nothing_before_it():
    thinker = use_hov2_attention(tiny_thinker())
    prompt = Encoder(thinker, torch.device("cpu"))(random_inputs())
    completion = random_completions(1)[0]
    padded = torch.cat([completion, torch.full((3, 4), 7)], 1)
    short, long = (group_logps(thinker, [prompt], [c])[0][0] for c in (completion, padded))
    torch.testing.assert_close(long[:, :7], short, atol=1e-6, rtol=0)


def test_positions_restart_after_the_prompt():
    thinker = use_hov2_attention(tiny_thinker())
    prompt = Encoder(thinker, torch.device("cpu"))(random_inputs())
    row = pack([prompt], [torch.zeros(2, 3, dtype=torch.long)])
    after = row.position_ids[:, len(prompt.ids) :]
    first = int(prompt.position_ids.max()) + 1
    assert after.tolist() == [[first, first + 1, first + 2] * 2] * 3


@pytest.mark.parametrize("chunk", [1, 3, 100])
def test_chunked_log_probs_equal_full_ones(chunk):
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(10, 8, generator=g), torch.randn(50, 8, generator=g)
    tokens = torch.randint(0, 50, (10,), generator=g)
    results = []
    for function in (
        lambda h, w: (h @ w.T / 0.7).log_softmax(-1).gather(-1, tokens[:, None])[:, 0],
        lambda h, w: chunked_token_logps(h, w, tokens, 0.7, chunk)[0],
    ):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        logps = function(h, w)
        (logps * torch.arange(10)).sum().backward()
        results.append((logps.detach(), h.grad, w.grad))
    for ours, plain in zip(results[1], results[0]):
        torch.testing.assert_close(ours, plain, atol=1e-5, rtol=1e-5)


def test_entropy_of_a_hand_made_distribution():
    # logits log(1/2), log(1/4), log(1/4): entropy 1.5 log 2
    weight = torch.tensor([[0.5], [0.25], [0.25]]).log()
    logps, entropy = token_logps(torch.ones(1, 1), weight, torch.tensor([1]))
    assert logps.item() == pytest.approx(-2 * 0.6931472) and entropy.item() == pytest.approx(1.5 * 0.6931472)


def test_encoder_runs_each_tower_once_per_clip():
    thinker = use_hov2_attention(tiny_thinker())
    calls = []
    media_model = media_model_of(thinker)
    for tower in (media_model.visual, media_model.audio_tower):
        tower.register_forward_hook(lambda module, *_: calls.append(type(module).__name__))
    encoder = Encoder(thinker, torch.device("cpu"), cache_size=1)
    first, again = random_inputs(key="clip"), random_inputs(seed=3, key="clip")
    again.pixel_values = again.input_features = None  # as an InputMaker leaves them for a known clip
    a, b = encoder(first), encoder(again)
    assert calls == ["Qwen2_5OmniVisionEncoder", "Qwen2_5OmniAudioEncoder"]
    assert b.visual is a.visual and b.audio is a.audio and "clip" in encoder.known
    encoder(random_inputs(seed=1, key="other"))
    assert "other" not in encoder.known  # the cache is full
