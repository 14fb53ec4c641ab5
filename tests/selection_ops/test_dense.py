import numpy as np
import pytest
import torch

from schemas.errors import InputError
from selection_ops.dense import dense_gradients, plan_dense
from selection_ops.encoding import Encoded
from selection_ops.sites import find_sites
from tests.reference.gradients import dense_gradients as reference
from tests.tiny import MODELS

torch.set_num_threads(1)


def samples(count: int = 3) -> list[Encoded]:
    rng = np.random.default_rng(0)
    made = []
    for index in range(count):
        ids = [int(i) for i in rng.integers(3, 400, 6 + 3 * index)]
        made.append(Encoded(ids=ids, loss_mask=[False] + [bool(b) for b in rng.random(len(ids) - 2) < 0.7] + [True]))
    return made


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("memory", [1 << 30, 200_000])
def test_gradients_are_those_of_every_sample_alone(kind: str, memory: int) -> None:
    model = MODELS[kind](dtype=torch.float64)
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    some = samples()
    groups = find_sites(model).input_groups
    plan = plan_dense(model, groups, len(some), memory)
    assert plan.largest_pass <= memory
    assert (len(plan.passes) > 1) == (memory < 1 << 30)
    ticks: list[int] = []
    found = {
        name: value
        for _, sites in dense_gradients(model, some, plan, tick=ticks.append)
        for name, value in sites.items()
    }
    assert sum(ticks) == len(plan.passes) * sum(len(item.ids) for item in some)
    assert set(found) == {site for group in groups for site in group.sites}
    assert plan.numbers == sum(value[0].numel() for value in found.values())
    for row, item in enumerate(some):
        expected = reference(model, item.ids, item.loss_mask)
        for name, value in found.items():
            dense = expected[f"{name}.weight"]
            dense = dense.T if kind == "gpt2" else dense
            # transformers' RMSNorm and rotary embedding run in float32 on both sides alike; the rest is float64.
            np.testing.assert_allclose(
                value[row].numpy(), dense, rtol=1e-6, atol=1e-9 * np.abs(dense).max(), err_msg=name
            )
    assert before == {name: p.requires_grad for name, p in model.named_parameters()}


def test_mean_loss_divides_by_loss_tokens() -> None:
    model = MODELS["llama"](dtype=torch.float64)
    some = samples(2)
    plan = plan_dense(model, find_sites(model).input_groups[:1], 2, 1 << 30)
    (_, whole), *_ = dense_gradients(model, some, plan)
    (_, mean), *_ = dense_gradients(model, some, plan, loss="mean")
    for row, item in enumerate(some):
        for name, value in whole.items():
            # As above: normalisation rounds to float32.
            scaled, scale = mean[name][row] * sum(item.loss_mask), float(value[row].abs().max())
            torch.testing.assert_close(scaled, value[row], rtol=1e-5, atol=1e-6 * scale)


def test_vectors_and_unknown_sites() -> None:
    from schemas.spec import InputGroup

    model = MODELS["llama"](dtype=torch.float64)
    name = "model.layers.0.input_layernorm.weight"
    plan = plan_dense(model, [InputGroup(name=name, sites=(name,))], 1, 1 << 30)
    ((_, found),) = dense_gradients(model, samples(1), plan)
    item = samples(1)[0]
    np.testing.assert_allclose(found[name][0].numpy(), reference(model, item.ids, item.loss_mask)[name], rtol=1e-6)
    with pytest.raises(InputError, match="no site 'nowhere'"):
        plan_dense(model, [InputGroup(name="nowhere", sites=("nowhere",))], 1, 1 << 30)
    with pytest.raises(InputError, match=r"at most \d+ samples"):
        plan_dense(model, find_sites(model).input_groups, 1000, 1 << 20)
