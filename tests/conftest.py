"""For every test: polyalign before anything that might import torchvision or torchaudio, and one thread."""

# ruff: isort: off
import polyalign  # noqa: F401  (arms the repair of CPU wheels)

import torch

torch.set_num_threads(1)
