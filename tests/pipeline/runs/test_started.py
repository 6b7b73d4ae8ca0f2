"""Who started this process: torchrun and srun make it a rank; a shell, a batch script and `srun -n 1` don't."""

import pytest

from pipeline.errors import RequestError
from pipeline.runs.started import first_node, require_ranks, started_rank

TORCHRUN = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "n1", "MASTER_PORT": "29500"}
SRUN = {
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_JOB_ID": "4711",
    "SLURM_STEP_ID": "2",
    "SLURM_STEP_NODELIST": "gpu[07-08]",
}


def test_torchrun_makes_a_rank():
    started = started_rank(dict(TORCHRUN))
    assert started is not None and (started.rank, started.ranks, started.by) == (3, 4, "torchrun")


def test_srun_makes_a_rank_and_tells_torch():
    environment = dict(SRUN)
    started = started_rank(environment)
    assert started is not None and (started.rank, started.ranks, started.by) == (5, 8, "srun")
    told = {name: environment[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR")}
    assert told == {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "MASTER_ADDR": "gpu07"}
    assert 1024 < int(environment["MASTER_PORT"]) < 32768  # below the range that systems hand out by themselves


def test_all_tasks_of_a_step_meet_at_one_port_and_two_steps_do_not():
    ports = []
    for task, step in (("0", "2"), ("7", "2"), ("0", "3")):
        environment = SRUN | {"SLURM_PROCID": task, "SLURM_STEP_ID": step}
        started_rank(environment)
        ports.append(environment["MASTER_PORT"])
    assert ports[0] == ports[1] != ports[2]


def test_an_address_that_was_set_by_hand_stays():
    environment = SRUN | {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "5000"}
    started_rank(environment)
    assert (environment["MASTER_ADDR"], environment["MASTER_PORT"]) == ("10.0.0.1", "5000")


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"RANK": "0"},
        {"SLURM_JOB_ID": "4711", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"},  # a batch script
        SRUN | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"},
    ],
)
def test_anything_else_starts_its_own_ranks(environment):
    before = dict(environment)
    assert started_rank(environment) is None
    assert environment == before


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("n1", "n1"),
        ("n1,n2", "n1"),
        ("gpu[07-12]", "gpu07"),
        ("gpu[07,9-12],cpu3", "gpu07"),
        ("rack2-[3-4]-ib", "rack2-3-ib"),
        ("login-1.example.org", "login-1.example.org"),
    ],
)
def test_the_first_node_of_a_list(nodes, first):
    assert first_node(nodes) == first


def test_another_number_of_processes_than_ranks_is_refused():
    started = started_rank(dict(TORCHRUN))
    assert started is not None
    require_ranks(started, 4)
    with pytest.raises(RequestError, match=r"torchrun started 4 processes, but ranks is 2 .*--set train\.ranks=4"):
        require_ranks(started, 2)
