"""Saved quantized models read back one layer at a time, for those who write them in another form.

The model is made empty; a layer has its tensors only while it is asked for, so that the peak is one layer.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from safetensors import safe_open

from dq.disk import read_json
from dq.errors import DQError
from dq.host import files, header, saved
from dq.layers import packed_layers
from dq.layers.memory import page_out
from dq.model import swap
from dq.plan import LayerPlan, Plan


class SavedModel:
    """One diffusers model of a saved pipeline, or a lone one.

    config: of diffusers, without the quantization; shapes: of the full-precision model's tensors
    """

    def __init__(self, home: Path, plan: Plan):
        """DQError for a folder that is damaged or holds no diffusers model."""
        self.home, self.plan = home, plan
        if not (home / saved.MODEL).is_file() or "_diffusers_version" not in read_json(home / saved.MODEL):
            raise DQError(f"{str(home)!r} is no diffusers model, whose tensors others know by name; leave it out")
        entries = read_json(home / saved.MODEL)
        self.config = {key: value for key, value in entries.items() if key != "quantization_config"}
        saved.refuse_giants(self.config, str(home / saved.MODEL))
        paths = sorted(home.glob("*.safetensors"))
        files.verify(paths)
        self._places = {name: path for path in paths for name in header.read(path)[0]}
        self.model = _empty(self.config)
        self.shapes = {name: tuple(value.shape) for name, value in self.model.state_dict().items()}
        swap(self.model, plan, plan.dtype)
        files.check_names(files.expected(self.model, plan), set(self._places), f"{str(home)!r}")
        self._layers = packed_layers(self.model)

    def tensor(self, name: str) -> torch.Tensor:
        """A tensor as it was saved."""
        with safe_open(str(self._places[name]), "pt") as file:
            return file.get_tensor(name)

    def planned(self, name: str) -> LayerPlan | None:
        """The plan of the layer whose weight a tensor of the full-precision model is."""
        layer = name if name in self.plan.layers else name.removesuffix(".weight")
        return self.plan.layers.get(layer) if layer in self.plan.layers and layer + ".weight" == name else None

    @contextlib.contextmanager
    def layer(self, name: str) -> Iterator[Any]:
        """The packed layer of a name, with its tensors while the block runs."""
        packed: Any = self._layers[name]
        empty = dict(packed._parameters)
        held = [self.tensor(f"{name}.{key}") for key, value in empty.items() if value is not None]
        try:
            for key, value in zip([key for key, value in empty.items() if value is not None], held, strict=True):
                packed.put(key, value)
            yield packed
        finally:
            for key, value in empty.items():
                packed._parameters[key] = value
            for value in held:
                page_out(value)


def _empty(config: dict[str, Any]) -> Any:
    import diffusers

    name = str(config.get("_class_name"))
    kind: Any = getattr(diffusers, name, None) if name.isidentifier() else None
    if not isinstance(kind, type) or not issubclass(kind, diffusers.ModelMixin):
        raise DQError(f"config is for {name[:100]!r}, expected a model class of diffusers")
    with init_empty_weights():
        return kind.from_config(config)  # pyright: ignore[reportAttributeAccessIssue]
