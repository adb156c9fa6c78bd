"""Parameters that passes write to, from the beginning or long after the trials, are found in the step where it begins,
or, where no counter shows it, in the next one that looks."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch
from torch import nn

from elastic.errors import ConfigError
from elastic.parallel.writes import Writes
from tests.forked import configure, train
from tests.tiny_jobs import CLASSES, FEATURES, Plain

WRITTEN = "is written to in forward or backward passes, so its values depend on which worker runs which microbatch"


def test_what_passes_write_to_is_found_by_counters_and_addresses():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    writes = Writes(model, allowed=["0.bias"], exact=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        writes.begin()
        model(torch.ones(1, 2)).sum().backward()
        with torch.no_grad():
            model[0].bias.zero_()
        writes.check()
        optimizer.step()
    for write in (lambda: model[1].bias.detach().zero_(), lambda: setattr(model[1].bias, "data", torch.ones(2))):
        writes.begin()
        write()
        with pytest.raises(ConfigError, match=f"parameter 1.bias {WRITTEN}"):
            writes.check()


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x):
        return self.linear(x).relu()


@dataclass
class Writing(Plain):
    """Writes to a parameter in each pass from step `begins` on."""

    how: str = field(default="", metadata={"help": "how"})
    begins: int = field(default=1, metadata={"help": "from this step on"})

    blocks = ("Block",)

    def __post_init__(self):
        self.step = 1

    def after_step(self, model, step):
        self.step = step + 1

    def write(self, p, data=False):
        if self.step >= self.begins:
            if self.how == "storage":
                p.detach().numpy().__imul__(0.99)
                return
            with torch.no_grad():
                (p.data if data else p).mul_(0.99)

    def model(self):
        model = nn.Sequential(nn.Linear(FEATURES, 8), Block(), Block(), nn.Linear(8, CLASSES))
        model.train(True)
        if self.how == "hook":
            model[1].register_forward_hook(lambda m, *_: self.write(m.linear.bias))
        if self.how == "pre-hook":
            model[1].register_forward_pre_hook(lambda m, *_: self.write(m.linear.weight))
        if self.how == "root hook":
            model.register_forward_hook(lambda m, *_: self.write(m[3].bias))
        if self.how == "backward hook":
            model[1].register_full_backward_hook(lambda m, *_: self.write_back(m.linear.weight))
        if self.how == "accumulated":
            model[0].weight.register_post_accumulate_grad_hook(self.write_back)
        return model

    def write_back(self, p):
        with torch.no_grad():
            p.mul_(0.99)

    def logits(self, model, features, ids):
        if self.how in ("pass", "data", "storage"):
            self.write(model[0].weight, data=self.how == "data")
        return model(features)


@pytest.mark.processes
@pytest.mark.usefixtures("fork_server")
@pytest.mark.parametrize(
    ("how", "begins", "strategy", "said", "steps"),
    [
        ("pass", 4, "ddp", f"parameter 0.weight {WRITTEN}", 3),
        ("data", 5, "ddp", f"parameter 0.weight {WRITTEN}", 4),
        ("accumulated", 1, "ddp", f"parameter 0.weight {WRITTEN}", 0),
        pytest.param("backward hook", 1, "ddp", f"parameter 1.linear.weight {WRITTEN}", 0, marks=pytest.mark.long),
        ("hook", 4, "fsdp", f"parameter 1.linear.bias {WRITTEN}", 3),
        pytest.param("pre-hook", 4, "fsdp", f"parameter 1.linear.weight {WRITTEN}", 3, marks=pytest.mark.long),
        pytest.param("root hook", 4, "fsdp", f"parameter 3.bias {WRITTEN}", 3, marks=pytest.mark.long),
        pytest.param("backward hook", 1, "fsdp", f"parameter 1.linear.weight {WRITTEN}", 0, marks=pytest.mark.long),
        pytest.param("data", 5, "fsdp", f"parameter 0.weight {WRITTEN}", 4, marks=pytest.mark.long),
        ("storage", 5, "ddp", f"parameter 0.weight {WRITTEN}", 15),
        ("hook", 1, "fsdp", "loss() changes parameters of the model (1.linear.bias) while they are gathered", 0),
        pytest.param(
            "pre-hook",
            1,
            "fsdp",
            "loss() changes parameters of the model (1.linear.weight) while they are gathered",
            0,
            marks=pytest.mark.long,
        ),
    ],
)
def test_writes_in_passes_end_the_run_by_name(how, begins, strategy, said, steps, tmp_path):
    options = {"run__exactness": "fast", "run__duration": "20st", "parallel__strategy": strategy}
    ran = train(Writing(how=how, begins=begins), configure(tmp_path, "run", **options), 2)
    assert said in (ran.failure or "no failure")
    assert len(ran.history) == steps
