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
from hov2.spans import TURN_ENDS, states_towards, token_bytes_of

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
    answer_states: torch.Tensor | None = None  # (V, states), `spans.states_towards` "</answer>": end there as well
    compile: bool = False  # the decoding step goes through torch.compile, and its rows stay until all have ended
    logps: bool = False  # fills `Rollout.sampling_logps`; training takes those of its own first forward pass


@dataclass
class Rollout:
    """G completions of one prompt, right-padded to their own longest."""

    completion_ids: torch.Tensor  # (G, C)
    completion_mask: torch.Tensor  # (G, C) bool: up to and including the token that ended it
    truncated: torch.Tensor  # (G,) bool: cut off at the limit
    sampling_logps: torch.Tensor | None  # (G, C) float32: under the full vocabulary, at the sampling temperature


def sampling_for(tokenizer, config, stop_at_answer=False, **settings):
    """A Sampling with the stop, pad and suppressed ids of this tokenizer and thinker config.

    With `stop_at_answer` a completion ends with the token that completes its first `</answer>`, however the tokens
    share the tag among them.
    """
    stops = [tokenizer.convert_tokens_to_ids(t) for t in TURN_ENDS]
    media = [config.image_token_id, config.video_token_id, config.audio_token_id]
    vocab = config.text_config.vocab_size
    beyond = range(len(tokenizer), vocab)  # embedding rows that stand for no token
    if stop_at_answer:
        settings["answer_states"] = torch.tensor(states_towards(b"</answer>", token_bytes_of(tokenizer, range(vocab))))
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
    device, limit = prompts[0].ids.device, sampling.max_completion_length
    hidden, cache = _prefill(thinker, prompts, num_generations, limit)
    rows = len(cache.owner)
    start = torch.stack([prompts[i].next_position for i in cache.owner])  # (rows,)
    alive = torch.arange(rows, device=device)  # row numbers of those that haven't left
    ended = torch.zeros(rows, dtype=torch.bool, device=device)  # of the alive rows
    state = torch.zeros(rows, dtype=torch.long, device=device)  # how far they are in "</answer>"
    tokens = torch.full((rows, limit), sampling.pad_id, device=device)
    is_end = torch.zeros(rows, limit, dtype=torch.bool, device=device)
    logps = torch.zeros(rows, limit, device=device) if sampling.logps else None
    stops, suppressed = torch.tensor(sampling.stop_ids, device=device), sampling.suppressed_ids.to(device)
    states = None if sampling.answer_states is None else sampling.answer_states.to(device)
    for t in range(limit):
        logits = F.linear(hidden, thinker.lm_head.weight).float()  # (R, V)
        normaliser = (logits / (sampling.temperature or 1)).logsumexp(-1) if sampling.logps else None
        token = _sample(logits, sampling, suppressed, functools.partial(_noise, generators, num_generations, alive))
        tokens[alive, t] = torch.where(ended, sampling.pad_id, token)
        if sampling.logps:
            logit = logits.gather(-1, token[:, None])[:, 0] / (sampling.temperature or 1)
            logps[alive, t] = torch.where(ended, 0.0, logit - normaliser)
        if on_token is not None:
            on_token(tokens[:, t])
        ends = torch.isin(token, stops)
        if states is not None:
            state = states[token, state]
            ends = ends | (state == states.shape[1] - 1)
        is_end[alive, t] = ends
        ended = ended | ends
        if t % LEAVE_EVERY == LEAVE_EVERY - 1:
            keep = (~ended).nonzero()[:, 0]
            if len(keep) < len(ended) and not (sampling.compile and len(keep)):  # compiled for this number of rows
                alive, ended, start, token, state = (x[keep] for x in (alive, ended, start, token, state))
                cache.select(keep)
        if not len(alive) or t + 1 == limit:
            break
        place = torch.full((1,), t, device=device)
        run, length = (_compiled(), None) if sampling.compile else (_step, t + 1)
        hidden = run(thinker, token, start + t, cache, place, length)
    groups = torch.arange(rows).split(num_generations)
    return [_finish(tokens[r], is_end[r], None if logps is None else logps[r]) for r in groups]


def _prefill(thinker, prompts, num_generations, max_completion_length):
    """Runs each prompt once; returns the hidden states that predict the first tokens (R, D), and the cache."""
    cache, last = _Cache(len(prompts), num_generations, max_completion_length), []
    for prompt in prompts:  # packed into one row they would take as long, and the memory of all at a time
        row = pack([prompt])
        embeds = embed(thinker, row.ids, row.visual, row.audio)
        hidden = decode(thinker, embeds[None], row.position_ids[:, None], cache.attend_prefill)
        last.append(hidden[0, -1:].expand(num_generations, -1))
    return torch.cat(last), cache


def _step(thinker, token, position, cache, place, length):
    """Runs one new token of each row (R,) at its position (R,); returns the hidden states (R, D) that predict the next.

    place, length: as in `_Cache.attend`.
    """
    embeds = thinker.get_input_embeddings()(token)[:, None]
    return decode(thinker, embeds, position.expand(3, -1)[..., None], cache.attend(place, length))[:, -1]


@functools.cache
def _compiled():
    """`_step` compiled: once for a number of rows and tokens, and once more for prompts of any lengths.

    FSDP's hooks part the graph, so that each layer becomes a graph of its own: more than torch's limit of 8.
    """
    torch._dynamo.config.recompile_limit = 256
    return torch.compile(_step)


class _Cache:
    """Keys and values: each prompt's once, and the rows' own in buffers that are allocated once."""

    def __init__(self, prompts, num_generations, length):
        self.length = length
        self.owner = [i for i in range(prompts) for _ in range(num_generations)]  # row -> prompt, of the alive rows
        self.prompts, self.own_keys, self.own_values = [], [], []  # one entry a layer

    def attend_prefill(self, layer, query, key, value, scale):
        """Attention of one prompt, keeping its keys and values; prompts are expected in order."""
        if layer == len(self.prompts):  # of the first prompt
            shape = key.shape[1], len(self.owner), self.length, key.shape[3]
            self.prompts.append([])
            self.own_keys.append(key.new_zeros(shape))
            self.own_values.append(value.new_zeros(shape))
        kept = key[0].transpose(1, 2).contiguous(), value[0].contiguous()  # as decoding reads them
        self.prompts[layer].append(kept)
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=True)

    def attend(self, place, length):
        """The attention of one decoding step, one query a row: what `model.decode` takes.

        place (1,): where the rows' new keys go, as a tensor; length: of the rows' keys, the new ones last. None reads
        the whole buffers, masked: the same shapes at every step, for compiling.
        """
        future = torch.arange(self.length, device=place.device) > place if length is None else None
        return functools.partial(self._attend, place, length, future, _runs(self.owner))

    def _attend(self, place, length, future, runs, layer, query, key, value, scale):
        own_k, own_v = self.own_keys[layer], self.own_values[layer]
        own_k.index_copy_(2, place, key.transpose(0, 1))
        own_v.index_copy_(2, place, value.transpose(0, 1))
        prompts = [(*self.prompts[layer][prompt], rows) for prompt, rows in runs]
        return _decode_attention(query * scale, prompts, own_k[:, :, :length], own_v[:, :, :length], future)

    def select(self, keep):
        """Keeps the rows numbered `keep`."""
        self.owner = [self.owner[r] for r in keep.tolist()]
        self.own_keys = [k[:, keep] for k in self.own_keys]
        self.own_values = [v[:, keep] for v in self.own_values]


def _runs(owner):
    """Stretches of rows of the same prompt: [0, 0, 2] -> [(0, slice(0, 2)), (2, slice(2, 3))]."""
    starts = [r for r in range(len(owner)) if r == 0 or owner[r] != owner[r - 1]]
    return [(owner[a], slice(a, b)) for a, b in zip(starts, [*starts[1:], len(owner)])]


def _decode_attention(query, prompts, own_k, own_v, future=None):
    """Attention of R rows, one scaled query each, over [the keys of the row's prompt, shared | the row's own].

    query (R, heads, 1, hd); own_k and own_v (kv heads, R, T, hd); prompts: (keys (kv heads, hd, P), values (kv heads,
    P, hd), slice of its rows), in the order of the rows; future (T,): own keys to be left out. The keys of a prompt are
    read once for all its rows: their queries form one matrix a key-value head.
    """
    kv, r, _, hd = own_k.shape
    query = query.view(r, kv, -1, hd).transpose(0, 1)  # (kv, R, heads / kv, hd)
    own_scores = query @ own_k.transpose(2, 3)  # (kv, R, heads / kv, T)
    if future is not None:
        own_scores = own_scores.masked_fill(future, -torch.inf)
    on_prompt, own_weights = [], []
    for keys, values, rows in prompts:
        scores = torch.cat([query[:, rows].flatten(1, 2) @ keys, own_scores[:, rows].flatten(1, 2)], -1)
        weights = scores.softmax(-1, dtype=torch.float32).to(scores.dtype)  # (kv, rows * heads / kv, P + T)
        on_prompt.append(weights[..., :keys.shape[2]] @ values)
        own_weights.append(weights[..., keys.shape[2]:])
    out = torch.cat(on_prompt, 1).view_as(query) + torch.cat(own_weights, 1).view_as(own_scores) @ own_v
    return out.transpose(0, 1).reshape(r, -1, 1, hd)


def _noise(generators, num_generations, alive, width):
    """Exponential noise for the rows numbered `alive`, (R, width).

    Drawn for all rows of a prompt, those that have left too: what a row gets doesn't depend on when others end.
    """
    noise = [torch.empty(num_generations, width, device=alive.device).exponential_(generator=g) for g in generators]
    return torch.cat(noise)[alive]


def _sample(logits, sampling, suppressed, draw):
    """Chooses one token a row: ids (R,). `logits` (R, V) are set to minus infinity at the suppressed ids.

    draw(n): exponential noise (R, n). Gumbel's trick with it: argmax(p / noise) is a draw from p, on the device and
    without waiting for it.
    """
    logits.index_fill_(-1, suppressed, -torch.inf)
    if sampling.temperature == 0:
        return logits.argmax(-1)
    ids = None
    if sampling.top_k or sampling.top_p < 1:  # else the whole vocabulary, which then need not be sorted
        logits, ids = logits.topk(min(sampling.top_k or logits.shape[-1], logits.shape[-1]))
    probs = (logits / sampling.temperature).softmax(-1)
    if sampling.top_p < 1:  # the smallest set of tokens that reaches top_p: the first is always in
        probs = probs.masked_fill(probs.cumsum(-1) - probs >= sampling.top_p, 0.0)
    token = (probs / draw(probs.shape[1])).argmax(-1)
    return token if ids is None else ids.gather(-1, token[:, None])[:, 0]


def _finish(tokens, is_end, logps):
    """Rows (G, limit) of one prompt -> Rollout, trimmed to its longest completion. `is_end`: the first True counts."""
    ended = is_end.any(1)
    lengths = torch.where(ended, is_end.int().argmax(1) + 1, tokens.shape[1])
    longest = int(lengths.max())
    mask = torch.arange(longest, device=tokens.device) < lengths[:, None]
    return Rollout(tokens[:, :longest], mask, ~ended, None if logps is None else logps[:, :longest])
