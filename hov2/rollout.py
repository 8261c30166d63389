"""Sampling completions: one prefill for each prompt, its keys and values kept once, all rows decoded together.

Several prompts with G completions each are decoded as one batch: the linear layers run on all rows, attention runs for
each prompt over [its keys and values, shared by its G rows | the rows' own]. Finished rows leave the batch. Each prompt
has its own random generator, so its completions don't depend on what is decoded beside it.
"""

import functools
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from hov2.model import decode, embed
from hov2.prefix import pack

LEAVE_EVERY = 8  # tokens between looks at which rows have ended (each look waits for the device)


@dataclass
class Sampling:
    """How tokens are chosen. `temperature` 0 is greedy; `top_k` 0 and `top_p` 1 mean the whole vocabulary."""

    max_completion_length: int
    stop_ids: list[int]  # a completion ends with the first of these
    pad_id: int
    suppressed_ids: torch.Tensor  # (n,), never sampled: media placeholders, rows that the tokenizer lacks
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0


@dataclass
class Rollout:
    """G completions of one prompt, right-padded to their own longest."""

    completion_ids: torch.Tensor  # (G, C)
    completion_mask: torch.Tensor  # (G, C) bool: up to and including the first end-of-turn token
    truncated: torch.Tensor  # (G,) bool: no end-of-turn token within the limit
    sampling_logps: torch.Tensor  # (G, C) float32: log-prob under the full vocabulary at the sampling temperature


def sampling_for(tokenizer, config, **settings):
    """A Sampling with the stop, pad and suppressed ids of this tokenizer and thinker config."""
    stops = [tokenizer.convert_tokens_to_ids(t) for t in ("<|im_end|>", "<|endoftext|>")]
    media = [config.image_token_id, config.video_token_id, config.audio_token_id]
    beyond = range(len(tokenizer), config.text_config.vocab_size)  # embedding rows that stand for no token
    return Sampling(stop_ids=stops, pad_id=stops[1], suppressed_ids=torch.tensor([*media, *beyond]), **settings)


def make_generator(device, *key):
    """A generator seeded by (seed, step, sample): the same key gives the same tokens, in any run and on any rank."""
    seed = int(np.random.SeedSequence([int(k) for k in key]).generate_state(1, np.uint64)[0] >> np.uint64(1))
    return torch.Generator(device).manual_seed(seed)


@torch.no_grad()
def generate(thinker, prompts, num_generations, sampling, generators, on_token=None):
    """Samples `num_generations` completions for each prompt: a list of Rollout, in the order of the prompts.

    generators: one torch.Generator for each prompt (unused when greedy). The thinker must be in eval mode.
    `on_token(ids)` is called after every step with the new token of each row, (rows,) on the device, `num_generations`
    rows a prompt, `pad_id` for a row that has ended. Reading them waits for the device: at every token, where decoding
    by itself waits only now and then.
    """
    device = prompts[0].ids.device
    hidden, cache = _prefill(thinker, prompts, num_generations, sampling.max_completion_length)
    rows = len(prompts) * num_generations
    owner = [i for i in range(len(prompts)) for _ in range(num_generations)]  # row -> prompt, for the rows still alive
    alive = torch.arange(rows, device=device)  # row numbers
    ended = torch.zeros(rows, dtype=torch.bool, device=device)  # of the alive rows
    start = torch.stack([prompts[i].next_position for i in owner])  # (rows,)
    tokens = torch.full((rows, sampling.max_completion_length), sampling.pad_id, device=device)
    logps = torch.zeros(rows, sampling.max_completion_length, device=device)
    stops = torch.tensor(sampling.stop_ids, device=device)
    suppressed = sampling.suppressed_ids.to(device)
    for t in range(sampling.max_completion_length):
        logits = F.linear(hidden, thinker.lm_head.weight).float()  # (R, V)
        counts = [owner.count(i) for i in range(len(prompts))]
        token, logp = _sample(logits, sampling, suppressed, generators, counts)
        tokens[alive, t] = torch.where(ended, sampling.pad_id, token)
        logps[alive, t] = torch.where(ended, 0.0, logp)
        if on_token is not None:
            on_token(tokens[:, t])
        ended = ended | torch.isin(token, stops)
        if t % LEAVE_EVERY == LEAVE_EVERY - 1:
            keep = (~ended).nonzero()[:, 0]
            if len(keep) < len(ended):
                alive, ended, start, token = alive[keep], ended[keep], start[keep], token[keep]
                owner = [owner[r] for r in keep.tolist()]
                cache.select(keep, owner)
        if not len(alive) or t + 1 == sampling.max_completion_length:
            break
        embeds = thinker.get_input_embeddings()(token)[:, None]
        positions = (start + t).expand(3, -1)[..., None]  # (3, R, 1)
        hidden = decode(thinker, embeds, positions, cache.attend(t))[:, -1]
    return [_finish(tokens[r], logps[r], stops) for r in torch.arange(rows).split(num_generations)]


def _prefill(thinker, prompts, num_generations, max_completion_length):
    """Runs each prompt once; returns the hidden states that predict the first tokens (R, D), and the cache."""
    cache, last = _Cache(len(prompts), num_generations, max_completion_length), []
    for prompt in prompts:  # packed into one row they would take as long, and the memory of all at a time
        row = pack([prompt])
        embeds = embed(thinker, row.ids, row.visual, row.audio)
        hidden = decode(thinker, embeds[None], row.position_ids[:, None], cache.attend_prefill)
        last.append(hidden[0, -1:].expand(num_generations, -1))
    return torch.cat(last), cache


class _Cache:
    """Keys and values: each prompt's once, and the rows' own in buffers that are allocated once."""

    def __init__(self, prompts, num_generations, length):
        self.length = length
        self.owner = [i for i in range(prompts) for _ in range(num_generations)]
        self.prompts, self.own_keys, self.own_values = [], [], []  # one entry a layer

    def attend_prefill(self, layer, query, key, value, scale):
        """Attention of one prompt, keeping its keys and values; prompts are expected in order."""
        if layer == len(self.prompts):  # of the first prompt
            shape = key.shape[1], len(self.owner), self.length, key.shape[3]
            self.prompts.append([])
            self.own_keys.append(key.new_empty(shape))
            self.own_values.append(value.new_empty(shape))
        self.prompts[layer].append((key[0].transpose(1, 2).contiguous(), value[0].contiguous()))  # as decoding reads them
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=True)

    def attend(self, t):
        """The attention of decoding step `t`, one query a row: what `model.decode` takes."""
        return functools.partial(self._attend, t, _runs(self.owner))

    def _attend(self, t, runs, layer, query, key, value, scale):
        own_k, own_v = self.own_keys[layer], self.own_values[layer]
        own_k[:, :, t], own_v[:, :, t] = key[:, :, 0].transpose(0, 1), value[:, :, 0].transpose(0, 1)
        prompts = [(*self.prompts[layer][prompt], rows) for prompt, rows in runs]
        return _decode_attention(query * scale, prompts, own_k[:, :, :t + 1], own_v[:, :, :t + 1])

    def select(self, keep, owner):
        """Keeps the rows numbered `keep`."""
        self.owner = owner
        self.own_keys = [k[:, keep] for k in self.own_keys]
        self.own_values = [v[:, keep] for v in self.own_values]


def _runs(owner):
    """Stretches of rows of the same prompt: [0, 0, 2] -> [(0, slice(0, 2)), (2, slice(2, 3))]."""
    starts = [r for r in range(len(owner)) if r == 0 or owner[r] != owner[r - 1]]
    return [(owner[a], slice(a, b)) for a, b in zip(starts, [*starts[1:], len(owner)])]


def _decode_attention(query, prompts, own_k, own_v):
    """Attention of R rows, one scaled query each, over [the keys of the row's prompt, shared | the row's own].

    query (R, heads, 1, hd); own_k and own_v (kv heads, R, T, hd); prompts: (keys (kv heads, hd, P), values (kv heads,
    P, hd), slice of its rows), in the order of the rows. The keys of a prompt are read once for all its rows: their
    queries form one matrix a key-value head.
    """
    kv, r, _, hd = own_k.shape
    query = query.view(r, kv, -1, hd).transpose(0, 1)  # (kv, R, heads / kv, hd)
    own_scores = query @ own_k.transpose(2, 3)  # (kv, R, heads / kv, T)
    on_prompt, own_weights = [], []
    for keys, values, rows in prompts:
        scores = torch.cat([query[:, rows].flatten(1, 2) @ keys, own_scores[:, rows].flatten(1, 2)], -1)
        weights = scores.softmax(-1, dtype=torch.float32).to(scores.dtype)  # (kv, rows * heads / kv, P + T)
        on_prompt.append(weights[..., :keys.shape[2]] @ values)
        own_weights.append(weights[..., keys.shape[2]:])
    out = torch.cat(on_prompt, 1).view_as(query) + torch.cat(own_weights, 1).view_as(own_scores) @ own_v
    return out.transpose(0, 1).reshape(r, -1, 1, hd)


def _sample(logits, sampling, suppressed, generators, counts):
    """Chooses one token a row: (ids (R,), log-probs under the full vocabulary (R,)).

    counts: rows of each prompt, in order. Gumbel's trick with exponential noise: argmax(p / noise) is a draw from p, on
    the device and without waiting for it.
    """
    logits = logits.div_(sampling.temperature or 1.0)
    normaliser = logits.logsumexp(-1)
    allowed = logits.index_fill_(-1, suppressed, -torch.inf)  # in place: the normaliser has been taken
    if sampling.temperature == 0:
        token = allowed.argmax(-1)
    else:
        ids = None
        if sampling.top_k or sampling.top_p < 1:  # else the whole vocabulary, which then need not be sorted
            allowed, ids = allowed.topk(min(sampling.top_k or allowed.shape[-1], allowed.shape[-1]))
        probs = allowed.softmax(-1)
        if sampling.top_p < 1:  # the smallest set of tokens that reaches top_p: the first is always in
            probs = probs.masked_fill(probs.cumsum(-1) - probs >= sampling.top_p, 0.0)
        noise = torch.cat([probs.new_empty(n, probs.shape[1]).exponential_(generator=g)
                           for n, g in zip(counts, generators)])
        token = (probs / noise).argmax(-1)
        token = token if ids is None else ids.gather(-1, token[:, None])[:, 0]
    return token, logits.gather(-1, token[:, None])[:, 0] - normaliser


def _finish(tokens, logps, stops):
    """Rows (G, limit) of one prompt -> Rollout, trimmed to its longest completion."""
    is_stop = torch.isin(tokens, stops)
    stopped = is_stop.any(1)
    lengths = torch.where(stopped, is_stop.int().argmax(1) + 1, tokens.shape[1])
    longest = int(lengths.max())
    mask = torch.arange(longest, device=tokens.device) < lengths[:, None]
    return Rollout(tokens[:, :longest], mask, ~stopped, logps[:, :longest])
