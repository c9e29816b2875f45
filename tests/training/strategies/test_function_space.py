"""What layers use of old text, against scipy's splines, and what is held back by it."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from scipy.interpolate import BSpline as ScipySpline
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from kanlm.kan import BSpline, KANLinear
from kanlm.training import run as runs
from kanlm.training.callbacks import Callback
from kanlm.training.strategies.activations import (
    COVARIANCE,
    OCCUPANCY,
    PRODUCTS,
    kan_layers,
    mean_over_tokens,
)
from kanlm.training.strategies.controls import (
    control_covariance,
    control_products,
    control_values,
    generator_for,
)
from kanlm.training.strategies.function_penalties import (
    Banded,
    InputCovariance,
    OccupancyPenalty,
)
from kanlm.training.strategies.masks import OccupancyMask, OccupancyScaling, TfIdf


def splines(degree: int, x: np.ndarray, knots: np.ndarray) -> np.ndarray:
    """Values of all B-splines by scipy, (rows, in, B)."""
    count = len(knots) - degree - 1
    columns = [ScipySpline(knots, np.eye(count)[b], degree)(x) for b in range(count)]
    return np.stack(columns, axis=-1)


def layer_and_inputs(base: Any, degree: int = 2) -> tuple[KANLinear, np.ndarray, np.ndarray]:
    """A layer in float64, inputs in its range, and the values of its functions by scipy."""
    torch.manual_seed(0)
    layer = KANLinear(3, 4, basis=BSpline(grid_size=5, degree=degree), base=base).double()
    x = np.random.default_rng(0).uniform(-1.9, 1.9, size=(50, 3))
    assert isinstance(layer.basis, BSpline)
    values = splines(degree, x, layer.basis.exact_knots[0].numpy())
    if base == "silu":
        values = np.concatenate([values, (x / (1 + np.exp(-x)))[..., None]], axis=-1)
    return layer, x, values


def moved(strategy: Any, layer: nn.Module, moment: Tensor) -> tuple[float, dict[str, np.ndarray]]:
    """The penalty after random changes of a layer's weights, and these changes."""
    strategy.layers = {"layer": layer}
    strategy.moments = {"layer": moment}
    strategy.before = {"layer": strategy.weights_of(layer).detach().clone()}
    before = {n: p.detach().clone() for n, p in layer.named_parameters()}
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter += torch.randn_like(parameter)
    changes = {n: (p.detach() - before[n]).numpy() for n, p in layer.named_parameters()}
    return strategy.penalty(layer).item(), changes


@pytest.mark.parametrize("degree", [1, 2, 3])
@pytest.mark.parametrize("base", ["silu", None])
def test_the_banded_penalty_is_how_far_edge_functions_move_on_the_inputs(base: Any, degree: int):
    layer, x, values = layer_and_inputs(base, degree)
    moment = PRODUCTS.total(layer, torch.from_numpy(x)) / len(x)
    assert tuple(moment.shape) == PRODUCTS.shape(layer)
    penalty, changes = moved(Banded(weight=0.5), layer, moment)
    change = changes["coefficients"]
    if base is not None:
        change = np.concatenate([change, changes["base_weight"].T[:, None]], axis=1)
    # f − f_0 of every edge at every input, and the mean of its square over inputs.
    differences = np.einsum("nib,ibo->nio", values, change)
    assert penalty == pytest.approx(0.5 * (differences**2).mean(axis=0).sum(), rel=1e-6)
    # Functions further apart than the degree are never used together.
    number = layer.basis.num_functions
    places = torch.arange(number)
    apart = (places - places.unsqueeze(1)).abs() > degree
    assert not moment[:, :number, :number][:, apart].any()


def test_the_occupancy_penalty_weighs_squares_by_mean_squares_of_functions():
    layer, x, values = layer_and_inputs("silu")
    moment = OCCUPANCY.total(layer, torch.from_numpy(x)) / len(x)
    np.testing.assert_allclose(moment, (values**2).mean(axis=0), rtol=1e-6, atol=1e-9)
    penalty, changes = moved(OccupancyPenalty(weight=2.0), layer, moment)
    change = np.concatenate([changes["coefficients"], changes["base_weight"].T[:, None]], axis=1)
    weighed = (values**2).mean(axis=0)[..., None] * change**2
    assert penalty == pytest.approx(2 * weighed.sum(), rel=1e-6)


def test_the_covariance_penalty_is_how_far_outputs_of_a_linear_map_move():
    layer = nn.Linear(3, 4, bias=False, dtype=torch.float64)
    x = np.random.default_rng(0).normal(size=(50, 3))
    moment = COVARIANCE.total(layer, torch.from_numpy(x)) / len(x)
    penalty, changes = moved(InputCovariance(weight=3.0), layer, moment)
    expected = 3 * ((x @ changes["weight"].T) ** 2).sum(axis=1).mean()
    assert penalty == pytest.approx(expected, rel=1e-12)


def test_means_are_over_all_tokens_of_all_batches(bases: Path):
    """Against transformers' own hidden states, and a forward pass of all rows at once."""
    model = AutoModelForCausalLM.from_pretrained(bases / "kan-local" / "model").train()
    rows = torch.randint(0, 257, (6, 10), generator=torch.Generator().manual_seed(0))
    trainer: Any = SimpleNamespace(model=model, accelerator=Accelerator(cpu=True))
    batches = [{"input_ids": part, "shift_labels": part} for part in rows.split([4, 2])]
    layers = kan_layers(model)
    found = mean_over_tokens(trainer, layers, batches, PRODUCTS)
    assert model.training
    assert set(found) == {f"model.layers.0.feed_forward.{name}" for name in ("up", "down")}
    inputs: dict[str, Tensor] = {}

    def keep(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        inputs[next(name for name, layer in layers.items() if layer is module)] = arguments[0]

    for layer in layers.values():
        layer.register_forward_pre_hook(keep)
    with torch.no_grad():
        model.eval()(input_ids=rows)
    for name, x in inputs.items():
        basis, flat = layers[name].basis, x.flatten(0, 1)
        values = torch.cat([basis.values(flat), nn.functional.silu(flat).unsqueeze(-1)], -1)
        expected = torch.einsum("nib,nic->ibc", values.double(), values.double()) / len(flat)
        torch.testing.assert_close(found[name], expected, rtol=1e-5, atol=1e-7)


USED = {"a": torch.tensor([[0.0, 0.5, 1e-4], [0.2, 2e-3, 0.0]], dtype=torch.float64)}


def test_factors_are_those_of_their_formulas():
    mask = OccupancyMask(threshold=1e-3).factors_of(USED)["a"]
    assert mask.tolist() == [[1, 0, 1], [0, 0, 1]]
    scaling = OccupancyScaling(threshold=0.5).factors_of(USED)["a"]
    expected = 1 / (1 + USED["a"].numpy() / 0.5)
    np.testing.assert_allclose(scaling.numpy(), expected, rtol=1e-12)
    tf_idf = TfIdf(share=0.34, epsilon=1e-6)
    # The last column is the base function's.
    new = torch.tensor([[1e-7, 0.9, 0.3, 9.0], [0.1, 0.4, 1e-8, 9.0]], dtype=torch.float64)
    tf_idf.measure = lambda measure, new=False: {"a": values}  # type: ignore[method-assign]
    values = new
    # Scores 0.1, 1.8, 2970, 0.5, 200 and 0.01, of which ⌈0.34 · 6⌉ = 3 may move.
    assert tf_idf.factors_of(USED)["a"].tolist() == [[0, 1, 1], [0, 1, 0]]


def test_controls_hold_back_as_much_in_other_places():
    draw = torch.Generator().manual_seed(1)
    values = torch.rand(40, 6, generator=draw, dtype=torch.float64)
    roots = torch.randn(8, 6, 6, generator=draw, dtype=torch.float64)
    matrices = roots @ roots.mT

    def controlled(function: Any, value: Tensor, control: Any) -> Tensor:
        found = function(value, control, generator_for(3, 1))
        assert torch.equal(found, function(value, control, generator_for(3, 1)))
        if control != "none":
            assert not torch.allclose(found, value)
            assert not torch.allclose(found, function(value, control, generator_for(3, 2)))
        return found

    assert controlled(control_values, values, "none") is values
    shuffled = controlled(control_values, values, "random")
    assert torch.equal(shuffled.flatten().sort().values, values.flatten().sort().values)
    permuted = controlled(control_values, values, "permuted")
    assert sorted(permuted.tolist()) == sorted(values.tolist())
    turned = controlled(control_products, matrices, "random")
    eigenvalues = torch.linalg.eigvalsh
    torch.testing.assert_close(eigenvalues(turned), eigenvalues(matrices))
    permuted = controlled(control_products, matrices, "permuted")
    assert sorted(permuted.tolist()) == sorted(matrices.tolist())
    for control in ("random", "permuted"):
        found = controlled(control_covariance, matrices[0], control)
        torch.testing.assert_close(eigenvalues(found), eigenvalues(matrices[0]))


def parameters(folder: str | Path) -> dict[str, Tensor]:
    tensors = load_file(Path(folder) / "model" / "model.safetensors")
    return {name: t for name, t in tensors.items() if "knots" not in name}


@pytest.mark.parametrize("control", ["none", "random"])
def test_a_mask_holds_back_updates_and_decay_of_what_is_in_use(tuned, bases: Path, control: str):
    strategy = {"kind": "occupancy-mask", "threshold": 0.05, "sequences": 4, "control": control}
    decay = {"weight_decay": 0.5, "coefficients_weight_decay": 0.5}
    config = tuned({**strategy, "rest": "freeze"}, optimizer=decay)
    factors: dict[str, Tensor] = {}

    class Look(Callback):
        def after_step(self) -> None:
            own = next(c for c in self.trainer.callbacks if isinstance(c, OccupancyMask))
            factors.update(own.factors)

    runs.run(config, callbacks=[Look()])
    start, end = parameters(bases / "kan-local"), parameters(config.output_dir)
    for name, tensor in end.items():
        layer, _, own = name.rpartition(".")
        if own != "coefficients":
            assert torch.equal(tensor, start[name]), name
            continue
        free = factors[layer].bool()
        assert 0 < free.float().mean() < 1
        assert torch.equal(tensor[~free], start[name][~free])
        # Decay moves what has no gradient.
        assert (tensor[free] != start[name][free]).all()
    text = (Path(config.output_dir) / "metrics.jsonl").read_text()
    (line,) = [x for x in map(json.loads, text.splitlines()) if x["kind"] == "strategy"]
    for layer, found in factors.items():
        assert line[f"{layer}/may_move"] == pytest.approx(found.mean().item())


def test_interpolation_ends_between_and_logs_eleven_points(tuned, bases: Path):
    plain = tuned("plain", "plain", training={"evaluate_every": None})
    runs.run(plain)
    config = tuned({"kind": "interpolation", "share": 0.3})
    outcome = runs.run(config)
    assert outcome is not None
    start, last = parameters(bases / "kan-local"), parameters(plain.output_dir)
    for name, tensor in parameters(config.output_dir).items():
        expected = 0.7 * start[name].double() + 0.3 * last[name].double()
        torch.testing.assert_close(tensor.double(), expected, rtol=1e-5, atol=1e-7)

    def lines(run: Any, kind: str) -> list[dict[str, Any]]:
        text = (Path(run.output_dir) / "metrics.jsonl").read_text()
        return [line for line in map(json.loads, text.splitlines()) if line["kind"] == kind]

    points = lines(config, "interpolation")
    assert [line["share"] for line in points] == [n / 10 for n in range(11)]
    # The end of the curve is the model of the last step.
    assert points[-1]["nats_per_token"] == lines(plain, "validation")[-1]["nats_per_token"]
    assert points[0]["nats_per_token"] > points[-1]["nats_per_token"]
