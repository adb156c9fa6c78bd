"""Trackers of other projects as callbacks. Their packages are imported when a run begins."""

from __future__ import annotations

import hashlib
import html
import tempfile
from pathlib import Path
from typing import Any

from elastic.observe.callbacks import Callback, figures, need

_MOST = 500  # characters of a parameter's value that every version of MLflow takes


class WandB(Callback):
    """Weights & Biases. A run has one run there, however often it is resumed.

    Args:
        project: by default the one that `WANDB_PROJECT` names.
        init: further arguments of `wandb.init`, such as `entity`, `tags` or `mode="offline"`.

    Raises:
        ConfigError: the package `wandb` is not installed.
    """

    def __init__(self, project: str | None = None, **init: Any):
        need("wandb", "elastic.WandB")
        self._project, self._init = project, init
        self._run: Any = None

    def on_start(self, run: dict[str, Any]) -> None:
        import wandb

        self._run = wandb.init(
            **{
                "project": self._project,
                "name": run["run"],
                "id": hashlib.sha256(run["folder"].encode()).hexdigest()[:16],
                "resume": "allow",
                "reinit": "create_new",  # a sweep has several runs in one process
                "config": {**run["options"], "folder": run["folder"]},
                **self._init,
            }
        )

    def on_row(self, row: dict[str, Any]) -> None:
        self._run.log(figures(row), step=row["step"])

    def on_eval(self, row: dict[str, Any]) -> None:
        self._run.log(figures(row), step=row["step"])

    def on_sample(self, step: int, sample: dict[str, str | bytes]) -> None:
        import wandb

        with tempfile.TemporaryDirectory() as folder:
            shown: dict[str, Any] = {}
            for name, one in sample.items():
                if isinstance(one, bytes):
                    path = Path(folder, f"{len(shown)}.png")
                    path.write_bytes(one)
                    shown[f"sample/{name}"] = wandb.Image(str(path))
                else:
                    shown[f"sample/{name}"] = wandb.Html(f"<pre>{html.escape(one)}</pre>")
            self._run.log(shown, step=step)

    def on_end(self, end: dict[str, Any]) -> None:
        result = end.get("result") or {}
        self._run.summary.update({k: result[k] for k in ("status", "steps", "weights_sha256") if k in result})
        self._run.finish(exit_code=0 if end["status"] in ("finished", "stopped") else 1)


class MLflow(Callback):
    """MLflow. A run has one run there, however often it is resumed.

    Args:
        experiment: its name; made if there is none.
        uri: of the tracking server; by default the one that `MLFLOW_TRACKING_URI` names.

    Raises:
        ConfigError: the package `mlflow` (or `mlflow-skinny`) is not installed.
    """

    def __init__(self, experiment: str = "elastic", uri: str | None = None):
        need("mlflow", "elastic.MLflow")
        self._experiment, self._uri = experiment, uri
        self._client: Any = None
        self._run = ""

    def on_start(self, run: dict[str, Any]) -> None:
        from mlflow.tracking import MlflowClient

        self._client = client = MlflowClient(self._uri)
        known = client.get_experiment_by_name(self._experiment)
        experiment = known.experiment_id if known is not None else client.create_experiment(self._experiment)
        tag = hashlib.sha256(run["folder"].encode()).hexdigest()[:16]
        found = client.search_runs([experiment], f"tags.`elastic.run` = '{tag}'", max_results=1)
        if found:
            self._run = found[0].info.run_id
            client.update_run(self._run, status="RUNNING")
            return
        made = client.create_run(experiment, tags={"elastic.run": tag, "folder": run["folder"]}, run_name=run["run"])
        self._run = made.info.run_id
        for name, value in run["options"].items():
            client.log_param(self._run, name, str(value)[:_MOST])

    def on_row(self, row: dict[str, Any]) -> None:
        from mlflow.entities import Metric

        at = int(row["time"] * 1000)
        self._client.log_batch(self._run, [Metric(name, v, at, row["step"]) for name, v in figures(row).items()])

    def on_eval(self, row: dict[str, Any]) -> None:
        self.on_row(row)

    def on_sample(self, step: int, sample: dict[str, str | bytes]) -> None:
        for name, one in sample.items():
            if isinstance(one, bytes):
                with tempfile.TemporaryDirectory() as folder:
                    path = Path(folder, f"{name}.png")
                    path.write_bytes(one)
                    self._client.log_artifact(self._run, str(path), f"samples/{step:08d}")
            else:
                self._client.log_text(self._run, one, f"samples/{step:08d}/{name}.txt")

    def on_end(self, end: dict[str, Any]) -> None:
        done = {"finished": "FINISHED", "stopped": "KILLED"}.get(end["status"], "FAILED")
        self._client.set_terminated(self._run, done)
