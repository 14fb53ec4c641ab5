"""Slow, literal implementations of the online formulas: plain Python floats, brute force, nothing shared with the code under test."""

from __future__ import annotations

import itertools

import numpy as np


def greedy(gram: np.ndarray, align: np.ndarray, n_keep: int, score: str) -> list[int]:
    """Section 4 as printed: recompute alpha* and r = b - K_{:,S} alpha* 1 from scratch before every choice."""
    chosen: list[int] = []
    for _ in range(min(n_keep, len(align))):
        top = sum(align[i] for i in chosen)
        bottom = sum(gram[i][j] for i in chosen for j in chosen)
        alpha = max(0.0, top / bottom) if chosen else 0.0
        best, best_score = None, 0.0
        for j in range(len(align)):
            if j in chosen:
                continue
            r = align[j] - sum(gram[j][i] * alpha for i in chosen)
            if score == "decrease":
                value = max(r, 0.0) ** 2 / (2 * gram[j][j])
            elif score == "residual":
                value = r
            else:
                value = r / gram[j][j] ** 0.5
            if value > best_score:
                best, best_score = j, value
        if best is None:
            break
        chosen.append(best)
    return chosen


def box_quadratic(gram: np.ndarray, align: np.ndarray, upper: float) -> np.ndarray:
    """Exact minimiser of w'Kw/2 - b'w over the box, by trying every active set (at most 3^n of them)."""
    n = len(align)
    best, best_value = np.zeros(n), 0.0
    for pattern in itertools.product((0, 1, 2), repeat=n):
        free = [i for i in range(n) if pattern[i] == 1]
        w = np.array([upper if p == 2 else 0.0 for p in pattern])
        if free:
            rest = align[free] - gram[np.ix_(free, range(n))] @ w
            w[free] = np.linalg.solve(gram[np.ix_(free, free)], rest)
        if (w < -1e-12).any() or (w > upper + 1e-12).any():
            continue
        value = 0.5 * w @ gram @ w - align @ w
        if value < best_value:
            best, best_value = w, value
    return best


def adamw_step(theta, gradient, first, second, t, lr, beta1, beta2, eps, decay):  # type: ignore[no-untyped-def]
    """One step of AdamW as published (Loshchilov and Hutter), t from 1: (new theta, first, second moment)."""
    first = beta1 * first + (1 - beta1) * gradient
    second = beta2 * second + (1 - beta2) * gradient**2
    m_hat = first / (1 - beta1**t)
    v_hat = second / (1 - beta2**t)
    return theta - lr * decay * theta - lr * m_hat / (np.sqrt(v_hat) + eps), first, second


def sample_gradients(model, encoded):  # type: ignore[no-untyped-def]
    """Dense gradients of one sample's summed loss for every parameter, and that loss: plain autograd, one sample, no padding."""
    import torch

    ids = torch.tensor([encoded.ids])
    logits = model(input_ids=ids, use_cache=False).logits[0]
    total = torch.zeros((), dtype=logits.dtype)
    for position in range(1, len(encoded.ids)):
        if encoded.loss_mask[position]:
            total = total - torch.log_softmax(logits[position - 1], 0)[encoded.ids[position]]
    names, parameters = zip(*model.named_parameters())
    gradients = torch.autograd.grad(total, parameters, allow_unused=True)
    filled = [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, gradients)]
    return dict(zip(names, filled)), float(total.detach())
