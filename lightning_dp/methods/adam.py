"""DP-AdamBC: Adam whose second moment is corrected for the variance of the noise.

Tang, Shpilevskiy and Lecuyer 2023, "DP-AdamBC: Your DP-Adam Is Actually DP-SGD (Unless You Apply Bias Correction)",
arXiv 2312.14334 (update rule recalled, not read).
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


class DPAdamBC(Optimizer):
    """Adam on noisy gradients: the known noise variance is taken out of the second moment.

    The step is ``lr * m / sqrt(max(v - noise_std^2, floor))`` with m and v the bias-corrected moments.
    ``noise_std``, the standard deviation of the noise in each value of the gradient, is public; private methods write
    it into the parameter groups. With ``noise_std`` 0 and a small ``floor`` this is Adam.

    Args:
        params: parameters to train.
        lr: step size.
        betas: decay of the first and second moment.
        floor: least corrected second moment, in squared gradient units; below about ``noise_std^2 / 100`` the steps
            become erratic.
        noise_std: see above; set by the method.

    Raises:
        ValueError: a value is out of range.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        floor: float = 5e-8,
        noise_std: float = 0.0,
    ) -> None:
        if lr < 0 or floor <= 0 or not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"DPAdamBC: need lr >= 0, floor > 0, betas in [0, 1); got {lr}, {floor}, {betas}")
        super().__init__(params, {"lr": lr, "betas": betas, "floor": floor, "noise_std": noise_std})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update; returns what ``closure`` returns."""
        result = None if closure is None else closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad, group)
        return result

    def _update(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state["step"] = 0
            state["first"], state["second"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        state["step"] += 1
        beta1, beta2 = group["betas"]
        state["first"].lerp_(gradient, 1 - beta1)
        state["second"].lerp_(gradient.square(), 1 - beta2)
        first = state["first"] / (1 - beta1 ** state["step"])
        second = state["second"] / (1 - beta2 ** state["step"]) - group["noise_std"] ** 2
        parameter.add_(first / second.clamp(min=group["floor"]).sqrt(), alpha=-group["lr"])
