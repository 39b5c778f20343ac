from __future__ import annotations

import contextlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loopfast.distributed.launcher import LaunchEnvironment, read_launch_environment
from loopfast.errors import LoopfastError

TORCHRUN = {
    "RANK": "0",
    "WORLD_SIZE": "2",
    "LOCAL_RANK": "0",
    "MASTER_ADDR": "localhost",
    "MASTER_PORT": "1234",
}
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "4",
    "PMIX_NAMESPACE": "prterun-node-4748@1",
}
HYDRA = {"PMI_RANK": "1", "PMI_SIZE": "4", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "4"}
SLURM = {
    "SLURM_PROCID": "5",
    "SLURM_STEP_NUM_TASKS": "16",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NODELIST": "gpu[03-05,9],login",
    "SLURM_JOB_ID": "123",
    "SLURM_STEP_ID": "4",
}
# what Kubernetes sets in every container beside a service that is called master
KUBERNETES = {"MASTER_PORT": "tcp://10.0.0.1:29500", "MASTER_SERVICE_HOST": "10.0.0.1"}


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"RANK": "0", "WORLD_SIZE": "1"},
        {"RANK": "", "WORLD_SIZE": ""},
        # sbatch sets these in the batch script itself, which nobody has started with srun
        {"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_JOB_ID": "3", "SLURM_STEP_ID": "batch"},
        KUBERNETES,
        {"RANK": "0", "WORLD_SIZE": "1", **KUBERNETES},
        {"TORCHELASTIC_RESTART_COUNT": "many"},
    ],
)
def test_a_process_without_a_launcher_is_alone(environment: dict[str, str]) -> None:
    assert read_launch_environment(environment) == LaunchEnvironment()


def test_what_torchrun_says() -> None:
    environment = {
        **SLURM,
        **OPEN_MPI,
        "RANK": "3",
        "WORLD_SIZE": "8",
        "LOCAL_RANK": "1",
        "MASTER_ADDR": "node1",
        "MASTER_PORT": "4000",
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "2",
    }
    assert read_launch_environment(environment) == LaunchEnvironment(
        3, 8, 1, "node1", 4000, hosted=True, restart=2
    )
    assert read_launch_environment({**environment, "TORCHELASTIC_RESTART_COUNT": ""}).restart == 0


@pytest.mark.parametrize(
    ("nodes", "host"),
    [("gpu[03-05,9],login", "gpu03"), ("node7", "node7"), ("a1,b[2-3]", "a1"), ("r1n[10,12]-ib", "r1n10-ib")],
)
def test_what_srun_says(nodes: str, host: str) -> None:
    environment = {**SLURM, "SLURM_STEP_NODELIST": nodes}
    place = read_launch_environment(environment)
    assert (place.rank, place.size, place.local_rank, place.host) == (5, 16, 1, host)
    assert 1024 < place.port < 65536
    # the job's steps do not meet at one port, and the user may choose another
    assert read_launch_environment({**environment, "SLURM_STEP_ID": "5"}).port != place.port
    chosen = read_launch_environment({**environment, "MASTER_PORT": "7777", "MASTER_ADDR": "other"})
    assert (chosen.host, chosen.port) == ("other", 7777)
    # steps may have names
    assert read_launch_environment({**environment, "SLURM_STEP_ID": "interactive"}).port != place.port


@pytest.mark.parametrize("environment", [OPEN_MPI, HYDRA], ids=["open-mpi", "hydra"])
def test_what_mpirun_says(environment: dict[str, str]) -> None:
    place = read_launch_environment(environment)
    assert (place.rank, place.size, place.local_rank, place.host) == (1, 4, 1, "127.0.0.1")
    assert 1024 < place.port < 65536
    # all processes of a job find the same, also where srun has started mpirun or a container is always alone
    again = {name: "0" if name.endswith(("_RANK", "RANKID")) else text for name, text in environment.items()}
    container = {"RANK": "0", "WORLD_SIZE": "1"}
    assert read_launch_environment({**SLURM, **container, **again}) == LaunchEnvironment(
        0, 4, 0, "127.0.0.1", place.port
    )
    chosen = read_launch_environment({**environment, "MASTER_PORT": "7777", "MASTER_ADDR": "other"})
    assert (chosen.host, chosen.port) == ("other", 7777)


def test_two_jobs_of_open_mpi_do_not_meet() -> None:
    names = (
        {"PMIX_NAMESPACE": "prterun-node-4749@1"},
        {"PMIX_NAMESPACE": "", "OMPI_MCA_ess_base_jobid": "77"},
    )
    ports = {read_launch_environment({**OPEN_MPI, **name}).port for name in ({}, *names)}
    assert len(ports) == 3


def test_srun_may_set_variables_of_mpi() -> None:
    assert read_launch_environment({**SLURM, "PMI_RANK": "5", "PMI_SIZE": "16"}) == read_launch_environment(
        SLURM
    )


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        (
            {**TORCHRUN, "LOCAL_RANK": "one"},
            "LOCAL_RANK is 'one'; allowed: a whole number from 0 to 1, as WORLD_SIZE is 2",
        ),
        ({**TORCHRUN, "MASTER_PORT": ""}, "MASTER_PORT is ''; allowed: a whole number from 1 to 65535"),
        ({**TORCHRUN, "MASTER_PORT": "65536"}, "MASTER_PORT is '65536'; allowed: a whole number from 1 to"),
        ({**TORCHRUN, **KUBERNETES}, "MASTER_PORT is 'tcp://10.0.0.1:29500', as Kubernetes sets it"),
        ({**SLURM, **KUBERNETES}, "MASTER_PORT is 'tcp://10.0.0.1:29500', as Kubernetes sets it"),
        ({**TORCHRUN, "MASTER_ADDR": ""}, "MASTER_ADDR is missing beside RANK"),
        ({**TORCHRUN, "RANK": "2"}, "RANK is '2'; allowed: a whole number from 0 to 1, as WORLD_SIZE is 2"),
        ({**TORCHRUN, "RANK": ""}, "RANK is ''; allowed: "),
        ({**TORCHRUN, "WORLD_SIZE": "0"}, "WORLD_SIZE is '0'; allowed: a whole number from 1 to "),
        ({**TORCHRUN, "WORLD_SIZE": "9" * 5000}, "WORLD_SIZE is '9999"),
        ({**TORCHRUN, "TORCHELASTIC_RESTART_COUNT": "-1"}, "TORCHELASTIC_RESTART_COUNT is '-1'; allowed: "),
        ({**SLURM, "SLURM_LOCALID": "x"}, "SLURM_LOCALID is 'x'; allowed: "),
        ({**SLURM, "SLURM_STEP_NODELIST": ""}, "MASTER_ADDR is missing beside SLURM_PROCID"),
        ({**OPEN_MPI, "OMPI_COMM_WORLD_RANK": "4"}, "OMPI_COMM_WORLD_RANK is '4'; allowed: "),
        ({**HYDRA, "MPI_LOCALRANKID": ""}, "MPI_LOCALRANKID is ''; allowed: "),
        ({**OPEN_MPI, "OMPI_COMM_WORLD_LOCAL_SIZE": "2"}, "OMPI_COMM_WORLD_LOCAL_SIZE is 2 and OMPI_COMM_WORLD_SIZE"),
        # the proxies of several hosts have nothing in common that a port could be made from
        ({**HYDRA, "MPI_LOCALNRANKS": "2", "MASTER_ADDR": "a"}, "MASTER_PORT is missing; allowed: "),
    ],
)  # fmt: skip
def test_what_cannot_be_used_is_named(environment: dict[str, str], message: str) -> None:
    with pytest.raises(LoopfastError) as caught:
        read_launch_environment(environment)
    assert message in str(caught.value)


@pytest.mark.parametrize("text", ["²", "٣", "+4", " 4 ", "4\n", "-1", "1_0", "0x1", "1e1", "4.0"])
@pytest.mark.parametrize(
    "name", ["RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT", "TORCHELASTIC_RESTART_COUNT"]
)
def test_only_plain_digits_are_numbers(name: str, text: str) -> None:
    with pytest.raises(LoopfastError, match="the launcher's variable ") as caught:
        read_launch_environment({**TORCHRUN, name: text})
    assert f"{name} is {text!r}" in str(caught.value)


NAMES = sorted(
    {*TORCHRUN, *OPEN_MPI, *HYDRA, *SLURM, *KUBERNETES}
    | {"TORCHELASTIC_USE_AGENT_STORE", "TORCHELASTIC_RESTART_COUNT", "OMPI_MCA_ess_base_jobid"}
)
TEXTS = st.one_of(
    st.integers(-1, 17).map(str),
    st.sampled_from(
        ["", "True", "batch", "gpu[1-", "a,b", "tcp://10.0.0.1:29500", "127.0.0.1", "29500", "²"]
    ),
    st.text(st.characters(exclude_characters="\0"), max_size=8),
)


@settings(max_examples=200)
@given(
    st.sampled_from([{}, TORCHRUN, OPEN_MPI, HYDRA, SLURM]),
    st.dictionaries(st.sampled_from(NAMES), TEXTS, max_size=6),
    st.sets(st.sampled_from(NAMES), max_size=2),
)
def test_an_environment_gives_a_place_or_an_error_in_words(
    launcher: dict[str, str], changes: dict[str, str], missing: set[str]
) -> None:
    environment = {name: text for name, text in {**launcher, **changes}.items() if name not in missing}
    with contextlib.suppress(LoopfastError):
        place = read_launch_environment(environment)
        assert 0 <= place.rank < place.size
        assert 0 <= place.local_rank < place.size
        assert 0 < place.port < 65536
        assert place.host
