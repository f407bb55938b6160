"""Where a network looks, what that is called, and whether it matters at all.

Attention weights are not an explanation by themselves (Jain & Wallace 2019; Wiegreffe & Pinter
2019). So beside them stands what the forecasts lose when the weights are replaced by uniform ones
or shuffled, how much of the pattern is the seed's, and integrated gradients of the inputs.

Shapes: n bars, N heads, T window, F features, K targets, B pieces, L steps.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import combinations
from typing import Any, Final, NamedTuple, Protocol

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor

from models.attention import HIDDEN, Attention
from models.blending import EnsembleConfig
from models.bundle import Bundle, BundleRejected
from models.dataset import BarsRejected, History, histories, load_bars
from models.features import DAY_MS, FEATURE_NAMES, FeatureSpec, utc_offsets
from models.network import CausalNetwork, Network, State
from models.network_config import NetworkConfig
from models.pipeline import Piece, pieces
from models.runtimes import sequence_member
from models.runtimes.torch import load_network
from models.scoring import Floats, loss
from models.splits import Span
from models.window_network import WindowNetwork

MAX_BARS: Final = 20_000
"""The newest of each symbol, so many in all."""
PERMUTATIONS: Final = 20
RESAMPLES: Final = 500
ATTRIBUTED_BARS: Final = 128
IG_STEPS: Final = 32
WINDOWS_AT_ONCE: Final = 512
PEAK: Final = 1.5
"""Times the uniform weight, from which lags are called a peak."""
HALF_HOUR_MS: Final = 1_800_000

Weights = NDArray[np.float32]
Bools = NDArray[np.bool_]


class Interval(NamedTuple):
    """An estimate, and where 90 % of its resamples by day lie."""

    value: float
    low: float
    high: float


class Period(NamedTuple):
    """A stretch of the window with a name: what it gets of the weight, and of a uniform one."""

    name: str
    share: float
    uniform: float
    lift: Interval
    """share / uniform"""

    @property
    def found(self) -> bool:
        """More is looked at than chance would, on days that were not asked."""
        return self.lift.low > 1.1


class Ablation(NamedTuple):
    """Mean losses of one target's forecasts, and how much they rise without what was learned."""

    target: str
    loss: float
    uniform: float
    permuted: tuple[float, ...]
    """Each with the weights of every bar shuffled anew."""
    rise: Interval
    """uniform / loss - 1"""

    @property
    def p_value(self) -> float:
        """That shuffled weights do as well."""
        better = sum(permuted <= self.loss for permuted in self.permuted)
        return (1 + better) / (1 + len(self.permuted))


class Gradients(NamedTuple):
    """Integrated gradients (Sundararajan et al. 2017) of the first target, mean of |attribution|."""

    by_lag: Floats
    """[T]"""
    by_feature: Floats
    """[F]"""
    rank_correlation: float
    """Spearman's, of by_lag with attention by lag, the newest bar left out."""
    error: float
    """Of the attributions' sum, as a share of the change that they explain."""


class Agreement(NamedTuple):
    """Whether two bundles, trained from different seeds, look at the same and say the same."""

    profiles: float
    """Correlation of mean weights by lag."""
    bars: float
    """Mean correlation of the weights of one bar."""
    forecasts: float
    """Correlation of what they say."""


@dataclass(frozen=True, eq=False)
class Explanation:
    bundle: Bundle
    ts: NDArray[np.int64]
    """[n] of the bars that were explained"""
    symbol: NDArray[np.str_]
    weights: Weights
    """[n, N, T] by lag, lag 0 = the bar itself"""
    time_of_day: NDArray[np.int64]
    """[n] local, ms after midnight"""
    periods: list[Period]
    ablations: list[Ablation]
    seeds: list[Weights]
    """Mean weights by lag [T] of every bundle, the explained one first"""
    agreement: list[Agreement]
    """Of all pairs of bundles"""
    gradients: Gradients | None
    """None where captum is not installed"""

    @property
    def mean(self) -> Weights:
        """[n, T], over the heads."""
        return np.asarray(self.weights.mean(axis=1))

    @property
    def entropy(self) -> Floats:
        """[n] nats."""
        return entropy(self.mean)

    @property
    def effective_length(self) -> Floats:
        """[n] bars over which uniform weights would have the same entropy."""
        return np.exp(self.entropy)

    def by_half_hour(self) -> tuple[NDArray[np.int64], Weights]:
        """Half hours of the day [H] (local, ms) and mean weights [H, T]."""
        bucket = self.time_of_day // HALF_HOUR_MS
        found = np.unique(bucket)
        mean = np.stack([self.mean[bucket == b].mean(axis=0) for b in found])
        return found * HALF_HOUR_MS, mean

    def summary(self) -> dict[str, Any]:
        """All findings as JSON values."""
        return {
            "bundle": self.bundle.version,
            "bars": len(self.ts),
            "window": self.weights.shape[2],
            "heads": self.weights.shape[1],
            "entropy_nats": float(self.entropy.mean()),
            "effective_length_bars": float(self.effective_length.mean()),
            "periods": [
                p._asdict() | {"lift": p.lift._asdict(), "found": p.found} for p in self.periods
            ],
            "ablations": [
                a._asdict() | {"rise": a.rise._asdict(), "p_value": a.p_value}
                for a in self.ablations
            ],
            "agreement": [a._asdict() for a in self.agreement],
            "gradients": None
            if self.gradients is None
            else {
                "rank_correlation": self.gradients.rank_correlation,
                "error": self.gradients.error,
                "by_feature": dict(
                    sorted(
                        zip(FEATURE_NAMES, self.gradients.by_feature.tolist(), strict=True),
                        key=lambda item: -item[1],
                    )
                ),
            },
        }


def explain(
    bundles: Sequence[Bundle],
    bars: pd.DataFrame,
    *,
    advance: Callable[[str], None] = lambda what: None,
    seed: int = 0,
) -> Explanation:
    """Explain the first of the bundles; the others are held beside it, as other seeds of it.

    Bars as `load_bars` takes them, best such as no bundle was trained on. Raises
    BundleRejected where there is no attention to explain, BarsRejected where there are too few bars.
    """
    served, bundles = bundles[0], [_attending(bundle) for bundle in bundles]
    networks = [_opened(bundle) for bundle in bundles]
    bundle, config = bundles[0], bundles[0].config
    if any(b.config.features != config.features for b in bundles):
        raise BundleRejected("the bundles read bars in different ways: their feature specs differ")
    past = histories(load_bars(bars), config.features, config.targets)
    longest = max(_before(b) for b in bundles)
    todo = list(pieces(past, Span(0, np.iinfo(np.int64).max), longest))
    todo = [piece._replace(first=max(piece.first, piece.start + longest)) for piece in todo]
    todo = _newest([piece for piece in todo if piece.first < piece.stop])
    if not todo:
        raise BarsRejected(f"too few bars: none has {longest} warm ones before it")
    run = _Bars(past, todo, config.features)

    advance("attention")
    views = [run.look(b, n) for b, n in zip(bundles, networks, strict=True)]
    view = views[0]
    advance("uniform weights")
    rng = np.random.default_rng(seed)
    uniform = run.look(bundle, networks[0], _uniform).values
    permuted = []
    for i in range(PERMUTATIONS):
        advance(f"shuffled weights, {i + 1} of {PERMUTATIONS}")
        generator = torch.Generator().manual_seed(seed + i)
        shuffle = _Shuffle(generator)
        permuted.append(run.look(bundle, networks[0], shuffle).values)
    ablations = [
        _ablation(run, bundle, k, view.values, uniform, permuted, rng)
        for k in range(len(config.targets))
    ]
    advance("integrated gradients")
    return Explanation(
        bundle=served,
        ts=run.ts,
        symbol=run.symbol,
        weights=view.weights,
        time_of_day=run.local % DAY_MS,
        periods=_periods(run, view.weights.mean(axis=1), rng),
        ablations=ablations,
        seeds=[v.weights.mean(axis=(0, 1)) for v in views],
        agreement=[_agreement(a, b) for a, b in combinations(views, 2)],
        gradients=_gradients(run, bundle, networks[0], view, rng),
    )


def entropy(weights: NDArray[np.floating[Any]]) -> Floats:
    """[..., T] -> nats [...]."""
    w = np.asarray(weights, np.float64)
    return np.asarray(-(w * np.log(np.maximum(w, 1e-30))).sum(axis=-1))


# ---- running the network, with its weights as they are or otherwise ----


Alter = Callable[[Tensor], Tensor]
"""Weights [B, N, L, K] of what is seen, 0 where nothing is -> what to put in their place."""


class _View(NamedTuple):
    weights: Weights
    """[n, N, T]"""
    values: Floats
    """[n, K]"""


class _Bars:
    """The bars that are explained: rows of histories, in the order of the pieces that cover them."""

    def __init__(self, past: Sequence[History], todo: list[Piece], spec: FeatureSpec) -> None:
        self.past, self.todo = past, todo
        spans = [(p.history, np.arange(p.first, p.stop)) for p in todo]
        self.history = np.concatenate([np.full(len(rows), i) for i, rows in spans])
        self.row = np.concatenate([rows for _, rows in spans])
        self.ts = np.concatenate([past[i].ts[rows] for i, rows in spans])
        self.y = np.concatenate([past[i].y[rows] for i, rows in spans])
        self.symbol = np.array([past[i].symbol for i in self.history])
        self.spec = spec
        self.local = local_ms(self.ts, spec)
        self.day = self.local // DAY_MS

    @torch.inference_mode()
    def look(self, bundle: Bundle, network: "_Opened", alter: Alter = lambda w: w) -> _View:
        weights, values = [], []
        for piece in self.todo:
            h = self.past[piece.history]
            x = torch.from_numpy(bundle.scaler.transform(h.x[piece.start : piece.stop]))
            outputs, by_head = network.look(x, piece.first - piece.start, alter)
            values.append(bundle.values(outputs.numpy())[0])
            weights.append(by_head.numpy())
        return _View(np.concatenate(weights), np.concatenate(values))


class _Opened(Protocol):
    """A network of one of the two modes, whose attention can be seen and altered."""

    def look(self, x: Tensor, first: int, alter: Alter) -> tuple[Tensor, Tensor]:
        """x[L, F] -> outputs[L - first, O], weights[L - first, N, T] by lag.

        Rows before `first` warm it up.
        """

    def newest(self, x: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """x[n, L, F] -> its last T rows [n, T, F], and their newest first output [n] as a function.

        The function takes some multiple of the n sequences; what was before the T rows stays.
        """


class _Carried:
    def __init__(self, network: CausalNetwork) -> None:
        self.network = network

    def look(self, x: Tensor, first: int, alter: Alter) -> tuple[Tensor, Tensor]:
        T, seen = self.network.config.window, []

        def altered(weights: Tensor, lag: Tensor) -> Tensor:
            place = lag.where(lag != HIDDEN, T).unsqueeze(1).expand_as(weights)
            by_lag = torch.zeros(*weights.shape[:3], T + 1).scatter(3, place, weights)[..., :T]
            by_lag = alter(by_lag)
            seen.append(by_lag)
            return torch.cat([by_lag, torch.zeros(*by_lag.shape[:3], 1)], 3).gather(3, place)

        with _altered(self.network, altered):
            outputs, _, _ = self.network(x.unsqueeze(0))
        return outputs[0, first:], seen[0][0].transpose(0, 1)[first:]

    def newest(self, x: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        n, before = len(x), x.shape[1] - self.network.config.window
        with torch.inference_mode():
            _, _, carried = self.network(x[:, :before])
        state = State(*(t.clone() for t in carried))

        def last_output(window: Tensor) -> Tensor:
            each = window.shape[0] // n
            wide = State(
                *(t.repeat(1, each, 1) for t in state[:2]),
                *(t.repeat(each, *[1] * (t.ndim - 1)) for t in state[2:]),
            )
            outputs: Tensor = self.network(window, wide)[0]
            return outputs[:, -1, 0]

        return x[:, before:], last_output


class _Windowed:
    def __init__(self, network: WindowNetwork) -> None:
        self.network = network

    def look(self, x: Tensor, first: int, alter: Alter) -> tuple[Tensor, Tensor]:
        T = self.network.config.window
        windows = x[first - T + 1 :].unfold(0, T, 1).transpose(1, 2)
        outputs, weights, attended = [], [], []

        def altered(found: Tensor, lag: Tensor) -> Tensor:
            attended.append(alter(found))
            return attended[-1]

        with _altered(self.network, altered):
            for some in torch.split(windows, WINDOWS_AT_ONCE):
                seen = torch.ones(some.shape[:2], dtype=torch.bool)
                outputs.append(self.network.windowed(some, seen)[0])
                weights.append(self.network.by_row(attended.pop(), some, seen).flip(-1))
        return torch.cat(outputs), torch.cat(weights)

    def newest(self, x: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        def last_output(window: Tensor) -> Tensor:
            seen = torch.ones(window.shape[:2], dtype=torch.bool)
            return self.network.windowed(window, seen)[0][:, 0]

        return x[:, x.shape[1] - self.network.config.window :], last_output


@contextmanager
def _altered(network: Network, alter: Callable[[Tensor, Tensor], Tensor]) -> Iterator[None]:
    """Inside, it attends by what `alter` makes of weights[B, N, L, K] at lag[B or 1, L, K]."""

    def hook(attention: Attention, given: Any, said: Any) -> tuple[Tensor, Tensor | None]:
        q, k, v, lag, filled = given[:5]
        return attention.mixed(alter(attention.weights(q, k, lag, filled), lag), v), said[1]

    assert network.attention is not None
    handle = network.attention.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def _uniform(weights: Tensor) -> Tensor:
    seen = (weights > 0).float()
    return seen / seen.sum(-1, keepdim=True)


class _Shuffle:
    """What each bar sees gets its weights in random order, those of all heads alike."""

    def __init__(self, generator: torch.Generator) -> None:
        self._generator = generator

    def __call__(self, weights: Tensor) -> Tensor:
        B, _, L, K = weights.shape
        unseen = (weights == 0).all(1, keepdim=True)
        random = torch.rand(B, 1, L, K, generator=self._generator)
        source = (random + unseen).argsort(-1).expand_as(weights)
        into = unseen.byte().argsort(dim=-1, stable=True).expand_as(weights)
        return torch.zeros_like(weights).scatter(-1, into, weights.gather(-1, source))


def _attending(bundle: Bundle) -> Bundle:
    """Of an ensemble its network, which alone attends to anything."""
    ensemble = isinstance(bundle.config.network, EnsembleConfig)
    return sequence_member(bundle) if ensemble else bundle


def _before(bundle: Bundle) -> int:
    """Bars that a forecast needs before it counts, and one more than attention sees."""
    return max(bundle.config.warm_up_bars, bundle.config.window + 1)


def _opened(bundle: Bundle) -> _Opened:
    config = bundle.config.network
    if not isinstance(config, NetworkConfig) or not config.attends:
        raise BundleRejected(f"{bundle.version}: only networks with attention can be explained")
    network = load_network(bundle)
    if isinstance(network, WindowNetwork):
        return _Windowed(network)
    assert isinstance(network, CausalNetwork)
    return _Carried(network)


def _newest(todo: list[Piece]) -> list[Piece]:
    """Those of the newest bars, so many of each symbol, with as many before them as they had."""
    each = max(MAX_BARS // max(len({piece.history for piece in todo}), 1), 1)
    taken, kept = Counter[int](), list[Piece]()
    for piece in reversed(todo):
        n = min(piece.stop - piece.first, each - taken[piece.history])
        if n:
            later = piece.stop - n - piece.first
            kept.append(piece._replace(start=piece.start + later, first=piece.first + later))
            taken[piece.history] += n
    return kept[::-1]


# ---- what the stretches of the window are called ----


def local_ms(ts: NDArray[np.int64], spec: FeatureSpec) -> NDArray[np.int64]:
    """Local time as ms since 1970."""
    table = utc_offsets(spec.timezone)
    return np.asarray(ts + table[np.searchsorted(table[:, 0], ts, side="right") - 1, 1])


def _periods(run: _Bars, weights: Weights, rng: np.random.Generator) -> list[Period]:
    """Named stretches of the window, and peaks that earlier days show, all measured on later days."""
    middle = np.median(run.day)
    later = np.flatnonzero(run.day > middle)
    if not len(later):
        later = np.arange(len(run.day))
    earlier = weights[run.day <= middle].mean(axis=0)
    masks = dict(_named(run, later, weights.shape[1]))
    for first, last in _peaks(earlier):
        lag = np.arange(weights.shape[1])
        mask = np.broadcast_to((lag >= first) & (lag <= last), (len(later), len(lag)))
        masks[_lags_name(first, last, run.spec)] = mask
    found = []
    for name, mask in masks.items():
        there = mask.any(axis=1) & ~mask.all(axis=1)
        if there.mean() < 0.02:
            continue
        share = (weights[later] * mask)[there].sum(axis=1, dtype=np.float64)
        uniform = mask[there].mean(axis=1)
        lift = _by_day(run.day[later][there], share, uniform, rng)
        found.append(Period(name, float(share.mean()), float(uniform.mean()), lift))
    return sorted(found, key=lambda period: -period.lift.value)


def _named(run: _Bars, rows: NDArray[np.intp], T: int) -> Iterator[tuple[str, Bools]]:
    lag = np.arange(T)
    everywhere = np.ones((len(rows), 1), np.bool_)
    yield "the newest bar", everywhere & (lag == 0)
    yield "the five bars before it", everywhere & (lag >= 1) & (lag <= 5)
    yield "the oldest fifth of the window", everywhere & (lag >= T - max(T // 5, 1))
    masks: dict[str, list[Bools]] = {}
    for i in np.unique(run.history[rows]):
        h, own = run.past[i], rows[run.history[rows] == i]
        back = run.row[own][:, None] - lag
        local = local_ms(h.ts, run.spec)
        session = np.cumsum(np.r_[0, _breaks(h.ts, local, run.spec)])
        first = np.searchsorted(session, session, side="left")
        last = np.searchsorted(session, session, side="right") - 1
        since_open, to_close = h.ts - h.ts[first], h.ts[last] - h.ts
        age = session[back[:, :1]] - session[back]
        tod = local % DAY_MS
        apart = np.abs(tod[back] - tod[back[:, :1]])
        opening, closing = since_open < HALF_HOUR_MS, to_close < HALF_HOUR_MS
        move = np.abs(np.diff(np.log(h.ohlcv[:, 3]), prepend=np.log(h.ohlcv[0, 3])))
        near = max(2 * run.spec.interval_ms, 300_000)
        for name, mask in {
            "today's open (first half hour)": (age == 0) & opening[back] & (lag > 5),
            "the session before": age == 1,
            "the close before (last half hour)": (age == 1) & closing[back],
            "the same time, a session before": (age == 1) & (apart <= near),
            "the largest move in the window": lag == move[back].argmax(axis=1)[:, None],
            "the heaviest volume in the window": lag == h.ohlcv[back, 4].argmax(axis=1)[:, None],
        }.items():
            masks.setdefault(name, []).append(mask)
    order = np.argsort(
        np.concatenate(
            [np.flatnonzero(run.history[rows] == i) for i in np.unique(run.history[rows])]
        )
    )
    for name, parts in masks.items():
        yield name, np.concatenate(parts)[order]


def _breaks(ts: NDArray[np.int64], local: NDArray[np.int64], spec: FeatureSpec) -> Bools:
    """[n - 1] whether a session ends between two bars: a long silence, or midnight."""
    silence = np.diff(ts) > (spec.max_fill + 1) * spec.interval_ms
    return np.asarray(silence | (np.diff(local // DAY_MS) > 0))


def _peaks(profile: Weights) -> list[tuple[int, int]]:
    """Runs of lags (first, last) beyond the newest six whose weight is a peak."""
    high = np.flatnonzero(profile > PEAK / len(profile))
    high = high[high > 5]
    runs = np.split(high, np.flatnonzero(np.diff(high) > 1) + 1) if len(high) else []
    return [(int(r[0]), int(r[-1])) for r in runs]


def _lags_name(first: int, last: int, spec: FeatureSpec) -> str:
    minutes = [n * spec.interval_ms / 60_000 for n in (first, last)]
    unit, per = ("minutes", 1.0) if minutes[1] < 120 else ("hours", 60.0)
    if minutes[1] >= 48 * 60:
        unit, per = "days", 1440.0
    low, high = (f"{m / per:.3g}" for m in minutes)
    return f"{low} {unit} back" if low == high else f"{low} to {high} {unit} back"


# ---- whether it matters ----


def _ablation(
    run: _Bars,
    bundle: Bundle,
    k: int,
    values: Floats,
    uniform: Floats,
    permuted: Sequence[Floats],
    rng: np.random.Generator,
) -> Ablation:
    target = bundle.config.targets[k]
    known = np.isfinite(run.y[:, k])
    if not known.any():
        raise BarsRejected(f"no bar has a label for {target.name}: give bars beyond the horizon")
    y = run.y[known, k]
    own, flat = (loss(target, v[known, k], y) for v in (values, uniform))
    ratio = _by_day(run.day[known], flat, own, rng)
    return Ablation(
        target.name,
        float(own.mean()),
        float(flat.mean()),
        tuple(float(loss(target, v[known, k], y).mean()) for v in permuted),
        Interval(*(r - 1 for r in ratio)),
    )


def _by_day(
    day: NDArray[np.int64], above: Floats, below: Floats, rng: np.random.Generator
) -> Interval:
    """sum(above) / sum(below), resampled by whole days: bars of a day are not independent."""
    _, at = np.unique(day, return_inverse=True)
    sums = np.stack([np.bincount(at, above), np.bincount(at, below)])
    chosen = rng.integers(sums.shape[1], size=(RESAMPLES, sums.shape[1]))
    above_of, below_of = sums[:, chosen].sum(axis=2)
    low, high = np.quantile(above_of / below_of, (0.05, 0.95))
    return Interval(float(above.sum() / below.sum()), float(low), float(high))


def _agreement(a: _View, b: _View) -> Agreement:
    T = min(a.weights.shape[2], b.weights.shape[2])
    one, other = (v.weights.mean(axis=1)[:, :T].astype(np.float64) for v in (a, b))
    x, y = (w - w.mean(axis=1, keepdims=True) for w in (one, other))
    norm = np.sqrt((x**2).sum(axis=1) * (y**2).sum(axis=1))
    return Agreement(
        profiles=_correlation(one.mean(axis=0), other.mean(axis=0)),
        bars=float(((x * y).sum(axis=1) / np.maximum(norm, 1e-30)).mean()),
        forecasts=_correlation(a.values[:, 0], b.values[:, 0]),
    )


def _correlation(a: Floats, b: Floats) -> float:
    return float(np.corrcoef(a, b)[0, 1]) if a.std() and b.std() else 0.0


def _gradients(
    run: _Bars, bundle: Bundle, network: _Opened, view: _View, rng: np.random.Generator
) -> Gradients | None:
    """Of the inputs of the window, from a mean input (zero) on; the state before it stays as it was."""
    if find_spec("captum") is None:
        return None
    from captum.attr import IntegratedGradients

    before = _before(bundle)
    chosen = np.sort(rng.choice(len(run.row), min(ATTRIBUTED_BARS, len(run.row)), replace=False))
    rows = np.stack(
        [
            run.past[i].x[row - before + 1 : row + 1]
            for i, row in zip(run.history[chosen], run.row[chosen], strict=True)
        ]
    )
    window, last_output = network.newest(torch.from_numpy(bundle.scaler.transform(rows)))
    attributions, deltas = IntegratedGradients(last_output).attribute(
        window,
        n_steps=IG_STEPS,
        internal_batch_size=len(chosen),
        return_convergence_delta=True,
    )
    by_bar = attributions.detach().numpy().astype(np.float64)
    by_lag = np.abs(by_bar.sum(axis=2)).mean(axis=0)[::-1].copy()
    attention = view.weights.mean(axis=(0, 1))
    return Gradients(
        by_lag=by_lag,
        by_feature=np.abs(by_bar.sum(axis=1)).mean(axis=0),
        rank_correlation=_correlation(_ranks(by_lag[1:]), _ranks(attention[1:])),
        error=float(deltas.abs().mean() / np.abs(by_bar.sum(axis=(1, 2))).mean()),
    )


def _ranks(a: NDArray[np.floating[Any]]) -> Floats:
    return np.argsort(np.argsort(a)).astype(np.float64)
