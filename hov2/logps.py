"""Log-probabilities of chosen tokens from hidden states, without ever holding all logits.

Full logits of a group are (G * C, V): 8 x 1024 x 152k floats are 5 GB. Here they exist for `chunk` tokens at a time,
forward and backward (each piece is recomputed in the backward pass), so memory is O(chunk * V) and no work is added to
the plain way except that recomputation.
"""

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint


def token_logps(hidden, weight, tokens, temperature=1.0):
    """log_softmax(hidden @ weight.T / temperature) at `tokens`, and the entropy of that distribution; float32.

    hidden (N, D), weight (V, D), tokens (N,). Returns (logps (N,), entropy (N,)); the entropy carries no gradient.
    """
    logits = F.linear(hidden, weight).float() / temperature  # (N, V)
    normaliser = logits.logsumexp(-1)
    logps = logits.gather(-1, tokens[:, None])[:, 0] - normaliser
    with torch.no_grad():
        # H = logsumexp - sum p * logit
        entropy = normaliser - (torch.exp(logits - normaliser[:, None]) * logits).sum(-1)
    return logps, entropy


def chunked_token_logps(hidden, weight, tokens, temperature=1.0, chunk=128):
    """`token_logps` in chunks of tokens: equal values and gradients, logits of `chunk` tokens in memory.

    With gradients on, a chunk's logits are recomputed in the backward pass rather than kept.
    """
    pieces = []
    for start in range(0, len(tokens), chunk):
        arguments = hidden[start:start + chunk], weight, tokens[start:start + chunk], temperature
        if torch.is_grad_enabled():
            pieces.append(checkpoint(token_logps, *arguments, use_reentrant=False))
        else:
            pieces.append(token_logps(*arguments))
    return torch.cat([p[0] for p in pieces]), torch.cat([p[1] for p in pieces])
