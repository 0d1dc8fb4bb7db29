"""Networks of (n, channels, height, width) -> (n, classes), every one a function of each record by itself."""

from .canary import DiracCanaries as DiracCanaries
from .check import validate as validate
from .cnn import CIFARTanhCNN as CIFARTanhCNN
from .cnn import MNISTTanhCNN as MNISTTanhCNN
from .convnet import ConvNet as ConvNet
from .encoder import Encoder as Encoder
from .encoder import EncoderClassifier as EncoderClassifier
from .encoders import OpenClipEncoder as OpenClipEncoder
from .encoders import TimmEncoder as TimmEncoder
from .encoders import TorchvisionEncoder as TorchvisionEncoder
from .fix import RecordDropPath as RecordDropPath
from .fix import make_private_ready as make_private_ready
from .generator import ImageGenerator as ImageGenerator
from .linear import LinearHead as LinearHead
from .pretrained import TimmNet as TimmNet
from .pretrained import TorchvisionNet as TorchvisionNet
from .scatter import ScatterNet as ScatterNet
from .simclr import SimCLREncoder as SimCLREncoder
from .small import MLP as MLP
from .small import LeNet as LeNet
from .small import SmallAlexNet as SmallAlexNet
from .small import SmallVGG11 as SmallVGG11
from .small import small_networks as small_networks
from .wide_resnet import WideResNet as WideResNet
from .wide_resnet import WSConv2d as WSConv2d
