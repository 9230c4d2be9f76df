"""DeepSpeed-native training of Being-VL: one language model that reads VQ-GAN codes merged by a 2-D byte-pair encoding."""

__version__ = "0.1.0"
