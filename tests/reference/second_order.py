"""Second-order oracles for tiny models, in float64: Hessian-vector products, Lanczos, the Gauss-Newton matrix by all labels.

Parameters are taken as one vector: those named, in the order given, each flattened.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

Loss = Callable[[], torch.Tensor]


def log_probabilities(model: Any, ids: list[int], mask: list[bool]) -> torch.Tensor:
    """log p(. | tokens before t) for every loss token t; [tokens, vocabulary]. By kernels that can be differentiated twice."""
    with sdpa_kernel(SDPBackend.MATH):
        logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
    places = [t - 1 for t in range(1, len(ids)) if mask[t]]
    return torch.log_softmax(logits[places], dim=1)


def expected_loss(model: Any, ids: list[int], mask: list[bool], q: torch.Tensor) -> torch.Tensor:
    """sum_t sum_y q_t(y) (-log p_t(y)): the loss of a sample whose labels come from q."""
    return -(q * log_probabilities(model, ids, mask)).sum()


def flat(tensors: Any) -> torch.Tensor:
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


def hessian_vector(loss: Loss, parameters: list[torch.Tensor], vector: torch.Tensor) -> torch.Tensor:
    """H v by double backward."""
    gradient = flat(torch.autograd.grad(loss(), parameters, create_graph=True))
    return flat(torch.autograd.grad(gradient @ vector, parameters)).detach()


def dense_hessian(loss: Loss, parameters: list[torch.Tensor]) -> np.ndarray:
    """H, a row at a time, over one graph of the gradient."""
    gradient = flat(torch.autograd.grad(loss(), parameters, create_graph=True))
    rows = [flat(torch.autograd.grad(g, parameters, retain_graph=True)) for g in gradient]
    return torch.stack(rows).detach().numpy()


def lanczos(
    product: Callable[[np.ndarray], np.ndarray], size: int, steps: int, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Ritz values (descending) and vectors (columns) of a symmetric operator, with full reorthogonalisation, twice a step."""
    q = np.random.default_rng(seed).normal(size=size)
    basis = [q / np.linalg.norm(q)]
    alphas: list[float] = []
    betas: list[float] = []
    for _ in range(min(steps, size)):
        w = product(basis[-1])
        alphas.append(float(w @ basis[-1]))
        for _ in range(2):
            for b in basis:
                w = w - (w @ b) * b
        beta = float(np.linalg.norm(w))
        if beta < 1e-12 * max(map(abs, alphas)):
            break
        betas.append(beta)
        basis.append(w / beta)
    count = len(alphas)
    tridiagonal = np.diag(alphas) + np.diag(betas[: count - 1], 1) + np.diag(betas[: count - 1], -1)
    values, vectors = np.linalg.eigh(tridiagonal)
    order = values.argsort()[::-1]
    return values[order], np.stack(basis[:count], axis=1) @ vectors[:, order]


def label_gradients(
    model: Any, ids: list[int], mask: list[bool], parameters: list[torch.Tensor]
) -> tuple[np.ndarray, np.ndarray]:
    """(p_t(y) [tokens, V], gradient of -log p_t(y) [tokens, V, P]) for every loss token and every label."""
    logp = log_probabilities(model, ids, mask)
    rows = [
        [flat(torch.autograd.grad(-value, parameters, retain_graph=True)).numpy() for value in token] for token in logp
    ]
    return logp.detach().exp().numpy(), np.array(rows)


def gauss_newton(p: np.ndarray, g: np.ndarray) -> np.ndarray:
    """sum_t sum_y p_t(y) g_ty g_ty^T: the Gauss-Newton matrix of a softmax with cross entropy, equal to its Fisher."""
    return np.einsum("ty,typ,tyq->pq", p, g, g)
