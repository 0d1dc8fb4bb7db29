"""The guarantee: sampling, clipping, noise, accounting, and the mechanism that binds them. No Lightning in here."""

from lightning_dp.privacy.accounting import Release as Release
from lightning_dp.privacy.accounting import calibrate as calibrate
from lightning_dp.privacy.accounting import epsilon as epsilon
from lightning_dp.privacy.clipping import clipped_sum as clipped_sum
from lightning_dp.privacy.ledger import Ledger as Ledger
from lightning_dp.privacy.mechanism import Mechanism as Mechanism
from lightning_dp.privacy.mechanism import PrivacyConfig as PrivacyConfig
from lightning_dp.privacy.randomness import Randomness as Randomness
from lightning_dp.privacy.sampling import PoissonBatchSampler as PoissonBatchSampler
