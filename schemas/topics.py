"""The topics: names, keys and policies; the one place that spells them."""

from dataclasses import dataclass
from typing import Literal

BARS = "market.bars"
PREDICTIONS = "signals.predictions"
ATTENTION = "signals.attention"
OUTCOMES = "signals.outcomes"
DEGRADATION = "models.degradation"
LIFECYCLE = "models.lifecycle"
TRAINING = "models.training"
PERFORMANCE = "models.performance"
DEAD_LETTER = "dead-letter"

PARTITIONER = "murmur2_random"
"""Java's partitioner: librdkafka's own default would send a symbol elsewhere."""


@dataclass(frozen=True)
class Topic:
    name: str
    key: str
    co_partitioned: bool
    """Has the partition count of `market.bars`, so that one symbol has one partition number everywhere."""
    cleanup_policy: Literal["delete", "compact"]


TOPICS = (
    Topic(BARS, key="symbol", co_partitioned=True, cleanup_policy="delete"),
    Topic(PREDICTIONS, key="symbol", co_partitioned=True, cleanup_policy="delete"),
    Topic(ATTENTION, key="symbol", co_partitioned=True, cleanup_policy="delete"),
    Topic(OUTCOMES, key="symbol", co_partitioned=True, cleanup_policy="delete"),
    Topic(DEGRADATION, key="bundle", co_partitioned=False, cleanup_policy="delete"),
    Topic(LIFECYCLE, key="slot", co_partitioned=False, cleanup_policy="compact"),
    Topic(TRAINING, key="run", co_partitioned=False, cleanup_policy="compact"),
    Topic(PERFORMANCE, key="window", co_partitioned=False, cleanup_policy="compact"),
    Topic(DEAD_LETTER, key="original key", co_partitioned=False, cleanup_policy="delete"),
)
