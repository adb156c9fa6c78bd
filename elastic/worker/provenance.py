"""Tracks whether the bits of a state are those of one undisturbed run: with what each session of the run computed
it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from elastic.checkpoint.format import Manifest
from elastic.data.memory import Remembered
from elastic.errors import ConfigError
from elastic.likeness import DATA, DEVICE, data_change, refusal
from elastic.values import same, show
from elastic.worker.weights import weights_alone


class Provenance:
    """With what this session of the run computes, and what that changed since earlier sessions.

    Args:
        exact: the run promises bits.
        device: the result of `parallel.device.describe`.
        data: the result of `data.identity.identify`.
        options: the result options.
        remembered: how far samples depend on which others were fetched before.
        held: a digest of the models that the job holds besides the one that it trains.
        allowed: names of what may change.
    """

    def __init__(
        self,
        *,
        exact: bool,
        device: Mapping[str, Any],
        data: Mapping[str, Any],
        options: Mapping[str, Any],
        remembered: Remembered,
        held: str,
        allowed: tuple[str, ...],
    ):
        self._exact, self._device, self._data = exact, dict(device), dict(data)
        self._options, self._allowed = dict(options), allowed
        self._held = held
        self.broken: list[str] = []  # reasons why the bits are not those of one run
        self._reported: set[str] = set()
        self._remarks: list[str] = []
        if data.get("varies"):
            varies = "samples of train_data() are others each time they are fetched, under one seed"
            (self.broken if exact else self._remarks).append(varies)
        elif remembered.broken:
            (self.broken if exact else self._remarks).extend(remembered.broken)
        elif not data["found"]:
            self._remarks.append("no sample of train_data() can be compared: whether data change is not seen")
        if remembered.counts:
            names = ", ".join(remembered.counts[:5])
            self._remarks.append(f"{names} changed as samples were fetched; what goes by it depends on the worker")

    def header(self) -> dict[str, Any]:
        """The values for a checkpoint's manifest."""
        return {
            "device": self._device,
            "data": self._data,
            "options": self._options,
            "held": self._held,
            "exactness_broken": self.broken,
        }

    def goes_on_from(self, manifest: Manifest) -> None:
        """The state comes from this checkpoint.

        Raises:
            ConfigError: it was trained with other data, which may not change.
        """
        made, step = manifest.world, manifest.step
        if step == 0 or weights_alone(manifest.values):
            return  # the checkpoint holds no trained state
        change = data_change(self._data, made.get("data"), f"when step {step} was saved")
        if change and DATA not in self._allowed:
            raise ConfigError(refusal(change))
        if self._exact:
            self.broken = list(dict.fromkeys([*self._earlier(made, step), *self.broken]))

    def _earlier(self, made: Mapping[str, Any], step: int) -> list[str]:
        earlier = [str(reason) for reason in made.get("exactness_broken", ())]
        self._reported.update(earlier)
        device, options = made.get("device"), made.get("options")
        if not isinstance(device, dict) or not isinstance(options, dict):
            return [*earlier, f"what step {step} was computed with is not known: an older version saved it"]
        for key in sorted({*device} & {*self._device}):  # an older version had fewer keys
            if device.get(key) != self._device.get(key):
                what = f"{DEVICE.get(key, key)} was {device.get(key)!r} and is {self._device.get(key)!r}"
                earlier.append(f"{what} from step {step} on")
        for key in sorted({*options} & {*self._options}):
            if not same(options[key], self._options[key]):
                earlier.append(
                    f"--{key} was {show(options[key])} and is {show(self._options[key])} from step {step} on"
                )
        if made.get("held", self._held) != self._held:
            earlier.append(
                f"the models that the job holds beside the one it trains have other values from step {step} on"
            )
        change = data_change(self._data, made.get("data"), f"up to step {step}", exact=True)
        return [*earlier, change] if change else earlier

    def lose(self, reason: str) -> bool:
        """Bits are not those of one run, for this reason; returns whether that was not known."""
        new = self._exact and reason not in self.broken
        if new:
            self.broken.append(reason)
        return new

    def remark(self, sentence: str) -> bool:
        """Something is to be told that breaks nothing that this run promises; returns whether that was not known."""
        new = sentence not in (*self._remarks, *self.broken)
        if new:
            self._remarks.append(sentence)
        return new

    def agree(self, broken: list[str]) -> list[tuple[str, str]]:
        """Take over the reasons known to the member that had the newest state.

        Returns:
            events to record now, each once: (kind, detail).
        """
        self.broken = list(dict.fromkeys([*self.broken, *broken]))
        found = [("notice", text) for text in self._remarks] + [("exactness_lost", text) for text in self.broken]
        new = [(kind, text) for kind, text in found if text not in self._reported]
        self._reported.update(text for _, text in new)
        return new
