"""VQ4DiT: a codebook learned together with the entries that vectors take. Deng et al., AAAI 2025, arXiv 2408.17131.

    min_(book, z) E|f(hat; Ŵ) - y|^2 / E|y|^2 + penalty(z),   Ŵ_i = sum_n softmax(z_i)_n book[a_in]

f is a block of the model, y (any pytree) its output in full precision; Ŵ (out, in) in vectors i of `span` neighbours
of a row, a_in `candidates` entries, led by the one that makes up for the errors of other vectors (dq/fit/codebook.py),
the others nearest to W_i; z (vectors, candidates). Ratios above DECIDED are fixed at one candidate, for good; the
penalty E[r (1 - r)] on the others grows until, after the share SETTLED of the steps, each takes its largest and the
codebook is trained alone. Deviations:
- A few hundred steps of Adam on calls recorded once from the model's own runs, block after block on what the quantized
  blocks before leave, not 50 000 of RMSprop on all blocks at once; codebooks learn by a share of their size.
- The penalty grows with the steps; the paper's is on whenever ratios are less decided than at their best.
- k-means and distances weigh columns by the input's second moments, which calibration has at hand.
- The paper's candidates are the nearest entries alone (`start`): hundreds of steps from there do not reach what one
  pass over the columns gives, and choices made for few calls are no better on others.
- Small layers have fewer entries: 16 vectors each at least. Entries are stored in 8 bits (formats/codebook.py).
Options: `candidates` (1: only the codebook is trained), `start` ("compensated"; "nearest" as published), `steps` (0:
nothing is trained), `lr` of a codebook as a share of its root mean square, `batch`, `strength` of the penalty.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import nn

from dq.families import Family
from dq.fit import codebook, moments, reconstruct
from dq.fit.drafts import DraftLinear, draft
from dq.formats.base import Scales
from dq.formats.codebook import Codebook, nearest
from dq.plan import Plan, Recipe
from dq.trace.seen import Needs, Seen, Unit

NEEDS = Needs(rows=1024, gram=True, calls=True, hat=True)
RECIPES = tuple(
    Recipe(name, (form, None), (form, None), method="vq4dit", status="experimental")
    for name, form in {"vq4dit-w2": "vq256x4", "vq4dit-w3": "vq64x2"}.items()
)
RATIO_RATE, BIAS_RATE = 0.1, 1e-4  # of Adam
DECIDED = 0.99
SETTLED = 0.6
LED = 3.0  # how far the logit of an entry that makes up for others leads those of its neighbours at first


def smooths(options: Mapping) -> bool:
    return False


def prepare(model: nn.Module, plan: Plan, family: Family, options: Mapping) -> Plan:
    """Smaller codebooks for small layers."""
    return codebook.prepared(plan)


def fit(unit: Unit, seen: Seen, options: Mapping) -> dict[str, DraftLinear]:
    """Drafts of the unit's layers that have codebooks: k-means one by one, then all together on the unit's output."""
    return _fit(unit, seen, **options)


def _fit(
    unit: Unit,
    seen: Seen,
    candidates: int = 2,
    start: str = "compensated",
    steps: int = 200,
    lr: float = 1e-2,
    batch: int = 1,
    strength: float = 10.0,
) -> dict[str, DraftLinear]:
    made, learning = {}, Candidates(strength)
    for name, plan in unit.layers.items():
        spec = plan.weight.spec
        if name in seen.layers and isinstance(spec, Codebook):
            made[name] = draft(unit.layer(name), plan)
            gram = moments.rounded(seen.layers[name], made[name])
            learning.blends.append(Blend(made[name], spec, gram, candidates, seen.seed, start == "compensated"))
    if made and steps:
        settings = reconstruct.Settings(steps, BIAS_RATE, batch)
        reconstruct.reconstruct(unit, seen, made, learning.parameters(lr), settings, learning)
    return made


class Candidates(reconstruct.Learning):
    """Codebooks and ratios of several drafts, learned at once.

    strength  error, in units of that before training, that wholly undecided ratios cost at last
    decided   share of the vectors that had one candidate left, after each step
    """

    def __init__(self, strength: float):
        self.strength = strength
        self.blends: list[Blend] = []
        self.decided: list[float] = []

    def parameters(self, lr: float) -> list[dict]:
        """Adam's groups."""
        books = [
            {"params": [each.book], "lr": lr * float(each.book.detach().square().mean().sqrt())}
            for each in self.blends
        ]
        ratios = [{"params": [each.logits], "lr": RATIO_RATE} for each in self.blends]
        return books + ratios + [{"params": [each.made.bias]} for each in self.blends if each.made.bias is not None]

    def penalty(self, progress: float) -> torch.Tensor | float:
        for each in self.blends:
            each.decide(DECIDED if progress < SETTLED else 0.0)
        count = sum(len(each.taken) for each in self.blends)
        self.decided.append(sum(int((each.taken >= 0).sum()) for each in self.blends) / count)
        if self.decided[-1] == 1:
            return 0.0
        mixed = sum(((ratios := each.ratios()) * (1 - ratios)).sum() for each in self.blends)
        return self.strength * progress / SETTLED / count * mixed

    def soften(self) -> None:
        for each in self.blends:
            each.made.soft = each.weight

    def harden(self) -> None:
        for each in self.blends:
            each.made.soft = None
            each.decide(0.0)
            each.settle()

    def undo(self) -> None:
        for each in self.blends:
            each.reset()


class Blend:
    """The codebook of one draft and, for each of its n vectors, the candidates among its entries.

    Begins, and puts the draft, where k-means does with columns weighed by the diagonal of `gram` (columns, columns),
    in each vector's nearest entry or, `compensated`, in the one that makes up for the errors of others.
    book (entries, span), in the weight's units; codes (n, count), that one first; logits (n, count); taken (n,): the
    candidate that is left, -1 while there are several
    """

    def __init__(
        self, made: DraftLinear, spec: Codebook, gram: torch.Tensor, count: int, seed: int, compensated: bool
    ):
        self.made, self.spec = made, spec
        rows, important = made.weight.data.reshape(made.plan.rows, -1), gram.diagonal()
        self.first = codebook.start(rows, self.spec, important, seed)
        self.book = nn.Parameter(self.spec.book(self.first))
        counted = codebook.weights(important, len(rows), self.spec)
        codes, gaps = nearest(codebook.vectors(rows, self.spec), self.book.data, counted, count)
        self.codes, gaps = codes.reshape(-1, count), gaps.reshape(-1, count)
        logits = -gaps.clamp(min=1e-6 * float(gaps.mean())).log()
        if compensated:
            self.codes = _led(codebook.compensated(rows, spec, self.first, gram).reshape(-1), self.codes)
            logits = torch.zeros_like(logits).index_fill_(1, torch.tensor([0], device=logits.device), LED)
        self.logits = nn.Parameter(logits)
        self.taken = torch.full_like(self.codes[:, 0], -1)
        self.reset()

    def reset(self) -> None:
        """The draft at its nearest k-means entries."""
        self._put(self.first, self.codes[:, 0])

    def settle(self) -> None:
        """The draft at the entries that are left, the codebook as it is stored."""
        taken = self.codes.gather(1, self.taken[:, None])[:, 0]
        self._put(self.spec.stored(self.book.detach()), taken)

    def _put(self, scales: Scales, codes: torch.Tensor) -> None:
        self.made.scales = [scales]
        self.made.weight.data.copy_(self.spec.book(scales)[codes].reshape(self.made.plan.shape))

    def ratios(self) -> torch.Tensor:
        """(n, count)."""
        left = F.one_hot(self.taken.clamp(min=0), self.codes.shape[1]).to(self.logits.dtype)
        return torch.where(self.taken[:, None] < 0, self.logits.softmax(1), left)

    def weight(self) -> torch.Tensor:
        """Ŵ in the layer's shape."""
        return (self.ratios()[..., None] * self.book[self.codes]).sum(1).reshape(self.made.plan.shape)

    @torch.no_grad()
    def decide(self, above: float) -> None:
        """Leave one candidate where its ratio is above a bound."""
        largest, which = self.logits.softmax(1).max(1)
        self.taken = torch.where((self.taken < 0) & (largest > above), which, self.taken)


def _led(first: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    """codes (n, count) without `first` (n,), or without the last where it is not among them, behind it."""
    order = (codes != first[:, None]).long().argsort(dim=1, stable=True)
    known = codes.gather(1, order)
    missing = (known[:, :1] != first[:, None]).long()
    return torch.cat([first[:, None], torch.where(missing > 0, known[:, :-1], known[:, 1:])], 1)
