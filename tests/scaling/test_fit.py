import numpy as np
import pytest
from scipy import stats

from powertrain.scaling.fit import Law, _Problem, fit_law, fit_parabola, optimum
from powertrain.scaling.isoflop import MinimumInterval, minimum_interval

TRUTH = Law(E=1.5, A=400.0, alpha=0.34, B=410.0, beta=0.28)
# Sizes around the optimum of each budget, as a sweep has them.
N, C = (x.ravel() for x in np.meshgrid(np.geomspace(3e6, 3e8, 6), np.geomspace(1e17, 1e19, 5)))
D = C / (6 * N)


def noisy(seed, deviation=0.004, law=TRUTH):
    return law(N, D) * np.exp(np.random.default_rng(seed).normal(0, deviation, N.size))


def test_a_law_without_noise_is_recovered_exactly():
    fit = fit_law(N, D, TRUTH(N, D), replicates=2)
    np.testing.assert_allclose(fit.law.as_array(), TRUTH.as_array(), rtol=2e-3)
    assert fit.rms_residual < 1e-6
    assert fit.undetermined == ()


def test_gradient_is_that_of_the_objective():
    problem = _Problem(N, D, 1e-3)
    target = np.log(noisy(0))
    theta = np.array([0.4, 0.5, 0.3, 0.7, 0.25])
    _, gradient = problem.objective(theta, target)
    step = 1e-7
    numeric = [
        (problem.objective(theta + step * e, target)[0] - problem.objective(theta - step * e, target)[0]) / (2 * step)
        for e in np.eye(5)
    ]
    np.testing.assert_allclose(gradient, numeric, rtol=1e-5)


def test_the_objective_is_a_sum_of_huber_losses_of_log_loss():
    problem = _Problem(N, D, 1e-3)
    loss = noisy(1)
    log_n, log_d = np.log(N).mean(), np.log(D).mean()
    theta = np.array([np.log(1.5), np.log(400) - 0.34 * log_n, 0.34, np.log(410) - 0.28 * log_d, 0.28])
    residual = np.abs(np.log(TRUTH(N, D)) - np.log(loss))
    huber = np.where(residual <= 1e-3, 0.5 * residual**2, 1e-3 * (residual - 0.5e-3))
    assert problem.objective(theta, np.log(loss))[0] == pytest.approx(huber.sum() / 1e-6)


def test_intervals_cover_the_truth_as_often_as_they_say():
    """Thirty sweeps with known exponents and noise: nominal 90 % intervals must cover within binomial error."""
    trials, confidence = 30, 0.9
    covered = np.zeros(5)
    for seed in range(trials):
        low, high = fit_law(N, D, noisy(seed), replicates=30, seed=seed).interval(confidence)
        truth = TRUTH.as_array()
        covered += (low.as_array() <= truth) & (truth <= high.as_array())
    # What a correct procedure falls below, or exceeds, in one of a thousand tests of this kind.
    fewest, most = stats.binom.ppf([0.0005, 0.9995], trials, confidence)
    assert (covered >= fewest).all(), covered
    assert (covered <= most).all(), covered


def test_one_wild_point_hardly_moves_the_law():
    loss = noisy(3)
    clean = fit_law(N, D, loss, replicates=2).law
    wild = loss.copy()
    wild[7] *= 1.5
    moved = fit_law(N, D, wild, replicates=2).law
    np.testing.assert_allclose(moved(N, D), clean(N, D), rtol=2e-3)


def test_the_best_of_many_starts_is_no_worse_than_any_other():
    problem = _Problem(N, D, 1e-3)
    target = np.log(noisy(4))
    starts = problem.starts(target)
    assert len(starts) == 64
    best = problem.minimise(target, starts)[1]
    every = [problem.minimise(target, [start])[1] for start in starts[::9]]
    assert best <= min(every) + 1e-6


def test_terms_that_the_data_do_not_determine_are_named():
    flat = Law(E=2.0, A=0.0, alpha=0.3, B=410.0, beta=0.28)
    fit = fit_law(N, D, flat(N, D), replicates=2)
    assert {"A", "alpha"} & set(fit.undetermined)


@pytest.mark.parametrize("keep", [slice(0, 9), slice(0, 30, 5)])
def test_too_few_points_are_refused(keep):
    with pytest.raises(ValueError, match="do not determine five parameters"):
        fit_law(N[keep], D[keep], noisy(0)[keep])


def test_shifts_of_the_documents_widen_the_intervals():
    loss = noisy(5, deviation=0.001)
    rng = np.random.default_rng(0)
    shifts = np.broadcast_to(rng.normal(0, 0.02, (60, 1)), (60, N.size))
    narrow, wide = (fit_law(N, D, loss, replicates=60, shifts=s).interval(0.9) for s in (None, shifts))
    assert wide[1].E - wide[0].E > narrow[1].E - narrow[0].E


def test_the_optimum_of_a_law_is_where_calculus_puts_it():
    found = optimum(TRUTH, 1e19, lambda n: 6 * n, 1e6, 1e11)
    # d/dN of A N^-a + B (6 N / C)^b = 0.
    a, b = TRUTH.alpha, TRUTH.beta
    expected = (a * TRUTH.A / (b * TRUTH.B) * (1e19 / 6) ** b) ** (1 / (a + b))
    assert found.parameters == pytest.approx(expected, rel=0.01)
    assert found.tokens == pytest.approx(1e19 / (6 * found.parameters))


def test_a_parabola_finds_its_minimum_and_says_when_it_lies_outside():
    n = np.geomspace(1e6, 1e8, 5)
    inside = fit_parabola(n, 2.0 + 0.05 * (np.log(n) - np.log(7e6)) ** 2)
    assert inside.parameters == pytest.approx(7e6)
    assert inside.loss == pytest.approx(2.0)
    assert not inside.on_edge
    np.testing.assert_allclose(inside(n), 2.0 + 0.05 * (np.log(n) - np.log(7e6)) ** 2)
    outside = fit_parabola(n, 2.0 + 0.05 * (np.log(n) - np.log(2e8)) ** 2)
    assert outside.on_edge
    assert outside.parameters == pytest.approx(2e8)


def test_a_parabola_uses_the_sizes_around_the_lowest():
    n = np.geomspace(1e6, 1e9, 9)
    loss = 2.0 + 0.05 * (np.log(n) - np.log(n[3])) ** 2
    loss[7:] += 5.0
    assert fit_parabola(n, loss).parameters == pytest.approx(n[3])


def test_no_parabola_without_three_sizes_or_a_valley():
    assert fit_parabola(np.array([1e6, 1e7]), np.array([2.0, 1.9])) is None
    assert fit_parabola(np.array([1e6, 1e7, 1e8]), np.array([2.0, 2.5, 2.6])) is None


def test_a_minimum_that_replicates_do_not_bracket_is_bounded_by_the_sizes_measured():
    """Bent upwards; bent downwards; falling, and rising, with a vertex far beyond the sizes."""
    sizes = np.array([1e5, 3e5, 1e6])
    bracketed, concave = [3.02, 3.0, 3.05], [3.0, 3.1, 3.05]
    falling, rising = [3.2, 3.0999, 3.0], [3.0, 3.0999, 3.2]
    assert fit_parabola(sizes, np.array(falling)).parameters > 1e8
    minimum = fit_parabola(sizes, np.array(bracketed)).parameters

    def found(*shares):
        losses = [
            x for x, times in zip((bracketed, concave, falling, rising), shares, strict=True) for _ in range(times)
        ]
        return minimum_interval(sizes, np.array(losses), minimum, 0.9)

    assert found(100, 0, 0, 0) == MinimumInterval(*[minimum, False] * 2, 0.0)
    assert found(90, 0, 10, 0) == MinimumInterval(minimum, False, 1e6, True, 0.1)
    assert found(90, 0, 0, 10) == MinimumInterval(1e5, True, minimum, False, 0.1)
    assert found(90, 10, 0, 0) == MinimumInterval(1e5, True, minimum, False, 0.1), "its lower end is the smallest size"
    assert found(96, 0, 4, 0) == MinimumInterval(minimum, False, minimum, False, 0.04)
