"""Observers: they read the ledger and the logs, and change nothing."""

from lightning_dp.callbacks.budget import PrivacyBudget as PrivacyBudget
from lightning_dp.callbacks.card import PrivacyCard as PrivacyCard
from lightning_dp.callbacks.metrics import MetricsFile as MetricsFile
