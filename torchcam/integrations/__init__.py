"""Monitors for the training loops of other libraries, one module for each; see :mod:`torchcam.monitor`.

- :mod:`torchcam.integrations.lightning`: ``CAMCallback`` for the Trainer of Lightning
- :mod:`torchcam.integrations.transformers`: ``CAMTrainerCallback`` for the Trainer of transformers
"""

__all__: list[str] = []
