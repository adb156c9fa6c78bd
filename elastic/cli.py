"""The `elastic` command. Heavy modules are imported only by the verbs that need them."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from elastic import __version__
from elastic.cluster import node_watch
from elastic.errors import ConfigError, ElasticError, error_text
from elastic.observe.streams import sturdy_output
from elastic.redact import printable
from elastic.tools.control import add_control
from elastic.tools.doctor import add_doctor
from elastic.tools.places import USUAL, find_run
from elastic.tools.showing import add_showing
from elastic.tools.verbs import add_verbs, run

if TYPE_CHECKING:
    from elastic.tools.machine import Finding

TEMPLATE = '''\
"""A first job: is a point inside the ring?  python {file} --help"""

import torch
from torch import nn
from torch.nn import functional as F

import elastic


class Ring(elastic.Job):
    def model(self):
        return nn.Sequential(nn.Linear(2, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 2))

    def optimizer(self, model):
        return torch.optim.AdamW(model.parameters(), lr=3e-3)

    def train_data(self):  # map-style: samples by index
        x = torch.rand(4000, 2, generator=torch.Generator().manual_seed(0)) * 2 - 1
        return list(zip(x, ((x.norm(dim=1) - 0.6).abs() < 0.2).long()))

    def eval_data(self):
        x = torch.rand(1000, 2, generator=torch.Generator().manual_seed(1)) * 2 - 1
        return list(zip(x, ((x.norm(dim=1) - 0.6).abs() < 0.2).long()))

    def loss(self, model, batch):  # the loss summed over the batch, its weight, further sums
        x, y = batch
        logits = model(x)
        return F.cross_entropy(logits, y, reduction="sum"), len(y), {{"accuracy": (logits.argmax(1) == y).sum()}}


if __name__ == "__main__":
    elastic.main(Ring)
'''


def init(file: str) -> str:
    """Write a first job.

    Raises:
        ConfigError: the file exists already, or its folder does not exist.
    """
    path = Path(file)
    if path.suffix != ".py":
        raise ConfigError(f"the job's file is {file!r}; give a name that ends in .py")
    if not path.parent.is_dir():
        raise ConfigError(f"the job's file is {file!r}, but there is no folder {str(path.parent)!r}; make it first")
    try:
        with path.open("x") as f:
            f.write(TEMPLATE.format(file=path.name))
    except FileExistsError:
        raise ConfigError(f"{file} exists and is left as it is; give another name") from None
    except OSError as error:
        why = error.strerror
        raise ConfigError(f"{file} cannot be written ({why}); give a folder that you may write to") from error
    return f"wrote {file}; run it with: python {file}"


def _init(arguments: argparse.Namespace) -> int:
    print(init(arguments.file))
    return 0


def _evaluate(arguments: argparse.Namespace) -> int:
    from elastic.evaluation import run

    return run(arguments)


def _examine_cluster(address: str, storage: Sequence[str]) -> list[Finding]:
    from elastic.cluster.examining import examine_cluster

    return examine_cluster(address, storage)


def parser() -> argparse.ArgumentParser:
    """All verbs and their options."""
    parser = argparse.ArgumentParser(prog="elastic", description="PyTorch training on Ray that does not stop.")
    parser.add_argument("--version", action="version", version=f"elastic-train {__version__}")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    verb = verbs.add_parser("init", help="write a small job that runs as it is")
    verb.add_argument("file", help="for example job.py")
    verb.set_defaults(run=_init)
    verbs.add_parser("sweep", help="search for the options of a job: elastic sweep job.py --help", add_help=False)
    add_control(verbs)
    verb = verbs.add_parser("evaluate", help="evaluate a checkpoint of a run on the data that its job holds out")
    verb.add_argument("url", metavar="RUN", type=find_run, help=f"folder or URL of a run, or its name in {USUAL}")
    verb.add_argument("--job", required=True, metavar="FILE", help="the job's file, such as job.py, or its module")
    verb.add_argument("--step", type=int, help="of this checkpoint (default the newest)")
    verb.add_argument("--accelerator", choices=("cpu", "gpu"), default="cpu", help="where to compute (default cpu)")
    verb.add_argument("--json", action="store_true", help="print JSON")
    verb.epilog = "Options of the job (--job.NAME VALUE) are those of the run unless they are given too."
    verb.set_defaults(run=_evaluate, rest=[])
    add_verbs(verbs)
    add_showing(verbs)
    add_doctor(verbs, _examine_cluster)
    node_watch.add_verb(verbs)
    return parser


def _read(line: Sequence[str]) -> argparse.Namespace:
    """Parse the line. Only verbs with `rest` take options of a job besides their own."""
    reader = parser()
    arguments, rest = reader.parse_known_args(line)
    if rest and not hasattr(arguments, "rest"):
        reader.error(f"unrecognized arguments: {' '.join(rest)}")
    arguments.rest = rest
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; returns the exit code."""
    line = sys.argv[1:] if argv is None else list(argv)
    if line[:1] == ["sweep"]:
        from elastic.sweep.command import main as sweep

        sweep(line[1:], program="elastic sweep")
    with sturdy_output(patience_s=None) as out:
        arguments = _read(line)
        try:
            code = run(arguments)
        except ElasticError as error:
            print(printable(error_text(error)), file=sys.stderr)
            return error.exit_code
    lost = out.broken is not None and not isinstance(out.broken, BrokenPipeError)  # a broken pipe is usual: `| head`
    return 1 if lost else code


if __name__ == "__main__":
    raise SystemExit(main())
