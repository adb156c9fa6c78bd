"""An actor and a critic with an optimizer each, on the pole on a cart of Barto, Sutton and Anderson (1983).

The environment is a few lines of torch, so that `loss` can play. Samples are the beginnings of games, with the chances
of each move: whoever plays a game plays the same one, and actor and critic see the same games.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import elastic
from elastic import BatchOptions, EvalOptions, OptimOptions, RunOptions, TrainConfig

CONFIG = TrainConfig(
    run=RunOptions(duration="20ep"),
    batch=BatchOptions(global_size=32, microbatches=8),
    optim=OptimOptions(clip_norm=1.0),
    eval=EvalOptions(every="5ep"),
)


@dataclass
class ActorCritic(elastic.Job):
    """The critic learns how long a pole will stand; the actor, to choose what the critic did not expect."""

    lr: float = field(default=1e-2, metadata={"help": "learning rate of the actor; the critic's is twice that"})
    moves: int = field(default=60, metadata={"help": "of a game, at most"})
    games: int = field(default=256, metadata={"help": "of an epoch"})
    discount: float = field(default=0.97, metadata={"help": "of what comes a move later"})

    phases = ("critic", "actor")

    def model(self):
        from torch import nn

        def network(outputs: int):
            return nn.Sequential(nn.Linear(4, 32), nn.Tanh(), nn.Linear(32, outputs))

        class Both(nn.Module):
            def __init__(self):
                super().__init__()
                self.actor, self.critic = network(2), network(1)

            def forward(self, states):
                """The actor's logits, float32 (..., 2), and what the critic expects, float32 (...)."""
                return self.actor(states), self.critic(states)[..., 0]

        return Both()

    def optimizer(self, model):
        import torch

        actor, critic = model.actor.parameters(), model.critic.parameters()
        return {"actor": torch.optim.Adam(actor, lr=self.lr), "critic": torch.optim.Adam(critic, lr=2 * self.lr)}

    def train_data(self):
        return Beginnings(self.games, self.moves)

    def eval_data(self):
        return Beginnings(64, self.moves)

    def loss_critic(self, model, batch):
        states, _, alive, returns = self.play(model, batch)
        wrong = (model.critic(states)[..., 0] - returns).square() * alive
        return wrong.sum(), alive.sum(), {}

    def loss_actor(self, model, batch):
        import torch

        states, actions, alive, returns = self.play(model, batch)
        better = (returns - model.critic(states)[..., 0]).detach()
        chances = torch.log_softmax(model.actor(states), -1).gather(-1, actions[..., None])[..., 0]
        return -(chances * better * alive).sum(), alive.sum(), {"moves": (alive.sum(), alive.shape[1])}

    def evaluate(self, model, batch):
        _, _, alive, _ = self.play(model, batch)
        return -alive.sum(), alive.shape[1], {"moves": alive.sum()}

    def play(self, model, batch):
        """Games of the present actor.

        Returns:
            For each move (T) and game (N): states float32 (T, N, 4), actions int64 (T, N), whether the pole still stood
            float32 (T, N), and the discounted number of moves from there on float32 (T, N).
        """
        import torch

        state, chances = batch
        states, actions, alive = [], [], []
        stands = torch.ones_like(chances[:, 0])
        with torch.no_grad():
            for chance in chances.unbind(1):
                right = (chance < torch.softmax(model.actor(state), -1)[:, 1]).long()
                states.append(state)
                actions.append(right)
                alive.append(stands)
                state = moved(state, right)
                stands = stands * ((state[:, 0].abs() < 2.4) & (state[:, 2].abs() < 0.21)).float()
            total, returns = torch.zeros_like(stands), []
            for stood in reversed(alive):
                total = stood + self.discount * total
                returns.append(total)
        return torch.stack(states), torch.stack(actions), torch.stack(alive), torch.stack(returns[::-1])


def moved(state, right):
    """The states, float32 (N, 4): place, speed, angle and its speed, 20 ms after a push to the right or to the left."""
    import torch

    x, v, angle, spin = state.unbind(1)
    force = 20.0 * right - 10.0
    sin, cos = angle.sin(), angle.cos()
    push = (force + 0.05 * spin.square() * sin) / 1.1
    turn = (9.8 * sin - cos * push) / (0.5 * (4 / 3 - 0.1 * cos.square() / 1.1))
    slide = push - 0.05 * turn * cos / 1.1
    return torch.stack([x + 0.02 * v, v + 0.02 * slide, angle + 0.02 * spin, spin + 0.02 * turn], 1)


class Beginnings:
    """The state in which a game begins, float32 (4), and a number from 0 to 1 for each move, float32 (moves)."""

    def __init__(self, games: int, moves: int):
        self.games, self.moves = games, moves

    def __len__(self):
        return self.games

    def __getitem__(self, index):
        import torch

        return torch.rand(4) * 0.1 - 0.05, torch.rand(self.moves)


if __name__ == "__main__":
    elastic.main(ActorCritic, CONFIG)
