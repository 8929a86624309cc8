"""A plugin of pytest: the kernels are those of the library that ``KERNELS_UNDER_TEST`` names, see `sanitize.py`."""

import ctypes
import os

from anabranch import native

library = ctypes.CDLL(os.environ["KERNELS_UNDER_TEST"])
native.load = lambda: library
