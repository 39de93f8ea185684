"""Holds this model against numbers of the released one: `python -m tests.golden FOLDER [FOLDER...]`.

Takes any folder of the reference format (case.json, weights, inputs, f32 and f64 outputs), whatever its sizes and seeds.
Runs it in float64 (tolerance 1e-8) and float32 (1e-4), prints a line for each group of tensors with the worst difference,
and names everything that is not compared with the reason. Exits 1 when something is outside its tolerance or unknown.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from tests import golden_models
from tests.golden_captioner import run_captioner
from tests.golden_nlvr import run_nlvr
from tests.golden_retrieval import run_retrieval
from tests.golden_vqa import run_vqa

RUNS = golden_models.RUNS | {"captioner": run_captioner, "nlvr": run_nlvr, "retrieval": run_retrieval, "vqa": run_vqa}
TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-4}


@dataclass
class Outcome:
    """What a run made of a case: tensors and lists by the folder's names, and why others are left out.

    mask: for a tensor, where to compare it (bool, broadcast over the last dimensions), and why not elsewhere.
    """

    tensors: dict[str, Any] = field(default_factory=dict)
    lists: dict[str, Any] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)
    masks: dict[str, tuple[Tensor, str]] = field(default_factory=dict)


def check(folder: Path, say: Callable[[str], None] = print) -> bool:
    """Runs one folder; True when all that it holds agrees or is left out with a reason."""
    try:
        case = json.loads((folder / "case.json").read_text(encoding="utf-8"))
        inputs = load_file(folder / "inputs.safetensors")
        weights = load_file(folder / "weights.safetensors") if (folder / "weights.safetensors").exists() else {}
    except (OSError, ValueError) as error:
        say(f"{folder}: cannot be read: {error}")
        return False
    name = case.get("case")
    if name not in RUNS:
        say(f"{folder}: unknown case {name!r}; known: {', '.join(sorted(RUNS))}")
        return False
    good = True
    for dtype in (torch.float64, torch.float32):
        expected = _expected(folder, dtype)
        if not expected:
            say(f"{name} {dtype}: not compared: the folder has no outputs for it")
            continue
        outcome = Outcome()
        try:
            with sdpa_kernel(
                SDPBackend.MATH
            ):  # in the order of the reference: in float32 a fused kernel rounds otherwise
                RUNS[name](outcome, folder, case, weights, inputs, dtype)
        except (ValueError, KeyError, RuntimeError) as error:
            say(f"{name} {str(dtype)[6:]}: COULD NOT RUN: {type(error).__name__}: {error}")
            return False
        good &= _compare_tensors(f"{name} {str(dtype)[6:]}", expected, outcome, TOLERANCE[dtype], say)
        if dtype == torch.float64 or not (folder / "f64.safetensors").exists():
            good &= _compare_lists(name, case, outcome, say)
    return good


def _expected(folder: Path, dtype: torch.dtype) -> dict[str, Tensor]:
    """The numbers to meet; gradients and parameters of the float32 run are held against the float64 ones."""
    files = {torch.float64: ["f64"], torch.float32: ["f64", "f32"]}[dtype]
    tensors: dict[str, Tensor] = {}
    for file in files:
        path = folder / f"{file}.safetensors"
        found = load_file(path) if path.exists() else {}
        if dtype == torch.float32 and file == "f64":
            found = {
                name: tensor for name, tensor in found.items() if any(k in name for k in FULL) and "digest" not in name
            }
        tensors.update(found)
    return tensors


FULL = ("grad.", ".param.", ".momentum.")


def _compare_tensors(
    title: str, expected: dict[str, Tensor], outcome: Outcome, tolerance: float, say: Callable[[str], None]
) -> bool:
    good = True
    groups: dict[str, list[tuple[float, str]]] = {}
    skipped: dict[tuple[str, str], list[str]] = {}
    for name, want in sorted(expected.items()):
        group = _group(name)
        if name not in outcome.tensors:
            reason = next((why for key, why in outcome.reasons.items() if name.startswith(key)), None)
            if reason is None:
                say(f"{title} {name}: UNKNOWN, nothing was made to compare it with")
                good = False
            else:
                skipped.setdefault((group, reason), []).append(name)
            continue
        got = torch.as_tensor(outcome.tensors[name]).detach()
        if got.shape != want.shape:
            say(f"{title} {name}: WRONG, shape {list(got.shape)} instead of {list(want.shape)}")
            good = False
            continue
        scale = want.abs().clamp(min=1) if want.is_floating_point() else torch.ones(want.shape)
        if (
            ".digest." in name and tolerance > 1e-6
        ):  # in float32 a sum is no more exact than the norm of its terms allows
            scale = torch.maximum(scale, want[:, 1:2].abs())
        if name in outcome.masks:
            mask, why = outcome.masks[name]
            got, want, scale = got[mask], want[mask], scale[mask]
            if not mask.all():
                skipped.setdefault((group, f"{int((~mask).sum())} of {mask.numel()} places: {why}"), []).append(name)
        groups.setdefault(group, []).append((_difference(got, want, scale), name))
    for group, found in groups.items():
        exact = not expected[found[0][1]].is_floating_point()
        worst, where = max(found)
        passed = worst == 0 if exact else worst <= tolerance
        good &= passed
        label = "exact" if exact and passed else f"worst {worst:.2e}"
        count = f"{len(found)} tensors" if len(found) > 1 else "1 tensor"
        say(f"{title} {group}: {label} ({count}){'' if passed else f'  OUTSIDE {tolerance:g} at {where}'}")
    for (group, why), names in skipped.items():
        shown = f"{len(names)} tensors" if len(names) > 1 else names[0]
        say(f"{title} {group} ({shown}): not compared: {why}")
    return good


def _group(name: str) -> str:
    """`step1.grad.text_encoder…` -> `step1.grad`: tensors of one kind share a line."""
    for kind in ("grad.", "after.param.", "after.momentum."):
        if kind in name and ".digest." not in f".{name}":
            return name[: name.index(kind) + len(kind) - 1]
    return name


def _difference(got: Tensor, want: Tensor, scale: Tensor) -> float:
    """The worst difference, as a share of the scale; equal infinities agree, NaN never."""
    got, want = got.double(), want.double()
    gap = torch.where(got == want, 0.0, (got - want).abs() / scale).nan_to_num(nan=float("inf"))
    return gap.max().item() if gap.numel() else 0.0


def _compare_lists(title: str, case: dict[str, Any], outcome: Outcome, say: Callable[[str], None]) -> bool:
    good = True
    skipped: dict[str, list[str]] = {}
    for path, want in _lists(case):
        if path in outcome.lists:
            same = outcome.lists[path] == want
            good &= same
            say(f"{title} list {path}: {'equal' if same else 'DIFFERS'} ({len(want)} entries)")
            continue
        reason = next((why for key, why in outcome.reasons.items() if path.startswith(key)), None)
        if reason is None:
            say(f"{title} list {path}: UNKNOWN, nothing was made to compare it with")
            good = False
        else:
            skipped.setdefault(reason, []).append(path)
    for why, paths in skipped.items():
        say(f"{title} lists {', '.join(paths)}: not compared: {why}")
    return good


def _lists(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, list]]:
    for key, value in tree.items():
        path = f"{prefix}{key}"
        if isinstance(value, dict):
            yield from _lists(value, f"{path}.")
        elif isinstance(value, list):
            yield path, value


def main(folders: list[str]) -> int:
    if not folders:
        print("usage: python -m tests.golden FOLDER [FOLDER...]")
        return 2
    results = {folder: check(Path(folder)) for folder in folders}
    for folder, good in results.items():
        print(f"{folder}: {'agrees' if good else 'DOES NOT AGREE'}")
    return 0 if all(results.values()) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
