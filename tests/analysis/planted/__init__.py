"""Runs with planted causes of a mismatch between rollout and training, for tests of the analysis.

`plant(folder, cause, magnitude, seed)` writes one; `CAUSES` lists what can be planted, with magnitudes from strong to nil.
"""

from planted.causes import CAUSES as CAUSES
from planted.causes import PAIRS as PAIRS
from planted.plant import BF16_NOISE as BF16_NOISE
from planted.plant import FP32_NOISE as FP32_NOISE
from planted.plant import NO_NOISE as NO_NOISE
from planted.plant import Planted as Planted
from planted.plant import plant as plant
