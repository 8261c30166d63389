"""Sampling completions: one prefill for each prompt, its keys and values kept once, all rows decoded together.

N prompts with G completions each are decoded as one batch of N x G rows. Attention is one batched operation over
[the prompt's keys and values, shared by its G rows | the row's own]. Each prompt has its own random generator, so its
completions don't depend on what is decoded beside it.

On the CPU a step costs what it computes: rows that have ended leave, and attention reads the tokens that there are. On
CUDA a step would cost mostly the launching of some 800 small kernels, so there it has fixed shapes and is captured as a
CUDA graph, which launches all of them at once. Both are the same code with other lengths.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from hov2.distributed import print0
from hov2.model.attention import stacked_projections
from hov2.model.encoder import Prompt
from hov2.model.prefix import causal_attention, pack
from hov2.model.thinker import Thinker, decode, embed
from hov2.spans import TURN_ENDS, states_towards, token_bytes_of

LEAVE_EVERY = 8  # tokens between looks at which rows have ended (each look waits for the device)
WORTH_LEAVING = 0.75  # fixed shapes: rows leave when no more than this share of them remains
OWN_KEYS = 256  # fixed shapes: the rows' own keys are read in multiples of so many tokens
ALIGNED = 8  # prompts are padded to a multiple of so many tokens: tensor cores want rows of 16 bytes


@dataclass
class Sampling:
    """How tokens are chosen. `temperature` 0 is greedy; `top_k` 0 and `top_p` 1 mean the whole vocabulary."""

    max_completion_length: int
    stop_ids: list[int]  # a completion ends with the first of these
    pad_id: int
    suppressed_ids: Tensor  # (n,), never sampled: media placeholders, rows that the tokenizer lacks
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    answer_states: Tensor | None = None  # (V, states), `spans.states_towards` "</answer>": end there as well
    logps: int = 0  # of how many prompts, the first ones, `Rollout.sampling_logps` is filled
    decoding: Literal["auto", "shrinking", "fixed", "graph"] = "auto"  # auto: a graph on CUDA, else shrinking shapes


@dataclass
class Rollout:
    """G completions of one prompt, right-padded to their own longest."""

    completion_ids: Tensor  # (G, C)
    completion_mask: Tensor  # (G, C) bool: up to and including the token that ended it
    truncated: Tensor  # (G,) bool: cut off at the limit
    sampling_logps: Tensor | None  # (G, C) float32: under the full vocabulary, at the sampling temperature


def sampling_for(
    tokenizer: PreTrainedTokenizerBase, config: Any, stop_at_answer: bool = False, **settings: Any
) -> Sampling:
    """Return a Sampling with the stop, pad and suppressed ids of this tokenizer and thinker config.

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


def make_generator(device: torch.device | str, *key: int) -> torch.Generator:
    """Return a generator seeded by (seed, step, sample): the same key, the same tokens, on any rank."""
    seed = int(np.random.SeedSequence([int(k) for k in key]).generate_state(1, np.uint64)[0] >> np.uint64(1))
    return torch.Generator(device).manual_seed(seed)


@torch.no_grad()
def generate(
    thinker: Thinker,
    prompts: list[Prompt],
    num_generations: int,
    sampling: Sampling,
    generators: list[torch.Generator | None],
    on_token: Callable[[Tensor], None] | None = None,
) -> list[Rollout]:
    """Sample `num_generations` completions for each prompt: a list of Rollout, in the order of the prompts.

    generators: one torch.Generator for each prompt (unused when greedy). The thinker must be in eval mode.
    `on_token(ids)` is called after every step with the new token of each row, (rows,) on the device, `num_generations`
    rows a prompt, `pad_id` for a row that has ended. Reading them waits for the device: at every token, where decoding
    by itself waits only now and then.
    """
    device, limit = prompts[0].ids.device, sampling.max_completion_length
    hidden, cache = _prefill(thinker, prompts, num_generations, limit)
    step = _Step(thinker, cache, _decoding_on(device, sampling.decoding))
    rows = len(prompts) * num_generations
    start = torch.stack([prompt.next_position for prompt in prompts]).repeat_interleave(num_generations)  # (rows,)
    batch = torch.arange(rows, device=device)  # the numbers of the rows that are still decoded
    ended = torch.zeros(rows, dtype=torch.bool, device=device)  # of the batch
    state = torch.zeros(rows, dtype=torch.long, device=device)  # how far they are in "</answer>"
    tokens = torch.full((rows, limit), sampling.pad_id, device=device)
    is_end = torch.zeros(rows, limit, dtype=torch.bool, device=device)
    logps = torch.zeros(rows, limit, device=device)
    stops = torch.tensor(sampling.stop_ids, device=device)
    suppressed = sampling.suppressed_ids.to(device)
    temperature = sampling.temperature or 1.0  # greedy: the log-probs at 1
    states = None if sampling.answer_states is None else sampling.answer_states.to(device)
    with stacked_projections(thinker, step.fixed):
        for t in range(limit):
            logits = F.linear(hidden, thinker.lm_head.weight).float()  # (R, V)
            first = slice(cache.rows_of_first(sampling.logps))  # the rows whose log-probs are kept
            normaliser = (logits[first] / temperature).logsumexp(-1)  # before some tokens are suppressed
            token = _sample(logits, sampling, suppressed, functools.partial(_noise, generators, num_generations, batch))
            tokens[batch, t] = torch.where(ended, sampling.pad_id, token)
            logit = logits[first].gather(-1, token[first, None])[:, 0] / temperature
            logps[batch[first], t] = torch.where(ended[first], 0.0, logit - normaliser)
            if on_token is not None:
                on_token(tokens[:, t])
            ends = torch.isin(token, stops)
            if states is not None:
                state = states[token, state]
                ends = ends | (state == states.shape[1] - 1)
            is_end[batch, t] = ends
            ended = ended | ends
            if t % LEAVE_EVERY == LEAVE_EVERY - 1:
                alive = (~ended).view(cache.size).tolist()  # waits for the device
                if not any(any(of_prompt) for of_prompt in alive):
                    break
                kept = _rows_to_keep(alive, step.worth_leaving)
                if kept is not None:
                    keep = cache.select(kept)
                    batch = batch[keep]
                    ended = ended[keep]
                    start = start[keep]
                    token = token[keep]
                    state = state[keep]
            if t + 1 < limit:
                hidden = step(token, start + t, t)
    rollouts = []
    for number in range(len(prompts)):
        of_prompt = slice(number * num_generations, (number + 1) * num_generations)
        kept_logps = logps[of_prompt] if number < sampling.logps else None
        rollouts.append(_finish(tokens[of_prompt], is_end[of_prompt], kept_logps))
    return rollouts


def _prefill(
    thinker: Thinker, prompts: list[Prompt], num_generations: int, max_completion_length: int
) -> tuple[Tensor, "_Cache"]:
    """Run each prompt once; return the hidden states that predict the first tokens (R, D), and the cache."""
    cache = _Cache([len(prompt.ids) for prompt in prompts], num_generations, max_completion_length)
    last = []
    for number, prompt in enumerate(prompts):  # packed into one row they take as long, and the memory of all at a time
        row = pack([prompt])
        embeds = embed(thinker, row.ids, row.visual, row.audio)
        attend = functools.partial(cache.attend_prefill, number)
        hidden = decode(thinker, embeds[None], row.position_ids[:, None], attend)
        last.append(hidden[0, -1:].expand(num_generations, -1))
    return torch.cat(last), cache


# ---- One step of all rows --------------------------------------------------------------------------------------------


def _decoding_on(device: torch.device, decoding: str) -> str:
    """The form of decoding that "auto" stands for on a device."""
    if decoding != "auto":
        return decoding
    return "graph" if device.type == "cuda" else "shrinking"


class _Step:
    """Decodes one new token of each row: `step(token (R,), position (R,), t)` -> hidden states (R, D).

    "shrinking" computes no more than is needed. "fixed" computes the same shapes at token after token, masked where
    there is nothing yet. "graph" is "fixed" captured as a CUDA graph and replayed: of each new shape the first step
    runs as usual (which loads kernels), the second is captured. If that can't be done here, it goes on without.
    """

    def __init__(self, thinker: Thinker, cache: "_Cache", decoding: str) -> None:
        self.thinker = thinker
        self.cache = cache
        self.fixed = decoding != "shrinking"
        self.use_graph = decoding == "graph" and not _no_graph
        self.worth_leaving = WORTH_LEAVING if self.fixed else 1.0
        self.shape = self.graph = None

    def __call__(self, token: Tensor, position: Tensor, t: int) -> Tensor:
        if not self.fixed:
            return self._run(token, position, torch.full((1,), t, device=token.device), t + 1)
        length = min(self.cache.length, -(-(t + 1) // OWN_KEYS) * OWN_KEYS)
        if (len(token), length) != self.shape:
            self.shape = len(token), length
            self.graph = None
            self.seen = 0
            self.inputs = token.clone(), position.clone(), torch.full((1,), t, device=token.device)
        for mine, new in zip(self.inputs, (token, position)):
            mine.copy_(new)
        self.inputs[2].fill_(t)
        self.seen += 1
        if self.use_graph and self.seen == 2:
            self._capture(length)
        if self.graph is None:
            return self._run(*self.inputs, length)
        self.graph.replay()
        return self.hidden

    def _run(self, token: Tensor, position: Tensor, place: Tensor, length: int) -> Tensor:
        """Run one step. place (1,): where the rows' new keys go; length: how many of the rows' own keys are read."""
        embeds = self.thinker.get_input_embeddings()(token)[:, None]
        attend = self.cache.attend(place, length)
        return decode(self.thinker, embeds, position.expand(3, -1)[..., None], attend)[:, -1]

    def _capture(self, length: int) -> None:
        """Record one step, without running it, as `graph`, whose replays read `inputs` and write `hidden`."""
        try:
            graph = torch.cuda.CUDAGraph()
            memory, stream = _place_for_graphs()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                # other threads (pinned copies, the collectives' watchdog) may go on with what they do
                graph.capture_begin(pool=memory, capture_error_mode="thread_local")
                try:
                    hidden = self._run(*self.inputs, length)
                finally:
                    graph.capture_end()
            torch.cuda.current_stream().wait_stream(stream)
        except Exception as error:  # noqa: BLE001, whatever it is, the same numbers can be had without a graph
            self.use_graph = False
            _no_graph.append(error)
            print0(f"decoding goes on without a CUDA graph, slower: {type(error).__name__}: {error}")
        else:
            self.graph, self.hidden = graph, hidden
            _last_graph[:] = [graph]


_no_graph: list[Exception] = []  # why this process couldn't capture a graph, once it couldn't
# The newest graph, kept until the next one is there: memory that no graph uses can't be shared again.
_last_graph: list[torch.cuda.CUDAGraph] = []


@functools.cache
def _place_for_graphs() -> tuple[tuple[int, int], torch.cuda.Stream]:
    """The memory that all graphs of this process share, one after the other, and the stream that they're captured on.

    cuBLAS keeps a workspace for each stream that it ever saw.
    """
    return torch.cuda.graph_pool_handle(), torch.cuda.Stream()


def _rows_to_keep(alive: list[list[bool]], worth_leaving: float) -> dict[int, list[int]] | None:
    """Choose which rows go on: {prompt: its rows}, as many of each prompt; None if all do.

    alive: N lists of G bools. Prompts whose rows have all ended leave; of the others, those rows stay that are alive,
    and ended ones beside them where another prompt has more alive. It isn't worth it (None) if more than the share
    `worth_leaving` of the rows would stay.
    """
    most = max(sum(of_prompt) for of_prompt in alive)
    kept = {}
    for prompt, of_prompt in enumerate(alive):
        if any(of_prompt):
            alive_first = sorted(range(len(of_prompt)), key=lambda row: not of_prompt[row])
            kept[prompt] = sorted(alive_first[:most])
    before = len(alive) * len(alive[0])
    after = len(kept) * most
    if after == before or after > worth_leaving * before:
        return None
    return kept


# ---- Keys, values, attention -----------------------------------------------------------------------------------------


class _Cache:
    """Keys and values of N prompts and their G rows each: a prompt's once, the rows' own in buffers allocated once.

    One entry a layer: prompt_keys, prompt_values (N, kv heads, P, hd), prompts padded to the longest; own_keys,
    own_values (N, kv heads, G, T, hd).
    """

    def __init__(self, prompt_lengths: list[int], num_generations: int, length: int) -> None:
        self.prompt_lengths, self.length = prompt_lengths, length
        self.size = len(prompt_lengths), num_generations  # (N, G) of those that haven't left
        self.prompts = list(range(len(prompt_lengths)))  # the numbers of the prompts that haven't left
        self.longest = -(-max(prompt_lengths) // ALIGNED) * ALIGNED
        self.prompt_keys = []
        self.prompt_values = []
        self.own_keys = []
        self.own_values = []
        self.padding = None  # (N, P) float32: minus infinity where a prompt is padded, else 0

    def rows_of_first(self, count: int) -> int:
        """Say how many of the rows, the first ones, belong to the first `count` prompts."""
        return sum(prompt < count for prompt in self.prompts) * self.size[1]

    def attend_prefill(
        self, number: int, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float
    ) -> Tensor:
        """Attention of prompt `number`, keeping its keys and values (1, kv heads, its length, hd)."""
        if layer == len(self.prompt_keys):
            self._allocate(key)
        self.prompt_keys[layer][number, :, : key.shape[2]] = key[0]
        self.prompt_values[layer][number, :, : key.shape[2]] = value[0]
        return causal_attention(query, key, value, scale)

    def _allocate(self, key: Tensor) -> None:
        """Make the buffers of one layer, zero where there is nothing: what is masked must be finite."""
        prompts, rows = self.size
        _, heads, _, size = key.shape
        for of_prompts in (self.prompt_keys, self.prompt_values):
            of_prompts.append(key.new_zeros(prompts, heads, self.longest, size))
        for of_rows in (self.own_keys, self.own_values):
            of_rows.append(key.new_zeros(prompts, heads, rows, self.length, size))
        if self.padding is None:
            lengths = torch.tensor(self.prompt_lengths, device=key.device)[:, None]
            places = torch.arange(self.longest, device=key.device)
            self.padding = torch.zeros(prompts, self.longest, device=key.device)
            self.padding.masked_fill_(places >= lengths, -torch.inf)

    def attend(self, place: Tensor, length: int) -> Callable[..., Tensor]:
        """The attention of one decoding step, one query a row: what `model.decode` takes.

        place (1,): where the rows' new keys go; length: how many of the rows' own keys are read, those behind `place`
        masked.
        """
        future = torch.zeros(length, device=place.device)
        future.masked_fill_(torch.arange(length, device=place.device) > place, -torch.inf)
        mask = torch.cat([self.padding, future.expand(len(self.padding), -1)], 1)  # (N, P + length)
        return functools.partial(self._attend, place, length, mask[:, None, None])

    def _attend(
        self,
        place: Tensor,
        length: int,
        mask: Tensor,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float,
    ) -> Tensor:
        """query (R, heads, 1, hd), key and value (R, kv heads, 1, hd) of the new tokens -> (R, heads, 1, hd)."""
        own_keys, own_values = self.own_keys[layer], self.own_values[layer]
        n, kv, g, _, hd = own_keys.shape
        own_keys.index_copy_(3, place, key.view(n, g, kv, 1, hd).transpose(1, 2))
        own_values.index_copy_(3, place, value.view(n, g, kv, 1, hd).transpose(1, 2))
        query = query.view(n, g, kv, -1, hd).transpose(1, 2)  # (N, kv, G, heads / kv, hd)
        attended = _decode_attention(
            query,
            self.prompt_keys[layer],
            self.prompt_values[layer],
            own_keys[:, :, :, :length],
            own_values[:, :, :, :length],
            mask,
            scale,
        )
        return attended.transpose(1, 2).to(query.dtype, memory_format=torch.contiguous_format).reshape(n * g, -1, 1, hd)

    def select(self, kept: dict[int, list[int]]) -> Tensor:
        """Keep the rows `kept`, {number of the prompt in the batch: its rows}; return their numbers in the batch."""
        device = self.padding.device
        width = self.size[1]
        prompts = torch.tensor(list(kept), device=device)  # (N',)
        rows = torch.tensor(list(kept.values()), device=device)  # (N', G')
        for of_prompts in (self.prompt_keys, self.prompt_values):
            of_prompts[:] = [x if len(kept) == len(x) else x[prompts] for x in of_prompts]
        heads = torch.arange(self.own_keys[0].shape[1], device=device)
        for of_rows in (self.own_keys, self.own_values):
            of_rows[:] = [x[prompts[:, None, None], heads[None, :, None], rows[:, None]] for x in of_rows]
        self.padding = self.padding[prompts]
        self.prompts = [self.prompts[i] for i in kept]
        self.size = tuple(rows.shape)
        return (prompts[:, None] * width + rows).flatten()


def _decode_attention(
    query: Tensor,
    prompt_keys: Tensor,
    prompt_values: Tensor,
    own_keys: Tensor,
    own_values: Tensor,
    mask: Tensor,
    scale: float,
) -> Tensor:
    """Attention of one query a row over [the keys of its prompt, shared | its own]: (N, kv, G, heads / kv, hd) float32.

    query (N, kv, G, heads / kv, hd); prompt_keys, prompt_values (N, kv, P, hd); own_keys, own_values (N, kv, G, T, hd);
    mask (N, 1, 1, P + T), added to the scores. The keys of a prompt are read once for all its rows: their queries form
    one matrix a key-value head. Scores, weights' sums and the output are float32, as in flash attention, which training
    uses: what is sampled is what is trained.
    """
    n, kv, g, shared, hd = query.shape
    p, t = prompt_keys.shape[2], own_keys.shape[3]
    query = query.reshape(n * kv, g * shared, hd)
    on_prompt = _product(query, prompt_keys.flatten(0, 1).mT)  # (N * kv, G * shared, P)
    on_own = _product(query.view(n * kv * g, shared, hd), own_keys.flatten(0, 2).mT)
    scores = torch.cat([on_prompt, on_own.view(n * kv, g * shared, t)], -1).view(n, kv, g * shared, p + t)
    weights = torch.add(mask, scores, alpha=scale).softmax(-1).to(own_values.dtype).flatten(0, 1)
    own_weights = weights[..., p:].unflatten(1, (g, shared)).flatten(0, 1)
    from_prompt = _product(weights[..., :p], prompt_values.flatten(0, 1))  # (N * kv, G * shared, hd)
    from_own = _product(own_weights, own_values.flatten(0, 2)).view_as(from_prompt)
    return (from_prompt + from_own).view(n, kv, g, shared, hd)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """Return a batched a @ b in float32, also of matrices in a lower precision."""
    if a.dtype == torch.float32:
        return torch.bmm(a, b)
    if a.device.type == "cpu":  # has no such product
        return torch.bmm(a.float(), b.float())
    return torch.bmm(a, b, out_dtype=torch.float32)


# ---- Choosing tokens -------------------------------------------------------------------------------------------------


def _noise(generators: list[torch.Generator], num_generations: int, batch: Tensor, width: int) -> Tensor:
    """Draw exponential noise for the rows numbered `batch`, (R, width).

    Drawn for all rows of a prompt, those that have left too: what a row gets doesn't depend on when others end.
    """
    noise = [torch.empty(num_generations, width, device=batch.device).exponential_(generator=g) for g in generators]
    return torch.cat(noise)[batch]


def _sample(logits: Tensor, sampling: Sampling, suppressed: Tensor, draw: Callable[[int], Tensor]) -> Tensor:
    """Choose one token a row: ids (R,). `logits` (R, V) are set to minus infinity at the suppressed ids.

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


def _finish(tokens: Tensor, is_end: Tensor, logps: Tensor | None) -> Rollout:
    """Make a Rollout of one prompt's rows (G, limit), trimmed to the longest. `is_end`: the first True counts."""
    ended = is_end.any(1)
    lengths = torch.where(ended, is_end.int().argmax(1) + 1, tokens.shape[1])
    longest = int(lengths.max())
    mask = torch.arange(longest, device=tokens.device) < lengths[:, None]
    return Rollout(tokens[:, :longest], mask, ~ended, None if logps is None else logps[:, :longest])
