"""Steps 2 and 3: the union of weight and task directions on each side, and the best core inside it.

With damped covariances G = L_G L_Gᵀ and A = L_A L_Aᵀ, the loss of a change ΔW is ½‖L_Gᵀ ΔW L_A‖²_F: the metric. The
truncated SVD of L_Gᵀ W L_A = P Σ Qᵀ is the best low-rank weight in it, and gives *weight directions* U = L_G⁻ᵀ P,
V = L_A⁻ᵀ Q that are orthonormal in the metric (UᵀGU = I, VᵀAV = I). *Task directions* join them (the union); made
orthonormal in the metric against the weight directions kept, they leave the closed-form core

    C = (UᵀGU)⁻¹ (UᵀGWAV) (VᵀAV)⁻¹ = UᵀGWAV = diag(σ) ⊕ C_task,

block-diagonal because the two kinds are orthogonal. Everything a core needs beyond the directions themselves is small
Gram matrices, so once these are known any rank costs one product, and neither W nor the covariances are needed again.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from jactus_kernels import JactusError

# A direction whose remainder outside the others is below this part of its length is not counted as new. A saved plan
# keeps directions in float32, which resolves such a remainder to 2⁻²⁴ / 1e-3, four digits.
INDEPENDENT = 1e-3


def metric_factor(covariance: Tensor | None, damping: float, size: int, device: torch.device) -> Tensor | None:
    """L (size, size) float64, lower, with L Lᵀ = S + λ·mean(diag S)·I; None stands for the identity.

    Raises JactusError for a covariance that is zero everywhere, which defines no metric at any damping.
    """
    if covariance is None:
        return None
    S = covariance.to(device, torch.float64)
    scale = S.diagonal().mean()
    if not scale > 0:
        raise JactusError("the covariance is zero (no signal reached this layer in calibration); exclude the layer")
    S = S + damping * scale * torch.eye(size, dtype=S.dtype, device=device)
    return torch.linalg.cholesky(S)


def apply_t(L: Tensor | None, X: Tensor) -> Tensor:
    """Lᵀ X."""
    return X if L is None else L.T @ X


def solve_t(L: Tensor | None, X: Tensor) -> Tensor:
    """L⁻ᵀ X."""
    return X if L is None else torch.linalg.solve_triangular(L.T, X, upper=True)


PARTS = ("weight", "task", "cross", "gram")


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

    def remainder(self, kept: int, limit: int) -> Tensor:
        """E (t', ≤ limit): combinations of the first `limit` task directions whose part outside the first `kept` weight
        directions is orthonormal in the metric; rank-revealing, strongest first."""
        cross = self.cross[:kept, :limit]
        left_over = self.gram[:limit, :limit] - cross.T @ cross
        values, vectors = torch.linalg.eigh(left_over)
        values, vectors = values.flip(0), vectors.flip(1)
        fresh = values > INDEPENDENT**2
        return vectors[:, fresh] / values[fresh].sqrt()

    def basis(self, kept: int, E: Tensor) -> Tensor:
        """The first `kept` weight directions and the combinations E of task directions, orthonormal in the metric."""
        weight = self.weight[:, :kept]
        t = E.shape[0]
        return torch.cat([weight, (self.task[:, :t] - weight @ self.cross[:kept, :t]) @ E], dim=1)


@dataclass
class Directions:
    """All that is needed to make a layer's factors at any rank up to K.

    left: (m, ·) and right: (n, ·) candidates; sigma: all min(m, n) singular values of the weight in the metric;
    task_core: (t, t) task_leftᵀ G W A task_right. All float64 when made.
    """

    left: Side
    right: Side
    sigma: Tensor
    task_core: Tensor

    def factors(self, rank: int, share: float, task_first: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """U (m, rank), C (rank, rank), V (n, rank) in float64, bases orthonormal in the metric.

        ⌊share·rank⌋ task directions are asked for a side; where fewer are independent, weight directions fill up. They
        come after the weight directions, or before them with `task_first`.
        """
        K = self.left.weight.shape[1]
        tasks = min(task_rank(rank, share), self.task_core.shape[0])
        if rank > K:
            raise JactusError(f"rank {rank} was asked for, but only {K} weight directions were kept; plan again")
        left, right = self.to64(self.left), self.to64(self.right)
        while True:
            kept = rank - tasks
            E_left, E_right = left.remainder(kept, tasks), right.remainder(kept, tasks)
            found = min(E_left.shape[1], E_right.shape[1])
            if found == tasks:
                break
            tasks = found
        E_left, E_right = E_left[:, :found], E_right[:, :found]
        sigma = self.sigma.double()
        inner = self.task_core.double()[:tasks, :tasks] - left.cross[:kept, :tasks].T @ (
            sigma[:kept, None] * right.cross[:kept, :tasks]
        )
        core = torch.block_diag(sigma[:kept].diag(), E_left.T @ inner @ E_right)
        U, V = left.basis(kept, E_left), right.basis(kept, E_right)
        if task_first:
            U, V, core = U.roll(tasks, 1), V.roll(tasks, 1), core.roll((tasks, tasks), (0, 1))
        return U, core, V

    @staticmethod
    def to64(side: Side) -> Side:
        return Side(side.weight.double(), side.task.double(), side.cross.double(), side.gram.double())


def task_rank(rank: int, share: float) -> int:
    """How many of a layer's `rank` directions a side go to the task."""
    return int(share * rank + 1e-9)


def directions(
    W: Tensor,
    L_G: Tensor | None,
    L_A: Tensor | None,
    keep: int,
    tasks: int,
    output_covariance: Tensor | None = None,
    input_covariance: Tensor | None = None,
    gradient: Tensor | None = None,
) -> Directions:
    """The candidates of a layer with weight W (m, n), in the metric of the factors L_G (m, m), L_A (n, n).

    keep: how many weight directions; tasks: how many task directions, drawn in turn from the sources given: leading
    eigenvectors of the (undamped) covariances, leading singular vectors of the mean gradient (m, n).
    """
    W = W.double()
    M = apply_t(L_G, W) if L_A is None else apply_t(L_G, W) @ L_A
    P, sigma, Qt = torch.linalg.svd(M, full_matrices=False)
    keep = min(keep, len(sigma))
    u, v = solve_t(L_G, P[:, :keep]), solve_t(L_A, Qt[:keep].T)
    left_sources, right_sources = [], []
    if tasks and output_covariance is not None and input_covariance is not None:
        left_sources.append(_leading_eigenvectors(output_covariance.to(W.device), tasks))
        right_sources.append(_leading_eigenvectors(input_covariance.to(W.device), tasks))
    if tasks and gradient is not None:
        d_left, d_right = _leading_singular_vectors(gradient.to(W.device), tasks)
        left_sources.append(d_left)
        right_sources.append(d_right)
    left, task_left = _side(u, P[:, :keep], _in_turn(left_sources, tasks, W[:, :0]), L_G)
    right, task_right = _side(v, Qt[:keep].T, _in_turn(right_sources, tasks, W.T[:, :0]), L_A)
    count = min(left.task.shape[1], right.task.shape[1])
    return Directions(left, right, sigma, (task_left.T @ M @ task_right)[:count, :count])


def _side(weight: Tensor, whitened: Tensor, task: Tensor, L: Tensor | None) -> tuple[Side, Tensor]:
    inside = apply_t(L, task)
    length = inside.norm(dim=0).clamp_min(torch.finfo(inside.dtype).tiny)
    inside, task = inside / length, task / length
    return Side(weight, task, whitened.T @ inside, inside.T @ inside), inside


def _in_turn(sources: list[Tensor], count: int, nothing: Tensor) -> Tensor:
    """Columns of the sources dealt one from each in turn, `count` at most."""
    if not sources or count == 0:
        return nothing
    longest = max(s.shape[1] for s in sources)
    columns = [s[:, i] for i in range(longest) for s in sources if i < s.shape[1]]
    return torch.stack(columns[:count], dim=1)


def _leading_eigenvectors(S: Tensor, count: int) -> Tensor:
    return torch.linalg.eigh(S.double())[1].flip(1)[:, :count]


def _leading_singular_vectors(D: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """By the eigenvectors of the smaller Gram matrix: a third of the time of an SVD, and these are only candidates."""
    D = D.double()
    if D.shape[0] > D.shape[1]:
        right, left = _leading_singular_vectors(D.T, count)
        return left, right
    left = torch.linalg.eigh(D @ D.T)[1]
    left = left.flip(1)[:, :count]
    right = D.T @ left
    lengths = right.norm(dim=0)
    solid = lengths > 1e-7 * lengths.max().clamp_min(torch.finfo(D.dtype).tiny)
    return left[:, solid], right[:, solid] / lengths[solid]


def change_coordinates(
    U: Tensor, C: Tensor, V: Tensor, whiten: bool, extra_left: float, extra_right: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The same product U C Vᵀ in other coordinates of the core.

    U and V come orthonormal in the metric. whiten=True whitens them again in the metric plus `extra_left`·I on the left
    and `extra_right`·I on the right, then scales each to unit mean column norm; whiten=False makes their columns
    orthonormal. C takes up the difference. Our choice: with whitened bases plain Adam on C is preconditioned.
    """
    R, S = _new_frame(U, whiten, extra_left), _new_frame(V, whiten, extra_right)
    U = torch.linalg.solve_triangular(R, U, upper=True, left=False)
    V = torch.linalg.solve_triangular(S, V, upper=True, left=False)
    C = R @ C @ S.T
    if whiten:
        u, v = U.norm(dim=0).mean(), V.norm(dim=0).mean()
        U, C, V = U / u, C * (u * v), V / v
    return U, C, V


def _new_frame(B: Tensor, whiten: bool, extra: float) -> Tensor:
    """Upper triangular R with B R⁻¹ orthonormal, in the metric plus `extra` or in the plain inner product.

    Triangular, so that the leading directions stay leading.
    """
    if whiten:
        eye = torch.eye(B.shape[1], dtype=B.dtype, device=B.device)
        return torch.linalg.cholesky(eye + extra * (B.T @ B)).T
    return torch.linalg.qr(B)[1]
