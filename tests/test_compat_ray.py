"""What `elastic.compat` relies on in Ray, name by name, so that a new Ray fails here first, without a cluster."""

from __future__ import annotations

import builtins
import inspect
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import ray
from ray._private import ray_constants, services
from ray._private import worker as ray_worker
from ray._private.authentication import authentication_token_setup as token_setup
from ray._private.grpc_utils import init_grpc_channel
from ray._private.node import Node
from ray._private.state import state as ray_state
from ray._private.utils import get_runtime_env_info
from ray._private.worker import Worker
from ray._raylet import InnerGcsClient
from ray.cluster_utils import Cluster
from ray.core.generated.autoscaler_pb2 import DrainNodeReason, GetClusterStatusReply
from ray.core.generated.gcs_pb2 import GcsNodeInfo
from ray.core.generated.node_manager_pb2 import PrestartWorkersRequest
from ray.core.generated.node_manager_pb2_grpc import NodeManagerServiceServicer
from ray.experimental import internal_kv
from ray.runtime_env import RuntimeEnv

from elastic.cluster import fork_server
from elastic.compat import ray as compat

# Ray Train and Tune take seconds to import: only where they are asked.


def parameters(function: object) -> list[str]:
    return list(inspect.signature(function).parameters)  # type: ignore[arg-type]


def test_this_is_the_ray_that_was_tested() -> None:
    assert ray.__version__.startswith(compat.TESTED)


@pytest.mark.processes
def test_a_controller_imports_neither_torch_nor_ray_train() -> None:
    """Each import takes seconds, at the beginning of every run."""
    program = "import sys, elastic.cluster.controller; print({'torch', 'ray.train'} & set(sys.modules))"
    ran = subprocess.run([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, timeout=60, check=True)
    assert ran.stdout == "set()\n"


def test_a_raylet_is_known_by_its_command_and_an_idle_worker_by_its_name() -> None:
    """`cluster.standing` and `cluster.fork_server` read them without Ray."""
    source = inspect.getsource(services.start_raylet)
    for word in ("--python_worker_command={", "--node_id={", "--gcs-address={"):
        assert word in source
    assert services.RAYLET_EXECUTABLE.endswith("raylet/raylet")
    assert ray_constants.SETUP_WORKER_FILENAME == "setup_worker.py"
    assert Path(services.RAY_PATH, "_private", "workers", "setup_worker.py").is_file()
    assert fork_server._IDLE.decode() == ray_constants.WORKER_PROCESS_TYPE_IDLE_WORKER
    assert ray.JobID.nil().hex() == fork_server._NO_JOB
    assert b"RAY_LD_PRELOAD_ON_WORKERS" in Path(services.RAYLET_EXECUTABLE).read_bytes()


def test_a_raylet_starts_workers_ahead_for_an_environment() -> None:
    fields = {field.name for field in PrestartWorkersRequest.DESCRIPTOR.fields}
    assert fields == {"language", "job_id", "runtime_env_info", "keep_alive_duration_secs", "num_workers"}
    assert not PrestartWorkersRequest().HasField("job_id")  # then it is for any job
    assert "PrestartWorkers" in vars(NodeManagerServiceServicer)
    assert parameters(get_runtime_env_info)[0] == "runtime_env"
    assert parameters(init_grpc_channel)[0] == "address"
    info = get_runtime_env_info(RuntimeEnv(py_executable="python x"))
    assert info.serialized_runtime_env == '{"py_executable": "python x"}'


def test_a_worker_actor_takes_what_we_give_it() -> None:
    from ray.train.v2._internal.execution.context import DistributedContext, TrainRunContext
    from ray.train.v2._internal.execution.worker_group.poll import WorkerStatus
    from ray.train.v2._internal.execution.worker_group.worker import ActorMetadata, RayTrainWorker

    wanted = {
        "train_run_context",
        "distributed_context",
        "synchronization_actor",
        "storage_context",
        "worker_callbacks",
        "controller_actor",
    }
    assert wanted <= set(parameters(RayTrainWorker.init_train_context))
    assert parameters(RayTrainWorker.run_train_fn) == ["self", "train_fn_ref"]
    assert parameters(RayTrainWorker.poll_status) == ["self"]
    assert {"node_id", "pid"} <= set(ActorMetadata.__dataclass_fields__)
    fields = set(WorkerStatus.__dataclass_fields__)
    assert {"running", "error", "training_report", "return_value"} <= fields
    assert parameters(TrainRunContext) == [
        "run_config",
        "train_loop_config",
        "scaling_config",
        "backend_config",
        "dataset_config",
    ]
    assert "train_fn_ref.get()" in inspect.getsource(RayTrainWorker.run_train_fn)
    assert set(DistributedContext.__dataclass_fields__) == {
        "world_rank",
        "world_size",
        "local_rank",
        "local_world_size",
        "node_rank",
    }


def test_ray_tells_a_process_that_died_from_a_node_that_it_calls_dead() -> None:
    texts = Path(services.GCS_SERVER_EXECUTABLE).read_bytes()
    assert f"The actor is dead because {compat.PROCESS_DIED}".encode() in texts
    assert b"The actor died because its node has died" in texts


def test_ray_tells_how_a_process_ended() -> None:
    for hints in ("There are some potential root causes.", "Some common causes include: (1) the OOM killer"):
        text = (
            "The actor is dead because its worker process has died. Worker exit type: SYSTEM_ERROR Worker exit detail: "
            f"Worker unexpectedly exits with a connection error code 2. End of file. {hints}"
        )
        assert compat.how_it_ended(text) == "Worker unexpectedly exits with a connection error code 2. End of file"
    assert compat.how_it_ended("The actor died.") == "ended without a word"


def test_ray_tells_which_nodes_go_away_and_what_is_free_on_each() -> None:
    assert parameters(ray_state.get_draining_nodes) == []
    assert parameters(ray_state.available_resources_per_node) == []


def test_a_head_starts_its_parts_and_its_workers_as_we_replace_them() -> None:
    assert '"workers",\n                ray_constants.SETUP_WORKER_FILENAME,' in inspect.getsource(Node.__init__)
    starts = inspect.getsource(Node.start_head_processes)
    assert "self.start_monitor()" in starts
    assert "self.start_api_server(" in starts
    names = Node.start_monitor, Node.start_api_server, ray_constants.SETUP_WORKER_FILENAME
    with compat.bare_nodes("/a/script.py"):
        assert os.path.join("folder", ray_constants.SETUP_WORKER_FILENAME) == "/a/script.py"
        assert Node.start_monitor(None) is Node.start_api_server(None, include_dashboard=False) is None  # type: ignore[arg-type,call-arg]
    with compat.bare_nodes(None):
        assert names[2] == ray_constants.SETUP_WORKER_FILENAME
    assert names == (Node.start_monitor, Node.start_api_server, ray_constants.SETUP_WORKER_FILENAME)


def test_ray_tells_its_session_folder() -> None:
    assert callable(Node.get_session_dir_path)
    assert "self.node" in inspect.getsource(Worker.__init__)


def test_an_actors_handle_has_its_id() -> None:
    assert isinstance(inspect.getattr_static(ray.actor.ActorHandle, "_actor_id"), property)
    assert "__ray_ready__" in inspect.getsource(ray.actor)


def test_nodes_can_be_listed_and_drained_without_a_driver() -> None:
    asked: list[tuple[object, ...]] = []

    class Client:
        """Takes what GcsClient hands on to InnerGcsClient."""

        def get_all_node_info(self, timeout: float, state_filter: int) -> dict[bytes, GcsNodeInfo]:
            assert state_filter == GcsNodeInfo.GcsNodeState.Value("ALIVE")
            return {ray.NodeID(b"n" * 28): GcsNodeInfo(node_manager_address="10.0.0.7")}  # type: ignore[dict-item]

        def drain_node(self, *arguments: object, timeout: float) -> tuple[bool, str]:
            asked.append(arguments)
            return True, ""

    assert compat.living_nodes(Client(), 1.0) == {(b"n" * 28).hex(): "10.0.0.7"}
    assert compat.drain_node(Client(), "6e", "spot", 17, 1.0) == (True, "")
    assert asked == [("6e", DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION"), "spot", 17)]
    for name in ("get_all_node_info", "drain_node"):
        assert callable(getattr(InnerGcsClient, name))


def test_this_machines_nodes_clusters_and_address_are_found() -> None:
    assert parameters(services.node_ip_address_from_perspective) == ["address"]
    assert isinstance(compat.node_ids_here(), set)
    assert isinstance(compat.cluster_addresses_here(), set)
    assert compat.address_file().name == "ray_current_cluster"


def test_the_head_keeps_values_by_key() -> None:
    assert parameters(internal_kv._internal_kv_put) == ["key", "value", "overwrite", "namespace"]
    for name, first in (("get", "key"), ("list", "prefix"), ("del", "key")):
        wanted = parameters(getattr(internal_kv, f"_internal_kv_{name}"))
        assert wanted[0] == first
        assert "namespace" in wanted


def test_several_nodes_can_be_started_on_this_machine() -> None:
    assert {"initialize_head", "head_node_args"} <= set(parameters(Cluster.__init__))
    assert {"wait"} <= set(parameters(Cluster.add_node))
    assert all(callable(getattr(Cluster, name)) for name in ("wait_for_nodes", "shutdown"))


def test_what_an_autoscaler_can_start_and_could_not_start_is_asked_for() -> None:
    assert parameters(ray_state.get_cluster_config) == []
    assert callable(InnerGcsClient.get_cluster_status)
    told = GetClusterStatusReply().autoscaling_state
    told.failed_instance_requests.add(ray_node_type_name="small", reason="none left")
    told.infeasible_resource_requests.add(resources_bundle={"CPU": 1.0})
    told.infeasible_gang_resource_requests.add().requests.add(resources_bundle={"CPU": 2.0})
    packed = told.infeasible_gang_resource_requests.add().bundle_selectors.add()
    for _ in range(2):
        packed.resource_requests.add(resources_bundle={"GPU": 1.0})

    found = compat.read_autoscaling(told)

    assert found.failed == (("small", "none left"),)
    assert found.unserved == (({"CPU": 1.0},), ({"CPU": 2.0},), ({"GPU": 1.0}, {"GPU": 1.0}))
    assert compat.read_autoscaling(GetClusterStatusReply().autoscaling_state) == compat.Autoscaling()


def test_a_driver_shows_lines_of_other_processes_through_one_function() -> None:
    assert parameters(ray_worker.print_worker_logs) == ["data", "print_file", "ignore_prefix"]
    for prints in (ray_worker.print_to_stdstream, Worker.print_logs, ray_worker.listen_error_messages):
        source = inspect.getsource(prints)
        assert "print_worker_logs(" in source or "print_to_stdstream(" in source or "dispatcher.emit(" in source
    with compat.worker_lines_chosen(lambda source, lines: []):
        assert ray_worker.print_worker_logs({"pid": 7, "lines": ["hello"]}, None) is None


def test_tokens_are_looked_for_by_two_functions_that_say_so_to_one_logger() -> None:
    assert "warn_if_disabled" in parameters(token_setup.maybe_enable_token_auth_if_token_available)
    assert "create_token_if_missing" in parameters(token_setup.ensure_token_if_auth_enabled)
    assert token_setup.logger.name == compat.TOKEN_LOGGER


def test_tunes_controller_has_what_sweeps_use_of_it() -> None:
    from ray.tune.execution.tune_controller import TrialRunnerWrapper, TuneController

    from elastic.compat import ray_tune

    assert {
        "search_alg",
        "scheduler",
        "storage",
        "callbacks",
        "reuse_actors",
        "resource_manager_factory",
        "checkpoint_period",
    } <= set(parameters(TuneController.__init__))
    source = inspect.getsource(TuneController)
    assert "self._class_cache.get(trainable_cls)" in source
    assert "if self._print_trial_errors:" in source
    assert parameters(TuneController._schedule_trial_train) == ["self", "trial"]
    assert parameters(TuneController.pause_trial) == ["self", "trial", "should_checkpoint"]
    assert "return self._trials" in inspect.getsource(TuneController.get_trials)
    assert "self._tune_controller = tune_controller" in inspect.getsource(TrialRunnerWrapper)
    controller: Any = object()
    assert ray_tune.controller_of(controller) is controller
    assert ray_tune.controller_of(TrialRunnerWrapper(controller, "", set())) is controller


def test_a_trial_that_is_neither_continued_nor_stopped_keeps_its_actor() -> None:
    from ray.tune.execution.tune_controller import TuneController

    execute = inspect.getsource(TuneController._execute_action)
    assert "elif decision == TrialScheduler.NOOP:\n            pass" in execute


def test_a_worker_prints_with_pythons_own_print_and_lines_are_heard_before_some_are_left_out() -> None:
    from ray._private.ray_logging import global_worker_stdstream_dispatcher as dispatcher
    from ray.train.v2._internal.logging import patch_print

    assert patch_print._original_print is builtins.print
    assert "builtins.print = redirected_print" in inspect.getsource(patch_print.patch_print_function)
    heard: list[Any] = []
    with compat.worker_lines_heard(lambda *told: heard.append(told)):
        dispatcher.emit({"ip": "10.0.0.1", "pid": 7, "lines": ["hello"], "is_err": False})
    dispatcher.emit({"ip": "10.0.0.1", "pid": 7, "lines": ["later"], "is_err": False})
    assert heard == [("10.0.0.1", "7", ["hello"])]
