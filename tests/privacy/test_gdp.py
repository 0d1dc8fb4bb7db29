import math

import pytest

from lightning_dp.privacy import gdp


@pytest.mark.parametrize(("epsilon", "mu"), [(1, 0.26805), (2, 0.50155), (3, 0.71912), (8, 1.66603)])
def test_mu_is_the_tabled_one_and_comes_back(epsilon, mu):
    assert gdp.mu_of(epsilon, 1e-5) == pytest.approx(mu, rel=1e-4)
    assert gdp.epsilon_of(mu, 1e-5) == pytest.approx(epsilon, rel=1e-4)


def test_delta_of_a_gaussian():
    """At epsilon 0 it is the total variation of two normals at distance mu: 2 Phi(mu / 2) - 1."""
    assert gdp.delta_of_mu(1.0, 0.0) == pytest.approx(math.erf(0.5 / math.sqrt(2)), rel=1e-9)
