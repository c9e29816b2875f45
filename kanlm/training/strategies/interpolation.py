"""Interpolation between the base model and the fine-tuned one, after training."""

from typing import TYPE_CHECKING, Annotated, Any

import torch
from annotated_types import Ge, Le
from torch import Tensor, nn

from kanlm.config import Config
from kanlm.kan.sharding import own_part
from kanlm.training.sharding import reshard
from kanlm.training.strategies.base import Anchored
from kanlm.training.validation import Evaluator, figures

if TYPE_CHECKING:
    from kanlm.model import KanLMForCausalLM

#: Points that are validated, from θ0 to θ_T.
POINTS = 11


class Interpolation(Anchored):
    """Ends with (1 − share) θ0 + share θ_T, between the base run's parameters and the last.

    (WiSE-FT: Wortsman et al., arXiv 2109.01903.) After the last step eleven shares from 0 to 1
    are validated on every domain and logged in lines of kind `interpolation`, so that one run
    gives the whole curve.

    Args:
        share: a, of the model that the run ends with.
    """

    name = "interpolation"

    def __init__(self, *, share: Annotated[float, Ge(0), Le(1)] = 0.5) -> None:
        self.share = share

    def check(self, config: Config, model: nn.Module) -> None:
        """Check that there is a last step to validate after, too."""
        super().check(config, model)
        if config.training.early_stopping_patience is not None:
            raise ValueError(
                "lies between the base and the model of the last step: leave out "
                "training.early_stopping_patience"
            )

    def after_step(self) -> None:
        """Validate the points after the last step."""
        trainer = self.trainer
        if not trainer.is_last:
            return
        trainer.check_stop()
        evaluator = Evaluator(trainer.config, trainer.accelerator, dict(trainer.corpora))
        last = self._parameters(copy=True)
        found: list[dict[str, Any]] = []
        try:
            with trainer.phases.of("validation"):
                for point in range(POINTS):
                    share = point / (POINTS - 1)
                    self._move(last, share)
                    for domain in evaluator.corpora:
                        evaluation = evaluator.evaluate(
                            trainer.model, domain, "validation", trainer.check_stop
                        )
                        found.append({"share": share, **figures(domain, evaluation)})
        finally:
            self._move(last, 1.0)
        for values in found:
            trainer.record("interpolation", values)

    def finish(self, model: "KanLMForCausalLM") -> None:
        """Move to the stated share."""
        self._move(self._parameters(copy=True), self.share)

    def _parameters(self, *, copy: bool = False) -> dict[str, Tensor]:
        """This rank's parts of the parameters."""
        reshard(self.trainer.model)
        parts = {n: own_part(p.detach()) for n, p in self.trainer.model.named_parameters()}
        return {name: part.clone() for name, part in parts.items()} if copy else parts

    @torch.no_grad()
    def _move(self, last: dict[str, Tensor], share: float) -> None:
        """Set the parameters to (1 − share) θ0 + share θ_T, exact at both ends."""
        for name, part in self._parameters().items():
            part.copy_(torch.lerp(own_part(self.anchors[name]), last[name], share))
