"""The paired t-test of Appendix D, and Holm's correction for making many tests.

Both are a few lines, so that scipy is not needed.
"""

import math

import numpy as np


def t_test(a: list[float], b: list[float]) -> float:
    """Appendix D: p of the paired two-tailed t-test; nan for under two pairs or equal differences.

    Student's distribution is in closed form for n whole degrees of freedom (Abramowitz and Stegun
    26.7.3 and 26.7.4).
    """
    difference = np.subtract(a, b)
    n = len(difference) - 1
    if n < 1 or np.ptp(difference) < 1e-12:
        return math.nan
    t = abs(difference.mean()) / (difference.std(ddof=1) / math.sqrt(n + 1))
    theta = math.atan(t / math.sqrt(n))
    # n odd: cos + 2/3 cos^3 + 2/3 4/5 cos^5 + ...; n even: 1 + 1/2 cos^2 + 1/2 3/4 cos^4 + ...
    term = math.cos(theta) if n % 2 else 1.0
    series = 0.0
    for k in range(n % 2, n, 2):
        series += term
        term *= (k + 1) / (k + 2) * math.cos(theta) ** 2
    inside = math.sin(theta) * series
    if n % 2:
        inside = 2 / math.pi * (theta + inside)
    return max(0.0, 1 - inside)


def holm(p_values: list[float]) -> list[float]:
    """Holm's correction of each p for the number of tests. nan is no test, and stays nan."""
    p = np.array(p_values)
    order = p.argsort()  # nan comes last
    factors = np.count_nonzero(~np.isnan(p)) - np.arange(len(p))
    p[order] = np.maximum.accumulate(p[order] * factors).clip(max=1)
    return p.tolist()
