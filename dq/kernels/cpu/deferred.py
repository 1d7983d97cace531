"""Tensors that wait for the kernel call they end in, so that one call does what torch does in five.

    Normed    norm(x) * scale + shift    read by the linears that would round it; 16-bit dtypes only
    Product   gate * (x W^T + b)         made when a residual is added to it, or by a tanh GELU (16-bit)

Both stand only for what happens between the modules of one block (see `dq.blocks`), outside of `torch.compile` and
autograd. Anything else done to them first makes the tensor torch would have made. Where one comes from is a site. The
first time a block runs, every site computes both ways and compares; later only those defer that met a kernel and
agreed. In fp32 only what keeps every bit is fused. Linears that round one input one after the other share its codes.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.nn.functional as F

from dq.kernels.cpu.ops import DTYPES
from dq.plan import TensorPlan


class Changed(RuntimeError):
    """A tensor that a kernel had still to read was changed in place."""


class Beginning(NamedTuple):
    """What a call does to x before it rounds it. norm: "layer", "rms" or none; scale, shift: (batch | 1, channels)."""

    norm: str = ""
    eps: float = 0.0
    scale: torch.Tensor | None = None
    shift: torch.Tensor | None = None


class Ending(NamedTuple):
    """What follows a product in its call: a tanh GELU, a gate (batch | 1, channels), a residual like the output."""

    gelu: bool = False
    gate: torch.Tensor | None = None
    residual: torch.Tensor | None = None


@dataclass(eq=False)
class Site:
    """Where tensors are deferred: at a norm, at a linear. works: None until a block with it has run."""

    works: bool | None = None
    agreed: bool = False
    differed: bool = False
    unsure: bool = False  # NaN or infinity: nothing to compare

    def choose(self, fuse: Callable, plain: torch.Tensor, room: float) -> tuple[torch.Tensor, bool]:
        """On trial: -> the fused result and True where it agrees with torch's, else torch's and False."""
        try:
            fused = fuse()
        except Changed:
            self.differed = True
            return plain, False
        agree = bool((fused.float() - plain.float()).norm() <= room * plain.float().norm())
        self.agreed |= agree
        self.differed |= not agree
        self.unsure |= not plain.isfinite().all()
        return (fused, True) if agree else (plain, False)

    def settle(self) -> None:
        """Decide after a trial."""
        self.works = None if self.unsure else self.agreed and not self.differed
        self.agreed = self.differed = self.unsure = False


@dataclass(eq=False)
class Linear(Site):
    """A linear that may end in its kernel: how many outputs it has and what it rounds its input to."""

    outputs: int = 0
    act: TensorPlan | None = None

    @property
    def room(self) -> float:
        """Most relative distance of fused and unfused: codes next to a tie fall either way.

        If inputs differ by d, one in step / d has another code and that is off by a step: a distance of sqrt(d step).
        """
        return 2.0 ** -(1 + self.act.spec.bits / 2)


@dataclass(eq=False)
class Run:
    """One call of a block. Counts of kernel calls that took up a norm, an ending, the codes of the call before."""

    norms: int = 0
    endings: int = 0
    shared: int = 0
    trials: set[Site] = field(default_factory=set)
    rounded: tuple = (None, None, 0)  # the last input, what it was rounded to, and the key of its codes

    def norm(self, site: Site, again: Callable, x: torch.Tensor, beginning: Beginning) -> torch.Tensor | None:
        """The output of a norm, deferred; None where that does not work. again(x) runs the norm."""
        affine = [value for value in (beginning.scale, beginning.shift) if value is not None]
        if site.works is False or type(x) is not torch.Tensor or x.device.type != "cpu":
            return None
        if x.dtype not in DTYPES or x.dtype is torch.float32 or any(value.dtype is not x.dtype for value in affine):
            return None
        version = self._start(site, x)
        make = lambda: again(_unchanged(x, version))  # noqa: E731
        return Normed(x.shape, x.dtype, site, make, (x, version, beginning))

    def linear(self, linear: Linear, launch: Callable, x: torch.Tensor, ends: bool, shares: bool) -> torch.Tensor:
        """The output of a linear: x may be deferred, and so is the output where that works.

        launch   (x, Beginning, Ending, key) -> y
        ends     whether the kernel has endings for this input
        shares   whether another linear with the same `act` rounds x to the same codes
        """
        begin = Beginning()
        key = self._key(x, linear.act) if shares else 0
        if isinstance(x, Normed):
            x, begin, key = self._take_up(x, linear, launch, key)
        elif isinstance(x, Deferred):
            x = x.value()
        if not ends or linear.works is False:
            return launch(x, begin, Ending(), key)
        version = self._start(linear, x)
        product = lambda end: launch(_unchanged(x, version), begin, end, key)  # noqa: E731
        shape = (*x.shape[:-1], linear.outputs)
        return Product(shape, x.dtype, linear, lambda: product(Ending()), product, self)

    def settle(self) -> None:
        """Decide on the sites that were tried."""
        for site in self.trials:
            site.settle()
        self.rounded = (None, None, 0)

    def _take_up(self, x: Normed, linear: Linear, launch: Callable, key: int) -> tuple[torch.Tensor, Beginning, int]:
        """What a linear reads in place of x: the source of the norm, or the plain tensor where that differs."""
        if not x.site.works:
            value = x.quietly()
            fuse = lambda: launch(*x.taken(), Ending(), 0)  # noqa: E731
            if not x.site.choose(fuse, launch(value, Beginning(), Ending(), 0), linear.room)[1]:
                return value, Beginning(), 0
        self.norms += 1
        return *x.taken(), key

    def _start(self, site: Site, x: torch.Tensor) -> int | None:
        if site.works is None:
            self.trials.add(site)
        return _version(x)

    def _key(self, x: torch.Tensor, codes: TensorPlan) -> int:
        version = 0 if isinstance(x, Normed) else _version(x)
        if version is None:
            return 0
        before, state, key = self.rounded
        if x is before and state == (version, codes):
            self.shared += 1
            return key
        key = next(_keys)
        self.rounded = (x, (version, codes), key)
        return key


class Deferred(torch.Tensor):
    """A tensor that is made when something other than its kernel asks for it. `make` makes it as torch would."""

    @staticmethod
    def __new__(cls, shape: torch.Size, dtype: torch.dtype, *rest):
        return torch.Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device="cpu")

    def __init__(self, shape: torch.Size, dtype: torch.dtype, site: Site, make: Callable[[], torch.Tensor]):
        self.site, self.asked, self._make = site, False, make
        self._value = make() if site.works is None else None  # on trial: what is changed in between is noticed

    def value(self) -> torch.Tensor:
        """The tensor, for torch."""
        self.asked = True
        return self.quietly()

    def quietly(self) -> torch.Tensor:
        """The tensor, to compare with or to go on from."""
        if self._value is None:
            self._value = self._make()
        return self._value

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in _METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        step = _STEPS.get(func)
        if step is not None and not (func in _BARE and kwargs):
            found = step(func, *args, **kwargs)
            if found is not None:
                return found
        return func(*plain(args), **plain(kwargs))

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return func(*plain(args), **plain(kwargs or {}))  # C++ that asks for memory


class Normed(Deferred):
    """norm(x) * scale + shift."""

    def __init__(self, shape, dtype, site, make, source: tuple[torch.Tensor, int | None, Beginning]):
        super().__init__(shape, dtype, site, make)
        self._source = source

    def taken(self) -> tuple[torch.Tensor, Beginning]:
        """x, and what a kernel does to it first."""
        x, version, (norm, eps, scale, shift) = self._source
        if scale is None and shift is not None:
            scale = torch.ones_like(shift)
        if shift is None and scale is not None:
            shift = torch.zeros_like(scale)
        return _unchanged(x, version), Beginning(norm, eps, scale, shift)

    def then(self, func: Callable, other) -> Normed | None:
        """Times or plus a value per channel, or per channel and sample; None for anything else."""
        value = _per_sample(other, self)
        if value is None:
            return None
        x, version, (norm, eps, scale, shift) = self._source
        if func in _MULTIPLY:
            scale = value if scale is None else scale * value
            shift = None if shift is None else shift * value
        else:
            shift = value if shift is None else shift + value
        make = lambda: func(self.quietly(), other)  # noqa: E731
        return Normed(self.shape, self.dtype, self.site, make, (x, version, Beginning(norm, eps, scale, shift)))


class Product(Deferred):
    """gate * (x W^T + b). launch(ending) is the kernel call; before: the product without its gate."""

    def __init__(self, shape, dtype, site, make, launch: Callable[[Ending], torch.Tensor], run: Run, before=None):
        super().__init__(shape, dtype, site, make)
        self._launch, self._run, self._before, self._gate = launch, run, before, None

    def then(self, func: Callable, other) -> torch.Tensor | None:
        """Times a gate, plus a residual; None for anything else."""
        if func in _MULTIPLY:
            gate = _per_sample(other, self) if self._gate is None else None
            if gate is None:
                return None
            make = lambda: func(self.quietly(), other)  # noqa: E731
            gated = Product(self.shape, self.dtype, self.site, make, self._launch, self._run, self)
            gated._gate = gate
            return gated
        if isinstance(other, Deferred):
            other = other.value()
        if type(other) is not torch.Tensor or other.shape != self.shape or other.dtype is not self.dtype:
            return None
        return self._end(Ending(False, self._gate, other), lambda: func(self.quietly(), other))

    def gelu(self) -> torch.Tensor | None:
        """A tanh GELU of it."""
        if self._gate is not None or self.dtype is torch.float32:  # torch's GELU rounds otherwise
            return None
        return self._end(Ending(gelu=True), lambda: F.gelu(self.quietly(), approximate="tanh"))

    def _end(self, ending: Ending, make: Callable[[], torch.Tensor]) -> torch.Tensor:
        if self.asked or (self._before is not None and self._before.asked):
            return make()  # the product is there already
        fuse = lambda: self._launch(ending)  # noqa: E731
        result, fused = (fuse(), True) if self.site.works else self.site.choose(fuse, make(), self.site.room)
        self._run.endings += fused
        return result


def plain(value):
    """Tensors in place of deferred ones, also inside of tuples, lists and dicts."""
    if isinstance(value, Deferred):
        return value.value()
    if isinstance(value, tuple | list) and any(isinstance(each, Deferred | tuple | list | dict) for each in value):
        made = [plain(each) for each in value]
        return type(value)(*made) if hasattr(value, "_fields") else type(value)(made)
    if isinstance(value, dict):
        for key, each in value.items():
            if (made := plain(each)) is not each:
                value[key] = made
    return value


def _per_sample(value, like: Deferred) -> torch.Tensor | None:
    """`value` as (batch | 1, channels) when it is one number per channel, or per sample and channel, of `like`."""
    shape = like.shape
    if not isinstance(value, torch.Tensor) or isinstance(value, Deferred) or value.dtype is not like.dtype:
        return None
    if not 1 <= value.dim() <= len(shape) or value.shape[-1] != shape[-1]:
        return None
    lead = value.shape[:-1]
    if all(size == 1 for size in lead[1:]) and (not lead or lead[0] == 1 or len(lead) == len(shape) - 1):
        return value.reshape(-1, shape[-1])
    return None


def _version(x: torch.Tensor) -> int | None:
    return None if x.is_inference() else x._version


def _unchanged(x: torch.Tensor, version: int | None) -> torch.Tensor:
    if _version(x) != version:
        raise Changed("a block changed a tensor in place that dq's fused kernels had still to read")
    return x


_keys = itertools.count(1)
_here = threading.local()


def running() -> Run | None:
    """The call of a block that this thread is in. Not to be asked under torch.compile."""
    return getattr(_here, "run", None)


@contextlib.contextmanager
def run() -> Iterator[Run]:
    """Defer until the end of the block; what leaves it must be made `plain` before."""
    before, _here.run = running(), Run()
    try:
        yield _here.run
    finally:
        _here.run.settle()
        _here.run = before


def _pair(func: Callable, a, b) -> torch.Tensor | None:
    """A product or sum with a deferred tensor on either side."""
    for one, other in ((a, b), (b, a)):
        if isinstance(one, Normed | Product) and (found := one.then(func, other)) is not None:
            return found
    return None


def _gelu(func: Callable, x, approximate: str = "none") -> torch.Tensor | None:
    return x.gelu() if isinstance(x, Product) and approximate == "tanh" else None


def _dropout(func: Callable, x, p: float = 0.5, training: bool = True, inplace: bool = False):
    return None if training and p else x


def _over_one(func: Callable, x, other) -> torch.Tensor | None:
    """Diffusers divides every attention by a factor that is mostly 1."""
    return x if isinstance(other, int | float) and other == 1 else None


_MULTIPLY, _ADD = (torch.Tensor.mul, torch.mul), (torch.Tensor.add, torch.add)
_STEPS = dict.fromkeys((*_MULTIPLY, *_ADD), _pair) | {torch.Tensor.div: _over_one}
_BARE = set(_STEPS)  # only without keyword arguments such as alpha
_STEPS |= {F.gelu: _gelu, F.dropout: _dropout}
_GETTERS = ("shape", "dtype", "device", "ndim", "requires_grad", "layout", "is_cuda", "is_meta", "grad_fn")
_METHODS = ("size", "dim", "numel", "is_contiguous", "is_floating_point", "element_size", "stride", "is_inference")
_METADATA = {getattr(torch.Tensor, name).__get__ for name in _GETTERS}
_METADATA |= {getattr(torch.Tensor, name) for name in _METHODS}
