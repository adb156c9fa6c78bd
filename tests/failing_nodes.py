"""Nodes of Ray's fake provider that cannot be started while a file exists."""

from __future__ import annotations

import os
from typing import Any

from ray.autoscaler._private.fake_multi_node.node_provider import FakeMultiNodeProvider


class Failing(FakeMultiNodeProvider):
    """Loaded by Ray's autoscaler."""

    def create_node_with_resources_and_labels(self, *arguments: Any, **more: Any) -> Any:
        if os.path.exists(self.provider_config["fails_while"]):
            raise RuntimeError("InsufficientInstanceCapacity: no spot capacity in zone a")
        return super().create_node_with_resources_and_labels(*arguments, **more)
