"""torchx components: what a component describes, and what each scheduler is asked."""

import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import botocore.session
import kubernetes_validate
import pytest
import yaml
from botocore.validate import ParamValidator
from torchx import specs
from torchx.runner import Runner
from torchx.specs.file_linter import validate
from torchx.specs.finder import get_component, get_components

from jobs.torchx import components, launch
from jobs.torchx.launch import Processes
from jobs.torchx.resources import node
from schemas.cluster import ClusterSettings, known_clusters
from schemas.settings import load_settings

REPOSITORY = Path(__file__).parents[2]
COMPONENTS = ("train", "online", "evaluate", "prepare", "plan", "serve")
RDMA = ("--devices", "vpc.amazonaws.com/efa=4")
MOUNTS = "type=bind,src=/data,dst=/data,readonly,type=volume,src=runs,dst=/runs"


pytestmark = pytest.mark.usefixtures("stand_ins")


@pytest.fixture
def undecided_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take back what the tests have said of the device: what is asked for decides."""
    monkeypatch.delenv("DEVICE")


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


@pytest.mark.usefixtures("undecided_device")
def test_a_gpu_node_gets_a_process_a_gpu_and_its_cores_are_shared() -> None:
    app = components.train(j="128", h="h200-128x8")
    assert "--nnodes=128 --nproc-per-node=8" in line_of(app)
    assert role_of(app).num_replicas == 128
    assert role_of(app).env["OMP_NUM_THREADS"] == str(specs.named_resources["h200-128x8"].cpu // 8)


@pytest.mark.usefixtures("undecided_device")
@pytest.mark.parametrize(
    ("here", "per_node", "device"), [(0, 2, None), (1, 1, "cuda"), (8, 8, "cuda")], ids=["no GPU", "one", "eight"]
)
def test_processes_follow_this_machine_where_nothing_is_said(
    here: int, per_node: int, device: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "gpus", lambda environment: here)
    for app in (components.train(), components.evaluate()):
        assert f"--nnodes=1 --nproc-per-node={per_node} " in line_of(app)
        assert role_of(app).resource.gpu == here
        assert role_of(app).env.get("DEVICE") == device
    assert "--nproc-per-node=1 " in line_of(components.train(j="1x1"))
    # A container has what it is given.
    assert role_of(components.train(image="dare:cuda")).resource.gpu == 0


@pytest.mark.usefixtures("undecided_device")
def test_what_is_said_of_a_node_counts_more_than_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "gpus", lambda environment: 1)
    for arguments, per_node, device in (
        ({"h": "a100-8"}, 8, "cuda"),
        ({"h": "laptop-cpu"}, 2, "cpu"),
        ({"gpu": 4}, 4, "cuda"),
        ({"gpu": 0}, 2, "cpu"),
    ):
        app = components.train(**arguments)
        assert f"--nproc-per-node={per_node} " in line_of(app)
        assert role_of(app).env["DEVICE"] == device
    with pytest.raises(ValueError, match="2 processes on nodes of 1 GPU, and each needs one of its own; say --gpu or"):
        components.train(j="1x2")


def test_device_reaches_the_ranks_and_a_wrong_one_is_a_mistake(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DEVICE", "cpu")
    app = components.train(h="a100-8")
    assert role_of(app).env["DEVICE"] == "cpu"
    assert "--nproc-per-node=2 " in line_of(app)
    assert role_of(components.train(h="a100-8", env={"DEVICE": "cuda"})).env["DEVICE"] == "cuda"
    monkeypatch.setenv("DEVICE", "gpu")
    with pytest.raises(ValueError, match="DEVICE=gpu: must be cpu or cuda"):
        components.evaluate(h="a100-8")


@pytest.mark.parametrize("name", ["a100-8", "h200-128x8"])
def test_the_system_keeps_cores_and_memory_of_a_node(name: str) -> None:
    cluster = load_settings(ClusterSettings, [known_clusters(REPOSITORY / "jobs/clusters")[name]])
    assert cluster.cores is not None
    assert cluster.cores * 0.9 < node(name).cpu < cluster.cores
    assert cluster.host_memory / 2**20 * 0.9 < node(name).memMB < cluster.host_memory / 2**20


def test_ranks_on_several_nodes_may_lock_memory() -> None:
    cuda = {"env": {"DEVICE": "cuda"}, "h": "a100-8"}
    assert line_of(components.train(j="2", **cuda)).startswith("ulimit -S -l hard; exec ")
    assert line_of(components.train(j="1", **cuda)).startswith("exec ")
    assert subprocess.run(["bash", "-c", "ulimit -S -l hard; ulimit -H -l"], capture_output=True).returncode == 0


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
        ({"j": "1x9", "h": "a100-8", "env": {"DEVICE": "cuda"}}, "9 processes on nodes of 8 GPUs"),
        ({"devices": {"rdma/hca": "many"}}, "--devices rdma/hca=many: a name and how many"),
        ({"devices": {"rdma/hca": "0"}}, "--devices rdma/hca=0: a name and how many"),
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


def test_urls_arrive_whole() -> None:
    run = "s3://bucket/runs/a b?endpoint_override=127.0.0.1:9000&scheme=http"
    for component, arguments in (
        (components.train, ["--data", "hdfs:///data", "--run", run]),
        (components.evaluate, ["--run", run]),
        (components.prepare, ["--events", "s3://bucket/*.csv", "--out", run]),
    ):
        assert shlex.split(line_of(component(*arguments)))[-len(arguments) :] == arguments


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


@pytest.mark.usefixtures("undecided_device")
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
            "cpus-per-task": "105",
            "mem": str(specs.named_resources["h100-16x8"].memMB),
            "gpus-per-task": "8",
        }
        assert "--rdzv-endpoint=${SLURM_JOB_NODELIST_HET_GROUP_0:=localhost}:29533" in replica.args[1]


@pytest.mark.usefixtures("undecided_device")
@pytest.mark.filterwarnings("ignore:Cannot determine resource instance type")
def test_aws_batch(runner: Runner) -> None:
    arguments = ["-j", "2", "-h", "a100-8", "--image", "dare:cuda", "--max_retries", "3", "--mounts", MOUNTS]
    request = runner.dryrun_component(
        "dare.train",
        [*arguments, *RDMA, "--env", "A=b", "--", "--data", "/data"],
        "aws_batch",
        {"queue": "q"},
    ).request
    assert request.job_def["retryStrategy"]["attempts"] == 3
    assert request.job_def["nodeProperties"]["numNodes"] == 2
    (nodes,) = request.job_def["nodeProperties"]["nodeRangeProperties"]
    container = nodes["container"]
    assert container["image"] == "dare:cuda"
    assert {"name": "A", "value": "b"} in container["environment"]
    assert {"type": "GPU", "value": "8"} in container["resourceRequirements"]
    assert [each["hostPath"] for each in container["linuxParameters"]["devices"]] == [
        f"/dev/infiniband/uverbs{number}" for number in range(4)
    ]
    assert container["linuxParameters"]["sharedMemorySize"] == specs.named_resources["a100-8"].memMB
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
    """The mistakes in a request, by AWS' own description of its service."""
    service = botocore.session.get_session().get_service_model("batch")
    shape = service.operation_model("RegisterJobDefinition").input_shape
    return ParamValidator().validate(request, shape).generate_report()


@pytest.mark.usefixtures("undecided_device")
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
        assert container.command[2].startswith("ulimit -S -l hard; exec python -m torch.distributed.run")
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


@pytest.mark.usefixtures("undecided_device")
@pytest.mark.filterwarnings("ignore:[\\s\\S]*Role train configured")
def test_kubernetes(runner: Runner) -> None:
    from torchx.schedulers.kubernetes_scheduler import sanitize_for_serialization

    arguments = ["-j", "2", "-h", "h200-16x8", "--image", "dare:cuda", "--max_retries", "3", "--mounts", MOUNTS]
    request = runner.dryrun_component(
        "dare.train", [*arguments, *RDMA, "--env", "A=b", "--", "--data", "/data"], "kubernetes", {"queue": "q"}
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
            "vpc.amazonaws.com/efa": "4",
        }
        assert environment["DEVICE"] == "cuda"
        mounted = {mount["mountPath"]: mount.get("readOnly", False) for mount in container["volumeMounts"]}
        assert mounted == {"/dev/shm": False, "/data": True, "/runs": False}
        volumes = {volume["name"]: volume for volume in task["template"]["spec"]["volumes"]}
        data, runs = (volumes[mount["name"]] for mount in container["volumeMounts"][1:])
        assert data["hostPath"]["path"] == "/data"
        assert runs["persistentVolumeClaim"]["claimName"] == "runs"
        first = "TORCHX_RANK0_HOST" if number == 0 else "VC_TRAIN_0_HOSTS"
        assert f"${{{first}:=localhost}}:29500" in container["command"][-1]
        validate_pod(task["template"])


def test_a_server_on_kubernetes(runner: Runner) -> None:
    from torchx.schedulers.kubernetes_scheduler import sanitize_for_serialization

    arguments = ["--image", "dare:cpu", "--port", "8090", "--", "/models/dare", "--watch"]
    request = runner.dryrun_component("dare.serve", arguments, "kubernetes", {"queue": "q"}).request
    job: Any = sanitize_for_serialization(request.resource)
    (task,) = job["spec"]["tasks"]
    (container,) = task["template"]["spec"]["containers"]
    assert container["ports"] == [{"containerPort": 8090, "name": "http"}]
    assert "serve /models/dare --watch --host 0.0.0.0 --port 8090" in container["command"][-1]
    validate_pod(task["template"])
    for given in (("--host", "::1"), ("--host=::1",)):
        role = role_of(components.serve("/models/dare", *given, image="dare:cpu"))
        assert role.args[-1].endswith(f"serve /models/dare {' '.join(given)} --port 8080")
    # On this machine it listens to this machine alone.
    role = role_of(components.serve("/models/dare"))
    assert role.args[-1].endswith("serve /models/dare --port 8080")


def test_the_deployment_of_the_examples() -> None:
    documents = list(yaml.safe_load_all((REPOSITORY / "examples/serve_on_kubernetes.yaml").read_text()))
    assert [document["kind"] for document in documents] == ["Deployment", "Service"]
    for document in documents:
        for version in ("1.30", "1.37"):
            kubernetes_validate.validate(document, version, strict=True)
    (container,) = documents[0]["spec"]["template"]["spec"]["containers"]
    for probe in ("startupProbe", "readinessProbe"):
        assert container[probe]["httpGet"] == {"path": "/health", "port": "http"}
    # The command is one that `dare` understands.
    import typer.main

    from jobs.app import app

    command = typer.main.get_command(app).commands["serve"]  # type: ignore[attr-defined]
    given = command.make_context("serve", container["command"][2:], resilient_parsing=True).params
    assert (given["host"], given["port"], given["watch"]) == ("0.0.0.0", 8080, True)


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
