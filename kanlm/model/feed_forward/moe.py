"""A mixture of experts: a router sends every token to a few of many feed-forward blocks."""

import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, distributed, nn
from torch.nn import functional as F

from ...kan.monitoring import Monitored
from ..layers import Linear
from .base import Context, FeedForward


class Router(Linear):
    """Logits of the experts, in float32 at least whatever autocast says.

    (Fedus et al., arXiv 2101.03961, section 2.4.) A small start leaves the chosen experts
    with equal gates: which are chosen does not depend on its scale.
    """

    #: Root mean square of the logits at the start: a tenth of a linear map's, as there.
    START = 0.1

    def __init__(self, d_model: int, num_experts: int) -> None:
        super().__init__(d_model, num_experts, gain=self.START)

    def forward(self, input: Tensor) -> Tensor:
        wide = torch.promote_types(input.dtype, torch.float32)
        with torch.autocast(input.device.type, enabled=False):
            return F.linear(input.to(wide), self.weight.to(wide))


class MoE(FeedForward, Monitored):
    """Top-k routed experts (Shazeer et al., arXiv 1701.06538) of any kind.

    With router probabilities p = softmax(W x) and T the `top_k` most probable experts,

        y = Σ_{e ∈ T} g_e expert_e(x),   g_e = p_e / Σ_{i ∈ T} p_i

    so the gates are a softmax over the chosen logits. For top_k = 1 that is the constant
    1 and would teach the router nothing: there the denominator is held constant in
    backward, which leaves the gradient of log p_e.

    Equal gates of independent experts would divide the variance by top_k; the experts start
    with as much more.

    **Capacity.** In training, an expert takes ⌈capacity_factor · top_k · length /
    num_experts⌉ tokens of a sequence, the earliest that chose it; for those over it, it adds
    nothing, and a token dropped by all its experts passes by the residual stream only.
    Whether a token is dropped depends on earlier ones of its sequence alone, so the split
    into micro-batches and processes changes nothing. In evaluation and generation no token
    is dropped: perplexity is causal, and decoding with a cache equals the full pass.

    **Balance.** Two losses are minimised beside the language model's, with means over the
    tokens of a forward pass:

    - `balance_loss` · E Σ_e f_e P_e, where f_e is the share of the choices that fell on e
      before any drop and P_e the mean of p_e: 1 at perfect balance (arXiv 2101.03961,
      eq. 4-6, there with top_k = 1). The shares are those of all processes together
      (Qiu et al., arXiv 2501.11873), so that their number changes nothing where they
      train on equally many tokens; micro-batches are balanced one by one.
    - `router_z_loss` · mean of (log Σ_e exp (W x)_e)² (Zoph et al., arXiv 2202.08906, eq. 5).

    **Width.** `hidden` is that of the first listed expert. The others get the width at which
    they have as many parameters. So matching by parameters counts all experts, and matching
    by FLOPs counts those that a token is sent to.

    **Cost.** With a capacity, shapes are fixed. Without one, and outside training, each
    expert runs on just its tokens, for which the device is waited for, or under
    torch.compile on all of them, with num_experts / top_k times the work.

    Args:
        experts: `{"kind": …}` with options, without `hidden`, repeated in turn.
        num_experts: how many there are, a multiple of those listed.
        top_k: experts a token is sent to.
        capacity_factor: tokens that an expert takes in training, over an even share; None takes
            all that are sent to it.
        balance_loss: weight of the loss that keeps experts evenly used.
        router_z_loss: weight of the loss that keeps the router's logits small.

    Raises:
        ValueError: an option is out of range, or an expert is no map of each token by itself.
    """

    takes_context: ClassVar[bool] = True

    def __init__(
        self,
        d_model: int,
        hidden: int,
        output_scale: float,
        *,
        experts: list[dict[str, Any]] = [{"kind": "kan"}],  # noqa: B006 (read, never changed)
        num_experts: int = 8,
        top_k: int = 2,
        capacity_factor: float | None = 1.25,
        balance_loss: float = 0.01,
        router_z_loss: float = 0.001,
    ) -> None:
        super().__init__(d_model, hidden, output_scale)
        if not experts or num_experts < 1 or num_experts % len(experts):
            raise ValueError(
                f"num_experts = {num_experts}: expected a multiple of the {len(experts)} listed"
            )
        if not 1 <= top_k <= num_experts:
            raise ValueError(f"top_k = {top_k}: expected from 1 to num_experts = {num_experts}")
        if capacity_factor is not None and not 0 < capacity_factor < math.inf:
            raise ValueError(
                f"capacity_factor = {capacity_factor}: expected a positive number or null"
            )
        for name, value in (("balance_loss", balance_loss), ("router_z_loss", router_z_loss)):
            if not 0 <= value < math.inf:
                raise ValueError(f"{name} = {value}: expected 0 or more")
        self.num_experts = num_experts
        self.top_k = top_k
        self.capacity_factor = capacity_factor
        self.balance_loss = balance_loss
        self.router_z_loss = router_z_loss
        self.num_sums = num_experts + 3
        self.router = Router(d_model, num_experts)
        made = _make_experts(experts, num_experts, d_model, hidden, output_scale * math.sqrt(top_k))
        self.experts = nn.ModuleList(made)
        kinds = dict.fromkeys(expert.label for expert in made)
        self.label = f"moe{num_experts}-top{top_k}/{'+'.join(kinds)}"

    def forward(self, x: Tensor, context: Context | None = None) -> Tensor:
        rows = x.reshape(-1, x.shape[-2], self.d_model)
        logits = self.router(rows)
        probabilities = logits.softmax(dim=-1)
        gates, chosen = self._choose(probabilities)
        present = None if context is None else context.present
        kept = self._within_capacity(chosen, present)
        if self.training:
            self._report(logits, probabilities, chosen, kept, context)
        gates = (gates * kept).to(x.dtype)
        if self.training and self.capacity_factor is not None:
            y = self._by_capacity(rows, gates, kept)
        elif torch.compiler.is_compiling():
            y = self._on_all(rows, gates)
        else:
            y = self._by_tokens(rows, gates, kept)
        return y.reshape(x.shape)

    # Routing. Everything is (rows, length, num_experts).

    def _choose(self, probabilities: Tensor) -> tuple[Tensor, Tensor]:
        """Gates, 0 for the experts that a token did not choose, and whether it did."""
        top, index = probabilities.topk(self.top_k, dim=-1)
        total = top.sum(dim=-1, keepdim=True)
        top = top / (total.detach() if self.top_k == 1 else total)
        gates = torch.zeros_like(probabilities).scatter(-1, index, top)
        chosen = torch.zeros_like(probabilities, dtype=torch.bool).scatter(-1, index, True)
        return gates, chosen

    def _within_capacity(self, chosen: Tensor, present: Tensor | None) -> Tensor:
        """The choices that an expert has room for: in training, and those of tokens only."""
        if not self.training or self.capacity_factor is None:
            return chosen
        if present is not None:
            chosen = chosen & present.unsqueeze(-1)
        return chosen & (chosen.cumsum(dim=-2) <= self.capacity(chosen.shape[-2]))

    def capacity(self, length: int) -> int:
        """Tokens that an expert takes of a sequence of this length, in training."""
        assert self.capacity_factor is not None
        even = self.top_k * length / self.num_experts
        return min(length, math.ceil(self.capacity_factor * even))

    # Three ways to the same sum over experts.

    def _by_capacity(self, x: Tensor, gates: Tensor, kept: Tensor) -> Tensor:
        """Each expert on a fixed number of places a row: its tokens, then any others."""
        length = x.shape[-2]
        place = torch.arange(length, device=x.device)
        order = torch.where(kept.transpose(-1, -2), place, place + length).argsort(dim=-1)
        order = order[..., : self.capacity(length)].unsqueeze(-1)
        y = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            index = order[:, number]
            gate = gates[..., number, None].gather(-2, index)
            index = index.expand(-1, -1, self.d_model)
            out = expert(x.gather(-2, index)) * gate
            y = y.scatter_add(-2, index, out.to(y.dtype))
        return y

    def _by_tokens(self, x: Tensor, gates: Tensor, kept: Tensor) -> Tensor:
        """Each expert on just its tokens."""
        x, gates, kept = x.flatten(0, -2), gates.flatten(0, -2), kept.flatten(0, -2)
        y = torch.zeros_like(x)
        # Processes wait for each other: in training for the gradient of every parameter, and
        # where FSDP has split the experts for the parameters of each that is called.
        call_all = self.training or (distributed.is_available() and distributed.is_initialized())
        for number, expert in enumerate(self.experts):
            index = kept[:, number].nonzero().squeeze(-1)
            if len(index) or call_all:
                out = expert(x[index]) * gates[index, number, None]
                y = y.index_add(0, index, out.to(y.dtype))
        return y

    def _on_all(self, x: Tensor, gates: Tensor) -> Tensor:
        """Each expert on all tokens."""
        y = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            y = y + (expert(x) * gates[..., number, None]).to(y.dtype)
        return y

    # What training wants to know.

    def _report(
        self,
        logits: Tensor,
        probabilities: Tensor,
        chosen: Tensor,
        kept: Tensor,
        context: Context | None,
    ) -> None:
        """Hand over the auxiliary loss and count, over the tokens that are present."""
        wide = logits.dtype
        present = None if context is None else context.present
        weight = torch.ones_like(logits[..., 0]) if present is None else present.to(wide)
        weight = weight.unsqueeze(-1)
        tokens = weight.sum()
        choices = (chosen * weight).sum(dim=(0, 1))
        if context is not None:
            everywhere = _over_processes(torch.cat([choices.detach(), tokens.unsqueeze(0)]))
            share = everywhere[:-1] / (self.top_k * everywhere[-1])
            mean_probability = (probabilities * weight).sum(dim=(0, 1)) / tokens
            balance = self.num_experts * (share * mean_probability).sum()
            squares = logits.logsumexp(dim=-1, keepdim=True).square()
            z = (squares * weight).sum() / tokens
            context.auxiliary_losses.append(self.balance_loss * balance + self.router_z_loss * z)
        if self.sums is not None:
            entropy = -(probabilities * logits.log_softmax(dim=-1) * weight).sum()
            dropped = choices.sum() - (kept * weight).sum()
            scalars = torch.stack([dropped, entropy, tokens])
            self.count(torch.cat([choices, scalars]))

    def figures(self, sums: Sequence[float]) -> dict[str, float]:
        """Shares of the choices by expert, the largest over an even one, the share of the
        choices that were dropped, and the router's mean entropy in nats (at most ln E)."""
        *choices, dropped, entropy, tokens = sums
        total = sum(choices)
        return {
            **{f"load_{number}": count / total for number, count in enumerate(choices)},
            "largest_over_mean_load": max(choices) * len(choices) / total,
            "dropped": dropped / total,
            "router_entropy": entropy / tokens,
        }

    @property
    def flops_per_token(self) -> int:
        """Those of the router, of its softmax (5 an expert) and of `top_k` experts, each an
        average one, with their gates and sum."""
        router = self.router.flops_per_token + 5 * self.num_experts
        gates = 2 * self.top_k * self.d_model
        return router + gates + self._active(lambda expert: expert.flops_per_token)

    @property
    def active_parameters(self) -> int:
        """Those of the router and of `top_k` experts, each an average one."""
        router = self.router.weight.numel()
        return router + self._active(lambda expert: expert.active_parameters)

    def _active(self, cost: Callable[[FeedForward], int]) -> int:
        experts = [expert for expert in self.experts if isinstance(expert, FeedForward)]
        return round(self.top_k * sum(map(cost, experts)) / self.num_experts)


def _over_processes(counts: Tensor) -> Tensor:
    """Add up the counts of all processes of torch's default group, if there is one."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return counts
    total = counts.clone()
    distributed.all_reduce(total)
    return total


def _make_experts(
    specs: Sequence[dict[str, Any]],
    num_experts: int,
    d_model: int,
    hidden: int,
    output_scale: float,
) -> list[FeedForward]:
    # The registry holds this file's class: it cannot be imported before.
    from ..matching import feed_forward_cost, solve_hidden
    from . import make_feed_forward

    first = {**specs[0], "hidden": hidden}
    widths = [hidden] * len(specs)
    if any(spec != specs[0] for spec in specs):
        parameters = feed_forward_cost(first, d_model, "parameters")
        widths = [
            hidden if spec == specs[0] else solve_hidden(spec, d_model, parameters=parameters)
            for spec in specs
        ]
    turn = [{**spec, "hidden": width} for spec, width in zip(specs, widths, strict=True)]
    experts = [
        make_feed_forward(turn[number % len(turn)], d_model, output_scale)
        for number in range(num_experts)
    ]
    for expert in experts:
        if expert.takes_context:
            raise ValueError(
                f"experts: {expert.label} looks at more than one token, and an expert sees "
                "single ones"
            )
    return experts
