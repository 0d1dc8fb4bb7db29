import numpy as np
import pytest
import torch
from scipy.stats import kstest

from lightning_dp.errors import ConfigError
from lightning_dp.privacy import noise
from lightning_dp.privacy.mechanism import Mechanism, PrivacyConfig
from lightning_dp.privacy.randomness import Randomness

SIZE = 200_000


def mechanism(secure=False, seed=3):
    return Mechanism(PrivacyConfig(1000, 10, 5, 1e-5, noise_multiplier=1.3, max_norm=0.7, seed=seed, secure=secure))


def released_noise(step, secure=False, seed=3):
    """What release() really adds: the release of a zero sum, without the divisor."""
    zeros = {"a": torch.zeros(SIZE // 2), "b": torch.zeros(2, SIZE // 4)}
    mean = mechanism(secure, seed).release(zeros, step)
    return torch.cat([mean["a"], mean["b"].flatten()]).numpy() * 10


@pytest.mark.parametrize("secure", [False, True])
def test_noise_is_normal_at_sigma_times_max_norm_and_at_nothing_near(secure):
    drawn, std = released_noise(0, secure), 1.3 * 0.7
    assert kstest(drawn, "norm", args=(0, std)).pvalue > 1e-3
    for wrong in (0.97, 1.03):
        assert kstest(drawn, "norm", args=(0, std * wrong)).pvalue < 1e-3


def test_noise_is_float32_and_uncorrelated():
    drawn = noise.gaussian(SIZE, 1.0, Randomness.from_seed(0).numpy("noise", 0))
    assert drawn.dtype == torch.float32
    assert abs(np.corrcoef(drawn[1:], drawn[:-1])[0, 1]) < 4 / np.sqrt(SIZE)


@pytest.mark.parametrize("secure", [False, True])
def test_noise_is_fresh_at_every_step_and_in_every_run(secure):
    assert not np.array_equal(released_noise(0, secure), released_noise(1, secure))
    assert not np.array_equal(released_noise(0, secure, seed=None), released_noise(0, secure, seed=None))
    assert np.array_equal(released_noise(0, secure), released_noise(0, secure))


def test_noise_does_not_follow_the_global_seed():
    torch.manual_seed(0)
    first = released_noise(0, seed=None)
    torch.manual_seed(0)
    assert not np.array_equal(first, released_noise(0, seed=None))


def test_only_rank_zero_draws_noise():
    zeros = {"a": torch.zeros(10)}
    assert torch.equal(mechanism().release(zeros, 0, rank=1)["a"], zeros["a"])
    assert not torch.equal(mechanism().release(zeros, 0, rank=0)["a"], zeros["a"])


def test_noise_on_a_device_has_the_same_law():
    """The CUDA path, on a generator of the CPU."""
    drawn = noise.gaussian_on(SIZE, 0.91, torch.Generator().manual_seed(0)).numpy()
    assert kstest(drawn, "norm", args=(0, 0.91)).pvalue > 1e-3
    for wrong in (0.97, 1.03):
        assert kstest(drawn, "norm", args=(0, 0.91 * wrong)).pvalue < 1e-3


def test_streams_use_more_than_32_bits_of_the_key():
    """PyTorch's CPU generator does not, which is why it is not used."""
    low, high = Randomness((5).to_bytes(32, "little")), Randomness((5 + 2**32).to_bytes(32, "little"))
    assert low.numpy("noise", 0).random() != high.numpy("noise", 0).random()


def test_purposes_have_streams_of_their_own():
    randomness = Randomness.from_seed(0)
    assert randomness.numpy("noise", 0).random() != randomness.numpy("sampling", 0).random()


def test_a_key_is_never_shown():
    randomness = Randomness.from_seed(None)
    assert randomness.key.hex() not in repr(randomness)
    assert str(randomness.key) not in repr(randomness)


def test_secure_noise_without_randomgen_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "randomgen", None)
    with pytest.raises(ConfigError, match=r"lightning_dp\[secure\]"):
        released_noise(0, secure=True)


def test_the_card_tells_a_seeded_run_from_a_real_one():
    assert "NOT FOR RELEASE" in Randomness.from_seed(1).describe()
    assert "NOT FOR RELEASE" not in Randomness.from_seed(None).describe()
    assert "ChaCha20" in Randomness.from_seed(None, secure=True).describe()
