"""Rows in a file come back as they went, in whatever order they are written and asked for."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from blip.evaluators.rows import Rows, of_all_ranks, runs
from tests.ranks import as_ranks


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.int32])
@pytest.mark.parametrize("shape", [(), (3,), (2, 5)])
def test_rows_come_back_in_the_order_asked_for(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    rows = torch.arange(7 * torch.Size(shape).numel()).view(7, *shape).to(dtype)
    file = Rows(None)
    file.append(rows[:3])
    file.append(rows[:0])
    file.append(rows[3:])
    assert len(file) == 7
    assert torch.equal(file.read(2, 6), rows[2:6])
    assert torch.equal(file.take([6, 0, 1, 1]), rows[[6, 0, 1, 1]])
    assert file.take([]).shape == (0, *shape)
    blocks = list(file.blocks(3))
    assert [start for start, _ in blocks] == [0, 3, 6]
    assert torch.equal(torch.cat([block for _, block in blocks]), rows)


def test_rows_may_be_put_in_any_order() -> None:
    rows, file = torch.randn(5, 4), Rows(None)
    file.put([4, 0], rows[[4, 0]])
    file.put([2, 3, 1], rows[[2, 3, 1]])
    assert torch.equal(file.read(0, 5), rows)


def test_places_that_follow_each_other_are_read_at_once() -> None:
    assert list(runs([3, 4, 5, 9, 0, 1])) == [(0, 3, 6), (3, 9, 10), (4, 0, 2)]
    assert list(runs(range(2, 2))) == []


def test_rows_of_another_kind_are_refused() -> None:
    file = Rows(None)
    file.append(torch.zeros(2, 3))
    for other in (torch.zeros(2, 4), torch.zeros(2, 3).double()):
        with pytest.raises(ValueError, match="among"):
            file.append(other)
    with pytest.raises(ValueError, match="no row was ever written"):
        Rows(None).take([0])


def test_the_file_lies_in_the_folder_named_and_leaves_nothing(tmp_path: Path) -> None:
    file = Rows(tmp_path / "new" / "folder")
    file.append(torch.ones(2))
    assert (tmp_path / "new" / "folder").is_dir()
    assert list((tmp_path / "new" / "folder").iterdir()) == []
    assert torch.equal(file.read(0, 2), torch.ones(2))


def test_a_folder_without_room_is_named(tmp_path: Path) -> None:
    file = Rows(tmp_path)
    file.append(torch.ones(1))
    file.file.close()
    file.file = open("/dev/full", "wb", buffering=0)  # noqa: SIM115
    with pytest.raises(OSError, match=f"{tmp_path}: .*: name a folder with more room"):
        file.append(torch.ones(1))


@pytest.mark.parametrize("at_once", [1, 2, 100])
def test_every_rank_gets_all_rows_each_at_its_place(at_once: int) -> None:
    rows = torch.randn(7, 3)
    dealt = [[5, 1, 6, 0], [], [2, 4, 3]]  # of which rank holds which; the second none

    def run(rank: int) -> torch.Tensor:
        own = Rows(None)
        own.append(rows[dealt[rank]])
        return of_all_ranks(own, dealt[rank], at_once).read(0, 7)

    for got in as_ranks(3, run):
        assert torch.equal(got, rows)
