"""One file per paper, over two abstract bases."""

from lightning_dp.methods.adam import DPAdamBC as DPAdamBC
from lightning_dp.methods.adamix import AdaMix as AdaMix
from lightning_dp.methods.adamix import InverseTimeLR as InverseTimeLR
from lightning_dp.methods.base import Classifier as Classifier
from lightning_dp.methods.diffusion import ClassDiffusion as ClassDiffusion
from lightning_dp.methods.dp import DPModule as DPModule
from lightning_dp.methods.dp import GradientModule as GradientModule
from lightning_dp.methods.dp_mix import DPMix as DPMix
from lightning_dp.methods.dp_sgd import DPSGD as DPSGD
from lightning_dp.methods.mixture_heads import MixtureHead as MixtureHead
from lightning_dp.methods.mixture_heads import NearestMean as NearestMean
from lightning_dp.methods.mixture_heads import RidgeHead as RidgeHead
from lightning_dp.methods.neuromix import GammaWeights as GammaWeights
from lightning_dp.methods.neuromix import NeuroMix as NeuroMix
from lightning_dp.methods.one_shot import ClassSums as ClassSums
from lightning_dp.methods.one_shot import SufficientStatistics as SufficientStatistics
from lightning_dp.methods.public_head import FewShot as FewShot
from lightning_dp.methods.public_head import PublicHead as PublicHead
from lightning_dp.methods.public_head import ZeroHead as ZeroHead
from lightning_dp.methods.public_head import ZeroShot as ZeroShot
from lightning_dp.methods.release_classifier import ReleaseClassifier as ReleaseClassifier
from lightning_dp.methods.sgd import SGD as SGD
from lightning_dp.methods.subspaces import FeaturePCA as FeaturePCA
from lightning_dp.methods.subspaces import GradientSpan as GradientSpan
