"""What tells one calibration from another: every byte that decides what a denoiser sees, as short digests.

Weights are hashed whole, in threads (0.7 GB/s a core with SHA-256): a fine-tune may differ in its last row alone. Of a
pipeline every part counts, since a text encoder makes the embeddings and a scheduler the timesteps.
"""

from __future__ import annotations

import hashlib
import json
import os
import types
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from diffusers import SchedulerMixin
from torch import nn

from dq.trace import inputs
from dq.trace.calibration import Calibration
from dq.version import __version__

LIBRARIES = ("torch", "diffusers", "transformers")
PLAIN = (bool, int, float, complex, str, bytes, torch.dtype, torch.device, type(None))
MOST_THREADS = 8
DIGITS = 16  # of a digest that are kept
SWITCHES = ("scale", "scaling", "active_adapters", "merged_adapters", "disable_adapters", "b1", "b2", "s1", "s2")


def of(target, models: Mapping[str, nn.Module], calibration: Calibration) -> dict[str, Any]:
    """What two calibrations share when they make the same records: names to texts, numbers or more of the same."""
    found: dict[str, Any] = {"models": {part: weights(model) for part, model in models.items()}}
    found |= {"seed": calibration.seed, "target": type(target).__name__, "versions": _versions()}
    if calibration.forward_loop is not None:
        return found | {"forward_loop": digest(calibration.forward_loop)}
    others = {name: part for name, part in target.components.items() if part is not None and name not in models}
    parts = {name: _component(part) for name, part in others.items()}
    names = {name: getattr(calibration, name) for name in ("steps", "samples", "policy")}
    given = [inputs.arguments(entry) for entry in calibration.texts()]
    values = {"prompts": digest(given), "call_kwargs": digest(dict(calibration.call_kwargs))}
    own = {name: value for name, value in _settings(target).items() if name not in target.components}
    return found | names | values | {"settings": digest(own), "components": parts}


def differing(found: Mapping, wanted: Mapping) -> str:
    """The first entry in which two identities differ, with the part where it has parts."""
    name = next((name for name in wanted if found.get(name) != wanted[name]), "something")
    ours, theirs = wanted.get(name), found.get(name)
    if not (isinstance(ours, Mapping) and isinstance(theirs, Mapping)):
        return name
    inner = next(key for key in (*ours, *theirs) if ours.get(key) != theirs.get(key))
    return f"{name} ({inner})" if inner else name


def weights(model: nn.Module) -> str:
    """Class, settings and all parameters and buffers of a model, those that are not saved included."""
    modules = [[name, type(module).__name__, _attributes(module)] for name, module in model.named_modules()]
    return f"{type(model).__name__} {digest([tensors(model), modules, _settings(model)])}"


def tensors(model: nn.Module) -> dict[str, str]:
    """A digest of every parameter and buffer of a model by dotted name."""
    with ThreadPoolExecutor(min(MOST_THREADS, os.cpu_count() or 1)) as pool:
        return dict(pool.map(lambda item: (item[0], digest(item[1])), _tensors(model)))


def _tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Names and values of parameters and buffers, of offloaded ones where accelerate keeps them."""
    for home, module in model.named_modules():
        kept = getattr(getattr(module, "_hf_hook", None), "weights_map", None) or {}
        for name, value in (*module._parameters.items(), *module._buffers.items()):
            if value is not None:
                yield f"{home}.{name}".lstrip("."), kept[name] if value.is_meta and name in kept else value


def _attributes(module: nn.Module) -> dict[str, Any]:
    """What decides a module's output beside weights and config: scales of adapters and of FreeU, its processor."""
    processor = vars(module).get("processor", module._modules.get("processor"))
    own = {name: getattr(module, name, None) for name in SWITCHES}
    own |= {"processor": type(processor).__name__, "processor.scale": getattr(processor, "scale", None)}
    return {name: value for name, value in own.items() if value is not None and _is_plain(value)}


def _is_plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    if isinstance(value, Mapping):
        return all(map(_is_plain, value.values()))
    return isinstance(value, PLAIN)


def _component(part: Any) -> str:
    """A part of a pipeline beside its denoisers."""
    if isinstance(part, nn.Module):
        return weights(part)
    if isinstance(part, SchedulerMixin):
        return f"{type(part).__name__} {digest([_settings(part), getattr(part, 'shift', None)])}"
    if hasattr(part, "get_vocab"):
        return f"{type(part).__name__} {digest(_tokenizer(part))}"
    if hasattr(part, "to_dict"):
        return f"{type(part).__name__} {digest(part.to_dict())}"
    return f"{type(part).__name__} {digest(_settings(part) or part)}"


def _tokenizer(part: Any) -> list:
    """Its table, or all of a fast one but what every call sets anew, and the settings that are texts or numbers."""
    fast: Any = getattr(part, "backend_tokenizer", None)
    table = json.loads(fast.to_str()) if hasattr(fast, "to_str") else part.get_vocab()
    own = getattr(part, "init_kwargs", {})
    own = {
        name: value for name, value in own.items() if _is_plain(value) and "path" not in name and "file" not in name
    }
    return [{name: value for name, value in table.items() if name not in ("truncation", "padding")}, own]


def _settings(part: Any) -> dict[str, Any]:
    """The config of a part without its library's own notes, which say where it came from and when."""
    config: Any = getattr(part, "config", None)
    config = config.to_dict() if hasattr(config, "to_dict") else config
    items = config.items() if isinstance(config, Mapping) else ()
    return {name: value for name, value in items if name[0] != "_" and "version" not in name and _is_plain(value)}


def _versions() -> str:
    found = [f"dq {__version__}"]
    for name in LIBRARIES:
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            continue
    return ", ".join(found)


def digest(value: Any) -> str:
    """Of a tree of settings: the content of tensors, arrays, pictures and functions, never their address."""
    made = hashlib.sha256()
    _feed(value, made.update, set())
    return made.hexdigest()[:DIGITS]


def _feed(value: Any, take: Callable[[Any], None], above: set[int]) -> None:
    if isinstance(value, PLAIN):
        take(repr(value).encode())
    elif id(value) in above:  # a function that calls itself, a list that holds itself
        take(b"again")
    else:
        _feed_tree(value, take, above | {id(value)})


def _feed_tree(value: Any, take: Callable[[Any], None], above: set[int]) -> None:
    take(f"{type(value).__name__}(".encode())
    if isinstance(value, Mapping):
        for name in sorted(value, key=repr):
            _feed([repr(name), value[name]], take, above)
    elif isinstance(value, (list, tuple)):
        for item in value:
            _feed(item, take, above)
            take(b",")
    elif isinstance(value, (set, frozenset)):
        take(repr(sorted(map(repr, value))).encode())
    elif isinstance(value, torch.Tensor):
        _feed_tensor(value, take)
    elif hasattr(value, "tobytes"):  # arrays, pictures
        take(f"{getattr(value, 'shape', getattr(value, 'size', ''))}".encode())
        take(value.tobytes())
    elif isinstance(value, partial):
        _feed([value.func, value.args, value.keywords], take, above)
    elif isinstance(value, types.MethodType):
        _feed(value.__func__, take, above)
    elif isinstance(value, types.FunctionType):
        _feed(_parts_of(value), take, above)
    take(b")")


def _feed_tensor(value: torch.Tensor, take: Callable[[Any], None]) -> None:
    take(f"{value.dtype}{tuple(value.shape)}".encode())
    if value.numel() and not value.is_meta and value.layout is torch.strided:
        take(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())


def _parts_of(function: types.FunctionType) -> list:
    """What a function does and with what: its code, defaults, and the data it takes from around it."""
    code = function.__code__
    cells = [_cell(cell) for cell in function.__closure__ or ()]
    around = {name: function.__globals__.get(name) for name in _names(code)}
    around = {k: v for k, v in around.items() if _is_plain(v) or isinstance(v, (torch.Tensor, types.FunctionType))}
    return [_code(code), function.__defaults__, function.__kwdefaults__, cells, around]


def _cell(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not filled yet
        return None


def _names(code: types.CodeType) -> list[str]:
    inner = [name for const in code.co_consts if isinstance(const, types.CodeType) for name in _names(const)]
    return sorted({*code.co_names, *inner})


def _code(code: types.CodeType) -> list:
    consts = [_code(const) if isinstance(const, types.CodeType) else const for const in code.co_consts]
    return [code.co_code, consts, code.co_names, code.co_varnames]
