"""The preconditioner is what AdamW's next step multiplies a gradient by; its fit, and sketches through either."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from schemas.errors import InputError
from selection_ops.batching import collate
from selection_ops.encoding import Encoded
from selection_ops.engine import GradientEngine
from selection_ops.model import causal_model
from selection_ops.optimizer_state import AdamNumbers, OptimizerState
from selection_ops.preconditioning import (
    Preconditioner,
    adamw_preconditioner,
    exact_preconditioner,
    fit_preconditioner,
    preconditioner_of,
)
from selection_ops.rank_one import fit_rank_one
from selection_ops.sites import MatrixParameter, Site, SiteReport, find_sites, search
from tests.families import FAMILIES, wide_arithmetic
from tests.reference.gradients import projection, sample_loss
from tests.reference.online import adamw_step
from tests.reference.preconditioning import adafactor, adamw, log_rank_one, log_rank_one_by_solver
from tests.selection_ops.test_coverage import samples
from tests.tiny import tiny_llama

BETA1, BETA2, EPS = 0.9, 0.95, 1e-8
RANK, SEED = 3, 11


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


def positive(seed: int, rows: int, columns: int) -> np.ndarray:
    """Like the preconditioners of a model in training: log-normal rows, columns and noise."""
    rng = np.random.default_rng(seed)
    return np.exp(rng.normal(size=(rows, 1)) + rng.normal(size=(1, columns)) + 0.5 * rng.normal(size=(rows, columns)))


def test_the_fit_is_least_squares_in_the_logarithm_joint_over_sites() -> None:
    """Against a dense solver over all rows and columns; float64, a few thousand additions."""
    matrices = [positive(1, 7, 5), positive(2, 4, 5), positive(3, 9, 5)]
    fit = fit_rank_one([torch.from_numpy(matrix) for matrix in matrices])
    for matrix, output, correlation, wanted in zip(
        matrices, fit.outputs, fit.correlation, log_rank_one_by_solver(matrices)
    ):
        fitted = torch.outer(output, fit.inputs).numpy()
        assert np.abs(fitted / wanted - 1).max() < 1e-11
        assert correlation == pytest.approx(np.corrcoef(fitted.ravel(), matrix.ravel())[0, 1], abs=1e-12)
        assert 0.2 < correlation < 0.99


def test_what_is_of_rank_one_is_fitted_exactly() -> None:
    rows, columns = np.exp(np.random.default_rng(0).normal(size=11)), np.exp(np.random.default_rng(1).normal(size=6))
    fit = fit_rank_one([torch.from_numpy(np.outer(rows[:4], columns)), torch.from_numpy(np.outer(rows[4:], columns))])
    assert np.abs(torch.outer(torch.cat(fit.outputs), fit.inputs).numpy() / np.outer(rows, columns) - 1).max() < 1e-13
    assert fit.correlation == pytest.approx((1.0, 1.0), abs=1e-13)
    flat = fit_rank_one([torch.full((3, 4), 2.5)])
    assert torch.outer(flat.outputs[0], flat.inputs).numpy() == pytest.approx(np.full((3, 4), 2.5))
    assert flat.correlation == (1.0,)


def made_state(model: Any, optimizer: str = "adamw") -> OptimizerState:
    """Moments of a model in training: log-normal, with entries that no gradient has touched."""
    generator = torch.Generator().manual_seed(4)
    tensors: dict[str, torch.Tensor] = {}
    for name, parameter in model.named_parameters():
        shape = parameter.shape
        if optimizer == "adafactor" and len(shape) > 1:
            tensors[f"{name}:exp_avg_sq_row"] = torch.randn(shape[:-1], generator=generator).double().exp() * 1e-4
            tensors[f"{name}:exp_avg_sq_col"] = torch.randn(shape[:-2] + shape[-1:], generator=generator).double().exp()
        else:
            moment = torch.randn(shape, generator=generator).double().exp() * 1e-4
            moment.view(-1)[::17] = 0.0 if moment.numel() > 17 else 1e-4
            tensors[f"{name}:exp_avg_sq"] = moment
        tensors[f"{name}:step"] = torch.tensor(9.0)
    numbers = {name: AdamNumbers(beta1=0.7, beta2=0.9, eps=1e-5) for name, _ in model.named_parameters()}
    return OptimizerState(optimizer=optimizer, tensors=tensors, numbers=numbers, where="here")  # type: ignore[arg-type]


def test_p_of_a_state_is_the_formula() -> None:
    model = tiny_llama()
    state, factored = made_state(model), made_state(model, "adafactor")
    name = "model.layers.0.mlp.up_proj.weight"
    wanted = adamw(state.tensors[f"{name}:exp_avg_sq"].numpy(), 9, 0.7, 0.9, 1e-5)
    assert np.abs(preconditioner_of(state, name).numpy() / wanted - 1).max() < 1e-13
    row, column = (factored.tensors[f"{name}:exp_avg_sq_{side}"] for side in ("row", "col"))
    found = preconditioner_of(factored, name).numpy()
    assert np.abs(found / adafactor(row.numpy(), column.numpy()) - 1).max() < 1e-13
    with pytest.raises(InputError, match=r"no second moment of lm_head\.bias"):
        preconditioner_of(state, "lm_head.bias")


def test_factors_that_no_gradient_has_touched_are_floored() -> None:
    """Rows of an embedding that the data never had: P stays finite."""
    model = tiny_llama()
    state = made_state(model, "adafactor")
    state.tensors["lm_head.weight:exp_avg_sq_row"][5] = 0.0
    found = preconditioner_of(state, "lm_head.weight")
    assert bool(torch.isfinite(found).all()) and float(found[5].max() / found.median()) < 1e3


@pytest.mark.parametrize("optimizer", ["adamw", "adafactor"])
@pytest.mark.parametrize("form", ["rank-one", "exact"])
@pytest.mark.parametrize("power", [0.5, 1.0])
@pytest.mark.parametrize("family", ["llama-tied", "gpt2", "mixtral", "mamba", "lora"])
def test_invariant_3_sketches_are_of_the_preconditioned_gradient(
    family: str, form: str, optimizer: str, power: float
) -> None:
    """P_out (P^power * G) P_in^T, G by autograd; 1e-10 as without: factors multiply, they do not cancel."""
    with wide_arithmetic():
        model, items = FAMILIES[family](torch.float64), samples()
        report = find_sites(model, "all")
        inner = causal_model(model)
        state = made_state(inner, optimizer)
        if form == "exact":
            held = exact_preconditioner(model, state, report.input_groups, report.small, power=power)
        else:
            held = fit_preconditioner(model, state, report.input_groups, report.small, power=power).preconditioner
        engine = GradientEngine(
            model, report.input_groups, report.small, proj_rank=RANK, k=0, seed=SEED, preconditioner=held
        )
        with engine:
            found_BK = engine.features(collate(items)).sketch_BK
        sites = {site.name: site for site in search(inner).matrices}
        wanted = [reference(inner, sites, report, state, form, power, item) for item in items]
    sizes = [len(part) for part in wanted[0]]
    for index, found in enumerate(found_BK.split(sizes, dim=1)):
        exact = np.stack([row[index] for row in wanted])
        scale = np.linalg.norm(exact)
        assert float((found - torch.as_tensor(exact)).norm()) <= 1e-10 * scale + 1e-13 * float(found_BK.norm()), index


def reference(
    model: Any,
    sites: dict[str, Site],
    report: SiteReport,
    state: OptimizerState,
    form: str,
    power: float,
    item: Encoded,
) -> list[np.ndarray]:
    """Sketches of one sample's parts from dense gradients and the formulas of P and of its fit."""

    def exact(parameter: str) -> np.ndarray:
        row = state.tensors.get(f"{parameter}:exp_avg_sq_row")
        if row is not None:
            return adafactor(row.numpy(), state.tensors[f"{parameter}:exp_avg_sq_col"].numpy()) ** power
        second = state.tensors[f"{parameter}:exp_avg_sq"].numpy()
        if state.optimizer == "adafactor":
            return 1 / np.maximum(np.sqrt(second), 0.01 * np.sqrt(np.mean(second))) ** power
        return adamw(second, 9, 0.7, 0.9, 1e-5) ** power

    def matrix(name: str, held: np.ndarray) -> np.ndarray:
        shape = sites[name].shape
        assert isinstance(shape, MatrixParameter)
        index = shape.name.partition(".")[2]
        held = held[int(index)] if index else held
        return held.T if shape.transposed else held

    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    found = torch.autograd.grad(sample_loss(model, item.ids, item.loss_mask), [p for _, p in named], allow_unused=True)
    dense = {name: (torch.zeros_like(p) if g is None else g).double().numpy() for (name, p), g in zip(named, found)}
    pieces = []
    for group in report.input_groups:
        factors = [matrix(name, exact(sites[name].parameter)) for name in group.sites]
        if form == "rank-one" and state.optimizer == "adamw":
            factors = log_rank_one(factors)
        for name, factor in zip(group.sites, factors):
            gradient_OI = matrix(name, dense[sites[name].parameter]) * factor
            p_out = projection(SEED, 1, name, "out", RANK, gradient_OI.shape[0])
            p_in = projection(SEED, 1, group.name, "in", RANK, gradient_OI.shape[1])
            pieces.append((p_out @ gradient_OI @ p_in.T).ravel())
    return [*pieces, *((dense[site.name] * exact(site.name)).ravel() for site in report.small)]


def test_a_dense_gradient_is_projected_as_samples_are() -> None:
    model = tiny_llama(dtype=torch.float64)
    report = find_sites(model)
    state = made_state(model)
    fitted = fit_preconditioner(model, state, report.input_groups).preconditioner
    exact = exact_preconditioner(model, state, report.input_groups)
    name = "model.layers.1.self_attn.k_proj"
    group = next(group.name for group in report.input_groups if name in group.sites)
    gradient = torch.randn(model.get_parameter(f"{name}.weight").shape, dtype=torch.float64)
    plain = GradientEngine(model, report.input_groups, proj_rank=RANK, k=0, seed=SEED)
    for held in (fitted, exact):
        engine = GradientEngine(model, report.input_groups, proj_rank=RANK, k=0, seed=SEED, preconditioner=held)
        wanted = plain.project_dense(name, gradient * held.dense(name, group))
        assert float((engine.project_dense(name, gradient) - wanted).norm() / wanted.norm()) < 1e-12


def test_a_preconditioner_of_another_model_is_refused() -> None:
    model = tiny_llama()
    report = find_sites(model)
    with pytest.raises(InputError, match=r"has shape.*another model"):
        wrong = made_state(model)
        wrong.tensors["model.layers.0.mlp.up_proj.weight:exp_avg_sq"] = torch.ones(3, 3)  # type: ignore[index]
        fit_preconditioner(model, wrong, report.input_groups)
    with pytest.raises(InputError, match="no factors of site"):
        GradientEngine(model, proj_rank=RANK, k=0, seed=SEED, preconditioner=Preconditioner())


@pytest.mark.parametrize("family", ["llama-tied", "mixtral"])
def test_packed_samples_are_preconditioned_as_padded_ones(family: str) -> None:
    """The exact form needs every sample's own tokens; float64, 1e-10 as between other layouts."""
    with wide_arithmetic():
        model, items = FAMILIES[family](torch.float64), samples()
        report = find_sites(model, "all")
        held = exact_preconditioner(model, made_state(model), report.input_groups, report.small)
        engine = GradientEngine(
            model, report.input_groups, report.small, proj_rank=RANK, k=0, seed=SEED, preconditioner=held
        )
        with engine:
            padded, packed = (
                engine.features(collate(items, layout=layout)).sketch_BK for layout in ("padded", "packed")
            )
    assert float(((packed - padded).norm(dim=1) / padded.norm(dim=1)).max()) < 1e-10
