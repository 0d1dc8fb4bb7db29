"""Observers: they read the ledger and the logs, and change nothing."""

from lightning_dp.callbacks.audit import CanaryAudit as CanaryAudit
from lightning_dp.callbacks.budget import PrivacyBudget as PrivacyBudget
from lightning_dp.callbacks.card import PrivacyCard as PrivacyCard
from lightning_dp.callbacks.collapse import NeuralCollapse as NeuralCollapse
from lightning_dp.callbacks.conformance import Conformance as Conformance
from lightning_dp.callbacks.ema import WeightEMA as WeightEMA
from lightning_dp.callbacks.membership import MembershipInference as MembershipInference
from lightning_dp.callbacks.metrics import MetricsFile as MetricsFile
from lightning_dp.callbacks.pictures import Pictures as Pictures
from lightning_dp.callbacks.synthetic import ReleaseAccuracy as ReleaseAccuracy
from lightning_dp.callbacks.synthetic import SyntheticImages as SyntheticImages
from lightning_dp.callbacks.synthetic import TaskAccuracy as TaskAccuracy
