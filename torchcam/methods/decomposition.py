"""Methods that factorise activations."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal, NamedTuple, Self

import torch
from torch import Tensor, nn

from torchcam._checks import callable_object, finite_number, one_of, positive_integer
from torchcam._passes import model_device
from torchcam._replica import normal_mode, replicated
from torchcam._tensors import gaussian_noise, is_constant, is_finite, to_float
from torchcam.layers import TargetLayer

from ._finish import broken_samples
from ._hooked import Hooked
from ._replicas import on_replica
from ._request import Request
from ._stream import batch_arguments
from .gradient import _GradientCAM
from .summary import MeanActivation, _ClassAgnosticCAM

_LARGE = 512  # sides of matrices beyond which a full decomposition takes longer
_KRYLOV_STEPS = 64
_SQUARINGS = 14


class EigenCAM(_ClassAgnosticCAM):
    r"""Eigen-CAM (Muhammad & Yeasin 2020, arXiv:2008.00299): positions projected on their first principal component.

    With :math:`\bar A` the activations as a matrix (positions, channels), centred over positions, and :math:`v` the
    first right singular vector of that matrix:

    .. math::
        M = \mathrm{ReLU}(\pm \bar A v)

    where the sign makes the map correlate positively with the mean activation over channels. The map is the same for
    every class: none has to be named, and one that is named is ignored.

    Cost: the user's forward pass.
    """

    def map(self, activation: Tensor) -> Tensor:
        """Return the projection on the first principal component, (N, *spatial)."""
        return along(self._project(activation), activation)

    def _project(self, activation: Tensor) -> Tensor:
        """Project the positions on one component of either sign: (N, C, *spatial) to (N, *spatial)."""
        return first_component(activation)


class KPCACAM(EigenCAM):
    r"""KPCA-CAM (Karmani et al. 2024, arXiv:2410.00267): Eigen-CAM with kernel PCA.

    With :math:`x_s` the channels at position :math:`s`, centred over positions, :math:`K_{st} = \kappa(x_s, x_t)`
    centred in feature space, and :math:`\lambda, u` its largest eigenvalue and the eigenvector to it:

    .. math::
        M = \mathrm{ReLU}\big(\pm \sqrt{\lambda}\, u\big), \qquad
        \kappa(x, y) = \tanh(\gamma\, x^\top y + 1) \quad \text{or} \quad e^{-\gamma \|x - y\|^2}

    The sign rule is that of Eigen-CAM, and the class is ignored as there.

    Cost: the user's forward pass; memory grows with the square of the number of positions, time with the cube.

    Args:
        model: the model to explain
        target_layer: the layer(s) to look at
        input_shape: shape of the input without the batch dimension, used only to find a default layer
        kernel: ``"sigmoid"`` or ``"rbf"``
        gamma: the kernel's width; by default one by the number of channels
        kwargs: arguments of the base class

    Raises:
        ValueError: if ``kernel`` is unknown, or ``gamma`` not a finite number of 0 or more
    """

    _options = ("target_layer", "kernel", "gamma")

    def __init__(
        self,
        model: nn.Module,
        target_layer: TargetLayer | Sequence[TargetLayer] | None = None,
        input_shape: tuple[int, ...] = (3, 224, 224),
        *,
        kernel: Literal["sigmoid", "rbf"] = "sigmoid",
        gamma: float | None = None,
        **kwargs: Any,
    ) -> None:
        self.kernel = one_of("kernel", kernel, ("sigmoid", "rbf"))
        self.gamma = None if gamma is None else finite_number("gamma", gamma, 0)
        super().__init__(model, target_layer, input_shape, **kwargs)

    def _project(self, activation: Tensor) -> Tensor:
        features, finite = _centred(activation)  # (N, C, P)
        gamma = 1 / features.shape[1] if self.gamma is None else self.gamma
        products = features.mT @ features  # (N, P, P)
        if self.kernel == "sigmoid":
            kernel = torch.tanh(gamma * products + 1)
        else:
            norms = products.diagonal(dim1=1, dim2=2)
            kernel = torch.exp(-gamma * (norms.unsqueeze(1) + norms.unsqueeze(2) - 2 * products).relu())
        rows = kernel.mean(2, keepdim=True)
        centred = kernel - rows - rows.mT + rows.mean(1, keepdim=True)
        return _as_maps(_scores(centred, kernel.abs().amax((1, 2))), activation, finite)


class EigenGradCAM(_GradientCAM):
    r"""Eigen-Grad-CAM: Eigen-CAM of the activations weighted by their gradient, so that the class counts.

    .. math::
        M = \mathrm{ReLU}(\pm \bar X v), \qquad X = \frac{\partial Y}{\partial A} \odot A

    with :math:`\bar X` centred over positions and :math:`v` its first principal component, as in Eigen-CAM
    (Muhammad & Yeasin 2020, arXiv:2008.00299). The sign makes the map correlate positively with
    :math:`\sum_k X_k`, the map of HiRes-CAM.

    Cost: the user's forward pass and a backward pass to the target layer.
    """

    @staticmethod
    def map(activation: Tensor, gradient: Tensor) -> Tensor:
        """Return the first principal component of gradient times activation, (N, *spatial)."""
        product = gradient * activation
        return along(first_component(product), product)


class SegEigenCAM(_GradientCAM):
    r"""Seg-Eigen-CAM (Chung & Ying 2025, Applied Sciences 15(13)): Eigen-CAM weighted by the size of the gradient.

    .. math::
        M = \mathrm{ReLU}(\pm \bar X v), \qquad X = \Big|\frac{\partial Y}{\partial A}\Big| \odot A

    with :math:`\bar X` centred over positions and :math:`v` its first principal component; the sign is the one with
    :math:`\max M \ge |\min M|` before the ReLU. Meant for segmentation models, with a target that sums a class over a
    mask; works for any.

    Cost: the user's forward pass and a backward pass to the target layer.
    """

    @staticmethod
    def map(activation: Tensor, gradient: Tensor) -> Tensor:
        """Return the first principal component of the gradient's size times the activation, (N, *spatial)."""
        cam = first_component(gradient.abs() * activation)
        return _flipped(cam, -cam.flatten(1).amin(1) > cam.flatten(1).amax(1))


class Factorization(NamedTuple):
    """Concepts that the activations of a batch are made of.

    Attributes:
        concepts: what each concept is, (C, k): its activation vector at the position where it is strongest
        maps: how strong each is where, (N, k, *spatial), 1 at its strongest position in the batch
        scores: what the classifier makes of each concept, (k, classes), if there was one
    """

    concepts: Tensor
    maps: Tensor
    scores: Any = None


class DeepFeatureFactorization(Hooked):
    r"""Deep feature factorisation (Collins et al. 2018, arXiv:1806.10206): concepts that the images of a batch share.

    The activations of the whole batch, as a matrix :math:`V` (channels, positions of all images), are factorised into
    concepts and their maps, none of which is negative:

    .. math::
        \min_{W, H \ge 0} \| V - W H \|^2, \qquad W: (C, k), \quad H: (k, N |S|)

    by coordinate descent (hierarchical alternating least squares), which never increases the error. Channels with
    negative values are shifted to have none first. Concepts are sorted by their share of :math:`W H`.

    Cost: the user's forward pass.

    Args:
        model: the model to look into
        target_layer: the layer to look at
        n_components: number of concepts k
        classifier: function from activation vectors (k, C) to class scores (k, classes), say, the model's last layer
        input_shape: shape of the input without the batch dimension, used only to find a default layer
        num_iterations: number of rounds of the descent
        seed: seed of the start; the global random state is neither read nor changed
        kwargs: arguments of the base class

    Raises:
        TypeError: if ``classifier`` is not callable
        ValueError: if ``n_components`` or ``num_iterations`` is not positive, or there are several target layers

    Example:
        >>> from torchvision.models import resnet18
        >>> model = resnet18().eval()
        >>> with DeepFeatureFactorization(model, "layer4", 3, model.fc) as factorize, torch.inference_mode():
        ...     scores = model(torch.rand(2, 3, 224, 224))
        ...     concepts, maps, concept_scores = factorize()
        >>> concepts.shape, maps.shape, concept_scores.shape
        (torch.Size([512, 3]), torch.Size([2, 3, 7, 7]), torch.Size([3, 1000]))
    """

    def __init__(
        self,
        model: nn.Module,
        target_layer: TargetLayer | None = None,
        n_components: int = 16,
        classifier: Callable[[Tensor], Any] | None = None,
        input_shape: tuple[int, ...] = (3, 224, 224),
        *,
        num_iterations: int = 200,
        seed: int = 0,
        **kwargs: Any,
    ) -> None:
        if isinstance(target_layer, (list, tuple)) and len(target_layer) > 1:
            raise ValueError(f"one layer is factorised, but `target_layer` lists {len(target_layer)}")
        self.n_components = positive_integer("n_components", n_components)
        self.num_iterations = positive_integer("num_iterations", num_iterations)
        self.classifier = callable_object("classifier", classifier, optional=True)
        self.seed = seed
        self.extractor = MeanActivation(model, target_layer, input_shape, **kwargs)
        self._recorder = self.extractor._recorder

    def __call__(self) -> Factorization:
        """Factorise the activations of the recorded pass.

        Raises:
            AssertionError: if no forward pass was recorded
        """
        with normal_mode(graph=False):
            (activation,) = self.extractor._activations(Request(self._recorder.find()))
            finite = is_finite(activation).reshape(-1, *[1] * (activation.ndim - 1))
            matrix = torch.where(finite, activation, 0.0).transpose(0, 1).flatten(1)  # (C, N * positions)
            shift = matrix.amin(1, keepdim=True).clamp(max=0)
            concepts, strengths = self._factors(matrix - shift)
            maps = strengths.reshape(-1, len(activation), *activation.shape[2:]).transpose(0, 1)
            maps = broken_samples(maps, activation, None, self.extractor.target_names[0])
            if self.classifier is None:
                return Factorization(concepts, maps)
            vectors = (concepts + shift).mT
            if not isinstance(self.classifier, nn.Module):
                return Factorization(concepts, maps, self.classifier(vectors))
            with replicated(self.classifier) as classifier:
                return Factorization(concepts, maps, classifier(vectors))

    def stream(self, batches: Iterable[Any]) -> Iterator[Factorization]:
        """Run the model on batches, as :meth:`_CAM.stream` does, and yield the factorisation of each."""
        for batch in batches:
            args, options = batch_arguments(batch, model_device(self.model))
            with on_replica(self) as moved, torch.inference_mode():
                moved.model(*args, **options)
                found = moved()
            yield found

    def moved_to(self, replica: nn.Module) -> Self:
        """Return one like this with its hooks on a replica of the model."""
        moved = copy.copy(self)
        moved.extractor = self.extractor.moved_to(replica)
        moved._recorder = moved.extractor._recorder
        return moved

    def __repr__(self) -> str:
        return f"{type(self).__name__}(target_layer={self.target_names}, n_components={self.n_components})"

    def _factors(self, matrix: Tensor) -> tuple[Tensor, Tensor]:
        """Factorise (C, P) >= 0 into concepts (C, k) and strengths (k, P), the largest of each being 1."""
        channels, positions = matrix.shape
        start = gaussian_noise((channels + positions, self.n_components), matrix, 1, self.seed).abs()
        start = start * (matrix.mean() / self.n_components).sqrt()
        concepts, strengths = start[:channels], start[channels:]  # (C, k), (P, k)
        for _ in range(self.num_iterations):
            concepts = _descend(concepts, matrix @ strengths, strengths.mT @ strengths)
            strengths = _descend(strengths, matrix.mT @ concepts, concepts.mT @ concepts)
        peaks = strengths.amax(0)
        concepts, strengths = concepts * peaks, strengths / torch.where(peaks > 0, peaks, 1.0)
        order = (concepts.sum(0) * strengths.sum(0)).argsort(descending=True)
        return concepts[:, order], strengths[:, order].mT


def first_component(features: Tensor) -> Tensor:
    """Project positions on their first principal component, of either sign: (N, C, *spatial) to (N, *spatial).

    Computed in float64, from the smaller of the two Gram matrices. Constant features give zeros, samples that are not
    finite NaN.
    """
    centred, finite = _centred(features)  # (N, C, P)
    peak = centred.abs().amax((1, 2), keepdim=True)
    centred = centred / torch.where(peak > 0, peak, 1.0)  # a square neither over- nor underflows
    if centred.shape[1] <= centred.shape[2]:
        _, axis = _leading(centred @ centred.mT)  # (N, C)
        projection = torch.einsum("nc,ncp->np", axis, centred)
    else:
        projection = _scores(centred.mT @ centred)
    return _as_maps(projection * peak.squeeze(1), features, finite)


def along(projection: Tensor, channels: Tensor) -> Tensor:
    """Return a centred projection (N, *spatial) with the sign that makes it correlate positively with summed channels.

    Where that correlation is rounding noise, as behind a norm over channels, whose sum is the same everywhere, the side
    of the larger deviations becomes positive.
    """
    flat, projected = channels.sum(1).flatten(1).double(), projection.flatten(1).double()  # products overflow sooner
    size = channels.abs().sum(1).flatten(1).double()  # a sum is rounded as its terms are large
    centred = flat - flat.mean(1, keepdim=True)
    overlap = (projected * centred).sum(1)
    rounding = 16 * torch.finfo(channels.dtype).eps * flat.shape[1] ** 0.5
    is_noise = overlap.abs() <= rounding * projected.norm(dim=1) * size.norm(dim=1)
    scale = projected.abs().amax(1, keepdim=True)
    skewness = (projected / torch.where(scale == 0, 1.0, scale)).pow(3).sum(1)
    return _flipped(projection, torch.where(is_noise, skewness, overlap) < 0)


def _flipped(maps: Tensor, where: Tensor) -> Tensor:
    """Change the sign of the maps (N, *spatial) of some samples, (N,)."""
    return torch.where(where.reshape(-1, *[1] * (maps.ndim - 1)), -maps, maps)


def _centred(features: Tensor) -> tuple[Tensor, Tensor]:
    """Subtract the mean over positions, in float64; also return which samples are finite.

    Channels that are constant up to rounding become 0, so that rounding errors are no component.

    Returns:
        the centred features, (N, C, P), 0 for samples that are not finite; and a mask of the finite ones, (N,)
    """
    flat = features.flatten(2)
    finite = is_finite(features)
    constant = is_constant(flat.amin(2), flat.amax(2)).unsqueeze(2)
    exact = flat.double()
    keep = finite.reshape(-1, 1, 1) & ~constant
    return torch.where(keep, exact - exact.mean(2, keepdim=True), 0.0), finite


def _scores(kernel: Tensor, size: Tensor | float = 0.0) -> Tensor:
    r"""Return the first principal component of a centred kernel matrix (N, P, P): :math:`\sqrt\lambda u`, (N, P).

    Eigenvalues within the rounding error of entries of ``size`` are 0.
    """
    value, vector = _leading(kernel)
    noise = kernel.shape[1] * torch.finfo(kernel.dtype).eps * size
    return torch.where(value > noise, value, 0.0).sqrt().unsqueeze(1) * vector


def _leading(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Return the largest eigenvalue (N,) of symmetric matrices (N, R, R) and the eigenvector to it, (N, R).

    Large matrices are decomposed in a Krylov space alone (Lanczos, each step made orthogonal to all before). The vector
    is right to about 1e-8 if the next eigenvalue is 3 % smaller or more, to 1e-4 at 1 %; of two that are all but equal
    it is some mixture. In a graph that is traced, the matrix is squared until only that vector is left: no runtime of
    such graphs decomposes matrices.
    """
    if torch.compiler.is_compiling():
        return _leading_by_squaring(matrix)
    basis = None if matrix.shape[-1] <= _LARGE else _krylov_basis(matrix)  # (N, R, steps)
    values, vectors = torch.linalg.eigh(matrix if basis is None else basis.mT @ matrix @ basis)
    vector = vectors[..., -1:]
    return values[..., -1], (vector if basis is None else basis @ vector).squeeze(-1)


def _leading_by_squaring(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Return what `_leading` does, of matrices without negative eigenvalues, by operations that every runtime has."""
    power = matrix
    for _ in range(_SQUARINGS):
        power = power / power.amax((1, 2), keepdim=True).clamp(min=torch.finfo(power.dtype).tiny)
        power = power @ power
    column = power.diagonal(dim1=1, dim2=2).argmax(1).reshape(-1, 1, 1)  # any but those of zeros would do
    vector = power.gather(2, column.expand(-1, power.shape[1], 1))
    length = vector.norm(dim=1, keepdim=True)
    vector = vector / torch.where(length > 0, length, 1.0)
    return (vector.mT @ matrix @ vector).flatten(), vector.squeeze(2)


def _krylov_basis(matrix: Tensor) -> Tensor:
    start = gaussian_noise((matrix.shape[-1], 1), matrix, 1, 0).expand(len(matrix), -1, -1)
    basis = torch.zeros_like(matrix[..., :_KRYLOV_STEPS])
    for step in range(_KRYLOV_STEPS):
        ahead = matrix @ (start if step == 0 else basis[..., step - 1 : step])
        length = ahead.norm(dim=1, keepdim=True)
        for _ in range(2):  # rounding leaves a part of what one subtraction should remove
            ahead = ahead - basis @ (basis.mT @ ahead)
        left = ahead.norm(dim=1, keepdim=True)
        known = left <= torch.finfo(matrix.dtype).eps * len(ahead[0]) * length  # the space is complete
        basis[..., step : step + 1] = torch.where(known, 0.0, ahead / torch.where(known, 1.0, left))
    return basis


def _as_maps(projection: Tensor, features: Tensor, finite: Tensor) -> Tensor:
    """Lay out (N, P) as (N, *spatial), in the type of the features."""
    projection = projection.masked_fill(~finite.unsqueeze(1), torch.nan)
    return projection.reshape(features.shape[0], *features.shape[2:]).to(to_float(features).dtype)


def _descend(factor: Tensor, products: Tensor, gram: Tensor) -> Tensor:
    r"""Improve ``factor`` F (R, k) column by column in :math:`\min_{F \ge 0} \|V - F G^T\|^2`.

    Args:
        factor: F
        products: V G, (R, k)
        gram: G^T G, (k, k)
    """
    factor = factor.clone()
    steps = torch.where(gram.diagonal() > 0, 1 / gram.diagonal(), 0.0)
    for j, step in enumerate(steps):
        factor[:, j] = (factor[:, j] + step * (products[:, j] - factor @ gram[:, j])).relu()
    return factor
