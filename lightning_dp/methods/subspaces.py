"""Subspaces of the gradients of a linear head, found in public records alone and without writing a gradient out.

The gradient of one record is the outer product ``a x^T`` of its residual ``a`` (softmax minus label, (classes,)) and
its feature vector ``x`` (values,). Inner products of gradients are products of two small ones, so an eigendecomposition
of the Gram matrix of M public records (M x M, float64) takes the place of one of the M x (classes * values) matrix.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from lightning_dp.errors import ConfigError

# Directions with less of the largest eigenvalue are rounding error.
_SMALLEST_EIGENVALUE = 1e-8


class Subspace(ABC):
    """A subspace of the gradients (classes, values), with an orthonormal basis of k of them."""

    @abstractmethod
    def coordinates(self, residuals: Tensor, features: Tensor) -> Tensor:
        """Coordinates (n, k) of the gradients of n records: residuals (n, classes), features (n, values)."""

    @abstractmethod
    def coordinates_of(self, gradient: Tensor) -> Tensor:
        """Coordinates (k,) of any gradient (classes, values)."""

    @abstractmethod
    def lift(self, coordinates: Tensor) -> Tensor:
        """The gradient (classes, values) with the given coordinates (k,)."""

    @final
    def project(self, gradient: Tensor) -> Tensor:
        """The nearest gradient in the subspace, (classes, values)."""
        return self.lift(self.coordinates_of(gradient))


class Projection(ABC):
    """Finds a subspace in public records."""

    @abstractmethod
    def __call__(self, residuals: Tensor, features: Tensor) -> Subspace:
        """Subspace from public residuals (M, classes) and features (M, values)."""


@final
class GradientSpan(Projection):
    """The leading directions of the public records' gradients at the current head (recalled as the paper's choice).

    A step in it only re-weights public records: with few of them it keeps little of a private gradient.

    Args:
        rank: directions, at most; None for all that the public records span.
    """

    def __init__(self, rank: int | None = None) -> None:
        self.rank = _checked(rank)

    def __call__(self, residuals: Tensor, features: Tensor) -> Subspace:
        """Subspace spanned by the top right singular vectors of the M public gradients."""
        a, x = residuals.double(), features.double()
        mix = orthonormal_mix((a @ a.T) * (x @ x.T), self.rank)
        return _Span(mix.to(features), residuals, features)


@final
class FeaturePCA(Projection):
    """All gradients ``a x^T`` whose feature vectors lie in the leading directions of the public features.

    It does not depend on labels or on the head. Directions are those of the uncentred features, so one that all
    records share (and the constant of the bias) is kept.

    Args:
        rank: directions of the features, at most; None for all that the public records span.
    """

    def __init__(self, rank: int | None = None) -> None:
        self.rank = _checked(rank)

    def __call__(self, residuals: Tensor, features: Tensor) -> Subspace:
        """Subspace of the top right singular vectors of the M public feature vectors."""
        x = features.double()
        directions = x.T @ orthonormal_mix(x @ x.T, self.rank)
        return _Features(directions.to(features), residuals.shape[1])


def orthonormal_mix(gram: Tensor, rank: int | None) -> Tensor:
    """Weights (M, k) that turn M vectors with the given Gram matrix (M, M) into k orthonormal ones, leading first."""
    values, vectors = torch.linalg.eigh(gram)
    values, vectors = values.flip(0), vectors.flip(1)
    keep = values > _SMALLEST_EIGENVALUE * values[0].clamp(min=torch.finfo(gram.dtype).tiny)
    keep[len(keep) if rank is None else rank :] = False
    mix: Tensor = vectors[:, keep] / values[keep].sqrt()
    return mix


@final
@dataclass(frozen=True)
class _Span(Subspace):
    """Basis vector r is ``sum_j mix[j, r] a_j x_j^T`` over the public records j."""

    mix: Tensor
    residuals: Tensor
    features: Tensor

    def coordinates(self, residuals: Tensor, features: Tensor) -> Tensor:
        return ((residuals @ self.residuals.T) * (features @ self.features.T)) @ self.mix

    def coordinates_of(self, gradient: Tensor) -> Tensor:
        return self.mix.T @ ((self.residuals @ gradient) * self.features).sum(1)

    def lift(self, coordinates: Tensor) -> Tensor:
        return ((self.mix @ coordinates)[:, None] * self.residuals).T @ self.features


@final
@dataclass(frozen=True)
class _Features(Subspace):
    """Gradients ``G V V^T`` for orthonormal ``directions`` V (values, m); k = classes * m."""

    directions: Tensor
    num_classes: int

    def coordinates(self, residuals: Tensor, features: Tensor) -> Tensor:
        return (residuals[:, :, None] * (features @ self.directions)[:, None, :]).flatten(1)

    def coordinates_of(self, gradient: Tensor) -> Tensor:
        return (gradient @ self.directions).flatten()

    def lift(self, coordinates: Tensor) -> Tensor:
        return coordinates.view(self.num_classes, -1) @ self.directions.T


def _checked(rank: int | None) -> int | None:
    if rank is not None and rank < 1:
        raise ConfigError(f"projection rank {rank} must be at least 1, or left out for all directions: correct it")
    return rank
