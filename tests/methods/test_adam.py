import pytest
import torch

from lightning_dp.methods import DPAdamBC


def steps(optimizer, parameter, gradients):
    for gradient in gradients:
        parameter.grad = gradient.clone()
        optimizer.step()
    return parameter.detach().clone()


def test_without_noise_it_is_adam():
    gradients = torch.randn(20, 5, generator=torch.Generator().manual_seed(0))
    ours, theirs = torch.nn.Parameter(torch.zeros(5)), torch.nn.Parameter(torch.zeros(5))
    first = steps(DPAdamBC([ours], lr=0.1, floor=1e-20), ours, gradients)
    second = steps(torch.optim.Adam([theirs], lr=0.1, eps=0.0), theirs, gradients)
    torch.testing.assert_close(first, second, rtol=1e-5, atol=1e-6)


def test_the_step_is_the_papers():
    """One step by hand: m = g, v = g^2 after bias correction; step lr m / sqrt(v - s^2)."""
    parameter = torch.nn.Parameter(torch.zeros(2))
    moved = steps(DPAdamBC([parameter], lr=0.1, noise_std=0.3), parameter, [torch.tensor([0.5, -1.0])])
    expected = -0.1 * torch.tensor([0.5 / (0.25 - 0.09) ** 0.5, -1.0 / (1.0 - 0.09) ** 0.5])
    torch.testing.assert_close(moved, expected)


def test_the_floor_bounds_the_step_where_noise_is_all_there_is():
    parameter = torch.nn.Parameter(torch.zeros(1))
    moved = steps(DPAdamBC([parameter], lr=0.1, noise_std=1.0, floor=0.04), parameter, [torch.tensor([0.5])])
    torch.testing.assert_close(moved, torch.tensor([-0.1 * 0.5 / 0.2]))


def test_its_state_can_be_saved_and_loaded():
    gradients = torch.randn(6, 3, generator=torch.Generator().manual_seed(0))
    whole = torch.nn.Parameter(torch.zeros(3))
    expected = steps(DPAdamBC([whole], noise_std=0.1), whole, gradients)
    parameter = torch.nn.Parameter(torch.zeros(3))
    first = DPAdamBC([parameter], noise_std=0.1)
    steps(first, parameter, gradients[:3])
    second = DPAdamBC([parameter])
    second.load_state_dict(first.state_dict())
    torch.testing.assert_close(steps(second, parameter, gradients[3:]), expected)


@pytest.mark.parametrize("wrong", [{"lr": -1.0}, {"floor": 0.0}, {"betas": (1.0, 0.9)}])
def test_impossible_settings_are_refused(wrong):
    with pytest.raises(ValueError, match="DPAdamBC"):
        DPAdamBC([torch.nn.Parameter(torch.zeros(1))], **wrong)
