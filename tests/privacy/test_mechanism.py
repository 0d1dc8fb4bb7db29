import dataclasses
import json

import pytest
import torch

from lightning_dp.errors import ConfigError
from lightning_dp.privacy.accounting import Release, epsilon
from lightning_dp.privacy.ledger import read
from lightning_dp.privacy.mechanism import BudgetExceededError, Mechanism, PrivacyConfig

CONFIG = PrivacyConfig(num_examples=1000, expected_batch_size=100, steps=5, delta=1e-5, epsilon=2.0, seed=0)


def release(mechanism, step=0, value=0.0):
    return mechanism.release({"w": torch.full((3,), value)}, step)["w"]


def test_a_release_is_the_noisy_sum_over_the_expected_batch_size():
    quiet = dataclasses.replace(CONFIG, epsilon=None, noise_multiplier=0.0)
    torch.testing.assert_close(release(Mechanism(quiet), value=50.0), torch.full((3,), 0.5))


def test_each_release_is_in_the_ledger_and_on_disk(tmp_path):
    mechanism = Mechanism(CONFIG)
    mechanism.ledger.open(tmp_path)
    for count in range(1, 4):
        release(mechanism, count)
        assert mechanism.ledger.releases == (Release(mechanism.noise_multiplier, 0.1, count),)
        assert read(mechanism.ledger.path)[1] == mechanism.ledger.releases
    mechanism.ledger.close()


def test_it_is_recorded_before_anything_leaves(tmp_path):
    """A crash between recording and releasing may over-count, never under-count."""
    mechanism = Mechanism(CONFIG)

    def crash(flat):
        assert len(mechanism.ledger) == 1
        raise RuntimeError("the process dies here")

    with pytest.raises(RuntimeError, match="dies here"):
        mechanism.release({"w": torch.zeros(3)}, 0, reduce=crash)
    assert len(mechanism.ledger) == 1


def test_the_budget_holds_without_any_trainer():
    mechanism = Mechanism(CONFIG)
    assert mechanism.releases_left == 5
    for step in range(5):
        release(mechanism, step)
    assert 0.995 * 2.0 <= mechanism.epsilon() <= 2.0
    with pytest.raises(BudgetExceededError, match="spent after 5"):
        release(mechanism, 5)
    assert len(mechanism.ledger) == 5


def test_a_step_is_released_once():
    """The same address would give the same noise, and the difference of two releases the exact difference of sums."""
    mechanism = Mechanism(CONFIG)
    release(mechanism, 3)
    for step in (3, 2):
        with pytest.raises(ConfigError, match=f"step {step} was released before"):
            release(mechanism, step)
    assert len(mechanism.ledger) == 1
    mechanism.renew_randomness()
    release(mechanism, 0)


@pytest.mark.parametrize("accountant", ["pld", "prv"])
def test_the_budget_holds_under_replace_one(accountant):
    config = dataclasses.replace(CONFIG, adjacency="replace_one", accountant=accountant)
    mechanism = Mechanism(config)
    for step in range(5):
        release(mechanism, step)
    expected = epsilon([Release(mechanism.noise_multiplier, 0.1, 5)], 1e-5, "replace_one", accountant)
    assert mechanism.epsilon() == expected
    assert 0.99 * 2.0 <= expected <= 2.0
    assert mechanism.releases_left == 0
    assert mechanism.noise_multiplier > Mechanism(CONFIG).noise_multiplier


def test_where_the_noise_came_from_is_never_forgotten():
    """A run that began under a fixed seed stays marked, however it goes on."""
    state = Mechanism(CONFIG).state_dict()
    resumed = Mechanism(dataclasses.replace(CONFIG, seed=None, secure=True), state)
    assert "NOT FOR RELEASE" in resumed.rng_history[0]
    assert "ChaCha20" in resumed.rng_history[1]
    assert resumed.state_dict()["rng_history"] == resumed.rng_history


def test_given_sigma_stops_where_epsilon_is_reached():
    config = dataclasses.replace(CONFIG, noise_multiplier=1.0, steps=500)
    mechanism = Mechanism(config)
    left = mechanism.releases_left
    assert epsilon([Release(1.0, 0.1, left)], 1e-5) <= 2.0 < epsilon([Release(1.0, 0.1, left + 1)], 1e-5)


def test_a_budget_below_one_step_is_refused():
    with pytest.raises(ConfigError, match="below one step"):
        Mechanism(dataclasses.replace(CONFIG, noise_multiplier=0.3, epsilon=0.1))


def test_a_continued_run_keeps_sigma_and_counts_on():
    first = Mechanism(CONFIG)
    release(first)
    state = json.loads(json.dumps(first.state_dict()))
    second = Mechanism(CONFIG, state)
    assert second.noise_multiplier == first.noise_multiplier
    assert (len(second.ledger), second.releases_left) == (1, 4)


def test_more_steps_than_the_budget_covers_are_refused_on_resume():
    first = Mechanism(CONFIG)
    release(first)
    longer = Mechanism(dataclasses.replace(CONFIG, steps=10), first.state_dict())
    with pytest.raises(ConfigError, match=r"privacy.steps 10 would exceed the budget"):
        longer.planned_releases(done=1)
    richer = Mechanism(dataclasses.replace(CONFIG, steps=10, epsilon=4.0), first.state_dict())
    assert richer.planned_releases(done=1) == 9


def test_lost_releases_shorten_the_plan():
    first = Mechanism(CONFIG)
    for step in range(3):
        release(first, step)
    assert Mechanism(CONFIG, first.state_dict()).planned_releases(done=1) == 2


@pytest.mark.parametrize(
    ("field", "value"),
    [("num_examples", 999), ("expected_batch_size", 99), ("max_norm", 2.0), ("clipping", "automatic"),
     ("adjacency", "replace_one"), ("delta", 2e-5)],
)  # fmt: skip
def test_a_run_cannot_go_on_as_another_mechanism(field, value):
    state = Mechanism(CONFIG).state_dict()
    with pytest.raises(ConfigError, match=f"privacy.{field}"):
        Mechanism(dataclasses.replace(CONFIG, **{field: value}), state)


def test_another_sigma_is_refused_on_resume():
    state = Mechanism(CONFIG).state_dict()
    with pytest.raises(ConfigError, match=r"privacy\.noise_multiplier"):
        Mechanism(dataclasses.replace(CONFIG, noise_multiplier=9.0), state)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"delta": 1e-3}, r"privacy.delta 0.001 must lie .* below 1 / num_examples"),
        ({"delta": 0.0}, "privacy.delta"),
        ({"delta": 1e-10}, "set privacy.accountant to rdp"),
        ({"expected_batch_size": 1001}, r"expected_batch_size 1001 exceeds privacy.num_examples 1000"),
        ({"steps": 0}, "at least 1"),
        ({"epsilon": None}, "no privacy budget"),
        ({"epsilon": -1.0}, "privacy.epsilon -1"),
        ({"epsilon": float("nan")}, "privacy.epsilon"),
        ({"noise_multiplier": -1.0}, "privacy.noise_multiplier"),
        ({"max_norm": 0.0}, "privacy.max_norm"),
        ({"max_norm": 1e-26}, "privacy.max_norm"),
        ({"max_norm": float("inf"), "noise_multiplier": 1.0}, "privacy.max_norm is infinite"),
        ({"max_norm": float("inf")}, "privacy.max_norm is infinite"),
        ({"max_norm": float("inf"), "noise_multiplier": 0.0, "clipping": "automatic"}, "finite with"),
    ],
)
def test_contradictions_are_refused_in_one_line(changes, message):
    with pytest.raises(ConfigError, match=message) as error:
        dataclasses.replace(CONFIG, **changes)
    assert "\n" not in str(error.value)


def test_rdp_allows_a_small_delta():
    config = dataclasses.replace(CONFIG, delta=1e-11, accountant="rdp")
    assert Mechanism(config).releases_left == 5


def test_the_summary_never_shows_epsilon_alone():
    summary = Mechanism(CONFIG).summary()
    assert all(word in summary for word in ("delta 1e-05", "add_remove one image", "accountant pld"))


def test_the_state_holds_no_randomness():
    mechanism = Mechanism(dataclasses.replace(CONFIG, seed=None))
    assert mechanism.randomness.key.hex() not in json.dumps(mechanism.state_dict())
    assert str(mechanism.randomness.key) not in json.dumps(mechanism.state_dict())


PLAN = [Release(0.0, 0.2, 4, "class 0"), Release(0.0, 0.2, 3, "class 1")]


def test_a_planned_mechanism_releases_its_plan_and_nothing_else(tmp_path):
    mechanism = Mechanism(CONFIG, plan=PLAN)
    mechanism.ledger.open(tmp_path)
    sigma = mechanism.noise_multiplier
    total = {"w": torch.zeros(2, 3)}
    block = [Release(sigma, 0.2, 2, "class 0"), Release(sigma, 0.2, 2, "class 1")]
    noisy = mechanism.release(total, 0, draws=block)["w"]
    assert noisy.shape == (2, 3)
    assert noisy.unique().numel() == 6
    assert mechanism.releases_left == 3
    for wrong in (
        [Release(sigma, 0.2, 3, "class 0")],  # more than is left of the class
        [Release(sigma, 0.1, 1, "class 0")],  # another rate
        [Release(sigma, 0.2, 1, "class 2")],  # another class
        [Release(sigma, 0.2, 1)],  # all records
        None,
    ):
        with pytest.raises(BudgetExceededError):
            mechanism.release(total, 1, draws=wrong)
    assert mechanism.ledger.releases == read(mechanism.ledger.path)[1]
    mechanism.release(total, 1, draws=[Release(sigma, 0.2, 2, "class 0"), Release(sigma, 0.2, 1, "class 1")])
    assert mechanism.releases_left == 0
    assert 1.9 < mechanism.epsilon() <= 2.0
    mechanism.ledger.close()


def test_several_sums_at_once_are_counted_each_and_stay_within_the_budget():
    mechanism = Mechanism(CONFIG)
    entry = Release(mechanism.noise_multiplier, 0.1, 4)
    mechanism.release({"w": torch.zeros(4, 3)}, 0, draws=[entry])
    assert mechanism.releases_left == 1
    for wrong in ([dataclasses.replace(entry, count=2)], [dataclasses.replace(entry, count=1, sample_rate=0.01)]):
        with pytest.raises(BudgetExceededError):
            mechanism.release({"w": torch.zeros(2, 3)}, 1, draws=wrong)
    assert mechanism.releases_left == 1


def test_a_plan_that_a_given_sigma_takes_across_the_target_is_refused():
    planned = Mechanism(CONFIG, plan=PLAN)
    given = dataclasses.replace(CONFIG, noise_multiplier=planned.noise_multiplier)
    assert Mechanism(given, plan=PLAN).epsilon() == 0
    loud = dataclasses.replace(CONFIG, noise_multiplier=0.8 * planned.noise_multiplier)
    with pytest.raises(ConfigError, match=r"above privacy\.epsilon 2"):
        Mechanism(loud, plan=PLAN)


def test_sums_at_another_noise_multiplier_are_refused():
    mechanism = Mechanism(CONFIG)
    with pytest.raises(ValueError, match="noise multiplier"):
        mechanism.release({"w": torch.zeros(3)}, 0, draws=[Release(2 * mechanism.noise_multiplier, 0.1, 1)])
    assert len(mechanism.ledger) == 0
