"""Feed-forward kinds: their start, their formulas, and their errors."""

import math
import re

import pytest
import torch
from torch.nn import functional as F

from kanlm.model.feed_forward import FEED_FORWARDS, KAN, SwiGLU, make_feed_forward
from kanlm.model.matching import solve_hidden

KINDS = [
    {"kind": "gelu"},
    {"kind": "relu2"},
    {"kind": "swiglu"},
    {"kind": "kan"},
    {"kind": "kan", "base": None},
    {"kind": "kan", "base": "identity", "basis": {"kind": "bspline", "degree": 3, "grid_size": 4}},
]


def ident(spec: dict) -> str:
    return make_feed_forward({**spec, "hidden": 2}, 4, 1.0).label + f"-{spec.get('base', '')}"


@pytest.mark.parametrize("width", [16, 64, 256, 1024])
@pytest.mark.parametrize("spec", KINDS, ids=ident)
def test_starts_with_the_output_variance_asked_for(spec: dict, width: int) -> None:
    """For unit-normal inputs under the norm that every block has before it.

    At width 16 a vector's own norm scatters by a sixth, and would be squared or cubed by
    gated and squared activations; the norm takes that out, here as in the model.
    """
    torch.manual_seed(0)
    hidden = solve_hidden(spec, width, parameters=8 * width**2)
    block = make_feed_forward({**spec, "hidden": hidden}, width, output_scale=0.5)
    squares = []
    for _ in range(max(3, 2048 // width)):
        block.reset_parameters()
        x = F.rms_norm(torch.randn(64, width), (width,))
        with torch.no_grad():
            squares.append(block(x).square().mean())
    assert torch.stack(squares).mean().item() == pytest.approx(0.25, rel=0.1)


def test_labels_state_structure_and_basis() -> None:
    labels = [ident(spec).rsplit("-", 1)[0] for spec in KINDS]
    assert labels == [
        "gelu",
        "relu2",
        "swiglu",
        "kan/bspline1-g6-silu",
        "kan/bspline1-g6",
        "kan/bspline3-g4-identity",
    ]


def test_formulas() -> None:
    torch.manual_seed(0)
    x = torch.randn(5, 8, dtype=torch.float64)
    weights = [torch.randn(6, 8).double(), torch.randn(6, 8).double(), torch.randn(8, 6).double()]
    gelu = make_feed_forward({"kind": "gelu", "hidden": 6}, 8, 1.0).double()
    relu2 = make_feed_forward({"kind": "relu2", "hidden": 6}, 8, 1.0).double()
    for block in (gelu, relu2):
        block.load_state_dict({"up.weight": weights[0], "down.weight": weights[2]})
    inner = x @ weights[0].T
    normal = torch.distributions.Normal(0.0, 1.0)
    torch.testing.assert_close(gelu(x), (inner * normal.cdf(inner)) @ weights[2].T)
    torch.testing.assert_close(relu2(x), torch.relu(inner) ** 2 @ weights[2].T)
    swiglu = SwiGLU(8, 6, 1.0).double()
    swiglu.load_state_dict(
        {"gate.weight": weights[0], "up.weight": weights[1], "down.weight": weights[2]}
    )
    gated = inner / (1 + torch.exp(-inner)) * (x @ weights[1].T)
    torch.testing.assert_close(swiglu(x), gated @ weights[2].T)


def test_kan_is_layer_norm_layer() -> None:
    torch.manual_seed(0)
    block = KAN(8, 6, 0.7).double()
    torch.nn.init.uniform_(block.norm.weight, 0.5, 1.5)
    x = torch.randn(5, 8, dtype=torch.float64)
    hidden = block.up(x)
    normed = hidden / (hidden.square().mean(-1, keepdim=True) + 1e-6).sqrt() * block.norm.weight
    torch.testing.assert_close(block(x), block.down(normed))
    assert not any(name.endswith("bias") for name, _ in block.named_parameters())


@pytest.mark.parametrize("kind", FEED_FORWARDS)
def test_every_kind_trains_every_parameter(kind: str) -> None:
    torch.manual_seed(0)
    block = make_feed_forward({"kind": kind, "hidden": 6}, 8, 1.0)
    block(torch.randn(2, 50, 8)).square().sum().backward()
    for name, parameter in block.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize("kind", FEED_FORWARDS)
def test_resetting_draws_everything_anew(kind: str) -> None:
    block = make_feed_forward({"kind": kind, "hidden": 6}, 8, 1.0)
    before = {name: p.detach().clone() for name, p in block.named_parameters()}
    for parameter in block.parameters():
        torch.nn.init.constant_(parameter, math.nan)
    block.reset_parameters()
    for name, parameter in block.named_parameters():
        assert parameter.isfinite().all(), name
        assert "norm" in name or not torch.equal(parameter, before[name]), name


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"kind": "swigul", "hidden": 4}, "feed_forward.kind = 'swigul' is unknown; did you mean"),
        ({"kind": "tokens", "hidden": 4}, "expected one of: gelu, relu2, swiglu, kan"),
        ({"hidden": 4}, "feed_forward.kind = None is unknown"),
        ({"kind": "kan", "hidden": 4, "bases": None}, "feed_forward.bases is no option of kind"),
        ({"kind": "kan", "hidden": 4, "basis": {"kind": "bsplin"}}, "did you mean 'bspline'?"),
        ({"kind": "kan", "hidden": 4, "basis": {"kind": "bspline", "degree": 7}}, "degree = 7"),
        ({"kind": "kan", "hidden": 4, "base": "relu"}, "base = 'relu'"),
        ({"kind": "gelu", "hidden": 0}, "hidden = 0"),
        ({"kind": "gelu"}, "states no hidden width"),
    ],
)
def test_impossible_settings_are_refused(spec: dict, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        make_feed_forward(spec, 8, 1.0)
