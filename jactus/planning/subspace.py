"""Steps 2 and 3: the union of weight and task directions on each side, and the best core inside it.

With damped covariances G = L_G L_Gᵀ and A = L_A L_Aᵀ, the loss of a change ΔW is ½‖L_Gᵀ ΔW L_A‖²_F: the metric. The
truncated SVD of L_Gᵀ W L_A = P Σ Qᵀ is the best low-rank weight in it, and gives *weight directions* U = L_G⁻ᵀ P,
V = L_A⁻ᵀ Q that are orthonormal in the metric (UᵀGU = I, VᵀAV = I). *Task directions* join them (the union); made
orthonormal in the metric against the weight directions kept, they leave the closed-form core

    C = (UᵀGU)⁻¹ (UᵀGWAV) (VᵀAV)⁻¹ = UᵀGWAV = diag(σ) ⊕ C_task,

block-diagonal because the two kinds are orthogonal (where one side keeps more weight directions than the other, what it has
beyond the other's meets its task directions as well). Everything a core needs beyond the directions themselves is small
Gram matrices, so once these are known any rank costs one product, and neither W nor the covariances are needed again.
"""

import logging
from dataclasses import dataclass

import torch
from torch import Tensor

from jactus_kernels import JactusError

from ..model.lowrank import core_shape

logger = logging.getLogger("jactus")
# A direction whose remainder outside the others is below this part of its length is not counted as new. A saved plan
# keeps directions in float32, which resolves such a remainder to 2⁻²⁴ / 1e-3, four digits.
INDEPENDENT = 1e-3


# Singular values below this part of the largest have too few digits left in squares (2⁻⁵² / 1e-12, four) to build on.
RESOLVED = 1e-6
# A direction that the weight shortens below this part of the longest is rounding: the weight has not so much rank.
SOLID = 1e-12
NO_SIGNAL = "the covariance is zero (no signal reached this layer in calibration); exclude the layer"


def metric(covariance: Tensor | None, damping: float, device: torch.device) -> Tensor | None:
    """S + λ·mean(diag S)·I in float64 on `device`, for S (d, d); None stands for the identity.

    Raises JactusError for a covariance that is zero everywhere, which defines no metric at any damping.
    """
    if covariance is None:
        return None
    S = covariance.to(device, torch.float64, copy=True)
    scale = S.diagonal().mean()
    if not scale > 0:
        raise JactusError(NO_SIGNAL)
    S.diagonal().add_(damping * scale)
    return S


@dataclass(frozen=True)
class Seen:
    """A damped metric of a layer's longer side, of which only this is known: S, as the weight sees it, and δ.

    covariance: W A Wᵀ (m, m), or Wᵀ G W (n, n) of a layer with more outputs, undamped, float64; scale: mean diag A or G;
    damping: λ, so that δ = λ·scale.
    """

    covariance: Tensor
    scale: float
    damping: float


def seen(covariance: Tensor, scale: float, damping: float, device: torch.device) -> Seen:
    """As `metric`, of a covariance that is known as the weight sees it."""
    if not scale > 0:
        raise JactusError(NO_SIGNAL)
    return Seen(covariance.to(device, torch.float64), scale, damping)


PARTS = ("weight", "task", "cross", "gram")


def eigh(S: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues, rising, and eigenvectors of a symmetric S (d, d) that is positive but for rounding.

    Where the solver of its device fails, the CPU's tries, and then singular vectors, which another algorithm finds. Raises
    torch.linalg.LinAlgError where none of them converges.
    """
    for device in dict.fromkeys((S.device, torch.device("cpu"))):
        try:
            values, vectors = torch.linalg.eigh(S.to(device))
            return values.to(S.device), vectors.to(S.device)
        except torch.linalg.LinAlgError as e:
            logger.warning("the eigenvalues of a matrix of %d rows did not converge on %s (%s)", len(S), device, e)
    vectors, values, _ = torch.linalg.svd(S.cpu())
    return values.flip(0).to(S.device), vectors.flip(1).to(S.device)


@dataclass
class Side:
    """The candidate directions of one side, ordered by value, with their inner products in the metric.

    weight: (d, K), orthonormal in the metric; task: (d, t), of unit length in it;
    cross: (K, t) inner products of the two; gram: (t, t) of the task directions.
    """

    weight: Tensor
    task: Tensor
    cross: Tensor
    gram: Tensor

    def remainder(self, kept: int, limit: int | None = None) -> Tensor:
        """E (limit, t'): combinations of the first `limit` task directions (None: all) whose part outside the first `kept`
        weight directions is orthonormal in the metric; rank-revealing, strongest first."""
        cross = self.cross[:kept, :limit]
        left_over = self.gram[:limit, :limit] - cross.T @ cross
        values, vectors = eigh(left_over)
        values, vectors = values.flip(0), vectors.flip(1)
        fresh = values > INDEPENDENT**2
        return vectors[:, fresh] / values[fresh].sqrt()

    def split(self, size: int, tasks: int) -> tuple[int, Tensor]:
        """How many of `size` directions are weight directions, and the combinations E of task directions that are the rest:
        `tasks` of them, or as many as are independent."""
        while True:
            E = self.remainder(size - tasks, tasks)
            if E.shape[1] == tasks:
                return size - tasks, E
            tasks = E.shape[1]

    def basis(self, kept: int, E: Tensor) -> Tensor:
        """The first `kept` weight directions and the combinations E of task directions, orthonormal in the metric."""
        weight = self.weight[:, :kept]
        t = E.shape[0]
        return torch.cat([weight, (self.task[:, :t] - weight @ self.cross[:kept, :t]) @ E], dim=1)


@dataclass
class Directions:
    """All that is needed to make a layer's factors with up to K directions a side.

    left: (m, ·) and right: (n, ·) candidates; sigma: all min(m, n) singular values of the weight in the metric;
    task_core: (t, t) task_leftᵀ G W A task_right. All float64 when made.
    """

    left: Side
    right: Side
    sigma: Tensor
    task_core: Tensor

    def factors(
        self, rank: int, share: float, task_first: bool = False, width: int | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """U (m, p), C (p, q), V (n, q) in float64, bases orthonormal in the metric.

        p and q are the rank; with a `width` the side with fewer rows has that many instead. ⌊share·rank⌋ task directions
        are asked for a side, and none at full rank; where fewer are independent, weight directions fill that side up. They come
        after the weight directions, or before them with `task_first`.
        """
        m, n = self.left.weight.shape[0], self.right.weight.shape[0]
        tasks = 0 if rank == min(m, n) else min(task_rank(rank, share), self.task_core.shape[0])
        wide = rank if width is None else width
        left, right = self.to64(self.left), self.to64(self.right)
        p, q = core_shape(m, n, rank, wide)
        if wide > self.kept:
            raise JactusError(f"{wide} directions a side were asked for, but only {self.kept} were kept; plan again")
        (k_left, E_left), (k_right, E_right) = (side.split(size, tasks) for side, size in ((left, p), (right, q)))
        t_left, t_right, k = len(E_left), len(E_right), max(k_left, k_right)
        cross_left, cross_right = left.cross[:k, :t_left], right.cross[:k, :t_right]
        sigma = self.sigma.double()[:k, None]
        core = left.weight.new_zeros(p, q)
        core.diagonal()[: min(k_left, k_right)] = sigma[: min(k_left, k_right), 0]
        # weight directions that one side has and the other has not meet the other's task directions
        core[k_right:k_left, k_right:] = (sigma * cross_right)[k_right:k_left] @ E_right
        core[k_left:, k_left:k_right] = ((sigma * cross_left)[k_left:k_right] @ E_left).T
        inner = self.task_core.double()[:t_left, :t_right] - cross_left.T @ (sigma * cross_right)
        core[k_left:, k_right:] = E_left.T @ inner @ E_right
        U, V = left.basis(k_left, E_left), right.basis(k_right, E_right)
        if task_first:
            U, V = U.roll(p - k_left, 1), V.roll(q - k_right, 1)
            core = core.roll((p - k_left, q - k_right), (0, 1))
        return U, core, V

    @property
    def kept(self) -> int:
        """K: the weight directions of each side."""
        return self.left.weight.shape[1]

    @staticmethod
    def to64(side: Side) -> Side:
        return Side(side.weight.double(), side.task.double(), side.cross.double(), side.gram.double())


def task_rank(rank: int, share: float) -> int:
    """How many of a layer's `rank` directions a side go to the task."""
    return int(share * rank + 1e-9)


def directions(
    W: Tensor,
    G: Tensor | Seen | None,
    A: Tensor | Seen | None,
    keep: int,
    tasks: int,
    output_covariance: Tensor | None = None,
    input_covariance: Tensor | None = None,
    gradient: Tensor | None = None,
) -> Directions:
    """The candidates of a layer with weight W (m, n), in the metrics G (m, m) and A (n, n): damped, float64, or None.

    Without task directions the metric of the longer side may be `Seen`; what the formulas need of it is the same.
    keep: how many weight directions; tasks: how many task directions, drawn in turn from the sources given: leading
    eigenvectors of the (undamped) covariances, leading singular vectors of the mean gradient (m, n).

    Only the smaller side is factored. With G = L Lᵀ and N = Lᵀ W, the squares and left vectors of M = N A^½ are those of
    N A Nᵀ (m, m), and the right directions NᵀP Σ⁻¹ come without a root of A: a third of the time of whitening on both
    sides and an SVD of M.
    """
    if W.shape[0] > W.shape[1]:
        D = None if gradient is None else gradient.T
        other = directions(W.T, A, G, keep, tasks, input_covariance, output_covariance, D)
        return Directions(other.right, other.left, other.sigma, other.task_core.T)
    assert not isinstance(G, Seen)
    W = W.double()
    L = None if G is None else torch.linalg.cholesky(G)
    N = W if L is None else L.T @ W
    if isinstance(A, Seen):
        assert not tasks
        return _seen_directions(N, L, A, keep)
    NA = N if A is None else N @ A
    squares, P = eigh(NA @ N.T)
    sigma, P = squares.flip(0).clamp_min(0).sqrt(), P.flip(1)[:, :keep]
    V, AV, sigma[:keep] = _right_directions(N, NA, A, P, sigma)
    left_sources, right_sources = [], []
    if tasks and output_covariance is not None and input_covariance is not None:
        left_sources.append(_leading_eigenvectors(output_covariance.to(W.device), tasks))
        right_sources.append(_leading_eigenvectors(input_covariance.to(W.device), tasks))
    if tasks and gradient is not None:
        d_left, d_right = _leading_singular_vectors(gradient.to(W.device), tasks)
        left_sources.append(d_left)
        right_sources.append(d_right)
    left, right = _in_turn(left_sources, tasks, W[:, :0]), _in_turn(right_sources, tasks, W.T[:, :0])
    count = min(left.shape[1], right.shape[1])
    left, right = left[:, :count], right[:, :count]
    inside = left if L is None else L.T @ left
    left, inside = _unit(left, inside.square().sum(0), inside)
    across = right if A is None else A @ right
    right, across = _unit(right, (right * across).sum(0), across)
    return Directions(
        Side(P if L is None else _solve_t(L, P), left, P.T @ inside, inside.T @ inside),
        Side(V, right, AV.T @ right, right.T @ across),
        sigma,
        inside.T @ N @ across,
    )


def _seen_directions(N: Tensor, L: Tensor | None, A: Seen, keep: int) -> Directions:
    """`directions` of N = LᵀW (m, n) where only S = W A Wᵀ and the mean diagonal of A are known.

    The squares and left vectors are those of Lᵀ S L + δ N Nᵀ, and the right directions NᵀP Σ⁻¹ need no A. A σ is the length of
    its direction in the metric, pᵀLᵀSLp + δ|Nᵀp|²: the second term has the digits that are lost in squares.
    """
    S = A.covariance if L is None else L.T @ A.covariance @ L
    delta = A.damping * A.scale
    squares, P = eigh(S + delta * N @ N.T)
    sigma, P = squares.flip(0).clamp_min(0).sqrt(), P.flip(1)[:, :keep]
    V = N.T @ P
    short = V.norm(dim=0)
    solid = short > SOLID * short.max().clamp_min(torch.finfo(V.dtype).tiny) if keep else short > 0
    length = ((P * (S @ P)).sum(0).clamp_min(0) + delta * short.square()).sqrt()
    sigma[:keep] = length * solid
    V.div_(length.where(solid, torch.ones_like(length)))  # in place: V is as large as the weight
    if not bool(solid.all()):
        V[:, ~solid] = _beside(V[:, solid], int((~solid).sum())) / (A.scale * (1 + A.damping)) ** 0.5
    nothing = N.new_zeros(0, 0)

    def side(weight: Tensor) -> Side:
        return Side(weight, weight[:, :0], N.new_zeros(keep, 0), nothing)

    return Directions(side(P if L is None else _solve_t(L, P)), side(V), sigma, nothing)


def _beside(V: Tensor, count: int) -> Tensor:
    """Orthonormal columns (n, count) outside the span of V (n, k), the same at every call."""
    Q = torch.linalg.qr(V)[0]
    generator = torch.Generator(V.device).manual_seed(0)
    X = torch.randn(len(V), count, generator=generator, dtype=V.dtype, device=V.device)
    for _ in range(2):
        X = torch.linalg.qr(X - Q @ (Q.T @ X))[0]
    return X


def _right_directions(
    N: Tensor, NA: Tensor, A: Tensor | None, P: Tensor, sigma: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """V (n, K) = NᵀP Σ⁻¹, orthonormal in the metric A to rounding; A V; and the first K σ with the digits lost in squares.

    Where some σ are not resolved, L with A = L Lᵀ is made after all: an orthonormal basis of LᵀNᵀP is defined even then.
    """
    K = P.shape[1]
    V, AV = N.T @ P, NA.T @ P
    if K and not sigma[K - 1] > RESOLVED * sigma[0]:  # nor are any of a weight that is zero
        L = None if A is None else torch.linalg.cholesky(A)
        Q, R = torch.linalg.qr(V if L is None else L.T @ V)
        Q = Q * torch.where(R.diagonal() < 0, -1.0, 1.0)
        V, AV = (Q, Q) if L is None else (_solve_t(L, Q), L @ Q)
        return V, AV, R.diagonal().abs()
    length = (V * AV).sum(0).sqrt()
    V, AV = V.div_(length), AV.div_(length)
    R = torch.linalg.cholesky(V.T @ AV).T  # the identity, but for the rounding that small σ magnify
    V, AV = (torch.linalg.solve_triangular(R, X, upper=True, left=False) for X in (V, AV))
    return V, AV, length * R.diagonal()


def _unit(X: Tensor, squares: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
    """Columns of X and of the others divided by the roots of `squares`, the squared lengths of X's in the metric."""
    length = squares.sqrt().clamp_min(torch.finfo(X.dtype).tiny)
    return tuple(Y / length for Y in (X, *others))


def _solve_t(L: Tensor, X: Tensor) -> Tensor:
    """L⁻ᵀ X."""
    return torch.linalg.solve_triangular(L.T, X, upper=True)


def _in_turn(sources: list[Tensor], count: int, nothing: Tensor) -> Tensor:
    """Columns of the sources dealt one from each in turn, `count` at most."""
    if not sources or count == 0:
        return nothing
    longest = max(s.shape[1] for s in sources)
    columns = [s[:, i] for i in range(longest) for s in sources if i < s.shape[1]]
    if not columns:
        return nothing
    return torch.stack(columns[:count], dim=1)


def _leading_eigenvectors(S: Tensor, count: int) -> Tensor:
    return eigh(S.double())[1].flip(1)[:, :count]


def _leading_singular_vectors(D: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Left (m, ≤ count) and right (n, ≤ count), float64, without the directions in which D has nothing.

    A few of many come from a randomised subspace (fixed seed, four passes): these are only candidates, and it takes a
    tenth of the time.
    """
    if 4 * count < min(D.shape):
        D = D.float()
        generator = torch.Generator(D.device).manual_seed(0)  # of its own: nobody else's random numbers change
        start = torch.randn(D.shape[1], count + min(count, 16), generator=generator, device=D.device)
        Q = torch.linalg.qr(D @ start)[0]
        for _ in range(4):
            Q = torch.linalg.qr(D @ torch.linalg.qr(D.T @ Q)[0])[0]
        left, lengths, right_t = torch.linalg.svd(Q.T @ D, full_matrices=False)
        left = Q @ left
    else:
        left, lengths, right_t = torch.linalg.svd(D.double(), full_matrices=False)
    right = right_t.T
    solid = lengths[:count] > 1e-6 * lengths.max().clamp_min(torch.finfo(lengths.dtype).tiny)
    return left[:, :count][:, solid].double(), right[:, :count][:, solid].double()
