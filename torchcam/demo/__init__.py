"""A model that ships with the library, pictures to explain, and the generator that made them.

Everything works offline. The model finds handwritten digits in clutter; for the pictures it is known which pixels
belong to which digit, so a map can be checked and not just looked at:

    >>> from torchcam.demo import load_model, sample_images
    >>> model, sample = load_model(), sample_images()[0]
    >>> scores = model(sample.to_tensor())

`make_scenes` makes as many more of these pictures as a benchmark needs; it takes the handwriting from scikit-learn
(`pip install "torchcam[demo]"`), everything else here does without.
"""

from torchcam.demo.data import CLASS_NAMES, Scenes, make_scenes
from torchcam.demo.model import DemoNet, load_model
from torchcam.demo.samples import Sample, sample_images

__all__ = [
    "CLASS_NAMES",
    "DemoNet",
    "Sample",
    "Scenes",
    "load_model",
    "make_scenes",
    "sample_images",
]
