"""The workers of a grid."""

import os
import queue

import pytest

from smt_hf.experiments import grid


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system does not bind processes to cores")
@pytest.mark.parametrize(("jobs", "num_threads", "bound"), [(1, 1, None), (2, 1, [5]), (2, 2, None), (3, 1, [5])])
def test_several_workers_have_cores_of_their_own(jobs, num_threads, bound, monkeypatch):
    """One worker is left to the scheduler, beside another grid too; so are several that are too many for the cores."""
    seen = []
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {2, 5, 7})
    monkeypatch.setattr(os, "sched_setaffinity", lambda process, cores: seen.append(list(cores)))
    slots: queue.Queue = queue.Queue()
    slots.put(jobs - 1 if jobs < 3 else 1)
    grid._settle(slots, jobs, num_threads)
    assert seen == ([] if bound is None else [bound])
