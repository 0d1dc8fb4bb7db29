"""Whether a running mechanism does what its ledger says: statistics of the noise that was added and of who was drawn.

Pure accumulators; `callbacks.Conformance` feeds them. A check fails at a probability below `LEVEL`, so that ten
thousand looks at a right mechanism raise a false alarm once in a hundred thousand runs.
"""

import math

import numpy as np
from scipy import stats

LEVEL = 1e-9
# Expected coincidences, and looks, below which the approximations of the draw's tests are not used.
_COINCIDENCES = 50
_LOOKS = 20
_HEAD = 256  # values of each noise vector that are kept
_SHORTEST = 128
_ALIKE = 0.75  # correlation of two noise vectors from which on one is called a repetition


class NoiseStatistics:
    """Noise vectors of a run, each divided by its accounted standard deviation."""

    def __init__(self) -> None:
        self._squares, self._values = 0.0, 0
        self._heads, self._kept = np.zeros((64, _HEAD), dtype=np.float32), 0
        self._products, self._pairs = 0.0, 0

    def add(self, noise: np.ndarray) -> str | None:
        """Take a noise vector (values,) in units of its standard deviation; what is wrong with it, if anything."""
        self._squares += float(np.square(noise, dtype=np.float64).sum())
        self._values += noise.size
        if noise.size < _SHORTEST:
            return self._scale()
        head = np.zeros(_HEAD, dtype=np.float32)  # a shorter one ends in zeros
        head[: noise.size] = noise[:_HEAD]
        found = self._scale() or self._repeat(head, min(_HEAD, noise.size))
        if self._kept == len(self._heads):
            self._heads = np.concatenate([self._heads, np.zeros_like(self._heads)])
        self._heads[self._kept] = head
        self._kept += 1
        return found

    def _scale(self) -> str | None:
        below = stats.chi2.cdf(self._squares, self._values)
        p = 2 * min(below, stats.chi2.sf(self._squares, self._values))
        if p >= LEVEL:
            return None
        ratio = math.sqrt(self._squares / self._values)
        return f"the noise has {ratio:.4f} times its accounted standard deviation (chi-square, p = {p:.2g})"

    def _repeat(self, head: np.ndarray, size: int) -> str | None:
        """A noise vector of before, or correlation with the last one over all pairs so far, within 7 deviations."""
        if not self._kept:
            return None
        alike = self._heads[: self._kept] @ head / size
        place = int(np.abs(alike).argmax())
        if abs(alike[place]) >= _ALIKE:
            back = self._kept - place
            return f"the noise repeats that of {back} releases ago (correlation {alike[place]:.2f}), so it cancels"
        self._products += float(alike[-1]) * size
        self._pairs += size
        away = self._products / math.sqrt(self._pairs)
        if self._pairs < 2 * _HEAD or abs(away) < 7:
            return None
        return (
            f"the noise depends on that of the release before (correlation {self._products / self._pairs:.2f}, "
            f"{away:+.1f} standard deviations)"
        )


class DrawStatistics:
    """Batches of a run, against independent draws of every record at one rate.

    Args:
        num_records: records to draw from.
        sample_rate: accounted probability per record and batch.
    """

    def __init__(self, num_records: int, sample_rate: float) -> None:
        self._records, self._rate = num_records, sample_rate
        self._counts = np.zeros(num_records, dtype=np.int64)
        self._looks, self._pairs, self._dispersion, self._total = 0, 0, 0.0, 0

    def add(self, drawn: np.ndarray) -> str | None:
        """Take the indices of a whole batch (n,); what is wrong with it or with all so far, if anything."""
        if len(np.unique(drawn)) < len(drawn):
            return "a record is in a batch twice, so it moves the sum by more than the clip norm"
        rate, mean = self._rate, self._records * self._rate
        # every earlier batch with the record makes a pair with this one
        self._pairs += int(self._counts[drawn].sum())
        self._counts[drawn] += 1
        self._looks += 1
        self._total += len(drawn)
        if rate == 1:
            return None if len(drawn) == self._records else "a full batch lacks records"
        self._dispersion += (len(drawn) - mean) ** 2 / (mean * (1 - rate))
        return self._rate_of_draws() or self._spread_of_sizes() or self._repeats()

    def _rate_of_draws(self) -> str | None:
        trials = self._records * self._looks
        p = 2 * min(
            stats.binom.cdf(self._total, trials, self._rate), stats.binom.sf(self._total - 1, trials, self._rate)
        )
        if p >= LEVEL:
            return None
        return f"records are drawn at the rate {self._total / trials:.4g}, not {self._rate:.4g} (p = {p:.2g})"

    def _spread_of_sizes(self) -> str | None:
        if self._looks < _LOOKS or self._records * self._rate * (1 - self._rate) < _LOOKS:
            return None
        p = 2 * min(stats.chi2.cdf(self._dispersion, self._looks), stats.chi2.sf(self._dispersion, self._looks))
        if p >= LEVEL:
            return None
        ratio = self._dispersion / self._looks
        return f"batch sizes vary {ratio:.2g} times as much as Poisson batches do (p = {p:.2g}): shuffled batches?"

    def _repeats(self) -> str | None:
        """Records that were drawn in two batches: as many pairs as independence gives, within 7 deviations."""
        looks, rate = self._looks, self._rate
        expected = self._records * looks * (looks - 1) / 2 * rate**2
        if expected < _COINCIDENCES:
            return None
        # pairs of a record's c = Binomial(looks, rate) batches: c (c - 1) / 2, with factorial moments of the binomial
        second, third, fourth = (math.perm(looks, k) * rate**k for k in (2, 3, 4))
        variance = self._records * ((fourth + 4 * third + 2 * second) / 4 - (second / 2) ** 2)
        away = (self._pairs - expected) / math.sqrt(variance)
        if abs(away) < 7:
            return None
        return (
            f"records come back in later batches {self._pairs / expected:.2g} times as often as independent draws do "
            f"({away:+.1f} standard deviations): shuffled batches?"
        )
