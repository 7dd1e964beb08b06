"""The attributes of a study as people read them, for the dashboard's page of the study."""

from collections.abc import Mapping
from typing import Any

from storage.attributes import PREFIX, SHAPES
from storage.errors import many
from studies.definition import from_json, to_toml
from studies.errors import DefinitionError

# In this order. What is not listed is of use to programs alone.
TITLES = {
    "state": "state",
    "pause_reason": "why it is paused",
    "budget": "budget",
    "data": "images",
    "definition": "definition (TOML)",
    "precision": "precision",
    "software": "software",
}
FINDINGS = "what was found"


def for_people(user_attrs: Mapping[str, Any], found: list[str]) -> dict[str, Any]:
    """What was `found`, a sentence each; then the attributes of Trialyard with titles, and those of others as they are.

    A study that Trialyard did not make keeps its attributes.
    """
    if f"{PREFIX}definition" not in user_attrs:
        return dict(user_attrs)
    known = {FINDINGS: " ".join(found)} if found else {}
    for name, title in TITLES.items():
        value = user_attrs.get(PREFIX + name)
        if value is not None:
            known[title] = _text(name, value)
    return known | {key: value for key, value in user_attrs.items() if not key.startswith(PREFIX)}


def _text(name: str, value: Any) -> str:
    if not SHAPES[name](value):
        return str(value)  # another program changed it
    if name == "definition":
        try:
            return to_toml(from_json(value))
        except DefinitionError:  # of a later version
            return str(value)
    if name == "budget":
        hours = f", {value['hours']:g} hours" if value.get("hours") else ""
        return f"{many(value['trials'], 'trial')}{hours}"
    if isinstance(value, dict):
        return ", ".join(f"{key.replace('_', ' ')} {_value(each)}" for key, each in value.items())
    return str(value)


def _value(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
