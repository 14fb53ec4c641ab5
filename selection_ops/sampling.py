"""Labels sampled from a model's own distribution: what a Monte-Carlo Gauss-Newton matrix is made of.

For a sample's loss tokens, labels y_t ~ p(. | tokens before t) drawn from the softmax make a pseudo-loss sum -log p(y_t) whose
gradient g has mean zero and E[g g^T] = sum_t J_t^T (diag p_t - p_t p_t^T) J_t, the Gauss-Newton matrix of the sample (Martens,
JMLR 2020, sections 9 and 11; arXiv 1412.1193). Labels of different tokens are independent, so that no cross terms are left.

A draw is a function of (seed, sample id, draw, position) by the counter-based generator of `signs`. The distribution is computed of
the sample alone, without padding, so that a batch changes nothing.

Legend: T tokens, V vocabulary, D draws.
"""

from __future__ import annotations

from typing import Any

import torch

from schemas.spec import PROJECTION_VERSION
from selection_ops.encoding import Encoded
from selection_ops.model import evaluating
from selection_ops.signs import hashes

_TOKENS = 64
"""Tokens whose distribution stands in float64 at a time."""


def uniforms(seed: int, sample_id: str, draw: int, count: int) -> torch.Tensor:
    """Numbers in [0, 1), float64 [count]: the top 53 bits of the hashes of (seed, sample id, draw)."""
    value = hashes(seed, PROJECTION_VERSION, sample_id, f"label {draw}", count)
    return ((value >> 11) & (2**53 - 1)).to(torch.float64) * 2.0**-53


@torch.no_grad()
def sampled_labels(model: Any, item: Encoded, *, seed: int, sample_id: str, draws: int) -> list[list[int]]:
    """Token ids with every loss token drawn from the model's softmax in its place, once per draw; [D][T].

    A token's label is where the cumulated probabilities, in float64, pass its uniform number.
    """
    device = next(model.parameters()).device
    ids_T = torch.tensor(item.ids)
    places = torch.tensor(item.loss_mask).nonzero().flatten()
    with evaluating(model):
        logits_TV = model(input_ids=ids_T[None].to(device), use_cache=False).logits[0]
    uniform_DT = torch.stack([uniforms(seed, sample_id, draw, len(ids_T)) for draw in range(draws)])
    labels_DT = ids_T.repeat(draws, 1)
    for part in places.split(_TOKENS):
        cumulated_tV = logits_TV[(part - 1).to(device)].to(torch.float64).softmax(1).cumsum(1)
        wanted_tD = uniform_DT[:, part].T.to(device) * cumulated_tV[:, -1:]
        found_tD = torch.searchsorted(cumulated_tV, wanted_tD.contiguous(), right=True)
        labels_DT[:, part] = found_tD.clamp_max_(cumulated_tV.shape[1] - 1).T.cpu()
    return labels_DT.tolist()
