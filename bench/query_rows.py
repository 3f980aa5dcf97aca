"""What the rows of bench/queries.py share: a comparison, and a map for everybody."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from curvlinops._torch_base import PyTorchLinearOperator
from hessian_eigenthings.operators.base import LambdaOperator
from scipy.sparse.linalg import LinearOperator
from torch import Tensor

from curvd_server.linalg import Products


@dataclass(frozen=True)
class Row:
    """A comparison; less is better."""

    what: str
    ours: float
    peer: float
    noise: float = 0.0
    """Standard error of the logarithm of ours over the peer's."""

    @property
    def good(self) -> bool:
        """Whether ours is no more, as far as the noise can tell."""
        return self.ours <= self.peer * np.exp(2 * self.noise)

    def __str__(self) -> str:
        noise = f" +- {self.noise:4.0%}" if self.noise else " " * 8
        verdict = "ok" if self.good else "MISSED"
        return f"{self.what:58} {self.ours:9.4g} {self.peer:9.4g}{noise}  {verdict}"


class Counted(PyTorchLinearOperator):
    """A dense matrix that counts its columns, for every contestant."""

    SELF_ADJOINT = True
    device, dtype = torch.device("cpu"), torch.float64

    def __init__(self, A: Tensor) -> None:
        super().__init__([(len(A),)], [(len(A),)])
        self.A, self.columns = A, 0

    def _matmat(self, X: list[Tensor]) -> list[Tensor]:
        self.columns += X[0].shape[1]
        return [self.A @ X[0]]

    def to_rows(self, V: Tensor) -> Tensor:
        self.columns += len(V)
        return V @ self.A

    def to_vector(self, v: np.ndarray) -> np.ndarray:
        self.columns += 1
        return self.A.numpy() @ v

    def to_eigenthings(self) -> LambdaOperator:
        def multiply(v: Tensor) -> Tensor:
            self.columns += 1
            return self.A @ v

        return LambdaOperator(multiply, len(self.A), dtype=self.A.dtype)

    def to_scipy(self) -> LinearOperator:
        return LinearOperator(self.A.shape, matvec=self.to_vector, dtype=np.float64)

    def products(self) -> Products:
        return Products(self.to_rows, size=len(self.A), dtype=self.A.dtype)

    def count(self, work: Callable[[], object]) -> int:
        self.columns = 0
        work()
        return self.columns
