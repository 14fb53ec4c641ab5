"""The preconditioner is what AdamW's next step multiplies a gradient by."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from schemas.errors import InputError
from selection_ops.preconditioning import adamw_preconditioner
from tests.reference.online import adamw_step

BETA1, BETA2, EPS = 0.9, 0.95, 1e-8


@pytest.mark.parametrize("t", [2, 3, 7, 50])
def test_difference_of_true_steps_is_p_times_difference_of_gradients(t: int) -> None:
    """Two batches differ by g1 - g2; so the parameters after the step differ by -lr P (g1 - g2).

    Where every gradient so far had entries of one magnitude the new second moment equals the old one after bias
    correction, and the frozen P is exact: the tolerance is float64 rounding, about 10 operations of 1e-16 on numbers
    of relative size 1, taken as 1e-12.
    """
    rng = np.random.default_rng(t)
    size = rng.uniform(0.5, 2.0, 20)
    theta, first, second = rng.normal(size=20), np.zeros(20), np.zeros(20)
    for step in range(1, t):
        gradient = size * rng.choice([-1, 1], 20)
        theta, first, second = adamw_step(theta, gradient, first, second, step, 0.1, BETA1, BETA2, EPS, 0.3)
    g1, g2 = size * rng.choice([-1, 1], 20), size * rng.choice([-1, 1], 20)
    after1 = adamw_step(theta, g1, first, second, t, 0.1, BETA1, BETA2, EPS, 0.3)[0]
    after2 = adamw_step(theta, g2, first, second, t, 0.1, BETA1, BETA2, EPS, 0.3)[0]
    p = adamw_preconditioner(torch.tensor(second), step=t, beta1=BETA1, beta2=BETA2, eps=EPS).numpy()
    assert np.max(np.abs((after1 - after2) - -0.1 * p * (g1 - g2))) < 1e-12


def test_difference_of_torch_steps_for_general_gradients() -> None:
    """The same against torch.optim.AdamW with Gaussian gradients, where freezing the second moment is an approximation.

    After 1000 steps with beta2 = 0.999 the new gradient has the share 0.001 / (1 - 0.999^1000) = 0.0016 of vhat, so its root
    moves by 0.0008 (g^2 - 1) for unit Gaussians. That multiplies the first moment 0.9 m + 0.1 g with m of variance 0.05:
    root mean square sqrt(0.04 * 2 + 0.01 * 10) = 0.43 for each of two batches, against 0.1 * sqrt(2) for the difference:
    0.0008 * 0.43 * sqrt(2) / 0.14 = 0.0034 expected; twice that is the bound.
    """
    torch.manual_seed(0)
    steps = 1000
    gradients = torch.randn(steps + 1, 300, dtype=torch.float64)
    after = []
    second, seen = torch.empty(0), 0
    other = torch.randn(300, dtype=torch.float64)
    for last in (gradients[steps], other):
        theta = torch.nn.Parameter(torch.ones(300, dtype=torch.float64))
        optimizer = torch.optim.AdamW([theta], lr=0.01, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.1)
        for step in range(steps):
            theta.grad = gradients[step].clone()
            optimizer.step()
        second, seen = optimizer.state[theta]["exp_avg_sq"].clone(), int(optimizer.state[theta]["step"])
        theta.grad = last.clone()
        optimizer.step()
        after.append(theta.detach().clone())
    p = adamw_preconditioner(second, step=seen + 1, beta1=0.9, beta2=0.999, eps=1e-8)
    true = after[0] - after[1]
    assert seen == steps
    assert float((true + 0.01 * p * (gradients[steps] - other)).norm() / true.norm()) < 7e-3


def test_untouched_entries_are_floored_at_a_hundredth_of_the_site() -> None:
    second = torch.full((10, 10), 4.0, dtype=torch.float64)
    second[0, 0] = 0.0
    p = adamw_preconditioner(second, step=2, beta1=0.0, beta2=0.5, eps=0.0)
    # vhat = v / 0.5, its root mean square over the site sqrt(8 * 99 / 100); float64 rounding only.
    floor = 0.01 * (8 * 99 / 100) ** 0.5
    assert float(p[0, 0]) == pytest.approx(1 / floor, rel=1e-12)
    assert float(p[1, 1]) == pytest.approx(1 / 8**0.5, rel=1e-12)


def test_refuses_a_moment_that_saw_nothing() -> None:
    with pytest.raises(InputError, match="seen no gradient"):
        adamw_preconditioner(torch.ones(3), step=1, beta1=0.9, beta2=0.99, eps=1e-8)
