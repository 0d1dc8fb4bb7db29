"""Membership scores from a target model and reference models; higher always means "more likely a member".

Pure functions on NumPy arrays. n records are under attack; k reference models were trained on random parts of the same
pool, and ``inside[j, i]`` says whether record i was in part j. Formulas are those of the papers as recalled, checked
against public code where the method's specification says so.
"""

import numpy as np
from scipy import stats
from scipy.special import log_softmax
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

# From so many reference models on, a record's own variance is better than that of all records together.
_OWN_VARIANCE = 64


def log_odds(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Log p - log(1 - p) of each record's label: (..., n) of logits (..., n, classes), in float64.

    Example:
        >>> log_odds(np.array([[100.0, 0.0, 0.0]]), np.array([0])).round(3).tolist()
        [99.307]
    """
    exact = np.asarray(logits, dtype=np.float64)
    rows = np.arange(len(labels))
    own = exact[..., rows, labels].copy()
    others = exact.copy()
    others[..., rows, labels] = -np.inf
    top = others.max(-1)
    return np.asarray(own - top - np.log(np.exp(others - top[..., None]).sum(-1)))


def lira(target: np.ndarray, references: np.ndarray, inside: np.ndarray, online: bool) -> np.ndarray:
    """Likelihood ratio attack (Carlini et al. 2022), mean over queries.

    Online: log density of the target's score under the models with the record, minus that under those without.
    Offline: log probability of a smaller score under those without; one-sided, a record that is fitted worse than by
    models without it is no member.

    Args:
        target: `log_odds` of the target model, (queries, n).
        references: the same of the reference models, (k, queries, n).
        inside: (k, n).
        online: as above.

    Raises:
        ValueError: a record has fewer than two reference models on a side that is needed.
    """
    here = np.broadcast_to(inside[:, None, :], references.shape)
    low, low_spread = _normal(references, ~here)
    outside = stats.norm.logcdf(target, low, low_spread)
    if not online:
        return np.asarray(outside.mean(0))
    high, high_spread = _normal(references, here)
    ratio = stats.norm.logpdf(target, high, high_spread) - stats.norm.logpdf(target, low, low_spread)
    return np.asarray(ratio.mean(0))


def _normal(references: np.ndarray, chosen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of the chosen models' scores, each (queries, n)."""
    counts = chosen.sum(0)
    if counts.min() < 2:
        raise ValueError("a record needs two reference models on each side: train more of them")
    mean = np.where(chosen, references, 0).sum(0) / counts
    squares = np.where(chosen, (references - mean) ** 2, 0)
    if len(references) < _OWN_VARIANCE:
        spread = np.full_like(mean, np.sqrt(squares.sum() / (counts - 1).sum()))
    else:
        spread = np.sqrt(squares.sum(0) / (counts - 1))
    return mean, np.maximum(spread, 1e-12)


def rmia(
    target: np.ndarray,
    references: np.ndarray,
    inside: np.ndarray,
    population: np.ndarray,
    online: bool,
    a: float = 0.3,
    gamma: float = 1.0,
) -> np.ndarray:
    """Robust membership inference attack (Zarifzadeh et al. 2024): how many population records a record beats.

    A record beats another if its probability under the target, over that under models in general, is ``gamma`` times
    the other's. In general: the mean of those with and without it (online), or a line through those without (offline).

    Args:
        target: probability of each record's label under the target, (n,).
        references: the same under the reference models, (k, n).
        inside: (k, n).
        population: records, among the n, that the target was not trained on; their numbers.
        online: as above.
        a: slope of the line.
        gamma: as above.

    Raises:
        ValueError: a record has no reference model without it, or (online) none with it.
    """
    without = _mean_where(references, ~inside)
    with_it = _mean_where(references, inside) if online else a * without + 1 - a
    general = (with_it + without) / 2
    ratio = target / np.maximum(general, 1e-300)
    others = np.sort(ratio[population])
    return np.asarray(np.searchsorted(others, ratio / gamma, side="right") / len(others))


def _mean_where(values: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    counts = chosen.sum(0)
    if counts.min() < 1:
        raise ValueError("a record needs a reference model without it, and one with it if online: train more of them")
    return np.asarray(np.where(chosen, values, 0).sum(0) / counts)


def population_threshold(scores: np.ndarray, population: np.ndarray, fpr: float) -> np.ndarray:
    """Attack-P (Ye et al. 2022): whether each score (n,) is above all but a share ``fpr`` of a population's."""
    return np.asarray(scores > np.quantile(population, 1 - fpr, method="higher"))


def shadow(target: np.ndarray, references: np.ndarray, inside: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Shadow models (Shokri et al. 2017): a classifier for each class tells outputs on members from others.

    The reference models are the shadows; the classifier is a logistic regression on sorted log probabilities and the
    label's own.

    Args:
        target: logits of the target model, (n, classes).
        references: logits of the reference models, (k, n, classes).
        inside: (k, n).
        labels: (n,).
    """
    scores = np.zeros(len(labels))
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label)
        seen = _features(references[:, rows].reshape(-1, references.shape[-1]), int(label))
        truth = inside[:, rows].reshape(-1)
        if truth.min() == truth.max():
            continue
        model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=200)).fit(seen, truth)
        scores[rows] = model.decision_function(_features(target[rows], int(label)))
    return scores


def _features(logits: np.ndarray, label: int) -> np.ndarray:
    logs = np.maximum(log_softmax(np.asarray(logits, dtype=np.float64), axis=1), -50.0)
    return np.concatenate([np.sort(logs, axis=1)[:, ::-1][:, :3], logs[:, label : label + 1]], axis=1)
