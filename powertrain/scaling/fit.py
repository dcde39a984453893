"""Fits of loss against size and data: the parametric scaling law, and parabolas along equal FLOPs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

# Start values of both exponents: from far below to far above published ones (0.28 to 0.37). For each pair, E, A and B
# follow from non-negative least squares, so that 64 starts cover what a grid over all five parameters would.
START_EXPONENTS = (0.05, 0.1, 0.2, 0.3, 0.4, 0.55, 0.75, 1.0)
# The most promising of these, from which the search descends; on smooth laws nearly all reach the same minimum.
DESCENTS = 16
# An exponent that ends here was not determined by the data.
MAX_EXPONENT = 3.0
# Stands for a coefficient of zero in the logarithm.
SMALLEST_LOG = -30.0
# Five parameters, and at least as many points again before an interval means anything.
MIN_POINTS = 10


@dataclass(frozen=True)
class Law:
    """L(N, D) = E + A / N^alpha + B / D^beta, in nats per token (Hoffmann et al. 2022, arXiv:2203.15556, eq. 2)."""

    E: float
    A: float
    alpha: float
    B: float
    beta: float

    def __call__(self, parameters: Array | float, tokens: Array | float) -> Array:
        """Return the loss at `parameters` and `tokens`, broadcast against each other."""
        n, d = np.asarray(parameters, dtype=np.float64), np.asarray(tokens, dtype=np.float64)
        return self.E + self.A * n**-self.alpha + self.B * d**-self.beta

    def as_array(self) -> Array:
        """Return (E, A, alpha, B, beta)."""
        return np.array([self.E, self.A, self.alpha, self.B, self.beta])


class _Problem:
    """The log-Huber objective in centred coordinates, where the parameters hardly correlate."""

    def __init__(self, parameters: Array, tokens: Array, delta: float) -> None:
        log_n, log_d = np.log(parameters), np.log(tokens)
        self.centre_n, self.centre_d = float(log_n.mean()), float(log_d.mean())
        self.n, self.d = log_n - self.centre_n, log_d - self.centre_d
        self.delta = delta

    def objective(self, theta: Array, target: Array) -> tuple[float, Array]:
        """Return the *sum* over points of Huber(log L - target) / delta^2, and its gradient.

        A mean, with an optimizer's default tolerance, ends before the minimum: that is what biased the published fit of
        Hoffmann et al. 2022 (Besiroglu et al. 2024, arXiv:2404.10102, appendix A).
        """
        logs = np.stack([np.full_like(self.n, theta[0]), theta[1] - theta[2] * self.n, theta[3] - theta[4] * self.d])
        top = logs.max(axis=0)
        weights = np.exp(logs - top)
        total = weights.sum(axis=0)
        weights /= total
        residual = (top + np.log(total) - target) / self.delta
        size = np.abs(residual)
        value = float(np.where(size <= 1.0, 0.5 * residual**2, size - 0.5).sum())
        slope = np.clip(residual, -1.0, 1.0) / self.delta
        gradient = np.stack([weights[0], weights[1], -self.n * weights[1], weights[2], -self.d * weights[2]]) @ slope
        return value, gradient

    def starts(self, target: Array) -> list[Array]:
        """Return one start per pair of exponents."""
        from scipy.optimize import nnls

        loss = np.exp(target)
        starts = []
        for alpha in START_EXPONENTS:
            for beta in START_EXPONENTS:
                basis = np.stack([np.ones_like(self.n), np.exp(-alpha * self.n), np.exp(-beta * self.d)], axis=1)
                coefficients, _ = nnls(basis / loss[:, None], np.ones_like(loss))
                e, a, b = np.log(np.maximum(coefficients, np.exp(SMALLEST_LOG)))
                starts.append(np.array([e, a, alpha, b, beta]))
        return starts

    def minimise(self, target: Array, starts: list[Array]) -> tuple[Array, float]:
        """Return the best minimum over all starts, and its objective."""
        from scipy.optimize import minimize

        bounds = [(SMALLEST_LOG, None), (SMALLEST_LOG, None), (0.0, MAX_EXPONENT)]
        bounds += [(SMALLEST_LOG, None), (0.0, MAX_EXPONENT)]
        best: tuple[Array, float] | None = None
        for start in sorted(starts, key=lambda s: self.objective(s, target)[0])[:DESCENTS]:
            result = minimize(
                self.objective,
                start,
                args=(target,),
                jac=True,
                method="L-BFGS-B",
                bounds=bounds,
                # Far below rounding of the objective: the search ends at the minimum, not before it.
                options={"ftol": 1e-14, "gtol": 1e-8, "maxiter": 5000, "maxfun": 20000, "maxcor": 20},
            )
            if best is None or result.fun < best[1]:
                best = (result.x, float(result.fun))
        assert best is not None
        return best

    def law(self, theta: Array) -> Law:
        """Return the law in its usual coordinates."""
        e, a, alpha, b, beta = (float(x) for x in theta)
        return Law(
            E=float(np.exp(e)),
            A=float(np.exp(a + alpha * self.centre_n)),
            alpha=alpha,
            B=float(np.exp(b + beta * self.centre_d)),
            beta=beta,
        )


@dataclass(frozen=True)
class LawFit:
    """A fitted law, its bootstrap and how well it fits."""

    law: Law
    replicates: Array  # (R, 5): E, A, alpha, B, beta
    points: int
    objective: float  # sum of Huber(log residual) / delta^2
    rms_residual: float  # of log loss
    undetermined: tuple[str, ...]  # terms that the data do not determine: they ended on a bound

    def interval(self, confidence: float) -> tuple[Law, Law]:
        """Return the lower and upper percentile of each parameter."""
        tail = (1.0 - confidence) / 2.0
        low, high = np.quantile(self.replicates, [tail, 1.0 - tail], axis=0)
        return Law(*(float(x) for x in low)), Law(*(float(x) for x in high))


def fit_law(
    parameters: Array,
    tokens: Array,
    loss: Array,
    *,
    delta: float = 1e-3,
    replicates: int = 200,
    shifts: Array | None = None,
    seed: int = 0,
) -> LawFit:
    """Fit the parametric law by log-Huber regression from many starts, and bootstrap it.

    Args:
        parameters: (P,) model sizes; at least two distinct.
        tokens: (P,) training tokens.
        loss: (P,) nats per token.
        delta: where the Huber loss turns linear, in log loss.
        replicates: R, bootstrap fits. A replicate adds resampled, centred residuals, scaled by sqrt(P / (P - 5)) for
            the fitted parameters, so that it holds what the seeds and the law's own misfit contribute.
        shifts: (R, P) changes of log loss under resampled evaluation documents, added to the replicates; None: none.
        seed: of the bootstrap.
    Returns:
        The fit.
    Errors:
        ValueError: fewer than ten points, or fewer than three sizes or amounts of data.
    """
    parameters, tokens, loss = (np.asarray(x, dtype=np.float64) for x in (parameters, tokens, loss))
    points = loss.size
    sizes, amounts = np.unique(parameters).size, np.unique(tokens).size
    if points < MIN_POINTS or sizes < 3 or amounts < 3:
        raise ValueError(
            f"{points} points of {sizes} sizes and {amounts} amounts of data do not determine five parameters: "
            f"at least {MIN_POINTS} points, 3 sizes and 3 amounts are needed"
        )
    problem = _Problem(parameters, tokens, delta)
    target = np.log(loss)
    theta, objective = problem.minimise(target, problem.starts(target))
    law = problem.law(theta)
    fitted = np.log(law(parameters, tokens))
    residuals = target - fitted
    spread = (residuals - residuals.mean()) * np.sqrt(points / (points - theta.size))
    rng = np.random.default_rng(seed)
    drawn = np.empty((replicates, theta.size))
    for r in range(replicates):
        noise = rng.choice(spread, size=points)
        replicate = fitted + noise + (0.0 if shifts is None else shifts[r])
        drawn[r] = problem.law(problem.minimise(replicate, [theta])[0]).as_array()
    # On a bound a term has vanished or turned into a constant: the data do not tell it from the others.
    coefficients = {"E": theta[0], "A": theta[1], "B": theta[3]}
    undetermined = [name for name, log in coefficients.items() if log <= SMALLEST_LOG + 0.01]
    exponents = {"alpha": law.alpha, "beta": law.beta}
    undetermined += [name for name, value in exponents.items() if not 1e-6 < value < MAX_EXPONENT - 1e-6]
    return LawFit(law, drawn, points, objective, float(np.sqrt(np.mean(residuals**2))), tuple(undetermined))


@dataclass(frozen=True)
class Optimum:
    """The compute-optimal point of a law at one budget."""

    parameters: float
    tokens: float
    loss: float


def optimum(law: Law, budget: float, flops_per_token: Callable[[Array], Array], low: float, high: float) -> Optimum:
    """Return where a law is lowest at a budget, between two sizes.

    Args:
        budget: training FLOPs.
        flops_per_token: training FLOPs per token, as a function of the parameters.
        low, high: range of parameters searched; the law says nothing beyond the sizes it was fitted on.
    """
    # A thousand points put the optimum within 0.5 % over a ladder of two decades, where the loss is flat to 1e-6.
    parameters = np.geomspace(low, high, 1000)
    tokens = budget / flops_per_token(parameters)
    losses = law(parameters, tokens)
    best = int(np.argmin(losses))
    return Optimum(float(parameters[best]), float(tokens[best]), float(losses[best]))


@dataclass(frozen=True)
class Parabola:
    """Loss at equal FLOPs as a parabola in log parameters: loss + curvature * (log N - log parameters)^2."""

    parameters: float  # at the minimum
    loss: float  # at the minimum
    curvature: float
    on_edge: bool  # the minimum is outside the sizes that were fitted: not a measured minimum
    fitted: tuple[float, ...]  # sizes used

    def __call__(self, parameters: Array | float) -> Array:
        """Return the loss at `parameters`."""
        x = np.log(np.asarray(parameters, dtype=np.float64)) - np.log(self.parameters)
        return self.loss + self.curvature * x**2


def fit_parabola(parameters: Array, loss: Array, reach: int = 2) -> Parabola | None:
    """Fit a parabola in log parameters through the sizes around the lowest loss.

    Args:
        parameters: (P,) distinct model sizes at one budget.
        loss: (P,) nats per token.
        reach: sizes used on each side of the lowest; further away the valley is no parabola and would move its minimum.
    Returns:
        The parabola; None for fewer than three sizes, or where the curve does not bend upwards.
    """
    order = np.argsort(parameters, kind="stable")
    parameters, loss = np.asarray(parameters, dtype=np.float64)[order], np.asarray(loss, dtype=np.float64)[order]
    best = int(np.argmin(loss))
    # At an end of the ladder the window keeps its length, towards the inside.
    first = max(0, min(best - reach, parameters.size - 2 * reach - 1))
    parameters, loss = parameters[first : first + 2 * reach + 1], loss[first : first + 2 * reach + 1]
    if parameters.size < 3:
        return None
    log_n = np.log(parameters)
    centre = log_n.mean()
    a, b, c = np.polyfit(log_n - centre, loss, 2)
    if a <= 0:
        return None
    vertex = -b / (2 * a)
    at = vertex + centre
    return Parabola(
        parameters=float(np.exp(at)),
        loss=float(c - b**2 / (4 * a)),
        curvature=float(a),
        on_edge=not log_n[0] < at < log_n[-1],
        fitted=tuple(float(x) for x in parameters),
    )
