"""Log-probabilities of chosen tokens from hidden states, without ever holding all logits.

Full logits of a group are (G * C, V): 8 x 1024 x 152k floats are 5 GB. Here they exist for `chunk` tokens at a time,
forward and backward (each chunk's are computed again in the backward pass), so memory is O(chunk * V). The backward
pass is written out, so that the weight's gradient is summed in one (V, D) buffer instead of made anew for each chunk.
"""

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable


def token_logps(hidden, weight, tokens, temperature=1.0):
    """log_softmax(hidden @ weight.T / temperature) at `tokens`, and the entropy of that distribution; float32.

    hidden (N, D), weight (V, D), tokens (N,). Returns (logps (N,), entropy (N,)); the entropy carries no gradient.
    """
    return chunked_token_logps(hidden, weight, tokens, temperature, chunk=max(1, len(tokens)))


def chunked_token_logps(hidden, weight, tokens, temperature=1.0, chunk=128):
    """`token_logps` in chunks of tokens: equal values and gradients, logits of `chunk` tokens in memory."""
    return _TokenLogps.apply(hidden, weight, tokens, temperature, chunk)


def _logits(hidden, weight, temperature):
    logits = F.linear(hidden, weight).float()  # (N, V)
    return logits if temperature == 1 else logits.div_(temperature)


class _TokenLogps(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, tokens, temperature, chunk):
        """As chunked_token_logps; keeps the normalisers (N,) for the backward pass, and no logits."""
        pieces = []
        for h, ids in zip(hidden.split(chunk), tokens.split(chunk)):
            logits = _logits(h, weight, temperature)
            top = logits.amax(-1, keepdim=True)
            powers = (logits - top).exp_()
            total = powers.sum(-1)
            normaliser = top[:, 0] + total.log()
            # H = normaliser - sum p * logit
            entropy = normaliser - torch.einsum("nv,nv->n", powers, logits) / total
            pieces.append((logits.gather(-1, ids[:, None])[:, 0] - normaliser, entropy, normaliser))
        logps, entropy, normaliser = (torch.cat(part) for part in zip(*pieces))
        ctx.save_for_backward(hidden, weight, tokens, normaliser)
        ctx.temperature, ctx.chunk = temperature, chunk
        ctx.mark_non_differentiable(entropy)
        return logps, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, _):
        """With g = grad / temperature: d logits = g (one-hot(token) - p), a chunk at a time."""
        hidden, weight, tokens, normaliser = ctx.saved_tensors
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None  # frozen with LoRA
        parts = (x.split(ctx.chunk) for x in (hidden, tokens, normaliser, grad / ctx.temperature, grad_hidden))
        for h, ids, norm, g, out in zip(*parts):
            slope = _logits(h, weight, ctx.temperature).sub_(norm[:, None]).exp_().mul_(-g[:, None])
            slope = slope.scatter_add_(-1, ids[:, None], g[:, None]).to(weight.dtype)
            torch.mm(slope, weight, out=out)
            if grad_weight is not None:
                grad_weight.addmm_(slope.t(), h)
        return grad_hidden, grad_weight, None, None, None
