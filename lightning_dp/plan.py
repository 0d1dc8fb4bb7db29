"""``lightning-dp plan``: what a budget buys, before anything is trained."""

import math
from pathlib import Path

from lightning_dp.errors import ConfigError
from lightning_dp.privacy.accounting import Accountant, Adjacency, Release, calibrate, epsilon, search_epsilon
from lightning_dp.privacy.mechanism import PrivacyConfig

_ACCOUNTANTS: tuple[Accountant, ...] = ("pld", "prv")
_ADJACENCIES: tuple[Adjacency, ...] = ("add_remove", "replace_one")


def plan(
    num_examples: int,
    expected_batch_size: int,
    steps: int,
    delta: float,
    epsilon: float | None = None,
    noise_multiplier: float | None = None,
    plot: Path | None = Path("runs/plan.png"),
    search_mean: float | None = None,
    search_shape: float = 1.0,
) -> None:
    """Print sigma, epsilon and steps under both adjacencies by both accountants, and plot epsilon over steps.

    Args:
        num_examples: public size of the private role.
        expected_batch_size: expected records per step.
        steps: noisy sums released.
        delta: probability bound, below 1 / num_examples.
        epsilon: target; sigma is calibrated for it.
        noise_multiplier: sigma, if it is given instead of epsilon.
        plot: where to save the plot (png, pdf or svg); null for none.
        search_mean: expected number of runs of a search for hyper-parameters of which only the best is ever shown;
            null for none.
        search_shape: of the distribution of that number: 1 geometric, 0 logarithmic, inf Poisson.

    Raises:
        ConfigError: the numbers contradict each other.
    """
    config = PrivacyConfig(num_examples, expected_batch_size, steps, delta, epsilon, noise_multiplier)
    if noise_multiplier == 0:
        raise ConfigError("--noise_multiplier 0 has no finite epsilon to plan: raise it, or give --epsilon")
    print(
        f"N {num_examples}, expected batch {expected_batch_size} (sample rate {config.sample_rate:.6g}), "
        f"{steps} steps ({steps * config.sample_rate:.1f} epochs), delta {delta:g}\n"
    )
    sigmas = {adjacency: _sigma(config, adjacency) for adjacency in _ADJACENCIES}
    print(sigma_table(config, sigmas))
    print(step_table(config, sigmas["add_remove"]))
    if search_mean is not None:
        print(search_line(config, sigmas["add_remove"], search_mean, search_shape))
    if plot is not None:
        save_plot(config, sigmas, plot)
        print(f"plot of epsilon over steps: {plot}")


def sigma_table(config: PrivacyConfig, sigmas: dict[Adjacency, float]) -> str:
    """Rows (adjacency, sigma, epsilon by each accountant) of the full plan."""
    lines = ["adjacency    sigma     epsilon (pld)  epsilon (prv)"]
    for adjacency, sigma in sigmas.items():
        values = (_epsilon(config, sigma, config.steps, adjacency, accountant) for accountant in _ACCOUNTANTS)
        lines.append(f"{adjacency:<12} {sigma:<9.4f} " + "".join(f"{value:<15.4f}" for value in values))
    return "\n".join(lines) + "\n"


def step_table(config: PrivacyConfig, sigma: float) -> str:
    """Rows (steps, epsilon by accountant and adjacency) at one sigma."""
    lines = [f"at sigma {sigma:.4f}:", "steps     add_remove pld  prv       replace_one pld  prv"]
    for count in sorted({max(1, config.steps * share // 8) for share in (1, 2, 4, 6, 8)}):
        cells = [_epsilon(config, sigma, count, adjacency, name) for adjacency in _ADJACENCIES for name in _ACCOUNTANTS]
        lines.append(f"{count:<9} {cells[0]:<15.4f} {cells[1]:<9.4f} {cells[2]:<16.4f} {cells[3]:<9.4f}")
    return "\n".join(lines) + "\n"


def search_line(config: PrivacyConfig, sigma: float, mean: float, shape: float) -> str:
    """Epsilon of a declared search, and what has to hold for it."""
    one = [Release(sigma, config.sample_rate, config.steps)]
    alone, best = epsilon(one, config.delta, accountant="rdp"), search_epsilon(one, config.delta, mean, shape)
    return (
        f"search: epsilon {best:.4f} for the best of a random number of such runs, {mean:g} on average (shape "
        f"{shape:g}), against {alone:.4f} for one (rdp, add_remove). Draw the number once, before the first run; "
        "choose the settings of each run at random; compare them by public data or the released models; show "
        "nothing of the others.\n"
    )


def save_plot(config: PrivacyConfig, sigmas: dict[Adjacency, float], path: Path) -> None:
    """Epsilon over steps, one curve per adjacency at the sigma planned for it."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    counts = sorted({max(1, round(config.steps * (part / 12) ** 2)) for part in range(1, 13)})
    for adjacency, sigma in sigmas.items():
        curve = [_epsilon(config, sigma, count, adjacency, "pld") for count in counts]
        axes.plot(counts, curve, marker="o", markersize=3, label=f"{adjacency}, sigma {sigma:.3f}")
    axes.set(xlabel="steps", ylabel=f"epsilon at delta {config.delta:g} (pld)", xlim=(0, None), ylim=(0, None))
    axes.set_title(f"N {config.num_examples}, expected batch {config.expected_batch_size}")
    axes.grid(alpha=0.3)
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def _sigma(config: PrivacyConfig, adjacency: Adjacency) -> float:
    if config.noise_multiplier is not None:
        return config.noise_multiplier
    assert config.epsilon is not None
    return calibrate(config.epsilon, config.delta, config.sample_rate, config.steps, adjacency)


def _epsilon(config: PrivacyConfig, sigma: float, steps: int, adjacency: Adjacency, accountant: Accountant) -> float:
    release = Release(sigma, config.sample_rate, steps)
    certified = epsilon([release], config.delta, adjacency)
    if accountant == "pld" or certified > 50:  # prv runs for minutes there
        return certified if accountant == "pld" else math.nan
    return epsilon([release], config.delta, adjacency, accountant)
