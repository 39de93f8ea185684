"""A checkpoint is replaced whole or not at all."""

from __future__ import annotations

import errno
import os
import resource
from pathlib import Path

import pytest
import torch

from blip.callbacks.checkpoint import AtomicCheckpointIO, Checkpoint


def test_a_checkpoint_is_read_back_and_leaves_nothing_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "new" / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint({"step": 1, "weights": torch.arange(3)}, path)
    AtomicCheckpointIO().save_checkpoint({"step": 2, "weights": torch.arange(3)}, path)
    assert torch.load(path, weights_only=True)["step"] == 2
    assert os.listdir(path.parent) == ["last.ckpt"]


def test_half_a_file_that_a_killed_run_left_is_written_over(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint({"step": 1, "weights": torch.arange(3)}, path)
    (tmp_path / ".last.ckpt.partial").write_bytes(path.read_bytes()[:100] + b"cut" * 10**5)
    AtomicCheckpointIO().save_checkpoint({"step": 2, "weights": torch.arange(3)}, path)
    assert torch.load(path, weights_only=True)["step"] == 2
    assert os.listdir(tmp_path) == ["last.ckpt"]


@pytest.mark.parametrize("before", [True, False])
def test_a_disk_that_is_full_while_writing_keeps_the_old_file(tmp_path: Path, before: bool) -> None:
    path = tmp_path / "last.ckpt"
    if before:
        AtomicCheckpointIO().save_checkpoint({"step": 1}, path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))  # the kernel refuses what is written beyond
    try:
        with pytest.raises(OSError, match=r"checkpoint not saved .*Make room, then resume") as caught:
            AtomicCheckpointIO().save_checkpoint({"step": 2, "weights": torch.zeros(10**6)}, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert ("the checkpoint before it is kept" in str(caught.value)) == before
    assert os.listdir(tmp_path) == (["last.ckpt"] if before else [])
    assert not before or torch.load(path, weights_only=True) == {"step": 1}


def test_a_disk_that_is_full_at_the_end_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint({"step": 1}, path)

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left on device") as caught:
        AtomicCheckpointIO().save_checkpoint({"step": 2}, path)
    assert caught.value.errno == errno.ENOSPC
    assert os.listdir(tmp_path) == ["last.ckpt"]
    assert torch.load(path, weights_only=True) == {"step": 1}


def test_what_can_not_be_saved_for_another_reason_says_so_itself(tmp_path: Path) -> None:
    with pytest.raises((AttributeError, TypeError, RuntimeError), match=r"pickle|local object"):
        AtomicCheckpointIO().save_checkpoint({"no": lambda: None}, tmp_path / "last.ckpt")


def test_a_cadence_of_no_steps_is_refused() -> None:
    with pytest.raises(ValueError, match="every_steps must be at least 1"):
        Checkpoint("folder", 0)
