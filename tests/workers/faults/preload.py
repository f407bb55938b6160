"""What every replica would load at its start, loaded once into the process they are forked from."""

import numpy as np
import torch

import workers.inference  # noqa: F401
from tests.workers.builders import make_bars, make_bundle, make_engine

torch.set_num_threads(1)  # a pool of threads would not outlive the fork
make_engine(make_bundle()).process(make_bars(["S"], 420), np.zeros(420, np.int64))
