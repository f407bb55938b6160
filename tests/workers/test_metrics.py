import re
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from workers import metrics as metrics_module
from workers.metrics import Metrics

NAMES = {
    "bars": ("counter", ("status",)),
    "batch_bars": ("histogram", ()),
    "bundle": ("info", ("role",)),
    "bundles_rejected": ("counter", ("role",)),
    "challenger_evidence": ("gauge", ("bundle", "target")),
    "commit_seconds": ("histogram", ()),
    "cusum": ("gauge", ("bundle", "target")),
    "cusum_threshold": ("gauge", ("bundle", "target")),
    "cycle_seconds": ("histogram", ()),
    "dead_letters": ("counter", ("reason",)),
    "degradations": ("counter", ("target",)),
    "input_psi": ("gauge", ("bundle",)),
    "input_ks": ("gauge", ("bundle",)),
    "input_embedding_distance": ("gauge", ("bundle",)),
    "gaps": ("counter", ("kind",)),
    "lag_messages": ("gauge", ("topic", "partition")),
    "lifecycle_decisions": ("counter", ("decision",)),
    "messages_consumed": ("counter", ("topic",)),
    "messages_produced": ("counter", ("topic",)),
    "outcomes": ("counter", ("target", "role")),
    "predictions": ("counter", ("role",)),
    "progress_age_seconds": ("gauge", ()),
    "rebalances": ("counter", ("kind",)),
    "registry_errors": ("counter", ("operation",)),
    "restore_seconds": ("histogram", ()),
    "retrain_progress_ratio": ("gauge", ()),
    "retrain_seconds": ("histogram", ()),
    "retrains": ("counter", ("result",)),
    "snapshot_bytes": ("gauge", ("partition",)),
    "snapshot_failures": ("counter", ("operation",)),
    "snapshot_seconds": ("histogram", ()),
    "stalled_partitions": ("gauge", ()),
    "swaps": ("counter", ("role",)),
    "symbols": ("gauge", ()),
    "symbols_silent": ("gauge", ()),
    "transactions_aborted": ("counter", ()),
}
"""Dashboards and alert rules of other people are built on these: change them knowingly."""


def declared(metrics: Metrics) -> dict[str, tuple[str, tuple[str, ...]]]:
    return {
        m._name.removeprefix("gpt_trader_"): (m._type, tuple(m._labelnames))
        for m in vars(metrics).values()
        if hasattr(m, "_labelnames")
    }


def test_metric_names_kinds_and_labels_are_pinned() -> None:
    assert declared(Metrics()) == NAMES


def test_every_metric_is_on_the_page_under_the_prefix() -> None:
    page = generate_latest(Metrics().registry).decode()
    families = {f.name.removesuffix("_info") for f in text_string_to_metric_families(page)}
    assert {f"gpt_trader_{name}" for name in NAMES} <= families
    assert all(f.startswith(("gpt_trader_", "process_")) for f in families)


def test_every_metric_has_a_comment_that_says_what_a_rise_means() -> None:
    source = Path(metrics_module.__file__).read_text()
    uncommented = [
        match["name"]
        for match in re.finditer(
            r"(?P<before>^.*\n)^        self\.(?P<name>\w+) = (counter|gauge|histogram|Info)\(",
            source,
            re.MULTILINE,
        )
        if not match["before"].lstrip().startswith("#")
    ]
    assert uncommented == []


def test_two_instances_count_apart() -> None:
    one, other = Metrics(), Metrics()
    one.bars.labels("ok").inc(3)
    assert one.registry.get_sample_value("gpt_trader_bars_total", {"status": "ok"}) == 3
    assert other.registry.get_sample_value("gpt_trader_bars_total", {"status": "ok"}) == 0


@pytest.mark.parametrize(
    ("name", "labels"),
    [
        ("bundles_rejected", {"role": "challenger"}),
        ("rebalances", {"kind": "lost"}),
        ("retrains", {"result": "failed"}),
        ("lifecycle_decisions", {"decision": "rolled_back"}),
        ("snapshot_failures", {"operation": "load"}),
        ("transactions_aborted", {}),
        ("gaps", {"kind": "jump"}),
    ],
)
def test_rare_events_start_at_0_so_that_the_first_one_is_an_increase(
    name: str, labels: dict[str, str]
) -> None:
    assert Metrics().registry.get_sample_value(f"gpt_trader_{name}_total", labels) == 0


def test_a_registry_of_the_callers_own_is_used() -> None:
    registry = CollectorRegistry()
    Metrics(registry).symbols.set(7)
    assert registry.get_sample_value("gpt_trader_symbols") == 7


def test_the_same_registry_twice_is_refused() -> None:
    registry = CollectorRegistry()
    Metrics(registry)
    with pytest.raises(ValueError, match="Duplicated"):
        Metrics(registry)


def test_bundle_of_a_role_is_replaced_not_added() -> None:
    metrics = Metrics()
    metrics.bundle.labels("champion").info({"bundle": "aaa"})
    metrics.bundle.labels("champion").info({"bundle": "bbb"})
    page = generate_latest(metrics.registry).decode()
    assert 'gpt_trader_bundle_info{bundle="bbb",role="champion"} 1.0' in page
    assert "aaa" not in page
