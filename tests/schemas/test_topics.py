from dataclasses import asdict

from schemas.topics import LIFECYCLE, PARTITIONER, PERFORMANCE, TOPICS, TRAINING
from tests.schemas.test_messages import pin


def test_topic_names_keys_and_policies_are_pinned() -> None:
    pin("topics", {topic.name: asdict(topic) for topic in TOPICS} | {"partitioner": PARTITIONER})


def test_only_states_are_compacted_and_what_is_keyed_by_symbol_is_co_partitioned() -> None:
    compacted = [t.name for t in TOPICS if t.cleanup_policy == "compact"]
    assert compacted == [LIFECYCLE, TRAINING, PERFORMANCE]
    assert all(t.co_partitioned == (t.key == "symbol") for t in TOPICS)
    assert len({t.name for t in TOPICS}) == len(TOPICS)
