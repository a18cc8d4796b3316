"""The vote of a step: its fields by name, summed over the ranks."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from dist_train.ranks.vote import Vote

CPU = torch.device("cpu")


@dataclass
class Others:
    """A world whose other ranks say `says`, in the order of the fields."""

    says: tuple[float, ...]
    device: torch.device = CPU
    rank: int = 1
    size: int = 3

    def reduce(self, values: Tensor) -> None:
        values += torch.tensor(self.says, dtype=values.dtype)


def test_each_field_is_summed_under_its_name() -> None:
    """Numbers, flags and scalars of any dtype; what a rank does not say counts as nothing."""
    others = Others((1.5, 20.0, 300.0, 4000.0, 5.0e4, 6.0e5, 7.0e6, 8.0e7, 9.0e8, 1e10))
    loss, wrong = torch.tensor(0.25, dtype=torch.float64), torch.tensor(3)
    vote = Vote.cast(others, wrong=wrong, loss=loss, stop=True, bad=2).read()  # type: ignore[arg-type]
    assert vote == Vote(
        loss=1.75, wrong=23, refused=300, stop=4001, save=5e4, lost=6e5, bad=7e6 + 2, unread=8e7, square=9e8, new=1e10
    )


def test_another_name_is_refused() -> None:
    with pytest.raises(TypeError, match="losss"):
        Vote.cast(Others((0.0,) * 10), losss=1.0)  # type: ignore[arg-type]


def test_each_rank_has_a_row_of_its_own() -> None:
    others = Others((0.0,) * 10 + (0.5, 100.0, 0.0, 0.0, 0.25, 300.0))
    vote = Vote.cast(others, (2.0, 200.0), bad=1).read()  # type: ignore[arg-type]
    assert vote.rows == ((0.5, 100.0), (2.0, 200.0), (0.25, 300.0))
    assert vote.bad == 1
