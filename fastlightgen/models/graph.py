"""ComfyUI: what its code assumes of a family's networks, and workflows in the form that its API and its canvas take."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from fastlightgen.models.keys import Table

Link = list  # [number of a node, number of one of its outputs]
PROMPT = "a red fox runs through fresh snow"


@dataclass
class Graph:
    """A workflow: nodes by number, each with its class and inputs."""

    nodes: dict[str, dict[str, Any]] = field(default_factory=dict)

    def add(self, kind: str, **inputs: Any) -> Link:
        """Add a node; return the link to its first output."""
        number = str(len(self.nodes) + 1)
        self.nodes[number] = {"class_type": kind, "inputs": inputs}
        return [number, 0]


def output(node: Link, number: int) -> Link:
    """A link to another output of a node."""
    return [node[0], number]


def prompts(graph: Graph, clip: Link) -> tuple[Link, Link]:
    """A prompt and the empty one, both encoded."""
    positive = graph.add("CLIPTextEncode", text=PROMPT, clip=clip)
    return positive, graph.add("CLIPTextEncode", text="", clip=clip)


def picture(graph: Graph) -> Link:
    """The first frame."""
    return graph.add("LoadImage", image="first.png")


def embedded(graph: Graph, image: Link, clip_vision: str) -> Link:
    """Its embedding by the image encoder in this file."""
    eye = graph.add("CLIPVisionLoader", clip_name=clip_vision)
    return graph.add("CLIPVisionEncode", clip_vision=eye, image=image, crop="none")


@dataclass(frozen=True)
class Inputs:
    """What a family's part of a workflow leaves for the sampler."""

    positive: Link
    negative: Link
    latent: Link
    vae: Link


@dataclass(frozen=True)
class Comfy:
    """What ComfyUI needs to run a family's networks."""

    assumes: Mapping[str, Any]  # key of config.json -> the value that its code takes for granted
    inputs: Callable[[Graph, Mapping, tuple[int, int, int], float], Inputs]  # of (config, (H, W, frames), guidance)
    gguf: str  # the family's name in GGUF files
    float8: bool  # can its loader read float8 weights of this family by the names in the file?
    keys: Callable[[Mapping], Table] | None = None  # key table of its files; None: the original repository's


def size_of(shape: tuple[int, int, int]) -> dict[str, int]:
    height, width, frames = shape
    return {"width": width, "height": height, "length": frames, "batch_size": 1}
