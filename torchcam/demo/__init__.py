"""A model that ships with the library, pictures to explain, and the generator that made them.

Everything works offline. The model finds handwritten digits in clutter. The pixels of each digit are known, so that
maps can be checked by numbers:

    >>> from torchcam.demo import load_model, sample_images
    >>> model, sample = load_model(), sample_images()[0]
    >>> scores = model(sample.to_tensor())

`make_scenes` makes any number of such pictures for benchmarks, from the handwriting in scikit-learn
(`pip install -e ".[demo]"`); nothing else here needs scikit-learn.
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
