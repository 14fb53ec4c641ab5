"""Block passes over sketches that may lie in a memory-mapped file.

Shape legend: N rows of the matrix, n chosen rows, K sketch dimension, P vectors of a pass, B rows of a block.

A pass converts one block at a time into a reused float32 buffer (a fresh temporary per block costs tens of times more,
in page faults), multiplies there, and accumulates in float64. Nothing here depends on the number of threads.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

BLOCK_ROWS = 512


def dot_rows(unit_NK: torch.Tensor, vectors_PK: torch.Tensor) -> np.ndarray:
    """<row, vector> for every row and every vector; float64 [N, P], computed in float32."""
    n_rows = unit_NK.shape[0]
    out_NP = np.empty((n_rows, vectors_PK.shape[0]), dtype=np.float64)
    vectors_KP = vectors_PK.to(torch.float32).T.contiguous()
    product_BP = torch.empty(BLOCK_ROWS, vectors_KP.shape[1])
    for start, stop, row in _blocks(unit_NK):
        product = product_BP[: stop - start]
        if vectors_KP.shape[1] == 1:
            torch.mv(row, vectors_KP[:, 0], out=product[:, 0])
        else:
            torch.mm(row, vectors_KP, out=product)
        out_NP[start:stop] = product.numpy()
    return out_NP


def square_rows(unit_NK: torch.Tensor) -> np.ndarray:
    """||row||^2, float64 [N]; not finite exactly where the row is not (float32 rows above 1e19 count as not finite)."""
    out_N = np.empty(unit_NK.shape[0], dtype=np.float64)
    for start, stop, row in _blocks(unit_NK):
        out_N[start:stop] = torch.linalg.vecdot(row, row).numpy()
    return out_N


def gather_rows(unit_NK: torch.Tensor, index_n: np.ndarray) -> torch.Tensor:
    """The chosen rows as float32 [n, K]; the only place that holds more than a block of them."""
    out_nK = torch.empty(len(index_n), unit_NK.shape[1])
    for start, stop, row in _gathered(unit_NK, index_n):
        out_nK[start:stop].copy_(row)
    return out_nK


def sum_rows(unit_NK: torch.Tensor, index_n: np.ndarray, factor_n: np.ndarray) -> torch.Tensor:
    """sum_i factor_i row_i over the chosen rows; float64 [K]. Blocks in float32, their sum in float64."""
    total_K = torch.zeros(unit_NK.shape[1], dtype=torch.float64)
    factor = torch.as_tensor(np.ascontiguousarray(factor_n, dtype=np.float64))
    for start, stop, row in _gathered(unit_NK, index_n):
        # A power of two keeps float32 away from overflow for loud samples without changing a digit.
        largest = float(factor[start:stop].abs().max())
        scale = 2.0 ** np.floor(np.log2(largest)) if largest > 0 else 1.0
        total_K += torch.mv(row.T, (factor[start:stop] / scale).to(torch.float32)).to(torch.float64) * scale
    return total_K


def dot_chosen(unit_NK: torch.Tensor, index_n: np.ndarray, vector_K: torch.Tensor) -> np.ndarray:
    """<row, vector> for the chosen rows; float64 [n]."""
    out_n = np.empty(len(index_n), dtype=np.float64)
    vector_K = vector_K.to(torch.float32)
    for start, stop, row in _gathered(unit_NK, index_n):
        out_n[start:stop] = torch.mv(row, vector_K).numpy()
    return out_n


def _blocks(unit_NK: torch.Tensor) -> Iterator[tuple[int, int, torch.Tensor]]:
    n_rows, dimension = unit_NK.shape
    buffer_BK = torch.empty(min(BLOCK_ROWS, n_rows), dimension)
    for start in range(0, n_rows, BLOCK_ROWS):
        stop = min(start + BLOCK_ROWS, n_rows)
        yield start, stop, buffer_BK[: stop - start].copy_(unit_NK[start:stop])


def _gathered(unit_NK: torch.Tensor, index_n: np.ndarray) -> Iterator[tuple[int, int, torch.Tensor]]:
    n_rows, dimension = len(index_n), unit_NK.shape[1]
    index = torch.as_tensor(np.ascontiguousarray(index_n, dtype=np.int64))
    size = min(BLOCK_ROWS, n_rows)
    stored_BK = torch.empty(size, dimension, dtype=unit_NK.dtype)
    buffer_BK = torch.empty(size, dimension)
    for start in range(0, n_rows, BLOCK_ROWS):
        stop = min(start + BLOCK_ROWS, n_rows)
        torch.index_select(unit_NK, 0, index[start:stop], out=stored_BK[: stop - start])
        yield start, stop, buffer_BK[: stop - start].copy_(stored_BK[: stop - start])
