"""What the stages that train a backbone have in common: what decays, what is saved, what fits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from recbole_mm.stage import Stage, UnfitWeightsError

_FINGERPRINT = "tokenizer_fingerprint"


class AdapterStage(Stage):
    """A stage whose module has a `backbone`, of which adapters, or all weights, are trained.

    Attributes:
        model: its `forget` is called when weights have changed.
    """

    of_items = False
    model: Any

    def param_groups(self) -> list[dict[str, Any]]:
        """Biases and norms, that is all vectors, never decay."""
        trained = [p for p in self.module.parameters() if p.requires_grad]
        return [
            {"params": [p for p in trained if p.ndim > 1]},
            {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
        ]

    def _trained(self) -> dict[str, Tensor]:
        return {name: p for name, p in self.module.named_parameters() if p.requires_grad}

    def state(self) -> dict[str, Tensor]:
        """Trained weights only (adapters, or a whole tiny backbone), and the tokenizer's mark."""
        module: Any = self.module
        digest = bytes.fromhex(module.backbone.tokenizer_fingerprint)
        mark = torch.tensor(list(digest), dtype=torch.uint8)  # (32,)
        return {**{name: p.detach() for name, p in self._trained().items()}, _FINGERPRINT: mark}

    def check_state(self, state: Mapping[str, Tensor]) -> None:
        """Compares tokenizer, names and shapes with the module's own.

        Raises:
            UnfitWeightsError: they belong to another backbone, or to other texts of the items.
        """
        own = self.state()
        mark = state.get(_FINGERPRINT)
        if mark is None or not torch.equal(mark.cpu(), own[_FINGERPRINT]):
            raise UnfitWeightsError(
                "they were made with another tokenizer (another backbone, other item texts or "
                "other attributes)"
            )
        if {k: v.shape for k, v in state.items()} != {k: v.shape for k, v in own.items()}:
            raise UnfitWeightsError("they do not fit this backbone")

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Takes back what `state` gave.

        Raises:
            UnfitWeightsError: see `check_state`.
        """
        self.check_state(state)
        with torch.no_grad():
            for name, parameter in self._trained().items():
                parameter.copy_(state[name])
        self.model.forget()
