"""Muon for the matrices, AdamW for the rest, as one optimizer."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch


class MuonAdamW(torch.optim.Optimizer):
    """torch's Muon (orthogonalised momentum) for groups with `muon: true`, torch's AdamW for all others.

    Groups come from `blip.tasks.base.parameter_groups`; a group that Muon takes may hold matrices only. Muon's update is
    scaled to AdamW's size, so that both share one rate and one schedule.
    """

    def __init__(
        self,
        params: Iterable[dict[str, Any]],
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        weight_decay: float = 0.05,
        momentum: float = 0.95,
        ns_steps: int = 5,
    ) -> None:
        groups = [{"muon": False, **group} for group in params]
        super().__init__(groups, {"lr": lr, "weight_decay": weight_decay})
        of_muon, of_adamw = ([g for g in self.param_groups if g["muon"] is which] for which in (True, False))
        self.parts: list[torch.optim.Optimizer] = []
        if of_muon:
            scale = "match_rms_adamw"
            self.parts.append(
                torch.optim.Muon(of_muon, lr, weight_decay, momentum, ns_steps=ns_steps, adjust_lr_fn=scale)
            )
        if of_adamw:
            first, second = betas  # a list where it comes from a config
            self.parts.append(torch.optim.AdamW(of_adamw, lr, (first, second), weight_decay=weight_decay, fused=True))
        self.param_groups = [group for part in self.parts for group in part.param_groups]
        self._share()

    def _share(self) -> None:
        """The parts read and write this optimizer's groups and state, so that one state dict holds all."""
        for part in self.parts:
            part.state = self.state
            part.param_groups = [g for g in self.param_groups if g["muon"] is isinstance(part, torch.optim.Muon)]

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._share()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self.parts:
            part.step()
        return loss
