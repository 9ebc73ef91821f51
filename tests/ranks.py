"""Tensor-parallel ranks as threads of this process, with a sum over them that is counted."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

T = TypeVar("T")


class Ranks:
    """`sum_` is the collective; `summed` says what shapes went through it, once for all ranks.

    One rank runs at a time, from one collective to the next: Triton's interpreter knows no threads.
    """

    def __init__(self, size: int = 2) -> None:
        self.size, self.summed = size, []
        self._given: list[torch.Tensor] = [torch.empty(0)] * size
        self._barrier, self._here = threading.Barrier(size), threading.local()
        self._turn = threading.Lock()

    def sum_(self, t: torch.Tensor) -> torch.Tensor:
        rank = self._here.rank
        self._given[rank] = t.clone()
        self._meet()
        assert len({g.shape for g in self._given}) == 1
        total = torch.stack(self._given).sum(dim=0)
        self._meet()
        if rank == 0:
            self.summed.append(tuple(t.shape))
        return total

    def _meet(self) -> None:
        self._turn.release()
        try:
            self._barrier.wait(60)
        finally:
            self._turn.acquire()

    def run(self, call: Callable[[int], T]) -> list[T]:
        """`call(rank)` of every rank at once."""

        def one(rank: int) -> T:
            self._here.rank = rank
            with self._turn:
                try:
                    return call(rank)
                except BaseException:
                    self._barrier.abort()
                    raise

        with ThreadPoolExecutor(self.size) as pool:
            return list(pool.map(one, range(self.size)))
