"""Block passes over sketches that may lie in a memory-mapped file.

Shape legend: N rows of the matrix, n chosen rows, K sketch dimension, P vectors of a pass, B rows of a block.

A pass converts one block at a time into a reused float32 buffer (a fresh temporary per block costs tens of times more,
in page faults), multiplies there, and accumulates in float64. Blocks are dealt out to as many threads as torch has, each of
which multiplies by itself: products of a block are the same whichever thread makes them, and sums over blocks are added in
the order of rows, so nothing here depends on the number of threads.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from selection_ops.selectors.seconds import spent

BLOCK_ROWS = 512
GROUP_BLOCKS = 16
"""Blocks that one thread takes at a time; their sum is formed before it is added to others."""


@spent("product")
def dot_rows(unit_NK: torch.Tensor, vectors_PK: torch.Tensor) -> np.ndarray:
    """<row, vector> for every row and every vector; float64 [N, P], computed in float32."""
    n_rows = unit_NK.shape[0]
    out_NP = np.empty((n_rows, vectors_PK.shape[0]), dtype=np.float64)
    vectors_KP = vectors_PK.to(torch.float32).T.contiguous()

    def work(begin: int, end: int) -> None:
        product_BP = torch.empty(BLOCK_ROWS, vectors_KP.shape[1])
        row_BK = None if unit_NK.dtype == torch.float32 else _buffer(unit_NK, n_rows)
        for start, stop in _blocks(begin, end):
            row, product = unit_NK[start:stop], product_BP[: stop - start]
            if row_BK is not None:
                row = row_BK[: stop - start].copy_(row)
            if vectors_KP.shape[1] == 1:
                torch.mv(row, vectors_KP[:, 0], out=product[:, 0])
            else:
                torch.mm(row, vectors_KP, out=product)
            out_NP[start:stop] = product.numpy()

    _in_groups(n_rows, work)
    return out_NP


@spent("product")
def square_rows(unit_NK: torch.Tensor) -> np.ndarray:
    """||row||^2, float64 [N]; not finite exactly where the row is not (float32 rows above 1e19 count as not finite)."""
    n_rows = unit_NK.shape[0]
    out_N = np.empty(n_rows, dtype=np.float64)

    def work(begin: int, end: int) -> None:
        row_BK = _buffer(unit_NK, n_rows)
        for start, stop in _blocks(begin, end):
            row = row_BK[: stop - start].copy_(unit_NK[start:stop])
            out_N[start:stop] = torch.linalg.vecdot(row, row).numpy()

    _in_groups(n_rows, work)
    return out_N


@spent("product")
def gather_rows(unit_NK: torch.Tensor, index_n: np.ndarray) -> torch.Tensor:
    """The chosen rows as float32 [n, K]; the only place that holds more than a block of them."""
    out_nK = torch.empty(len(index_n), unit_NK.shape[1])
    chosen = _Chosen(unit_NK, index_n)

    def work(begin: int, end: int) -> None:
        stored_BK = chosen.stored()
        for start, stop in _blocks(begin, end):
            out_nK[start:stop].copy_(chosen.read(start, stop, stored_BK))

    _in_groups(len(index_n), work)
    return out_nK


@spent("product")
def sum_rows(unit_NK: torch.Tensor, index_n: np.ndarray, factor_n: np.ndarray) -> torch.Tensor:
    """sum_i factor_i row_i over the chosen rows; float64 [K]. Blocks in float32, their sum in float64."""
    count, dimension = len(index_n), unit_NK.shape[1]
    factor = torch.as_tensor(np.ascontiguousarray(factor_n, dtype=np.float64))
    chosen = _Chosen(unit_NK, index_n)
    groups = -(-count // (BLOCK_ROWS * GROUP_BLOCKS))
    total_GK = torch.zeros(groups, dimension, dtype=torch.float64)

    def work(begin: int, end: int) -> None:
        stored_BK, row_BK = chosen.stored(), _buffer(unit_NK, count)
        total_K = total_GK[begin // (BLOCK_ROWS * GROUP_BLOCKS)]
        for start, stop in _blocks(begin, end):
            row = row_BK[: stop - start].copy_(chosen.read(start, stop, stored_BK))
            # A power of two keeps float32 away from overflow for loud samples without changing a digit.
            largest = float(factor[start:stop].abs().max())
            scale = 2.0 ** np.floor(np.log2(largest)) if largest > 0 else 1.0
            total_K += torch.mv(row.T, (factor[start:stop] / scale).to(torch.float32)).to(torch.float64) * scale

    _in_groups(count, work)
    sum_K = torch.zeros(dimension, dtype=torch.float64)
    for group in range(groups):
        sum_K += total_GK[group]
    return sum_K


@spent("product")
def dot_chosen(unit_NK: torch.Tensor, index_n: np.ndarray, vector_K: torch.Tensor) -> np.ndarray:
    """<row, vector> for the chosen rows; float64 [n]."""
    out_n = np.empty(len(index_n), dtype=np.float64)
    vector_K = vector_K.to(torch.float32)
    chosen = _Chosen(unit_NK, index_n)

    def work(begin: int, end: int) -> None:
        stored_BK, row_BK = chosen.stored(), _buffer(unit_NK, len(index_n))
        for start, stop in _blocks(begin, end):
            row = row_BK[: stop - start].copy_(chosen.read(start, stop, stored_BK))
            out_n[start:stop] = torch.mv(row, vector_K).numpy()

    _in_groups(len(index_n), work)
    return out_n


def gram_rows(unit_mK: torch.Tensor, index_P: np.ndarray) -> np.ndarray:
    """<row, chosen row> of float32 rows for every chosen row; float32 [P, m]."""
    chosen_PK = unit_mK[torch.as_tensor(index_P)]
    out_Pm = torch.empty(len(index_P), len(unit_mK))

    def work(begin: int, end: int) -> None:
        torch.mm(chosen_PK, unit_mK[begin:end].T, out=out_Pm[:, begin:end])

    _in_groups(len(unit_mK), work, size=BLOCK_ROWS)
    return out_Pm.numpy()


class _Chosen:
    """Rows of a matrix by index, a block at a time, as they are stored."""

    def __init__(self, unit_NK: torch.Tensor, index_n: np.ndarray) -> None:
        self.unit_NK = unit_NK
        self.index = torch.as_tensor(np.ascontiguousarray(index_n, dtype=np.int64))

    def stored(self) -> torch.Tensor:
        return torch.empty(min(BLOCK_ROWS, len(self.index)), self.unit_NK.shape[1], dtype=self.unit_NK.dtype)

    def read(self, start: int, stop: int, stored_BK: torch.Tensor) -> torch.Tensor:
        return torch.index_select(self.unit_NK, 0, self.index[start:stop], out=stored_BK[: stop - start])


def _buffer(unit_NK: torch.Tensor, n_rows: int) -> torch.Tensor:
    return torch.empty(min(BLOCK_ROWS, n_rows), unit_NK.shape[1])


def _blocks(begin: int, end: int) -> list[tuple[int, int]]:
    return [(start, min(start + BLOCK_ROWS, end)) for start in range(begin, end, BLOCK_ROWS)]


def _in_groups(n_rows: int, work: Callable[[int, int], None], size: int = BLOCK_ROWS * GROUP_BLOCKS) -> None:
    """Calls work(begin, end) for every group of rows, in as many threads as torch has; each multiplies by itself."""
    groups = [(begin, min(begin + size, n_rows)) for begin in range(0, n_rows, size)]
    threads = torch.get_num_threads()

    def alone(group: tuple[int, int]) -> None:
        # A number of threads belongs to the thread that sets it, and what torch starts later takes the last one set.
        torch.set_num_threads(1)
        work(*group)

    try:
        if threads == 1 or len(groups) <= 1:
            for group in groups:
                alone(group)
        else:
            with ThreadPoolExecutor(min(threads, len(groups))) as pool:
                for _ in pool.map(alone, groups):
                    pass
    finally:
        torch.set_num_threads(threads)
