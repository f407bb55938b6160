"""What a network is made of, readable where torch is absent."""

from collections.abc import Mapping
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, model_validator

Mode = Literal["carried", "window"]
AttentionKind = Literal["none", "dot", "additive", "self", "cross"]
LagBias = Literal["none", "alibi", "relative"]


class NetworkConfig(BaseModel):
    """A recurrent network with or without attention, in one of two modes.

    - carried: causal, its state goes on from bar to bar (`models.network.CausalNetwork`).
    - window: sees the last `window` bars and nothing else (`models.window_network.WindowNetwork`).
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    family: Literal["sequence"] = "sequence"
    n_features: int = Field(ge=1, le=4096)
    n_outputs: int = Field(ge=1, le=256)
    mode: Mode = "carried"
    hidden: int = Field(default=128, ge=1, le=4096)
    layers: int = Field(default=2, ge=1, le=4)
    cell: Literal["lstm", "gru"] = "lstm"
    bidirectional: bool = False
    """In window mode: a carried state cannot know the bars that come later."""
    layer_norm: bool = False
    """On the output of each layer."""
    attention: AttentionKind = "dot"
    """Of the newest step over the window, with scaled dot-product or additive (Bahdanau) scores.

    In window mode also `self`, of every step over every other, and `cross`, of the newest step over
    the completed bars of a slower time frame. Each with one head or many. Over a session `dot` is
    as good as any and never worse than none, in five seeds on two markets; the figures are in
    `tests/benchmarks/forecasting.md`.
    """
    window: int = Field(default=30, ge=1, le=4096)
    """Steps that attention sees, the newest included; in window mode all that is seen.

    The default is for speed: a session of 5-minute bars, 78, forecasts 0.6 % better and costs a
    fifth more time.
    """
    heads: int = Field(default=4, ge=1, le=64)
    attention_size: int = Field(default=64, ge=1, le=4096)
    """Numbers per key and per value, all heads together."""
    lag_bias: LagBias = "relative"
    slower: int = Field(default=12, ge=2, le=1024)
    """Bars in one bar of the slower time frame of `cross`: 12 of 5 minutes are an hour."""
    skip: bool = True
    gate: bool = True
    dropout: float = Field(default=0.1, ge=0, lt=1)
    """On the output of each layer and on the context."""
    input_dropout: float = Field(default=0.0, ge=0, lt=1)

    @model_validator(mode="after")
    def _parts_agree(self) -> Self:
        if self.attention_size % self.heads:
            raise ValueError("attention_size must be a multiple of heads")
        if self.mode == "carried" and self.bidirectional:
            raise ValueError(
                "bidirectional needs mode='window': a carried state cannot know the bars that come "
                "later"
            )
        if self.mode == "carried" and self.attention in ("self", "cross"):
            raise ValueError(
                f"attention={self.attention!r} needs mode='window'; in carried mode 'dot' and "
                "'additive' are causal"
            )
        if self.attention == "cross" and self.window < 2 * self.slower - 1:
            raise ValueError(
                f"attention='cross' needs window >= {2 * self.slower - 1}, or a completed bar of "
                f"{self.slower} bars may not fit in"
            )
        return self

    @property
    def attends(self) -> bool:
        return self.attention != "none"

    @property
    def width(self) -> int:
        """Of what the recurrent layers say about a step."""
        return self.hidden * (2 if self.bidirectional else 1)

    def takes(self, weights: Mapping[str, NDArray[Any]]) -> bool:
        """Whether these are its weights, by name and shape."""
        return {name: a.shape for name, a in weights.items()} == weight_shapes(self)

    def summary(self) -> str:
        both = "bidirectional " if self.bidirectional else ""
        seen = "the last" if self.mode == "window" else "a carried state, attention over the last"
        return (
            f"{self.layers} x {both}{self.cell.upper()} of {self.hidden}, attention "
            f"`{self.attention}`, {seen} {self.window} steps"
        )


def burn_in_steps(config: NetworkConfig, carried: int) -> int:
    """Steps before one that counts: what a window holds, or for a carried state as said."""
    return config.window - 1 if config.mode == "window" else carried


def warm_up_bars(config: NetworkConfig, carried: int) -> int:
    """Steps after a reset before outputs count; `carried` as in `burn_in_steps`."""
    return config.window if config.mode == "window" else carried + config.window


def weight_shapes(config: NetworkConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every weight of the network that `models.window_network` builds."""
    F, H, O, Y = config.n_features, config.hidden, config.n_outputs, config.width  # noqa: E741
    N, D = config.heads, config.attention_size if config.attends else 0
    gates = 4 * H if config.cell == "lstm" else 3 * H
    shapes: dict[str, tuple[int, ...]] = {"head.weight": (O, Y + D), "head.bias": (O,)}
    if config.skip:
        shapes["skip.weight"] = (O, F)
    if config.gate:
        shapes |= {"gate.weight": (F, F), "gate.bias": (F,)}
    for layer in range(config.layers):
        name = f"recurrent.{layer}"
        for way in ("", "_reverse") if config.bidirectional else ("",):
            shapes |= {
                f"{name}.weight_ih_l0{way}": (gates, Y if layer else F),
                f"{name}.weight_hh_l0{way}": (gates, H),
                f"{name}.bias_ih_l0{way}": (gates,),
                f"{name}.bias_hh_l0{way}": (gates,),
            }
        if config.layer_norm:
            shapes |= {f"norms.{layer}.weight": (Y,), f"norms.{layer}.bias": (Y,)}
    if config.attention == "cross":
        shapes |= {"attention.q.weight": (D, Y), "attention.q.bias": (D,)}
        shapes |= {"attention.kv.weight": (2 * D, F), "attention.kv.bias": (2 * D,)}
        shapes["clock"] = (2,)
    elif D:
        shapes |= {"attention.qkv.weight": (3 * D, Y), "attention.qkv.bias": (3 * D,)}
    if D and config.lag_bias == "relative":
        shapes["attention.lag_bias.table"] = (N, config.window)
    if config.attention == "additive":
        shapes["attention.direction"] = (N, D // N)
    return shapes


def alibi_slopes(heads: int) -> list[float]:
    """2^(-8 n / N) for n = 1..N (Press et al. 2022)."""
    return [2.0 ** (-8.0 * n / heads) for n in range(1, heads + 1)]


def lag_bias(config: NetworkConfig, weights: Mapping[str, NDArray[Any]]) -> NDArray[np.float32]:
    """What each lag adds to the scores of each head, [N, T]; zeros where there is no attention."""
    N, T = config.heads, config.window
    if config.lag_bias == "relative" and config.attends:
        return np.asarray(weights["attention.lag_bias.table"], np.float32)
    slopes = alibi_slopes(N) if config.lag_bias == "alibi" else [0.0] * N
    return -np.outer(slopes, np.arange(T)).astype(np.float32)
