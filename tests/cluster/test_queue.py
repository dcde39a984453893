import json

import pytest

from powertrain.cluster import queue
from powertrain.cluster.queue import (
    SlurmError,
    SlurmRefusal,
    current_job_id,
    job_state,
    patiently,
    queued_jobs,
    slurm,
)


@pytest.mark.parametrize(
    ("variables", "job_id"),
    [
        ({}, None),
        ({"SLURM_JOB_ID": "17"}, "17"),
        # The last task of an array to start has the array's own id.
        ({"SLURM_JOB_ID": "17", "SLURM_ARRAY_JOB_ID": "17", "SLURM_ARRAY_TASK_ID": "3"}, "17_3"),
    ],
)
def test_the_job_of_this_process(variables, job_id):
    assert current_job_id(variables) == job_id


def test_the_state_of_a_job(stub):
    calls = stub(
        "scontrol", "JobId=7 JobName=a JobState=COMPLETING Reason=TimeLimit Dependency=(null) Comment=Reason=x\n"
    )
    state = job_state("7")
    assert (state.state, state.reason, state.preempted) == ("COMPLETING", "TimeLimit", False)
    assert json.loads(calls.read_text())["argv"] == ["--oneliner", "show", "job", "7"]


def test_the_queue_is_asked_for_jobs_and_tasks_of_arrays(stub, monkeypatch):
    monkeypatch.setenv("SQUEUE_STATES", "RUNNING")
    calls = stub("squeue", "7|RUNNING|1795694644\n8_0|PENDING|N/A\n8_1|PENDING|N/A\n9|PENDING|N/A\n")
    assert queued_jobs(["7", "8_1", "6"]) == {"7": ("RUNNING", 1795694644.0), "8_1": ("PENDING", None)}
    # Seconds since 1970, whatever the time zones and the user's taste.
    call = json.loads(calls.read_text())
    assert call["env"]["SLURM_TIME_FORMAT"] == "%s"
    # The jobs of hidden partitions, and whatever the user wants left out of his own tables.
    assert "--all" in call["argv"]
    assert "SQUEUE_STATES" not in call["env"]


def test_without_jobs_nobody_is_asked(stub):
    calls = stub("squeue")
    assert queued_jobs([]) == {}
    assert not calls.exists()


def test_what_slurm_says_is_passed_on_in_one_sentence(stub):
    stub("sbatch", code=1, error="sbatch: error: invalid partition specified: x\nsbatch: error: failed\n")
    with pytest.raises(SlurmError, match=r"^sbatch --parsable failed: sbatch: error: invalid partition.* failed$"):
        slurm("sbatch", "--parsable", "f")


def test_a_machine_without_slurm_is_one_sentence(monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(SlurmError, match="scontrol is not installed here"):
        job_state("1")
    with pytest.raises(SlurmError, match="squeue is not installed here"):
        queued_jobs(["1"])


@pytest.mark.parametrize(
    ("said", "kind"),
    [
        ("slurm_load_jobs error: Invalid job id specified", SlurmRefusal),
        ("Requested operation is presently disabled for job 1", SlurmRefusal),
        ("Access/permission denied for job 1", SlurmRefusal),
        ("slurm_load_jobs error: Socket timed out on send/recv operation", SlurmError),
        ("slurm_load_jobs error: Unable to contact slurm controller (connect failure)", SlurmError),
    ],
)
def test_refusals_are_told_from_a_controller_that_does_not_answer(stub, said, kind):
    stub("scontrol", code=1, error=said)
    with pytest.raises(SlurmError) as caught:
        job_state("1")
    assert type(caught.value) is kind


@pytest.fixture
def pauses(monkeypatch):
    """The pauses that are made, none of which takes time but on the clock."""
    made = []
    monkeypatch.setattr(queue.time, "sleep", made.append)
    monkeypatch.setattr(queue.time, "monotonic", lambda: sum(made))
    return made


def test_a_controller_that_does_not_answer_is_asked_again_ever_less_often(pauses):
    answers = iter([SlurmError("busy")] * 8 + ["yes"])

    def ask():
        answer = next(answers)
        if isinstance(answer, SlurmError):
            raise answer
        return answer

    assert patiently(ask, 300) == "yes"
    assert len(pauses) == 8
    for pause, longest in zip(pauses, [1, 2, 4, 8, 15, 15, 15, 15], strict=True):
        assert longest / 2 <= pause <= longest


def test_asking_ends_with_the_last_error_when_the_time_is_over(pauses):
    errors = []

    def ask():
        errors.append(SlurmError(f"busy {len(errors)}"))
        raise errors[-1]

    with pytest.raises(SlurmError) as caught:
        patiently(ask, 60)
    assert caught.value is errors[-1]
    assert sum(pauses) == pytest.approx(60)


def test_a_refusal_is_final(pauses):
    def ask():
        raise SlurmRefusal("no")

    with pytest.raises(SlurmRefusal):
        patiently(ask, 60)
    assert pauses == []
