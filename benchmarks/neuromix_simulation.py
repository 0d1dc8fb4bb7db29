"""How the degree of a mixture trades signal for noise: the linear model of the NeuroMix paper (its Figure 11).

    python -m benchmarks.neuromix_simulation [--output runs/neuromix_simulation.png]

n = 300 records of a linear model with 10 features, T = 3 n Poisson mixtures of m expected records, noise by the
paper's Theorem 3.1 for mu-GDP. Shown is the error of least squares on the mixtures, over m, for several mu; theory puts
the best m at 0.505 mu n / sqrt(T).
"""

import argparse
import math
from pathlib import Path

import matplotlib as mpl
import numpy as np

mpl.use("Agg")
import matplotlib.pyplot as plt

from lightning_dp.privacy.sampling import poisson_draws

RECORDS, FEATURES, OUTPUTS = 300, 10, 900
DEGREES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
MUS = (1.0, 2.0, 5.0, 10.0, 20.0)


def error(degree: int, mu: float, generator: np.random.Generator) -> float:
    """Squared distance of the estimated coefficients from the true ones, over their squared length."""
    x = generator.standard_normal((RECORDS, FEATURES))
    x /= np.maximum(1, np.linalg.norm(x, axis=1, keepdims=True))
    truth = generator.standard_normal(FEATURES)
    truth /= np.linalg.norm(truth)
    y = np.clip(x @ truth + 0.05 * generator.standard_normal(RECORDS), -1, 1)
    noise = math.sqrt(2 / math.log1p((mu * RECORDS / degree) ** 2 / OUTPUTS))
    indices, starts = poisson_draws(RECORDS, degree / RECORDS, OUTPUTS, generator)
    mixed = np.zeros((OUTPUTS, FEATURES + 1))
    rows = np.repeat(np.arange(OUTPUTS), np.diff(starts, append=len(indices)))
    np.add.at(mixed, rows, np.column_stack([x, y])[indices])
    mixed = (mixed + noise * generator.standard_normal(mixed.shape)) / degree
    found = np.linalg.lstsq(mixed[:, :-1], mixed[:, -1], rcond=None)[0]
    return float(np.square(found - truth).sum())


def main() -> None:
    """Measure, print and draw."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.neuromix_simulation")
    parser.add_argument("--output", type=Path, default=Path("runs/neuromix_simulation.png"))
    parser.add_argument("--repeats", type=int, default=40)
    arguments = parser.parse_args()
    figure, axes = plt.subplots(figsize=(6, 4))
    print("mu      best m by theory, found   error by m " + " ".join(map(str, DEGREES)))
    for mu in MUS:
        generator = np.random.default_rng(0)
        means = [float(np.mean([error(degree, mu, generator) for _ in range(arguments.repeats)])) for degree in DEGREES]
        theory = 0.505 * mu * RECORDS / math.sqrt(OUTPUTS)
        found = DEGREES[int(np.argmin(means))]
        print(f"{mu:<8g}{theory:12.1f}{found:11d}   " + " ".join(f"{value:.3f}" for value in means))
        (line,) = axes.plot(DEGREES, means, marker="o", label=f"mu = {mu:g}")
        axes.axvline(theory, color=line.get_color(), linestyle=":", linewidth=1)
    axes.set(xscale="log", yscale="log", xlabel="degree m", ylabel="squared error over squared length")
    axes.set_title(f"Least squares on {OUTPUTS} mixtures of {RECORDS} records; dotted: best m by theory", fontsize=9)
    axes.legend()
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(arguments.output, dpi=120, bbox_inches="tight")
    print(arguments.output)


if __name__ == "__main__":
    main()
