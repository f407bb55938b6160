"""What must hold for every choice that a configuration offers, found by looking at what it offers."""

from collections.abc import Iterator
from typing import Any, get_args

import numpy as np
import pandas as pd
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from models.augmentation import (
    AugmentedChunks,
    BarAugmentation,
    ChunkAugmentation,
    altered_history,
)
from models.dataset import Chunk, History, histories, load_bars
from models.features import FEATURE_NAMES, F, FeatureSpec
from models.losses import LossConfig, Objective
from models.network import Network
from models.network_config import NetworkConfig, weight_shapes
from models.scaling import Kind, Scaler
from models.schedules import ScheduleConfig, ScheduleKind
from models.targets import Target
from models.training import OPTIMISERS, TrainingConfig, label_statistics, train
from models.window_network import CLOCK, build_network
from tests.models.builders import make_frame
from tests.models.networks import (
    DIRECTION,
    DIRECTION_3,
    RETURN,
    SMALL,
    VOLATILITY,
    make_any_network,
    variations,
)

ATOL = 1e-5


def choices(config: type[Any], *names: str) -> list[tuple[str, Any]]:
    """(field, value) for each value of each Literal field."""
    return [
        (name, value) for name in names for value in get_args(config.model_fields[name].annotation)
    ]


def ids(value: Any) -> str:
    if isinstance(value, dict):
        return ",".join(str(v) if not isinstance(v, bool) else f"{k}={v}" for k, v in value.items())
    return str(value)


# ---- networks: each mode with each attention, cell, bias, norm, direction, depth ----

B, L = 3, 17


def make_x(seed: int = 0) -> Tensor:
    """Scaled rows of sessions of 9 bars, so that bars of a slower time frame begin and end in them."""
    x = torch.randn(B, L, F, generator=torch.Generator().manual_seed(seed))
    number = 1 + (torch.arange(L) + torch.arange(B).unsqueeze(1)) % 9
    x[..., CLOCK] = torch.log1p(number)
    return x


def said(network: Network, *parts: Tensor) -> tuple[Tensor, Tensor]:
    state, outputs, weights = None, [], []
    with torch.inference_mode():
        for part in parts:
            out, by_lag, state = network(part, state, need_weights=True)
            outputs.append(out)
            weights.append(by_lag)
    return torch.cat(outputs, 1), torch.cat(weights, 1)


@pytest.mark.parametrize("options", variations(), ids=ids)
class TestEveryNetwork:
    @pytest.fixture
    def network(self, options: dict[str, Any]) -> Network:
        return make_any_network(n_features=F, **options)

    def test_its_weights_are_those_that_its_config_announces(self, network: Network) -> None:
        found = {name: tuple(t.shape) for name, t in network.state_dict().items()}
        assert weight_shapes(network.config) == found

    def test_chunks_in_pieces_say_what_one_chunk_says(self, network: Network) -> None:
        x = make_x()
        whole, pieces = said(network, x), said(network, x[:, :1], x[:, 1:9], x[:, 9:])
        for one, other in zip(whole, pieces, strict=True):
            torch.testing.assert_close(one, other, atol=ATOL, rtol=ATOL)

    def test_nothing_after_a_bar_changes_what_is_said_at_it(self, network: Network) -> None:
        x, (outputs, weights) = make_x(), said(network, make_x())
        for t in (0, 5, L - 2):
            other = x.clone()
            other[:, t + 1 :] = make_x(1)[:, t + 1 :]
            changed, moved = said(network, other)
            assert torch.equal(outputs[:, : t + 1], changed[:, : t + 1])
            assert torch.equal(weights[:, : t + 1], moved[:, : t + 1])
            assert not torch.equal(outputs[:, t + 1 :], changed[:, t + 1 :])

    def test_one_by_one_is_as_together(self, network: Network) -> None:
        x = make_x()
        together, weights = said(network, x)
        for b in range(B):
            alone, own = said(network, x[b : b + 1])
            torch.testing.assert_close(alone, together[b : b + 1], atol=ATOL, rtol=ATOL)
            torch.testing.assert_close(own, weights[b : b + 1], atol=ATOL, rtol=ATOL)

    def test_weights_are_shares_of_the_bars_that_were_seen(self, network: Network) -> None:
        weights, T = said(network, make_x())[1], network.config.window
        seen = torch.arange(T) <= torch.arange(L).unsqueeze(1)
        assert weights.shape == (B, L, T)
        assert (weights >= 0).all()
        assert (weights[:, ~seen] == 0).all()
        total = weights.sum(-1)
        one = torch.isclose(total, torch.ones(()), atol=1e-5)
        assert (one | (total == 0)).all()
        assert network.config.attends == one.any()

    def test_it_leaves_its_input_alone_and_says_without_weights_the_same(
        self, network: Network
    ) -> None:
        x = make_x()
        with torch.inference_mode():
            plain, none, _ = network(x)
        assert torch.equal(x, make_x())
        assert none is None
        torch.testing.assert_close(plain, said(network, x)[0], atol=ATOL, rtol=ATOL)

    def test_every_weight_learns(self, network: Network) -> None:
        network.train()(make_x())[0].square().sum().backward()
        still = {n for n, p in network.named_parameters() if p.grad is None or not p.grad.any()}
        if network.config.window == 1:  # one bar has no past, and one key no rival
            still -= {n for n in still if "weight_hh" in n or "lag_bias" in n}
        assert not still

    def test_a_new_one_is_its_linear_skip(self, network: Network) -> None:
        new = build_network(network.config).eval()
        if new.skip is None:
            assert not said(new, make_x())[0].any()
        else:
            torch.nn.init.normal_(new.skip.weight)
            torch.testing.assert_close(said(new, make_x())[0], new.skip(make_x()))


# ---- training: each optimiser, schedule, loss, and mix of heads, in both modes ----

LAG = 2


class Echo:
    """Chunks of noise whose labels are what the first feature was LAG bars ago, as each target has it."""

    def __init__(self, *targets: Target, seed: int = 0, streams: int = 6, chunks: int = 5) -> None:
        rng = np.random.default_rng(seed)
        x = rng.normal(size=(streams, 16 * chunks, 3)).astype(np.float32)
        past = np.roll(x[..., 0], LAG, axis=1)
        labels = [
            np.digitize(past, [-0.5, 0.5][: t.classes - 1]) if t.kind == "direction" else past
            for t in targets
        ]
        y = np.stack(labels, -1).astype(np.float32)
        self.x, self.y, self.epoch = np.split(x, chunks, 1), np.split(y, chunks, 1), 0

    def __len__(self) -> int:
        return len(self.x)

    def __iter__(self) -> Iterator[Chunk]:
        for k, (x, y) in enumerate(zip(self.x, self.y, strict=True)):
            weight = np.ones(x.shape[:2], np.float32)
            weight[:, : LAG if k == 0 else 0] = 0.0
            yield Chunk(x, y, weight, carry=k > 0)
        self.epoch += 1


def losses_of_training(
    targets: tuple[Target, ...], loss: dict[str, Any], network: dict[str, Any], **training: Any
) -> tuple[float, float]:
    """Of the first and the last epoch."""
    chunks = Echo(*targets)
    statistics = label_statistics(chunks, targets)
    objective = Objective(targets, statistics.scaling, statistics.frequencies, LossConfig(**loss))
    sizes = {"n_features": 3, "n_outputs": sum(t.n_outputs for t in targets), "dropout": 0.0}
    torch.manual_seed(0)
    module = build_network(NetworkConfig(**{**SMALL, "layers": 1, **sizes, **network}))
    config = TrainingConfig(**{"epochs": 4, "learning_rate": 1e-2, "patience": 9, **training})
    progress = train(module, chunks, Echo(*targets, seed=1), objective, config)
    return progress.epochs[0].train_loss, progress.epochs[-1].train_loss


@pytest.mark.parametrize("mode", ["carried", "window"])
@pytest.mark.parametrize("targets", [(VOLATILITY, DIRECTION, DIRECTION_3, RETURN), (DIRECTION_3,)])
def test_any_mix_of_heads_learns_in_either_mode(mode: str, targets: tuple[Target, ...]) -> None:
    first, last = losses_of_training(targets, {}, {"mode": mode}, epochs=6)
    assert last < 0.95 * first


@pytest.mark.parametrize("optimiser", choices(TrainingConfig, "optimiser"), ids=ids)
def test_every_optimiser_learns(optimiser: tuple[str, str]) -> None:
    rate = 0.1 if optimiser[1] == "sgd" else 1e-2
    first, last = losses_of_training(
        (VOLATILITY,), {}, {}, optimiser=optimiser[1], learning_rate=rate, epochs=6
    )
    assert last < 0.9 * first


def test_optimisers_are_those_that_the_config_offers() -> None:
    offered = get_args(TrainingConfig.model_fields["optimiser"].annotation)
    assert set(offered) == set(OPTIMISERS)


@pytest.mark.parametrize("kind", get_args(ScheduleKind))
def test_every_schedule_learns(kind: ScheduleKind) -> None:
    first, last = losses_of_training((VOLATILITY,), {}, {}, schedule=ScheduleConfig(kind=kind))
    assert last < 0.95 * first


REGRESSIONS = {"volatility": VOLATILITY, "returns": RETURN, "direction": DIRECTION_3}


@pytest.mark.parametrize(
    ("field", "value"), choices(LossConfig, "volatility", "returns", "direction"), ids=ids
)
def test_every_loss_learns(field: str, value: str) -> None:
    first, last = losses_of_training((REGRESSIONS[field],), {field: value}, {}, epochs=6)
    assert last < 0.95 * first


@pytest.mark.parametrize(
    ("field", "value"), choices(LossConfig, "volatility", "returns", "direction"), ids=ids
)
def test_every_loss_counts_only_steps_with_weight_and_is_least_at_the_truth(
    field: str, value: str
) -> None:
    target = REGRESSIONS[field]
    chunks = Echo(target)
    statistics = label_statistics(chunks, [target])
    objective = Objective(
        [target], statistics.scaling, statistics.frequencies, LossConfig(**{field: value})
    )
    _, y, weight, _ = next(iter(chunks))
    labels, counted = torch.from_numpy(y), torch.from_numpy(weight)
    if field == "direction":
        truth = 20.0 * torch.nn.functional.one_hot(labels[..., 0].long(), 3).float()
    else:
        truth = (labels - statistics.scaling[0].mean) / statistics.scaling[0].sd
    least = float(objective(truth, labels, counted))
    for shift in (-0.5, 0.5):
        other = truth.roll(1, -1) if field == "direction" else truth + shift
        assert float(objective(other, labels, counted)) > least + 1e-3
    garbled = truth.masked_fill((counted == 0).unsqueeze(-1), 3.0)
    assert float(objective(garbled, labels, counted)) == pytest.approx(least, abs=1e-6)
    outputs = (0.1 * torch.randn(truth.shape)).requires_grad_(True)
    objective(outputs, labels, counted).backward()
    assert outputs.grad is not None
    assert torch.isfinite(outputs.grad).all()


# ---- scalers ----


@pytest.mark.parametrize("kind", get_args(Kind))
class TestEveryScaler:
    def rows(self) -> NDArray[np.float32]:
        return np.random.default_rng(0).normal(3, 5, (200, 4)).astype(np.float32)

    def test_it_survives_saving_and_leaves_its_input_alone(self, kind: Kind) -> None:
        x = self.rows()
        scaler = Scaler.fit(x, kind)
        again = Scaler.from_json(scaler.to_json())
        assert again.kind == kind
        np.testing.assert_array_equal(again.transform(x), scaler.transform(x))
        np.testing.assert_array_equal(x, self.rows())

    def test_rows_one_by_one_are_as_together(self, kind: Kind) -> None:
        x = self.rows()
        scaler = Scaler.fit(x, kind)
        np.testing.assert_array_equal(
            scaler.transform(x), np.stack([scaler.transform(row) for row in x])
        )

    def test_it_refuses_what_is_not_finite(self, kind: Kind) -> None:
        x = self.rows()
        x[3, 1] = np.nan
        with pytest.raises(ValueError, match="finite"):
            Scaler.fit(x, kind)


# ---- augmentations ----

SPEC = FeatureSpec(interval_ms=300_000)
WHOLE = {"keep": 0.7, "warp_bars": None}
"""Fields that are no deviation or share: another value, or None for those that do nothing alone."""


def augmentations(config: type[Any]) -> list[dict[str, float]]:
    values = {name: WHOLE.get(name, 0.2) for name in config.model_fields}
    return [{name: value} for name, value in values.items() if value is not None]


@pytest.mark.parametrize("options", augmentations(BarAugmentation), ids=ids)
def test_every_augmentation_of_bars_alters_a_copy_of_the_training_part(
    options: dict[str, Any],
) -> None:
    bars = make_frame(1, 300)
    before = int(bars["ts"].quantile(0.5))

    def copy_of(frame: pd.DataFrame, config: BarAugmentation) -> History:
        (one,) = histories(load_bars(frame), SPEC, [VOLATILITY])
        kept = one.ohlcv.copy()
        made = altered_history(one, before, config, (1,), SPEC, [VOLATILITY])
        np.testing.assert_array_equal(one.ohlcv, kept)
        return made

    config = BarAugmentation(**options)
    copy = copy_of(bars, config)
    assert copy.ts.max() < before
    late = bars["ts"] >= before
    bars.loc[late, ["open", "high", "low", "close"]] *= 9
    np.testing.assert_array_equal(copy.ohlcv, copy_of(bars, config).ohlcv)
    plain = copy_of(bars, BarAugmentation()).ohlcv
    assert len(copy.ts) != len(plain) or not np.allclose(copy.ohlcv[:, 3], plain[:, 3])
    open_, high, low, close, _ = copy.ohlcv.T
    assert (high >= np.maximum(open_, close) - 1e-9).all()
    assert (low <= np.minimum(open_, close) + 1e-9).all()


class Rows(Echo):
    """One epoch of chunks with all features."""

    def __init__(self) -> None:
        super().__init__(VOLATILITY, RETURN)
        rng = np.random.default_rng(2)
        self.x = [rng.normal(size=(*x.shape[:2], F)).astype(np.float32) for x in self.x]


@pytest.mark.parametrize("options", augmentations(ChunkAugmentation), ids=ids)
def test_every_augmentation_of_chunks_is_the_same_for_the_same_seed_and_epoch(
    options: dict[str, Any],
) -> None:
    scaler = Scaler.fit(np.random.default_rng(0).normal(size=(50, len(FEATURE_NAMES))))

    def chunks(epoch: int, **config: float) -> list[Chunk]:
        made = AugmentedChunks(Rows(), ChunkAugmentation(**config), scaler, [VOLATILITY, RETURN], 3)
        made.epoch = epoch
        return list(made)

    one, same, other = chunks(0, **options), chunks(0, **options), chunks(1, **options)
    plain = list(Rows())
    assert all(
        np.array_equal(a.x, b.x) and np.array_equal(a.y, b.y)
        for a, b in zip(one, same, strict=True)
    )
    assert any(not np.array_equal(a.x, b.x) for a, b in zip(one, other, strict=True))
    assert any(not np.array_equal(a.x, b.x) for a, b in zip(one, plain, strict=True))
    for a, b in zip(one, plain, strict=True):
        assert np.array_equal(a.weight, b.weight)
        assert not a.y[a.weight == 0].any()
