import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from miles.data.sample import Sample
from miles.rollout.aside import Aside


def sample(index, routes):
    return Sample(0, index, 0, np.zeros(4, np.int32), 1, np.zeros(4, np.float32), np.zeros(4, np.uint8), np.zeros(4, np.uint8), routes=routes)


def test_routes_come_back_as_they_were_whoever_came_first(tmp_path):
    random = np.random.default_rng(0)
    routes = [random.integers(0, 60000, (rows, 5, 3)).astype(dtype) for rows, dtype in ((3, np.uint8), (2000, np.uint16), (0, np.uint8), (700, np.uint16))]
    group = [sample(index, array.copy()) for index, array in enumerate(routes)] + [sample(4, None)]
    aside, before = Aside(tmp_path), len(os.listdir("/proc/self/fd"))
    with ThreadPoolExecutor(4) as threads:
        list(threads.map(aside.put, reversed(group)))
    assert all(each.routes is None for each in group)
    assert list(tmp_path.iterdir()) == []  # nothing that a kill could leave behind
    aside.restore(group)
    for each, expected in zip(group, routes, strict=False):
        assert (each.routes.dtype, each.routes.shape, each.routes.tobytes()) == (expected.dtype, expected.shape, expected.tobytes())
    assert group[4].routes is None
    assert len(os.listdir("/proc/self/fd")) == before
    aside.close()
