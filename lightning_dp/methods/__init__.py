"""One file per paper, over two abstract bases."""

from lightning_dp.methods.adam import DPAdamBC as DPAdamBC
from lightning_dp.methods.base import Classifier as Classifier
from lightning_dp.methods.diffusion import ClassDiffusion as ClassDiffusion
from lightning_dp.methods.dp import DPModule as DPModule
from lightning_dp.methods.dp import GradientModule as GradientModule
from lightning_dp.methods.dp_mix import DPMix as DPMix
from lightning_dp.methods.dp_sgd import DPSGD as DPSGD
from lightning_dp.methods.sgd import SGD as SGD
