"""What the records of the slots say about bundles, and what is different in two of them."""

import pytest

from schemas.messages import Lifecycle
from tests.workers.builders import make_bundle
from tests.workers.test_trainer import make_record
from workers.lifecycle import differences, rolled_back


def champion(bundle: str, parent: str | None = None, actor: str = "monitor") -> Lifecycle:
    record = make_record("champion", bundle)
    return record.model_copy(update={"parent": parent, "actor": actor})


@pytest.mark.parametrize(
    ("records", "found"),
    [
        ([], set()),
        ([champion("a"), champion("b", "a")], set()),
        ([champion("a"), champion("b", "a"), champion("a")], {"b"}),
        ([champion("a"), champion("b", "a"), champion("c", "b")], set()),
        ([champion("a"), champion("b", "a"), champion("a"), champion("c", "a")], {"b"}),
        ([champion("a"), champion("b", "a"), champion("a"), champion("b", "a", "anna")], set()),
        (
            [champion("a"), champion("b", "a"), champion("a"), make_record("challenger", "b")],
            {"b"},
        ),
    ],
)
def test_a_bundle_whose_parent_came_back_is_rolled_back_until_a_person_says_otherwise(
    records: list[Lifecycle], found: set[str]
) -> None:
    assert rolled_back(records) == found


def test_differences_name_what_changed_and_nothing_else() -> None:
    first, second = make_bundle(0), make_bundle(1)
    assert differences(first, first) == []
    found = {name: (here, there) for name, here, there in differences(first, second)}
    assert found["origin.seed"] == ("0", "1")
    assert found["weights, moved by"][1].endswith("%")
    assert not any(name.startswith("config.network") for name in found)
