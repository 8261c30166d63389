"""Decoding: the tokens and log-probs of the shared cache are the plain model's, alone or beside other prompts."""

import copy
import dataclasses
import functools

import pytest
import torch
from transformers import Qwen2_5OmniThinkerForConditionalGeneration

from hov2.config import LoRAConfig
from hov2.grpo import sampling_kl
from hov2.model import rollout as rollouts
from hov2.model.encoder import Encoder, Prompt
from hov2.model.lora import add_lora
from hov2.model.prefix import group_logps
from hov2.model.rollout import _noise, _sample, generate, make_generator, sampling_for
from hov2.model.versions import decoder_of
from hov2.spans import completion_texts, completion_tokens
from tests.support.helpers import tiny_thinker, tiny_tokenizer
from tests.support.modelkit import random_inputs, random_prompts, use_hov2_attention


def settings(thinker, **kwargs):
    kwargs = {"max_completion_length": 20} | kwargs
    return sampling_for(tiny_tokenizer(), thinker.config, **kwargs)


def generators(count, step=0):
    return [make_generator("cpu", 0, step, i) for i in range(count)]


def noise(rows):
    return functools.partial(_noise, generators(1), rows, torch.arange(rows))


def peaked_thinker():
    """A tiny thinker that is sure of itself, and ends a turn now and then."""
    thinker = use_hov2_attention(tiny_thinker())
    with torch.no_grad():
        thinker.lm_head.weight *= 20
        thinker.lm_head.weight[thinker.config.text_config.eos_token_id] *= 2.0
    return thinker


def test_greedy_equals_transformers_generate():
    thinker = use_hov2_attention(tiny_thinker())
    inputs = random_inputs()
    prompt = Encoder(thinker, torch.device("cpu"))(inputs)
    ours = generate(thinker, [prompt], 2, settings(thinker, temperature=0.0), generators(1))[0]
    media = [thinker.config.image_token_id, thinker.config.video_token_id, thinker.config.audio_token_id]
    ids = inputs.prompt_ids[None]
    theirs = thinker.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        pixel_values_videos=inputs.pixel_values,
        video_grid_thw=inputs.shape.grid_thw,
        video_second_per_grid=torch.tensor([inputs.shape.second_per_grid]),
        input_features=inputs.input_features[None],
        feature_attention_mask=torch.ones(1, inputs.input_features.shape[1], dtype=torch.long),
        do_sample=False,
        max_new_tokens=20,
        suppress_tokens=media,
        eos_token_id=settings(thinker).stop_ids,
    )[0, len(ids[0]) :]
    n = len(theirs)
    assert len(set(theirs.tolist())) > 3
    assert ours.completion_ids[0, :n].tolist() == theirs.tolist() == ours.completion_ids[1, :n].tolist()


def test_sampler_log_probs_equal_teacher_forced_ones():
    thinker = use_hov2_attention(tiny_thinker())
    with torch.no_grad():
        thinker.lm_head.weight *= 10  # far from uniform
    prompts = random_prompts(thinker, 2)
    for top_k in (0, 5):
        rollouts = generate(
            thinker, prompts, 4, settings(thinker, temperature=0.9, top_k=top_k, logps=2), generators(2)
        )
        logps, _ = group_logps(thinker, prompts, [r.completion_ids for r in rollouts], temperature=0.9)
        for rollout, expected in zip(rollouts, logps):
            assert rollout.completion_mask.sum() > 20
            torch.testing.assert_close(
                rollout.sampling_logps * rollout.completion_mask, expected * rollout.completion_mask, atol=2e-5, rtol=0
            )


def test_a_prompt_gets_the_same_tokens_alone_and_beside_others(monkeypatch):
    thinker = peaked_thinker()
    prompts = random_prompts(thinker, 3)
    together = generate(thinker, prompts, 4, settings(thinker, max_completion_length=40), generators(3))
    lengths = {int(r.completion_mask.sum(1)[g]) for r in together for g in range(4)}
    assert len(lengths) > 2 and min(lengths) < 17, "rows should leave at different times"
    for i, prompt in enumerate(prompts):
        alone = generate(thinker, [prompt], 4, settings(thinker, max_completion_length=40), generators(3)[i:])[0]
        assert alone.completion_ids.tolist() == together[i].completion_ids.tolist()
    monkeypatch.setattr(rollouts, "LEAVE_EVERY", 1000)  # nobody leaves
    for a, b in zip(
        together, generate(thinker, prompts, 4, settings(thinker, max_completion_length=40), generators(3))
    ):
        assert a.completion_ids.tolist() == b.completion_ids.tolist()


def test_stop_at_answer_cuts_the_same_tokens_after_the_tag():
    thinker, vocab = use_hov2_attention(tiny_thinker()), tiny_tokenizer().get_vocab()
    with torch.no_grad():
        thinker.lm_head.weight.zero_()  # all tokens alike
    pieces = ["</", ".</", "<", "/", "answer", "answ", "e", "r", ">", "><"]
    others = torch.tensor(sorted(set(vocab.values()) - {vocab[piece] for piece in pieces}))
    prompts = random_prompts(thinker, 2)
    whole, cut = (
        [
            row
            for rollout in generate(
                thinker,
                prompts,
                8,
                dataclasses.replace(
                    settings(thinker, max_completion_length=200, stop_at_answer=stop), suppressed_ids=others
                ),
                generators(2),
            )
            for row in zip(completion_tokens(tiny_tokenizer(), rollout), rollout.truncated.tolist())
        ]
        for stop in (False, True)
    )
    ends = set()
    for (long, _), (short, truncated) in zip(whole, cut):
        n = next((n for n in range(len(long)) if b"</answer>" in b"".join(long[: n + 1])), None)
        assert short == (long if n is None else long[: n + 1]) and truncated == (n is None)
        ends.add(None if n is None else short[-1])
    assert ends == {None, b">", b"><"}
    for (tokens, truncated), text in zip(cut, completion_texts([tokens for tokens, _ in cut])):
        assert truncated or text.endswith("</answer>")
        assert b"".join(tokens).decode(errors="replace").startswith(text)


def test_mask_ends_with_the_first_stop_token():
    thinker = peaked_thinker()
    stops = settings(thinker).stop_ids
    sampling = settings(thinker, max_completion_length=40)
    for rollout in generate(thinker, random_prompts(thinker, 3), 4, sampling, generators(3)):
        for ids, mask, cut in zip(
            rollout.completion_ids.tolist(), rollout.completion_mask.tolist(), rollout.truncated.tolist()
        ):
            n = sum(mask)
            assert mask == [True] * n + [False] * (len(mask) - n)
            assert not any(i in stops for i in ids[: n - 1])
            assert (ids[n - 1] in stops) != cut


def test_media_placeholders_and_unknown_rows_are_never_sampled():
    thinker = use_hov2_attention(tiny_thinker(vocab=420))
    sampling = settings(thinker, temperature=5.0)
    config = thinker.config
    forbidden = {
        config.image_token_id,
        config.video_token_id,
        config.audio_token_id,
        *range(len(tiny_tokenizer()), 420),
    }
    assert set(sampling.suppressed_ids.tolist()) == forbidden
    logits = torch.zeros(5000, 420)
    tokens = _sample(logits, sampling, sampling.suppressed_ids, noise(5000))
    assert forbidden.isdisjoint(tokens.tolist()) and len(set(tokens.tolist())) > 300


def test_sampling_follows_top_k_top_p_and_temperature():
    thinker = use_hov2_attention(tiny_thinker())
    probs = torch.tensor([0.5, 0.3, 0.15, 0.05])
    logits = probs.log().repeat(40000, 1)

    def shares(**kwargs):
        tokens = _sample(logits.clone(), settings(thinker, **kwargs), torch.tensor([], dtype=torch.long), noise(40000))
        return torch.bincount(tokens, minlength=4) / 40000

    torch.testing.assert_close(shares(), probs, atol=0.01, rtol=0)
    torch.testing.assert_close(shares(top_k=2), torch.tensor([0.625, 0.375, 0, 0]), atol=0.01, rtol=0)
    torch.testing.assert_close(shares(top_p=0.7), torch.tensor([0.625, 0.375, 0, 0]), atol=0.01, rtol=0)
    torch.testing.assert_close(shares(top_p=0.4), torch.tensor([1.0, 0, 0, 0]), atol=0, rtol=0)
    torch.testing.assert_close(shares(temperature=0.5), probs**2 / (probs**2).sum(), atol=0.01, rtol=0)


def test_seed_step_and_sample_decide_the_draws():
    draws = {key: make_generator("cpu", *key).initial_seed() for key in [(0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 0)]}
    assert len(set(draws.values())) == 4 and draws[0, 1, 0] == make_generator("cpu", 0, 1, 0).initial_seed()


@pytest.mark.parametrize("decoding", ["fixed", "graph"])
@pytest.mark.parametrize("temperature, lora", [(0.0, False), (1.0, False), (1.0, True)])
def test_all_forms_of_decoding_give_the_same_tokens(monkeypatch, decoding, temperature, lora):
    monkeypatch.setattr(rollouts, "OWN_KEYS", 16)  # several lengths
    thinker = peaked_thinker()
    if lora:
        add_lora(thinker, LoRAConfig(rank=3))
        for name, parameter in thinker.named_parameters():
            if ".lora_" in name:
                parameter.data.normal_(std=0.2, generator=torch.Generator().manual_seed(0))
    prompts = random_prompts(thinker, 3)
    sampling = settings(thinker, max_completion_length=44, temperature=temperature, logps=2)
    plain = generate(thinker, prompts, 4, sampling, generators(3))
    assert len({int(length) for rollout in plain for length in rollout.completion_mask.sum(1)}) > 2
    same = generate(thinker, prompts, 4, dataclasses.replace(sampling, decoding=decoding), generators(3))
    for a, b in zip(plain, same):
        assert a.completion_ids.tolist() == b.completion_ids.tolist()
        assert (a.sampling_logps is None) == (b.sampling_logps is None)
        if a.sampling_logps is not None:
            torch.testing.assert_close(a.sampling_logps, b.sampling_logps, atol=1e-5, rtol=0)
    assert [rollout.sampling_logps is None for rollout in plain] == [False, False, True]


@pytest.mark.slow
@pytest.mark.parametrize("decoding", ["shrinking", "fixed"])
def test_what_is_sampled_in_bfloat16_is_what_is_trained(decoding):
    """Four layers of the 7B's sizes, key biases as large as real ones: with scores in bfloat16 the KL would be 6e-2."""
    config = copy.deepcopy(tiny_thinker().config)
    for name, value in {
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_attention_heads": 28,
        "vocab_size": 2048,
        "num_key_value_heads": 4,
        "num_hidden_layers": 4,
        "layer_types": ["full_attention"] * 4,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
    }.items():
        setattr(config.text_config, name, value)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        thinker = use_hov2_attention(Qwen2_5OmniThinkerForConditionalGeneration(config).eval().bfloat16())
    with torch.no_grad():
        for layer in decoder_of(thinker).layers:
            layer.self_attn.k_proj.bias.normal_(std=16.0, generator=torch.Generator().manual_seed(0))
        thinker.lm_head.weight *= 2.4
    ids = torch.randint(0, 300, (256,), generator=torch.Generator().manual_seed(1))
    prompt = Prompt(ids, torch.arange(256).expand(3, -1), None, None)
    sampling = dataclasses.replace(
        settings(thinker, max_completion_length=24, temperature=0.9, top_k=50, logps=1),
        stop_ids=[-1],
        decoding=decoding,
    )
    rollout = generate(thinker, [prompt], 8, sampling, generators(1))[0]
    with torch.no_grad():
        logps = group_logps(thinker, [prompt], [rollout.completion_ids], 0.9)[0][0]
    assert 1e-5 < sampling_kl(logps, rollout.sampling_logps, rollout.completion_mask) < 1e-2


def test_where_no_graph_can_be_captured_decoding_says_so_once_and_goes_on(monkeypatch, capsys):
    monkeypatch.setattr(rollouts, "_no_graph", [])
    thinker = peaked_thinker()
    prompts = random_prompts(thinker, 2)
    expected = generate(thinker, prompts, 3, settings(thinker), generators(2))
    for _ in range(2):
        same = generate(thinker, prompts, 3, settings(thinker, decoding="graph"), generators(2))
        assert [r.completion_ids.tolist() for r in same] == [r.completion_ids.tolist() for r in expected]
    assert capsys.readouterr().out.count("decoding goes on without a CUDA graph, slower: ") == 1


@pytest.mark.parametrize(
    "alive, worth, expected",
    [
        ([[1, 1], [1, 1]], 1.0, None),  # nobody has ended
        ([[0, 1], [1, 1]], 1.0, None),  # the second prompt still needs two rows
        ([[0, 1], [1, 0]], 1.0, {0: [1], 1: [0]}),
        ([[0, 1], [0, 0]], 1.0, {0: [1]}),  # a prompt leaves
        ([[0, 0, 1], [1, 1, 0]], 1.0, {0: [0, 2], 1: [0, 1]}),  # one that has ended stays beside one that hasn't
        ([[0, 0, 1], [1, 1, 0]], 0.6, None),  # two thirds of the rows would stay: not worth a new graph
        ([[0, 0, 1], [1, 1, 0]], 0.75, {0: [0, 2], 1: [0, 1]}),
    ],
)
def test_rows_leave_when_it_is_worth_it(alive, worth, expected):
    assert rollouts._rows_to_keep(alive, worth) == expected
