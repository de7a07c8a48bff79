"""What torch.compile has recorded."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch


def recording(backend: str, found: Counter[str]) -> Callable[..., Any]:
    """A backend of torch.compile that counts this library's operations in its graphs, by name."""

    def compiler(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
        for module in graph.modules():
            for node in getattr(getattr(module, "graph", None), "nodes", ()):
                if (
                    isinstance(node.target, torch._ops.OpOverload)
                    and node.target.namespace == "flamingo_kernels"
                ):
                    found[node.target.name().split("::")[1].split(".")[0]] += 1
        return torch._dynamo.lookup_backend(backend)(graph, inputs)

    return compiler
