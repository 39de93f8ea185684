"""Muon beside AdamW: who takes what, and that a restart goes on exactly."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from torch import nn

from blip.tasks.base import parameter_groups
from blip.tasks.optimizers import MuonAdamW

RULES = [{"match": r"0\.weight", "muon": True}, {"match": "bias", "lr": 0.5, "weight_decay": 0.0}]


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        x = torch.randn(5, 4, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()


def test_each_parameter_takes_the_first_rule_it_meets() -> None:
    groups = parameter_groups(network().named_parameters(), RULES, lr=0.1)
    assert [len(group["params"]) for group in groups] == [1, 1, 2]
    assert groups[1]["muon"] is True
    assert groups[2]["lr"] == 0.05
    assert groups[2]["weight_decay"] == 0.0


def test_a_rule_that_no_parameter_meets_is_refused() -> None:
    with pytest.raises(ValueError, match="temprature"):
        parameter_groups(network().named_parameters(), [{"match": "temprature"}], lr=0.1)


def test_the_parts_are_torchs_own_muon_and_adamw() -> None:
    ours, plain = network(), network()
    train(ours, MuonAdamW(parameter_groups(ours.named_parameters(), RULES, 0.01), lr=0.01), range(3))
    named = dict(plain.named_parameters())
    muon = torch.optim.Muon([named["0.weight"]], lr=0.01, weight_decay=0.05, adjust_lr_fn="match_rms_adamw")
    biases = {"params": [named["0.bias"], named["2.bias"]], "lr": 0.005, "weight_decay": 0.0}
    adamw = torch.optim.AdamW([{"params": [named["2.weight"]]}, biases], lr=0.01, weight_decay=0.05, fused=True)
    for step in range(3):
        x = torch.randn(5, 4, generator=torch.Generator().manual_seed(step))
        plain.zero_grad()
        plain(x).square().sum().backward()
        muon.step()
        adamw.step()
    for a, b in zip(ours.parameters(), plain.parameters(), strict=True):
        assert torch.equal(a, b)


def test_training_goes_on_exactly_from_a_saved_state() -> None:
    straight, stopped = network(), network()
    train(straight, MuonAdamW(parameter_groups(straight.named_parameters(), RULES, 0.01), lr=0.01), range(6))
    first = MuonAdamW(parameter_groups(stopped.named_parameters(), RULES, 0.01), lr=0.01)
    train(stopped, first, range(3))
    second = MuonAdamW(parameter_groups(stopped.named_parameters(), RULES, 0.01), lr=0.01)
    second.load_state_dict(deepcopy(first.state_dict()))
    train(stopped, second, range(3, 6))
    for a, b in zip(straight.parameters(), stopped.parameters(), strict=True):
        assert torch.equal(a, b)
