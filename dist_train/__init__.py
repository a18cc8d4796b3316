"""The trainer: AlexNet-class image classifiers at ImageNet scale, as the 2012 paper describes."""

import os

from pipelines import __version__ as version

__version__ = version

# Read when torch loads OpenMP, whose waiting threads would else spin and take the CPU from DALI's and from other
# programs (docs/performance.md).
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
