"""torchx components: what they ask of each scheduler, and that a job goes on after a process is killed."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import botocore.session
import kubernetes_validate
import pytest
from botocore.validate import ParamValidator
from torchx import specs
from torchx.cli.argparse_util import ArgOnceAction, torchxconfig
from torchx.cli.main import main
from torchx.runner import Runner, get_runner
from torchx.schedulers import DEFAULT_SCHEDULER_MODULES, get_scheduler_factories
from torchx.specs import AppState
from torchx.specs.file_linter import validate
from torchx.specs.finder import get_component, get_components

from jobs.torchx import components
from jobs.torchx.launch import Processes
from jobs.torchx.resources import node
from pipeline.runs.listing import run_state
from schemas.cluster import known_clusters
from tests.launcher import PATIENCE_S
from tests.torchx_jobs import last_step, past_a_checkpoint, rank_process, small_data, training, wait_until, written

REPOSITORY = Path(__file__).parents[2]
COMPONENTS = ("train", "evaluate", "prepare", "plan")
MOUNTS = "type=bind,src=/data,dst=/data,readonly,type=volume,src=runs,dst=/runs"


@pytest.fixture(autouse=True)
def stand_ins(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Commands of Slurm, which a dry run asks for the memory of nodes; `python` of a container prints a variable."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, script in {
        "sinfo": "exit 1",
        "srun": """while [ "$1" != bash ]; do shift; done; "${@:1:3}\"""",
        "python": 'printf "%s|" "$HOSTS" "${@: -1}"',
    }.items():
        (folder / name).write_text(f"#!/bin/bash\n{script}\n")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")


@pytest.fixture(scope="module")
def runner() -> Iterator[Runner]:
    with get_runner() as it:
        yield it


def role_of(app: specs.AppDef) -> specs.Role:
    (role,) = app.roles
    return role


def line_of(app: specs.AppDef) -> str:
    assert role_of(app).entrypoint == "bash"
    option, line = role_of(app).args
    assert option == "-c"
    return line


# What a component describes.


@pytest.mark.parametrize("name", COMPONENTS)
def test_torchx_accepts_the_components_source(name: str) -> None:
    assert validate(str(REPOSITORY / "jobs/torchx/components.py"), name) == []


def test_entry_points_are_found_beside_those_of_torchx() -> None:
    found = set(get_components())
    assert {f"dare.{name}" for name in COMPONENTS} | {"dist.ddp", "utils.echo"} <= found
    assert {name for name in found if name.startswith("dare.")} == {f"dare.{name}" for name in COMPONENTS}


def test_components_are_usable_by_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)
    app = specs.materialize_appdef(
        get_component("jobs/torchx/components.py:train").fn, ["-j", "2x1", "--", "--data", "d", "--run", "r"]
    )
    assert line_of(app).endswith("-m -- jobs.cli train --data d --run r")


@pytest.mark.parametrize("name", known_clusters(REPOSITORY / "jobs/clusters"))
def test_a_node_of_each_topology_is_a_named_resource(name: str) -> None:
    found = specs.named_resources[name]
    assert found == node(name)
    assert found.cpu > 0
    assert found.memMB > 0
    assert found.gpu == (0 if name == "laptop-cpu" else 8)


def test_a_gpu_node_gets_a_process_a_gpu_and_its_cores_are_shared() -> None:
    app = components.train(j="128", h="h200-128x8")
    assert "--nnodes=128 --nproc-per-node=8" in line_of(app)
    assert role_of(app).num_replicas == 128
    assert role_of(app).env["OMP_NUM_THREADS"] == str(specs.named_resources["h200-128x8"].cpu // 8)


def test_one_node_meets_on_its_loopback_and_several_at_the_port() -> None:
    assert "--rdzv-endpoint=127.0.0.1:0 --local-addr=127.0.0.1" in line_of(components.train(rdzv_port=29511))
    assert f"--rdzv-endpoint=$${{{specs.macros.rank0_env}:=localhost}}:29511" in line_of(
        components.train(j="2x1", rdzv_port=29511)
    )


def test_restarts_recover() -> None:
    app = components.train(max_restarts=7, log_dir="my logs")
    assert "--max-restarts=7" in line_of(app)
    assert "'--log-dir=my logs'" in line_of(app)
    assert role_of(app).env["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] == "1"
    assert role_of(app).env["OMP_WAIT_POLICY"] == "PASSIVE"
    assert "--max-restarts=0" in line_of(components.evaluate())


def test_the_users_environment_comes_first() -> None:
    assert role_of(components.plan(env={"OMP_NUM_THREADS": "5"})).env["OMP_NUM_THREADS"] == "5"


def test_python_is_the_containers_or_the_one_that_torchx_runs_in() -> None:
    assert line_of(components.plan(image="dare:cpu")).startswith("exec python -m jobs.cli plan")
    assert line_of(components.plan()).startswith(f"exec {sys.executable} -m jobs.cli plan")


@pytest.mark.parametrize("name", ["dare_train", "Dare", "-dare", "dare-", "7dare", "a/b", "", "a" * 41])
def test_a_name_that_a_scheduler_refuses_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"^--name .*not a name for a job"):
        components.prepare(name=name)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"j": "2x"}, "-j 2x: nodes, or nodes x processes"),
        ({"j": "0"}, "at least one node"),
        ({"j": "1x0"}, "at least one node and one process"),
        ({"j": "1x9", "h": "a100-8"}, "9 processes on nodes of 8 GPUs"),
        ({"h": "h300"}, "-h h300: no such node"),
        ({"cpu": 0}, "--cpu 0 --gpu 0 --memMB 4096"),
        ({"rdzv_port": 70000}, "--rdzv_port 70000"),
        ({"max_restarts": -1}, "--max_restarts -1"),
        ({"max_retries": -1}, "--max_retries -1"),
        ({"mounts": ["src=/data"]}, "--mounts src=/data: type must be"),
        ({"mounts": ["type=bind", "where=/data"]}, "unknown mount option where"),
    ],
)
def test_a_mistake_is_one_clear_line(arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError) as error:
        components.train(**arguments)
    assert said in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["epochs=0"], "dare train: epochs: input should be greater than 0"),
        (["epoch=1"], "dare train: epoch: unknown key"),
        (["model=tree"], "dare train: model.name: must be one of dare,"),
        (["--config", "FILE"], "dare train: seed: "),
    ],
)
def test_a_mistake_in_settings_is_found_before_anything_starts(arguments: list[str], said: str, tmp_path: Path) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text("seed: -1")
    arguments = [str(file) if argument == "FILE" else argument for argument in arguments]
    with pytest.raises(ValueError) as error:
        components.train("--data", "d", "--run", "r", *arguments)
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_settings_that_are_elsewhere_are_left_to_the_job() -> None:
    elsewhere = ("--data", "d", "--run", "r", "--config", "nowhere.yaml", "epochs=0")
    assert line_of(components.train(*elsewhere)).endswith("--config nowhere.yaml epochs=0")
    with_image = components.train("--data", "d", "--run", "r", "epochs=0", image="dare:cpu")
    assert line_of(with_image).endswith("--run r epochs=0")


def test_processes_without_gpus_are_two_unless_said() -> None:
    assert Processes.parse("3", 0) == Processes(3, 2)
    assert Processes.parse("3x5", 0) == Processes(3, 5)
    assert Processes.parse("3", 8) == Processes(3, 8)


# What schedulers are asked for.


def test_values_and_arguments_arrive_whole(runner: Runner) -> None:
    arguments = [
        "-j",
        "2x1",
        "--image",
        "any",
        "--env",
        "HOSTS=a,b c,'d,PLAIN=yes",
        "--",
        "--data",
        "d",
        "x=[1, 'a b']",
    ]
    script = runner.dryrun_component("dare.train", arguments, "slurm").request.materialize()
    told = subprocess.run(
        ["bash", "-c", script], capture_output=True, text=True, env=os.environ | {"SLURM_JOB_ID": "7"}
    )
    assert told.stdout == "a,b c,'d|x=[1, 'a b']|job exited with code 0\n", told.stderr
    (exported,) = {word for word in script.split() if "--export=" in word}
    assert "PLAIN=yes" in exported
    assert "HOSTS" not in exported


def test_local(runner: Runner, tmp_path: Path) -> None:
    request = runner.dryrun_component(
        "dare.train", ["--", "--data", "d", "--run", "r", "model.name=twin"], "local_cwd", {"log_dir": str(tmp_path)}
    ).request
    (params,) = request.role_params["train"]
    assert params.args[2].endswith("-m -- jobs.cli train --data d --run r model.name=twin")
    assert params.env["PET_LOG_DIR"].startswith(str(tmp_path))
    assert params.env["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] == "1"


def test_slurm(runner: Runner) -> None:
    arguments = ["-j", "2", "-h", "h100-16x8", "--rdzv_port", "29533", "--max_retries", "2", "--", "--data", "d"]
    request = runner.dryrun_component("dare.train", arguments, "slurm", {"partition": "gpu", "time": "1:00:00"}).request
    assert request.max_retries == 2
    assert list(request.replicas) == ["train-0", "train-1"]
    for replica in request.replicas.values():
        assert replica.sbatch_opts == {
            "requeue": None,
            "partition": "gpu",
            "time": "1:00:00",
            "ntasks-per-node": "1",
            "cpus-per-task": "112",
            "mem": str(specs.named_resources["h100-16x8"].memMB),
            "gpus-per-task": "8",
        }
        assert "--rdzv-endpoint=${SLURM_JOB_NODELIST_HET_GROUP_0:=localhost}:29533" in replica.args[1]


@pytest.mark.filterwarnings("ignore:Cannot determine resource instance type")
def test_aws_batch(runner: Runner) -> None:
    arguments = ["-j", "2", "-h", "a100-8", "--image", "dare:cuda", "--max_retries", "3", "--mounts", MOUNTS]
    request = runner.dryrun_component(
        "dare.train", [*arguments, "--env", "A=b", "--", "--data", "/data"], "aws_batch", {"queue": "q"}
    ).request
    assert request.job_def["retryStrategy"]["attempts"] == 3
    assert request.job_def["nodeProperties"]["numNodes"] == 2
    (nodes,) = request.job_def["nodeProperties"]["nodeRangeProperties"]
    container = nodes["container"]
    assert container["image"] == "dare:cuda"
    assert {"name": "A", "value": "b"} in container["environment"]
    assert {"type": "GPU", "value": "8"} in container["resourceRequirements"]
    assert [(m["containerPath"], m["readOnly"]) for m in container["mountPoints"][:2]] == [
        ("/data", True),
        ("/runs", False),
    ]
    assert "${AWS_BATCH_JOB_MAIN_NODE_PRIVATE_IPV4_ADDRESS:=localhost}:29500" in container["command"][-1]
    variables = {variable["name"]: variable["value"] for variable in container["environment"]}
    assert variables["TORCHX_JOB_ID"] == f"aws_batch://torchx/{request.job_def['jobDefinitionName']}"
    assert mistakes_in_job_definition(request.job_def) == ""
    container["imag"] = "x"
    del container["resourceRequirements"][0]["type"]
    assert 'Unknown parameter in nodeProperties.nodeRangeProperties[0].container: "imag"' in (
        mistakes := mistakes_in_job_definition(request.job_def)
    )
    assert "Missing required parameter in nodeProperties.nodeRangeProperties[0].container.resource" in mistakes


def mistakes_in_job_definition(request: dict[str, Any]) -> str:
    """By AWS' own description of its service."""
    service = botocore.session.get_session().get_service_model("batch")
    shape = service.operation_model("RegisterJobDefinition").input_shape
    return ParamValidator().validate(request, shape).generate_report()


def test_docker(runner: Runner) -> None:
    arguments = ["-j", "2", "-h", "a100-8", "--image", "dare:cuda", "--max_retries", "3", "--mounts", MOUNTS]
    request = runner.dryrun_component(
        "dare.train", [*arguments, "--env", "A=b", "--", "--data", "/data"], "local_docker"
    ).request
    node = specs.named_resources["a100-8"]
    assert len(request.containers) == 2
    first = f"{request.app_id[-30:]}-train-0"
    for number, container in enumerate(request.containers):
        assert container.image == "dare:cuda"
        assert container.command[:2] == ["bash", "-c"]
        assert container.command[2].startswith("exec python -m torch.distributed.run")
        assert "${TORCHX_RANK0_HOST:=localhost}:29500" in container.command[2]
        assert container.command[2].endswith("-m -- jobs.cli train --data /data")
        asked = container.kwargs
        assert asked["hostname"] == f"{first[:-1]}{number}"
        assert (
            asked["environment"]
            | {
                "A": "b",
                "TORCHX_RANK0_HOST": first,
                "TORCHX_JOB_ID": f"local_docker://torchx/{request.app_id}",
                "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
                "OMP_NUM_THREADS": str(node.cpu // 8),
            }
            == asked["environment"]
        )
        assert asked["nano_cpus"] == node.cpu * 1e9
        assert asked["mem_limit"] == asked["shm_size"] == f"{node.memMB}m"
        assert [gpus["Count"] for gpus in asked["device_requests"]] == [8]
        assert asked["restart_policy"] == {"Name": "on-failure", "MaximumRetryCount": 3}
        assert [(m["Type"], m["Source"], m["Target"], m["ReadOnly"]) for m in asked["mounts"]] == [
            ("bind", "/data", "/data", True),
            ("volume", "runs", "/runs", False),
        ]
    single = runner.dryrun_component(
        "dare.prepare", ["--image", "dare:cpu", "--", "--out", "o"], "local_docker"
    ).request
    (container,) = single.containers
    assert container.command[2] == "exec python -m jobs.cli prepare --out o"
    assert "device_requests" not in container.kwargs
    assert "restart_policy" not in container.kwargs


@pytest.mark.filterwarnings("ignore:[\\s\\S]*Role train configured")
def test_kubernetes(runner: Runner) -> None:
    from torchx.schedulers.kubernetes_scheduler import sanitize_for_serialization

    arguments = ["-j", "2", "-h", "h200-16x8", "--image", "dare:cuda", "--max_retries", "3", "--mounts", MOUNTS]
    request = runner.dryrun_component(
        "dare.train", [*arguments, "--env", "A=b", "--", "--data", "/data"], "kubernetes", {"queue": "q"}
    ).request
    job: Any = sanitize_for_serialization(request.resource)
    assert job["apiVersion"] == "batch.volcano.sh/v1alpha1"
    assert job["spec"]["queue"] == "q"
    assert job["spec"]["maxRetry"] == 3
    assert [task["name"] for task in job["spec"]["tasks"]] == ["train-0", "train-1"]
    node = specs.named_resources["h200-16x8"]
    for number, task in enumerate(job["spec"]["tasks"]):
        assert task["replicas"] == 1
        assert task["maxRetry"] == 3
        assert task["policies"] == [
            {"event": "PodEvicted", "action": "RestartJob"},
            {"event": "PodFailed", "action": "RestartJob"},
        ]
        (container,) = task["template"]["spec"]["containers"]
        assert container["image"] == "dare:cuda"
        environment = {variable["name"]: variable.get("value") for variable in container["env"]}
        assert environment["A"] == "b"
        assert environment["TORCHX_JOB_ID"].startswith("kubernetes://torchx/")
        assert environment["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] == "1"
        assert container["resources"]["limits"] == {
            "cpu": f"{node.cpu * 1000}m",
            "memory": f"{node.memMB}M",
            "nvidia.com/gpu": "8",
        }
        mounted = {mount["mountPath"]: mount.get("readOnly", False) for mount in container["volumeMounts"]}
        assert mounted == {"/dev/shm": False, "/data": True, "/runs": False}
        volumes = {volume["name"]: volume for volume in task["template"]["spec"]["volumes"]}
        data, runs = (volumes[mount["name"]] for mount in container["volumeMounts"][1:])
        assert data["hostPath"]["path"] == "/data"
        assert runs["persistentVolumeClaim"]["claimName"] == "runs"
        first = "TORCHX_RANK0_HOST" if number == 0 else "VC_TRAIN_0_HOSTS"
        assert f"${{{first}:=localhost}}:29500" in container["command"][-1]
        validate_pod(task["template"])


def test_a_pod_that_is_wrong_does_not_pass() -> None:
    container = {"name": "train", "image": "dare:cuda"}
    validate_pod({"metadata": {}, "spec": {"containers": [container]}})
    for wrong in ({**container, "imag": "x"}, {**container, "command": "x"}, {"image": "x"}):
        with pytest.raises(kubernetes_validate.ValidationError):
            validate_pod({"metadata": {}, "spec": {"containers": [wrong]}})


def validate_pod(template: dict[str, Any]) -> None:
    """Against Kubernetes' own schema, in which unknown keys are errors."""
    metadata = template["metadata"] | {"name": "pod"}
    pod = template | {"apiVersion": "v1", "kind": "Pod", "metadata": metadata}
    for version in ("1.30", "1.37"):
        kubernetes_validate.validate(pod, version, strict=True)


# On this machine.


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--name", "My_Job"], "--name My_Job: not a name for a job"),
        (["-j", "x"], "-j x: nodes, or nodes x processes"),
        (["--", "--data", "d", "--run", "r", "model=tree"], "dare train: model.name: must be one of dare,"),
    ],
)
def test_the_command_line_tells_a_mistake_without_a_traceback(arguments: list[str], said: str) -> None:
    told = subprocess.run(torchx("run", "dare.train", *arguments), cwd=REPOSITORY, capture_output=True, text=True)
    assert told.returncode == 1
    assert said in told.stderr
    assert "Traceback" not in told.stderr


@pytest.fixture
def fresh_command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let torchx forget: it remembers which options a process has seen."""
    for kind in (torchxconfig, ArgOnceAction):
        monkeypatch.setattr(kind, "called_args", set())


@pytest.mark.usefixtures("fresh_command_line")
def test_a_client_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "kubernetes", None)
    assert told_by_torchx("kubernetes", capsys, "dare.plan", "--image", "x") == (
        "torchx: kubernetes: needs a package that is not installed: pip install kubernetes\n"
    )


@pytest.mark.usefixtures("fresh_command_line")
def test_a_slurm_that_is_not_reachable_is_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "bin/sbatch").write_text("#!/bin/bash\nexit 1\n")
    (tmp_path / "bin/sbatch").chmod(0o755)
    assert told_by_torchx("slurm", capsys).startswith("torchx: slurm: sbatch ended with 1; is the cluster up")


@pytest.mark.usefixtures("fresh_command_line")
def test_a_machine_without_slurm_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    assert told_by_torchx("slurm", capsys) == "torchx: slurm: sbatch is not on this machine\n"


@pytest.mark.usefixtures("fresh_command_line")
@pytest.mark.parametrize("scheduler", ["local_docker", "kubernetes", "aws_batch"])
@pytest.mark.parametrize("component", ["dare.plan", "jobs/torchx/components.py:plan"])
def test_a_container_without_an_image_is_one_line(
    scheduler: str, component: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    said = f"torchx: {scheduler}: starts containers; say with --image which one, after {component} "
    assert told_by_torchx(scheduler, capsys, component, "--", "--image", "of the command itself").startswith(said)


@pytest.mark.usefixtures("fresh_command_line")
def test_an_image_may_stand_in_the_settings_of_torchx(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "settings").write_text("[component:dare.plan]\nimage = dare:cpu\n")
    monkeypatch.setenv("TORCHXCONFIG", str(tmp_path / "settings"))
    main(["run", "--dryrun", "-s", "local_docker", "--workspace", "", "dare.plan"])
    assert "'image': 'dare:cpu'" in capsys.readouterr().out


@pytest.mark.usefixtures("fresh_command_line")
def test_a_server_that_is_not_reachable_is_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("DOCKER_HOST", f"unix://{tmp_path}/no.sock")
    said = told_by_torchx("local_docker", capsys, "dare.plan", "--image", "x")
    assert said.startswith("torchx: local_docker: Docker is not reachable, or refuses: ")
    assert said.count("\n") == 1


@pytest.mark.usefixtures("fresh_command_line")
@pytest.mark.parametrize("command", ["status", "log", "cancel"])
def test_other_commands_tell_it_too(command: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "bin/sacct").write_text("#!/bin/bash\nexit 1\n")
    (tmp_path / "bin/sacct").chmod(0o755)
    with pytest.raises(SystemExit) as end:
        main([command, "slurm://torchx/7"])
    assert end.value.code == 1
    assert capsys.readouterr().err.startswith("torchx: slurm: sacct ended with 1; is the cluster up")


@pytest.mark.parametrize(
    ("told", "state", "replicas"),
    [
        ("7+0|train-0|CANCELLED by 0\n7+1|train-1|COMPLETED\n", AppState.CANCELLED, 2),
        ("7+0|train-0|COMPLETED\n7+1|train-1|FAILED\n", AppState.FAILED, 2),
        ("7+0|train-0|COMPLETED\n7+1|train-1|RUNNING\n", AppState.RUNNING, 2),
        ("7+0|train-0|REQUEUED\n7+1|train-1|PENDING\n", AppState.PENDING, 2),
        ("7|plan-0|COMPLETED\n", AppState.SUCCEEDED, 1),
        ("7|allocation|SOMETHING_NEW\n", AppState.UNKNOWN, 0),
    ],
)
def test_states_of_slurm(runner: Runner, tmp_path: Path, told: str, state: AppState, replicas: int) -> None:
    (tmp_path / "bin/sacct").write_text(f"#!/bin/bash\necho -n '{told}'\n")
    (tmp_path / "bin/sacct").chmod(0o755)
    status = runner.describe("slurm://torchx/7"), runner.status("slurm://torchx/7")
    assert status[1] is not None
    assert status[1].state == state
    assert sum(len(role.replicas) for role in status[1].roles) == replicas
    (tmp_path / "bin/sacct").write_text("#!/bin/bash\n")
    assert runner.status("slurm://torchx/7") is None


def test_all_schedulers_that_can_be_loaded_are_there() -> None:
    assert set(get_scheduler_factories()) == set(DEFAULT_SCHEDULER_MODULES) - {"ray"}


def told_by_torchx(scheduler: str, capsys: pytest.CaptureFixture[str], *component: str) -> str:
    options = ["-s", scheduler, "--workspace", "", *(["-cfg", "queue=q"] if scheduler == "kubernetes" else [])]
    with pytest.raises(SystemExit) as end:
        main(["run", *options, *(component or ["dare.plan"])])
    assert end.value.code == 1
    return capsys.readouterr().err


def test_a_single_process_job_runs_at_once_in_the_repository(tmp_path: Path) -> None:
    told = subprocess.run(
        torchx("run", *logs_in(tmp_path), "dare.plan", "--", "--topology", "none", "sizes.items=1000"),
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
    )
    assert told.returncode == 1
    assert "dare: --topology none: unknown" in told.stderr


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_data(tmp_path_factory.mktemp("killed") / "data")


LONG = ("epochs=6", "validation.every=15")
STEPS = 30


@pytest.fixture(scope="module")
def undisturbed(data: Path) -> Path:
    run = data.with_name("undisturbed")
    subprocess.run(train_locally(data, run), cwd=REPOSITORY, check=True, capture_output=True, timeout=PATIENCE_S)
    assert last_step(run) == STEPS
    return run


@pytest.mark.slow
@pytest.mark.parametrize("attempt", range(10))
def test_after_kill_9_of_a_rank_training_goes_on_to_the_same_end(data: Path, undisturbed: Path, attempt: int) -> None:
    run = data.with_name(f"killed-{attempt}")
    job = subprocess.Popen(train_locally(data, run), cwd=REPOSITORY, stderr=subprocess.PIPE, text=True)
    try:
        wait_until(lambda: past_a_checkpoint(run, attempt), "some steps")
        os.kill(rank_process(run, attempt % 2).pid, signal.SIGKILL)
        _, said = job.communicate(timeout=PATIENCE_S)
    finally:
        if job.poll() is None:
            job.send_signal(signal.SIGINT)
            job.wait(PATIENCE_S)
    assert job.returncode == 0, said
    assert "goes on after step" in said
    assert written(run) == written(undisturbed)
    assert json.loads((run / "test.json").read_text())["steps"] == STEPS


@pytest.mark.slow
def test_ctrl_c_of_torchx_lets_training_save(data: Path) -> None:
    run = data.with_name("interrupted")
    job = subprocess.Popen([*train_locally(data, run), "epochs=500"], cwd=REPOSITORY, stderr=subprocess.PIPE, text=True)
    try:
        wait_until(lambda: last_step(run), "some steps")
        job.send_signal(signal.SIGINT)
        _, said = job.communicate(timeout=PATIENCE_S)
    finally:
        job.kill()
    assert job.returncode == 130
    assert said.endswith("torchx: local_cwd: interrupted, and so is the job\n")
    assert "Traceback" not in said
    wait_until(lambda: run_state(run).state == "stopped", "its checkpoint")
    assert run_state(run).checkpoint_step


def torchx(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "torchx.cli.main", *arguments]


def logs_in(folder: Path) -> list[str]:
    return ["-s", "local_cwd", "-cfg", f"log_dir={folder}"]


def train_locally(data: Path, run: Path) -> list[str]:
    return torchx("run", *logs_in(data.with_name("logs")), "dare.train", "--", *training(data, run, *LONG))
