"""All runs on one data set: written down before they release, added up, refused above a limit."""

import dataclasses
import json
import math

import pytest

from lightning_dp.callbacks import PrivacyCard
from lightning_dp.cli import main
from lightning_dp.data import Digits
from lightning_dp.errors import ConfigError
from lightning_dp.methods import SGD
from lightning_dp.privacy import epsilon
from lightning_dp.privacy.accounting import Release, search_epsilon
from lightning_dp.privacy.dataset_ledger import DatasetLedger, whole
from lightning_dp.privacy.ledger import read
from tests.methods.runs import PRIVACY, STEPS, fit, make_data, make_module
from tests.methods.test_resume import StopAt, checkpoints, interrupted

ONE = Release(2.0, 0.1, 100)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("LIGHTNING_DP_LEDGER", str(tmp_path / "ledgers"))
    return tmp_path / "ledgers"


def the_ledger(folder):
    (file,) = folder.glob("*.jsonl")
    return DatasetLedger(file)


def total(*runs):
    return pytest.approx(epsilon([release for run in runs for release in run], 1e-5))


def test_a_fit_is_written_down_before_it_releases_and_again_at_its_end(folder, tmp_path):
    seen = []

    class Look(StopAt):
        def on_train_batch_start(self, trainer, *_):
            seen.append([run.ended for run in the_ledger(folder).runs()])

    module = fit(tmp_path, callbacks=[Look(STEPS)])
    assert seen[0] == [False]
    (run,) = the_ledger(folder).runs()
    assert run.ended
    assert run.method == "DPSGD"
    assert run.run == module.mechanism.ledger.run
    assert run.releases() == run.planned == module.mechanism.ledger.releases


def test_runs_on_any_split_and_with_any_noise_compose(folder, tmp_path):
    fit(tmp_path / "a")
    other = dataclasses.replace(PRIVACY, noise_multiplier=2.0, num_examples=1290)
    fit(tmp_path / "b", make_module(other), make_data(other, split_seed=5, audit=50))
    parts = [(Release(1.0, 60 / 1240, STEPS),), (Release(2.0, 60 / 1290, STEPS),)]
    assert the_ledger(folder).epsilon(1e-5) == total(*parts)


def test_the_same_records_by_another_name_are_the_same_records(folder, tmp_path, monkeypatch):
    fit(tmp_path / "a")
    monkeypatch.setattr(Digits, "name", "Numerals")
    fit(tmp_path / "b")
    assert len(the_ledger(folder).runs()) == 2


def test_a_run_that_did_not_end_counts_with_all_it_planned_until_it_has(folder, tmp_path):
    class Break(StopAt):
        def on_train_batch_end(self, trainer, *_):
            if trainer.global_step >= self.step:
                raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        fit(tmp_path, callbacks=[checkpoints(tmp_path), Break(7)], enable_checkpointing=True)
    (run,) = the_ledger(folder).runs()
    assert not run.ended
    assert sum(r.count for r in run.releases()) == STEPS
    fit(tmp_path, callbacks=[StopAt(9)], ckpt_path=tmp_path / "step=5.ckpt")
    (run,) = the_ledger(folder).runs()
    # seven releases before the cut and four after its checkpoint; stopped of its own accord, so only they count
    assert run.ended
    assert sum(r.count for r in run.releases()) == 7 + 4


def test_a_run_whose_own_ledger_is_gone_counts_with_all_it_planned(folder, tmp_path):
    interrupted(tmp_path)
    (run,) = the_ledger(folder).runs()
    assert run.ended
    assert sum(r.count for r in run.releases()) == 5
    run.path.unlink()
    assert sum(r.count for r in the_ledger(folder).runs()[0].releases()) == STEPS


def test_a_copy_that_goes_on_by_itself_is_a_run_of_its_own(folder, tmp_path):
    path = interrupted(tmp_path / "here")
    (tmp_path / "here").rename(tmp_path / "there")
    (tmp_path / "there/checkpoints").mkdir()
    (tmp_path / "there" / path.name).rename(tmp_path / "there/checkpoints/last.ckpt")
    fit(tmp_path / "rest", ckpt_path=tmp_path / "there/checkpoints/last.ckpt")
    first, second = the_ledger(folder).runs()
    assert first.run == second.run
    assert (first.path.is_file(), second.path.is_file()) == (False, True)
    # the first may have been copied, and go on where we cannot see it
    assert the_ledger(folder).epsilon(1e-5) == total(first.planned, second.planned)


def test_the_dataset_budget_refuses_before_the_first_release(folder, tmp_path):
    first = fit(tmp_path / "a")
    limit = 1.2 * first.mechanism.epsilon()
    second = make_module(dataclasses.replace(PRIVACY, dataset_epsilon=limit))
    with pytest.raises(ConfigError, match=r"from epsilon .* to .*, above privacy.dataset_epsilon"):
        fit(tmp_path / "b", second)
    assert len(second.mechanism.ledger) == 0
    assert len(the_ledger(folder).runs()) == 1
    with pytest.raises(ConfigError, match="dataset_epsilon -1 must be above 0"):
        dataclasses.replace(PRIVACY, dataset_epsilon=-1.0)
    # the same limit alone, and a resumed run, which is not counted beside itself
    alone = make_module(dataclasses.replace(PRIVACY, dataset_epsilon=3 * first.mechanism.epsilon()))
    path = interrupted(tmp_path / "c", alone)
    again = make_module(dataclasses.replace(PRIVACY, dataset_epsilon=1.6 * first.mechanism.epsilon()))
    fit(tmp_path / "c2", again, ckpt_path=path)
    assert len(again.mechanism.ledger) == STEPS


def test_a_dataset_budget_needs_a_ledger_and_runs_without_one_say_so(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LIGHTNING_DP_LEDGER", str(tmp_path / "file"))
    with pytest.raises(ConfigError, match="needs the dataset ledger"):
        fit(tmp_path / "a", make_module(dataclasses.replace(PRIVACY, dataset_epsilon=100.0)))
    with pytest.warns(UserWarning, match="in no dataset ledger"):
        fit(tmp_path / "b", callbacks=[PrivacyCard()])
    assert json.loads((tmp_path / "b/privacy_card.json").read_text())["all_runs_on_these_records"] is None


def test_the_control_has_no_budget_and_no_line(folder, tmp_path):
    fit(tmp_path, make_module(method=SGD))
    assert not list(folder.glob("*"))


def test_groups_count_as_the_worst_of_them_for_everybody():
    parts = [Release(2.0, 0.5, 3, "class 0"), Release(1.5, 0.1, 5, "class 1"), Release(3.0, 1.0, 2)]
    merged = whole(parts)
    assert all(not release.group for release in merged)
    assert epsilon(merged, 1e-5) >= epsilon(parts, 1e-5)
    assert set(merged) == {Release(3.0, 1.0, 2), Release(1.5, 0.5, 5)}


def test_two_runs_by_group_do_not_hide_behind_each_other(tmp_path):
    file = DatasetLedger(tmp_path / "x.jsonl")
    file.begin("a", "PSG", None, [Release(1.0, 0.2, 50, "task 0")], 1e-5)
    file.begin("b", "PSG", None, [Release(1.0, 0.2, 50, "task 1")], 1e-5)
    assert file.epsilon(1e-5) == total([Release(1.0, 0.2, 100)])


def test_a_line_that_cannot_be_read_is_an_error(tmp_path):
    file = DatasetLedger(tmp_path / "x.jsonl")
    file.begin("a", "DPSGD", None, [ONE], 1e-5)
    with (tmp_path / "x.jsonl").open("a") as text:
        text.write('{"event": "beg')
    with pytest.raises(ConfigError, match="line 2 of the dataset ledger"):
        file.epsilon(1e-5)


def test_very_small_delta_goes_by_rdp(tmp_path):
    file = DatasetLedger(tmp_path / "x.jsonl")
    file.begin("a", "DPSGD", None, [ONE], 1e-12)
    assert file.epsilon(1e-12) == pytest.approx(epsilon([ONE], 1e-12, accountant="rdp"))
    with pytest.raises(ConfigError, match="rdp"):
        file.epsilon(1e-12, "replace_one")


def test_card_and_verb_say_the_total(folder, tmp_path, capsys):
    fit(tmp_path / "a", callbacks=[PrivacyCard()])
    fit(tmp_path / "b", callbacks=[PrivacyCard()])
    expected = epsilon([Release(1.0, 60 / 1240, 2 * STEPS)], 1e-5)
    card = json.loads((tmp_path / "b/privacy_card.json").read_text())
    assert card["all_runs_on_these_records"] == {"runs": 2, "epsilon": pytest.approx(expected)}
    fit(tmp_path / "c", make_module(dataclasses.replace(PRIVACY, noise_multiplier=0.0)), callbacks=[PrivacyCard()])
    capsys.readouterr()
    main(["ledger", "--adjacency", "replace_one"])
    printed = capsys.readouterr().out
    assert printed.startswith("Digits-")
    assert printed.count("| DPSGD |") == 3
    assert "all together: epsilon inf at delta 1e-05, replace_one" in printed
    assert "no total" in printed
    alone = epsilon([Release(1.0, 60 / 1240, STEPS)], 1e-5, "replace_one")
    assert f"| {STEPS} | {alone:.4g} |" in printed


def test_no_ledger_is_an_error(folder):
    with pytest.raises(SystemExit):
        main(["ledger"])


def test_the_own_ledger_of_another_run_at_the_place_is_not_taken(folder, tmp_path):
    interrupted(tmp_path)
    (run,) = the_ledger(folder).runs()
    identity, made = read(run.path)
    run.path.write_text(run.path.read_text().replace(identity, "f" * 32))
    assert sum(r.count for r in made) == 5
    assert sum(r.count for r in the_ledger(folder).runs()[0].releases()) == STEPS


def test_a_search_costs_more_than_one_run_and_less_than_all_of_them():
    alone, best = epsilon([ONE], 1e-5, accountant="rdp"), search_epsilon([ONE], 1e-5, 10)
    assert alone < search_epsilon([ONE], 1e-5, 2) < best < epsilon([dataclasses.replace(ONE, count=1000)], 1e-5)
    assert search_epsilon([Release(0.0, 0.1)], 1e-5, 10) == math.inf
    for mean, shape in ((1.0, 1.0), (5.0, -1.0)):
        with pytest.raises(ConfigError, match="mean number of runs"):
            search_epsilon([ONE], 1e-5, mean, shape)


def test_search_of_a_gaussian_is_theorem_2_of_papernot_and_steinke():
    """RDP of order a, geometric: eps(a) + 2 (1 - 1/b) eps(b) + 2 log(1/gamma)/b + log E[K] / (a - 1), least over b."""
    sigma, mean, delta = 5.0, 8.0, 1e-5
    rdp = lambda order: order / (2 * sigma**2)  # noqa: E731
    orders = [1 + 0.02 * i for i in range(1, 5000)]
    second = min(2 * (1 - 1 / b) * rdp(b) + 2 * math.log(mean) / b for b in orders)
    expected = min(
        rdp(a) + second + math.log(mean) / (a - 1) + math.log1p(-1 / a) - math.log(delta * a) / (a - 1) for a in orders
    )
    assert search_epsilon([Release(sigma, 1.0)], delta, mean) == pytest.approx(expected, rel=0.02)
