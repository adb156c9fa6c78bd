"""The files that clusters are started from: Ray takes them, and they say what they promise."""

from __future__ import annotations

import importlib
import json
import re
import shlex
import tomllib
from pathlib import Path
from typing import Any

import click
import pytest
import ray
import yaml
from botocore import xform_name
from ray.autoscaler._private.util import prepare_config, validate_config

from elastic.cli import parser
from elastic.options import parse
from elastic.units import parse_amount

ROOT = Path(__file__).parent.parent
MAKEFILE = (ROOT / "Makefile").read_text()
AWS, MACHINES = ROOT / "cluster.yaml", ROOT / "cluster-machines.yaml"
BOTH = pytest.mark.parametrize("file", [AWS, MACHINES], ids=lambda f: f.name)


def prepared(file: Path) -> dict[str, Any]:
    """The file as `ray up` reads it, before it talks to anybody."""
    config = prepare_config(yaml.safe_load(file.read_text()))
    validate_config(config)
    return json.loads(json.dumps(config))  # as it is sent to the head


def start_command(config: dict[str, Any], which: str) -> str:
    """The command of head or worker that starts Ray."""
    (command,) = (c for c in config[f"{which}_start_ray_commands"] if "ray start" in c)
    return command


def exported(command: str) -> dict[str, str]:
    """The variables that a shell command exports."""
    return dict(word.split("=", 1) for line in re.findall(r"export ([^;]*);", command) for word in shlex.split(line))


@BOTH
def test_ray_takes_the_file(file: Path) -> None:
    config = prepared(file)

    assert config["head_node_type"] in config["available_node_types"]
    assert config["max_workers"] >= sum(t["min_workers"] for t in config["available_node_types"].values())


@BOTH
def test_the_head_does_no_work_and_asks_for_the_token_on_its_own_loopback(file: Path) -> None:
    command = start_command(prepared(file), "head")

    assert {"--head", "--num-cpus=0", "--num-gpus=0", "--dashboard-host=127.0.0.1"} <= set(shlex.split(command))
    assert exported(command)["RAY_AUTH_MODE"] == "token"
    assert exported(command)["RAY_JOB_STOP_WAIT_TIME_S"] == "120"


@BOTH
def test_every_node_has_the_token_and_the_pinned_versions(file: Path) -> None:
    config = prepared(file)

    assert config["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"
    assert config["file_mounts"]["~/elastic"] == "dist"
    assert re.search(
        r"^wheel:(\n\t| ).*--outdir dist .\n\tcp constraints.txt dist\n\tsed .* > dist/constraints-gpu.txt$",
        MAKEFILE,
        re.MULTILINE | re.DOTALL,
    )
    installs = [c for c in config["head_setup_commands"] + config["worker_setup_commands"] if "pip install" in c]
    assert len(installs) >= 4
    assert all(re.search(r"-c ~/elastic/constraints(-gpu)?\.txt ", c) for c in installs)
    assert exported(start_command(config, "worker"))["RAY_AUTH_MODE"] == "token"


@BOTH
def test_what_is_installed_exists(file: Path) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (extras,) = re.findall(r"\.whl\)\[(.*?)\]", " ".join(prepared(file)["setup_commands"]))

    assert set(extras.split(",")) <= set(project["optional-dependencies"])
    assert f"Python {project['requires-python'].removeprefix('>=')}" in file.read_text() or file is AWS


@BOTH
def test_it_says_what_max_workers_counts_and_what_to_edit(file: Path) -> None:
    text = file.read_text()

    assert re.search(r"# NODES beside the head.*\n?.*--scaling\.max-workers counts GPUs", text)
    assert "EDIT" in text


def test_gpu_nodes_are_spot_first_and_on_demand_where_there_is_none() -> None:
    types = prepared(AWS)["available_node_types"]
    spot, fallback = types["gpu_spot"], types["gpu_on_demand"]

    assert spot["priority"] > fallback["priority"]
    assert spot["min_workers"] == fallback["min_workers"] == 0
    assert spot["max_workers"] >= fallback["max_workers"] > 0
    assert spot["node_config"].pop("InstanceMarketOptions") == {"MarketType": "spot"}
    assert spot["node_config"] == fallback["node_config"]
    assert "InstanceMarketOptions" not in types["head"]["node_config"]
    assert types["head"]["resources"] == {"CPU": 0, "GPU": 0}
    for node_type in types.values():
        (disk,) = node_type["node_config"]["BlockDeviceMappings"]
        assert disk["Ebs"]["VolumeSize"] >= 200
        assert node_type["node_config"]["MetadataOptions"]["HttpTokens"] == "required"


def test_the_autoscaler_is_version_2_and_idle_nodes_outlive_a_set_up() -> None:
    config = prepared(AWS)

    assert exported(start_command(config, "head"))["RAY_enable_autoscaler_v2"] == "1"
    assert config["idle_timeout_minutes"] >= 10
    assert config["provider"]["cache_stopped_nodes"] is False


def documented(page: str) -> list[list[str]]:
    """The commands of a page of docs/, word by word."""
    blocks = re.findall(r"^```bash\n(.*?)^```$", (ROOT / "docs" / page).read_text(), re.MULTILINE | re.DOTALL)
    return [shlex.split(line) for block in blocks for line in block.splitlines()]


def check_entrypoint(words: list[str]) -> None:
    """A job's command line is one that it takes."""
    assert words[:2] == ["python", "-m"]
    module = importlib.import_module(words[2])
    (job_class,) = (c for c in vars(module).values() if isinstance(c, type) and c.__module__ == module.__name__)
    parse(job_class, module.CONFIG, words[3:])


@pytest.mark.parametrize("page", ["clusters.md", "kubernetes.md"])
def test_documented_commands_are_commands(page: str) -> None:
    commands = documented(page)
    assert len(commands) >= 5

    for words in commands:
        if words[0] == "make":
            assert re.search(rf"^{words[1]}:", MAKEFILE, re.MULTILINE)
        elif words[0] == "elastic":
            parser().parse_args(words[1:])
        elif words[0] == "ray":
            check_ray(words[1:])
        elif words[0] == "docker":
            assert "-f" not in words or (ROOT / words[words.index("-f") + 1]).is_file()
        elif words[0] == "aws":
            check_aws(*words[1:])
        else:
            assert words[0] in ("pip", "export", "kubectl")


SHAPES = {"--protocol": "IpProtocol", "--port": "FromPort", "--cidr": "CidrIp", "--source-group": "UserIdGroupPairs"}


def aws_service(name: str) -> Any:
    """What AWS's own description says of a service."""
    import botocore.session

    return botocore.session.get_session().get_service_model(name)


def names_in(shape: Any, depth: int = 3) -> set[str]:
    """The members of a structure, also of those inside it."""
    found: set[str] = set()
    if depth and shape.type_name == "structure":
        for name, member in shape.members.items():
            found |= {name} | names_in(member, depth - 1)
    elif depth and shape.type_name == "list":
        found = names_in(shape.member, depth - 1)
    return found


def check_aws(service: str, operation: str, *options: str) -> None:
    """AWS has the operation with these parameters, and files that are named exist (`storage.json` is the reader's)."""
    model = aws_service(service)
    known = {xform_name(name, "-"): name for name in model.operation_names}
    shape = model.operation_model(known[operation]).input_shape
    given = dict(zip(options[::2], options[1::2]))
    names = {f"--{xform_name(name, '-')}" for name in shape.members}
    for option, value in given.items():
        assert option in names or SHAPES[option] in names_in(shape), option
        if value.startswith("file://docs/"):
            assert json.loads((ROOT / value.removeprefix("file://")).read_text())["Version"] == "2012-10-17"
    required = {f"--{xform_name(name, '-')}" for name in shape.required_members}
    assert required <= given.keys()


def check_instance(node_config: dict[str, Any]) -> None:
    """AWS starts instances with such parameters. (Ray takes the subnets itself, from the zone.)"""
    from botocore.validate import ParamValidator

    shape = aws_service("ec2").operation_model("RunInstances").input_shape
    report = ParamValidator().validate({**node_config, "MinCount": 1, "MaxCount": 1}, shape)
    assert not report.has_errors(), report.generate_report()


def test_aws_would_take_every_node_type_and_the_interfaces_for_efa() -> None:
    config = prepared(AWS)
    for node_type in config["available_node_types"].values():
        check_instance(node_type["node_config"])
    (efa,) = re.findall(r"^```yaml\n(.*?)^```$", (ROOT / "docs" / "clusters.md").read_text(), re.MULTILINE | re.DOTALL)
    spot = dict(config["available_node_types"]["gpu_spot"]["node_config"])
    check_instance({**spot, **yaml.safe_load(efa)})
    with pytest.raises(AssertionError, match="Unknown parameter"):
        check_instance({**spot, "SecurityGroup": []})


def test_roles_zones_and_logs_are_as_documented() -> None:
    config, page = prepared(AWS), (ROOT / "docs" / "clusters.md").read_text()
    types = config["available_node_types"]
    profiles = {name: t["node_config"]["IamInstanceProfile"]["Name"] for name, t in types.items()}
    assert profiles == {"head": "elastic-head", "gpu_spot": "elastic-worker", "gpu_on_demand": "elastic-worker"}
    for name in set(profiles.values()):
        assert f"--instance-profile-name {name} --role-name {name}" in page
    assert all(t["node_config"]["SecurityGroupIds"] for t in types.values()), "else Ray makes one that is open to SSH"
    assert "," not in config["provider"]["availability_zone"]
    assert "/tmp" not in start_command(config, "worker"), "a name that anybody on the machine may take before"
    policy = json.loads((ROOT / "docs" / "aws" / "head.json").read_text())["Statement"]
    operations = set(aws_service("ec2").operation_names)
    assert {a.partition(":")[2] for a in policy[0]["Action"]} <= operations
    assert {"RunInstances", "TerminateInstances"} <= {a.partition(":")[2] for a in policy[0]["Action"]}
    assert (policy[1]["Action"], policy[1]["Resource"]) == ("iam:PassRole", "arn:aws:iam::*:role/elastic-worker")
    submit = next(words for words in documented("clusters.md") if words[:3] == ["ray", "job", "submit"])
    timeout = submit[submit.index("--scaling.request-timeout") + 1]
    assert parse_amount("--scaling.request-timeout", timeout, clock=True).seconds > 2 * 7 * 60, "two set-ups of a node"


def check_ray(words: list[str]) -> None:
    """Ray has the command with these options, its files exist, and what is submitted can be."""
    from ray.scripts import scripts  # takes seconds, with Ray Serve

    command: Any = scripts.cli
    while isinstance(command, click.Group):
        command = command.commands[words.pop(0)]
    entrypoint = words[words.index("--") + 1 :] if "--" in words else []
    context = command.make_context("ray", list(words))
    if "cluster_config_file" in context.params:
        assert (ROOT / context.params["cluster_config_file"]).is_file()
    if entrypoint:
        check_entrypoint(entrypoint)


def test_the_manifest_for_kubernetes_leaves_pods_in_time_and_runs_what_was_tested() -> None:
    text = (ROOT / "docs" / "kubernetes.md").read_text()
    (shown,) = re.findall(r"^```yaml\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    spec = yaml.safe_load(shown)["spec"]
    cluster = spec["rayClusterSpec"]
    (group,) = cluster["workerGroupSpecs"]
    pod = group["template"]["spec"]
    (worker,) = pod["containers"]
    (head,) = cluster["headGroupSpec"]["template"]["spec"]["containers"]

    assert cluster["rayVersion"] == ray.__version__
    assert f"FROM rayproject/ray:{ray.__version__}-" in (ROOT / "docs" / "Dockerfile").read_text()
    assert cluster["authOptions"] == {"mode": "token"}
    assert cluster["enableInTreeAutoscaling"] is True
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    assert {"name": "RAY_JOB_STOP_WAIT_TIME_S", "value": "120"} in head["env"]
    leave = parser().parse_args(worker["lifecycle"]["preStop"]["exec"]["command"][1:])
    assert leave.leave
    assert parse_amount("--grace", leave.grace, clock=True).seconds < pod["terminationGracePeriodSeconds"]
    assert cluster["headGroupSpec"]["template"]["spec"]["terminationGracePeriodSeconds"] > 120
    words = shlex.split(spec["entrypoint"])
    gpus = int(worker["resources"]["limits"]["nvidia.com/gpu"]) * group["maxReplicas"]
    assert int(words[words.index("--scaling.max-workers") + 1]) == gpus
    check_entrypoint(words)


def test_every_worker_on_aws_runs_the_node_watcher() -> None:
    words = shlex.split(start_command(prepared(AWS), "worker").replace("$RAY_HEAD_IP", "192.0.2.1"))
    at = words.index("node-watch")
    arguments = parser().parse_args(words[at : words.index(">>")])

    assert (arguments.cloud, arguments.address) == ("aws", "192.0.2.1:6379")
