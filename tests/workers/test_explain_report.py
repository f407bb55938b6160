"""Explanations: what is planted is found and named, what does not matter is said not to, all of it is drawn."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from models.bundle import Bundle, BundleRejected
from models.dataset import OHLCV, BarsRejected, histories, load_bars
from models.explain import Explanation, _Shuffle, explain
from models.network import CausalNetwork
from models.network_config import NetworkConfig
from models.runtimes import with_golden
from models.runtimes.torch import load_network, weights_of
from models.targets import Target
from models.window_network import WindowNetwork, build_network
from tests.workers.builders import make_bars, make_bundle
from workers.explain_report import run

VOLATILITY = (Target(kind="volatility", horizon=5),)


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def bars(n: int = 900) -> pd.DataFrame:
    made = make_bars(["A"], n)
    frame = pd.DataFrame(made.ohlcv, columns=OHLCV)
    return frame.assign(symbol=made.symbols, ts=made.ts)


def planted(seed: int = 0, lag: int = 9) -> Bundle:
    """It looks nearly only at the bar so many back, and forecasts by nothing else than what is there."""
    bundle = make_bundle(seed, window=16, targets=VOLATILITY)
    weights = dict(bundle.weights)
    table = np.zeros_like(weights["attention.lag_bias.table"])
    table[:, lag] = 8.0
    head = weights["head.weight"].copy()
    head[:, : bundle.config.sequence.hidden] = 0.0
    weights |= {"attention.lag_bias.table": table, "head.weight": head}
    return with_golden(replace(bundle, weights=weights), bundle.golden["x"])


def windowed(attention: str) -> Bundle:
    """It sees 16 bars, and every weight of it is random."""
    carried = make_bundle(window=16, targets=VOLATILITY)
    changes = {"mode": "window", "attention": attention, "slower": 4}
    network = NetworkConfig.model_validate({**carried.config.sequence.model_dump(), **changes})
    torch.manual_seed(0)
    module = build_network(network, carried.scaler)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    config = carried.config.model_copy(update={"network": network, "warm_up_bars": 16})
    made = replace(carried, config=config, weights=weights_of(module))
    return with_golden(made, carried.golden["x"])


@pytest.fixture(scope="module")
def found() -> Explanation:
    return explain([planted(), planted(seed=1)], bars())


def test_only_the_newest_bars_of_each_symbol_are_explained(
    found: Explanation, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("models.explain.MAX_BARS", 100)
    monkeypatch.setattr("models.explain.PERMUTATIONS", 1)
    two = pd.concat([bars(), bars().assign(symbol="B")])
    fewer = explain([planted()], two)
    for symbol in ("A", "B"):
        assert np.array_equal(fewer.ts[fewer.symbol == symbol], found.ts[-50:])
    np.testing.assert_allclose(fewer.weights[:50], found.weights[-50:], atol=1e-3)


def test_a_network_that_never_left_its_linear_start_is_said_to_look_nowhere_that_matters(
    tmp_path: Path,
) -> None:
    def untrained(seed: int) -> Bundle:
        bundle = make_bundle(seed, window=16, targets=VOLATILITY)
        nil = {n: np.zeros_like(a) for n, a in bundle.weights.items() if n != "skip.weight"}
        skip = np.full_like(bundle.weights["skip.weight"], 0.01)
        made = replace(bundle, weights={**nil, "skip.weight": skip})
        return with_golden(made, bundle.golden["x"])

    page = run([untrained(0), untrained(1)], bars(), tmp_path).read_text()
    assert "Nothing but the newest bar moves the forecast" in page
    assert "look at everything alike" in page


def test_a_planted_period_is_found_and_named(found: Explanation) -> None:
    assert next(p.name for p in found.periods if p.found) == "9 minutes back"
    best = found.periods[0]
    assert best.share > 0.8 > best.uniform
    assert best.lift.low <= best.lift.value <= best.lift.high
    assert np.allclose(found.weights.sum(axis=2), 1, atol=1e-4)
    assert (found.effective_length < 4).all()
    assert found.mean.argmax(axis=1).tolist() == [9] * len(found.ts)


def test_the_weights_are_those_that_the_network_itself_gives(found: Explanation) -> None:
    bundle = planted()
    network = CausalNetwork(bundle.config.sequence).eval()
    network.load_state_dict({k: torch.tensor(v) for k, v in bundle.weights.items()})
    assert weights_of(network).keys() == bundle.weights.keys()
    alone = explain([bundle], bars())
    np.testing.assert_array_equal(alone.weights, found.weights)
    assert found.weights.shape[1:] == (2, 16)


def test_gradients_agree_with_a_network_that_reads_the_past_by_attention_alone(
    found: Explanation,
) -> None:
    assert found.gradients is not None
    past = found.gradients.by_lag[1:]
    assert found.gradients.error < 0.05
    assert past.shape == (15,)
    assert past[8:].sum() > past[:8].sum()  # the state of the bar 9 back, and what led to it


def test_loss_with_other_weights_is_measured_on_the_same_bars(found: Explanation) -> None:
    (ablation,) = found.ablations
    assert ablation.uniform != ablation.loss
    assert ablation.rise.value == pytest.approx(ablation.uniform / ablation.loss - 1)
    assert len(set(ablation.permuted)) == len(ablation.permuted)
    assert 0 < ablation.p_value <= 1
    assert len(found.seeds) == 2
    assert -1 <= found.agreement[0].bars <= 1


@pytest.mark.parametrize("attention", ["dot", "additive", "self", "cross"])
def test_a_network_over_windows_is_explained_by_the_rows_it_goes_back_to(attention: str) -> None:
    bundle = windowed(attention)
    explained = explain([bundle], bars(500))
    T = bundle.config.window
    assert explained.weights.shape[1:] == (2, T)
    frame = load_bars(bars(500))
    (past,) = histories(frame, bundle.config.features, VOLATILITY)
    rows = np.searchsorted(past.ts, explained.ts)
    x = bundle.scaler.transform(past.x[rows[:, None] + np.arange(1 - T, 1)])
    network = load_network(bundle)
    assert isinstance(network, WindowNetwork)
    with torch.inference_mode():
        seen = torch.ones(x.shape[:2], dtype=torch.bool)
        _, weights = network.windowed(torch.from_numpy(x), seen, need_weights=True)
    assert weights is not None
    np.testing.assert_allclose(explained.mean, weights.numpy(), atol=1e-6)
    assert explained.gradients is not None
    assert explained.gradients.error < 0.05
    (ablation,) = explained.ablations
    assert ablation.uniform != ablation.loss


def test_shuffled_weights_stay_among_what_is_seen() -> None:
    weights = torch.zeros(2, 2, 3, 6)
    weights[..., 2:5] = torch.rand(2, 2, 3, 3) + 0.1
    shuffled = _Shuffle(torch.Generator().manual_seed(0))(weights)
    assert not torch.equal(shuffled, weights)
    assert (shuffled[..., :2] == 0).all()
    assert (shuffled[..., 5] == 0).all()
    torch.testing.assert_close(shuffled.sort(-1).values, weights.sort(-1).values)


def test_what_cannot_be_explained_says_why() -> None:
    none = make_bundle(targets=VOLATILITY)
    network = none.config.sequence.model_copy(update={"attention": "none"})
    without = replace(
        none,
        config=none.config.model_copy(update={"network": network}),
        weights=weights_of(CausalNetwork(network)),
    )
    with pytest.raises(BundleRejected, match="attention"):
        explain([without], bars(500))
    with pytest.raises(BarsRejected, match="too few"):
        explain([planted()], bars(300))


def test_every_picture_is_drawn_and_the_page_needs_no_other_file(tmp_path: Path) -> None:
    page = run([planted(), planted(seed=1)], bars(700), tmp_path)
    pictures = sorted(p.stem for p in tmp_path.glob("*.png"))
    names = "ablation effective_length features gradients heads heat_map periods seeds time_of_day"
    assert pictures == names.split()
    text = page.read_text()
    assert text.count("data:image/png;base64,") == len(pictures)
    assert "9 minutes back" in text
    said = json.loads((tmp_path / "explanation.json").read_text())
    assert said["window"] == 16
    assert said["periods"][0]["found"]
