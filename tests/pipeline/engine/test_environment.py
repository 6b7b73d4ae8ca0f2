"""Engines side by side compute on devices of their own."""

import os

import pytest
import torch

from pipeline.engine.environment import divide_cores, engine_places
from pipeline.engine.server import CPUS
from pipeline.errors import RequestError
from pipeline.params import ScoreParams


@pytest.mark.parametrize(("cores", "count"), [(2, 2), (7, 3), (16, 8), (1, 1)])
def test_no_core_belongs_to_two_engines_and_all_have_as_many(cores, count):
    """Engines with other numbers of threads would give a row other last bits."""
    shares = divide_cores(list(range(10, 10 + cores)), count)
    given = [core for share in shares for core in share]
    assert len(set(given)) == len(given) and set(given) <= set(range(10, 10 + cores))
    assert {len(share) for share in shares} == {cores // count}


def test_more_engines_than_cores_share_them():
    assert divide_cores([4, 5], 3) == [[4], [5], [4]]


def test_engines_on_cpus_are_bound_to_cores_that_this_process_may_use(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3})
    places = engine_places(ScoreParams(engines=2), 2)
    bound = [set(map(int, place[CPUS].split(","))) for place in places]
    assert len(bound[0]) == len(bound[1]) == 2 and bound[0] | bound[1] == {0, 1, 2, 3}
    assert engine_places(ScoreParams(), 1) == [{}]


@pytest.fixture
def four_gpus(monkeypatch):
    """What torch says where CUDA_VISIBLE_DEVICES, if set, names four devices."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def test_engines_on_gpus_get_tensor_parallel_size_of_the_visible_ones(four_gpus, monkeypatch):
    places = engine_places(ScoreParams(engines=2, tensor_parallel_size=2), 2)
    assert places == [{"CUDA_VISIBLE_DEVICES": "0,1"}, {"CUDA_VISIBLE_DEVICES": "2,3"}]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5,6,7")
    assert engine_places(ScoreParams(engines=3), 3)[1:] == [
        {"CUDA_VISIBLE_DEVICES": "5"},
        {"CUDA_VISIBLE_DEVICES": "6"},
    ]


def test_too_few_gpus_are_told_before_anything_starts(four_gpus):
    with pytest.raises(RequestError, match=r"takes 6 GPUs, but 4 are visible \(0, 1, 2, 3\)"):
        engine_places(ScoreParams(engines=3, tensor_parallel_size=2), 3)
