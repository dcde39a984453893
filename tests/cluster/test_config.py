import re

import pytest

from powertrain.cluster.config import OWN_OPTIONS, ClusterConfig
from powertrain.config import compose
from powertrain.schema import ConfigError


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"kind": "k8s"}, "cluster.kind='k8s' is not allowed: it must be one of local, slurm"),
        ({"nodes": 0}, "cluster.nodes=0 is not allowed"),
        ({"gpus_per_node": -1}, "cluster.gpus_per_node=-1 is not allowed"),
        ({"tasks_per_node": 0}, "cluster.tasks_per_node=0 is not allowed"),
        ({"gpus_per_node": 8, "tasks_per_node": 4}, "contradicts cluster.gpus_per_node=8"),
        ({"mem": "64 GB"}, "cluster.mem='64 GB' is not allowed"),
        ({"time": "43200"}, "in quotes where it is YAML"),
        ({"time": "12:00"}, "write H:MM:SS"),
        ({"time": "0:05:00"}, "the run saves and queues again cluster.signal_seconds=300 before the limit"),
        ({"signal_seconds": 65536}, "Slurm takes at most 65535"),
        ({"partition": "a\n#SBATCH --uid=0"}, "it must be one line of text"),
        ({"account": ""}, "it must be one line of text"),
        ({"env": {"A=B": "x"}}, "not a name of an environment variable"),
        ({"env": {"A": "x\0y"}}, "has a NUL"),
        ({"sbatch": {"--constraint": "x"}}, "long name of an option of sbatch without its dashes"),
        ({"sbatch": {"C": "x"}}, "long name"),
        ({"sbatch": {"constraint": "a\nb"}}, "it must be one line of text"),
        ({"sbatch": {"constraint": ["a"]}}, "must be a text, a number or true"),
    ],
)
def test_each_mistake_is_one_clear_sentence(values, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        ClusterConfig(**{"kind": "slurm", **values})


@pytest.mark.parametrize("option", sorted(OWN_OPTIONS))
def test_options_that_powertrain_sets_are_refused_with_who_sets_them(option):
    with pytest.raises(ValueError, match=re.escape(f"that is set by {OWN_OPTIONS[option]}")):
        ClusterConfig(kind="slurm", sbatch={option: "1"})


@pytest.mark.parametrize(
    ("beginning", "option"),
    [("arra", "array"), ("no-requ", "no-requeue"), ("ex", "export"), ("ntasks-per-n", "ntasks-per-node")],
)
def test_sbatch_takes_the_beginning_of_a_name_and_so_it_is_refused_too(beginning, option):
    message = f"cluster.sbatch.{beginning} (--{option}) is not allowed: that is set by {OWN_OPTIONS[option]}"
    with pytest.raises(ValueError, match=re.escape(message)):
        ClusterConfig(kind="slurm", sbatch={beginning: "1"})


def test_options_whose_names_go_on_after_one_that_powertrain_sets_are_others():
    ClusterConfig(kind="slurm", sbatch={"time-min": "1:00:00", "mem-per-gpu": "8G", "exclude": "n1"})


@pytest.mark.parametrize(
    ("time", "seconds"),
    [
        ("0:30:00", 1800),
        ("12:00:01", 43201),
        ("2-6", 54 * 3600),
        ("1-00:30", 24 * 3600 + 1800),
        ("1-00:00:30", 86430),
        ("UNLIMITED", None),
        (None, None),
    ],
)
def test_time_limits_as_slurm_reads_them(time, seconds):
    assert ClusterConfig(kind="slurm", time=time).time_seconds == seconds


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["trainer.num_nodes=3"], "trainer.num_nodes=3 contradicts cluster=slurm with cluster.nodes=2"),
        (["trainer.devices=4"], "trainer.devices=4 contradicts"),
        (["trainer.accelerator=gpu"], "give cluster.gpus_per_node"),
        (["trainer.accelerator=cpu", "cluster.gpus_per_node=2"], "leaves cluster.gpus_per_node=2 unused"),
        (["trainer.global_batch_tokens=1024"], "which 2 processes cannot share evenly: give a multiple of 2048 tokens"),
        (
            ["trainer.global_batch_tokens=8192", "trainer.micro_batch_size=8"],
            "2 processes of micro-batches of 8 cannot share evenly: give a multiple of 16384 tokens",
        ),
    ],
)
def test_contradictions_with_the_trainer(overrides, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        compose(["cluster=slurm", "cluster.nodes=2", *overrides])


def test_options_and_variables_of_any_name_can_be_given_one_by_one():
    config = compose(["cluster=slurm", "cluster.sbatch.mail-type=END", "cluster.env.NCCL_DEBUG=INFO", "cluster.mem=0"])
    assert (config.cluster.sbatch, config.cluster.env) == ({"mail-type": "END"}, {"NCCL_DEBUG": "INFO"})
    assert config.cluster.mem == "0"


def test_where_a_run_executes_is_not_what_it_is():
    assert compose(["cluster=slurm", "cluster.nodes=2"]).resolved_run_id() == compose([]).resolved_run_id()


@pytest.mark.parametrize("option", [{"nodes": 2}, {"tasks_per_node": 2}, {"time": "1:00:00"}])
def test_options_of_a_job_without_one_are_refused(option):
    ((name, value),) = option.items()
    with pytest.raises(ValueError, match=f"cluster.{name}={value} needs cluster=slurm"):
        ClusterConfig(**option)
