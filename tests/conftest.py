"""What every test runs under: one thread of linear algebra, because the tensors are tiny and the cores few."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before anything imports torch or numpy
