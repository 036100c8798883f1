"""``polyalign explain``: what an objective computes, what a key means, which recipes there are.

All of it is read from where it is defined: the rows of the table of objectives, the fields of the recipe's schema and their
docstrings, the first comment of each packaged recipe.
"""

from __future__ import annotations

import difflib
import json
import re
import textwrap
from collections.abc import Callable, Iterator, Mapping
from types import NoneType
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from polyalign.core.config import json_schema, packaged
from polyalign.core.config_errors import short
from polyalign.core.config_source import dotted, to_yaml
from polyalign.core.errors import UserError
from polyalign.core.schema_walk import Shape, all_paths, inside, literals, shape_of_field, through_lists

WIDTH = 100
BOUNDS = {"gt": "greater than", "ge": "at least", "lt": "less than", "le": "at most"}
PLAIN_NAMES = {int: "whole number", float: "number", str: "text", bool: "true or false", NoneType: "null", dict: "section"}

SchemaOf = Callable[[], type[BaseModel]]


def explanation(topic: str | None, schemas: Mapping[str, SchemaOf]) -> str:
    """The text for a topic.

    Args:
        topic: None is an overview.
        schemas: by modality, what fetches its recipe's schema, which imports the modality, when it is needed. A key is
            explained for every one that has it; the overview and the JSON schema are of the first.

    Raises:
        UserError: nothing is called that.
    """
    first = next(iter(schemas.values()))
    if topic is None:
        return overview(first())
    if topic == "configs":
        return configs_table()
    if topic == "schema":
        return json.dumps(json_schema(first()), indent=2)
    table = _objectives()
    if topic == "objective":
        return objectives_table(table)
    if topic in table:
        return objective_card(table[topic], {name: schema_of() for name, schema_of in schemas.items()})
    own = [(name, section) for name, schema_of in schemas.items() for section in _own(schema_of(), topic, table)]
    if own:
        return "\n\n".join(_own_card(name, topic, section) for name, section in own)
    wanted = re.sub(r"\.\d+(?=\.|$)", "", topic)
    keys = {name: [dotted(path) for path in all_paths(schema_of())] for name, schema_of in schemas.items()}
    having = {name: schemas[name]() for name, known in keys.items() if wanted in known}
    if having:
        return key_cards(having, wanted, several=len(schemas) > 1)
    raise UserError(_unknown(topic, wanted, list(dict.fromkeys(key for known in keys.values() for key in known)), list(table)))


def _own(schema: type[BaseModel], topic: str, table: Mapping[str, Any]) -> Iterator[type[BaseModel]]:
    """The objective of that name which only this schema has, outside the table: one that is no preference loss."""
    info = schema.model_fields.get("objective")
    found = {} if info is None else shape_of_field(info).tagged()
    if topic in found and topic not in table:
        yield found[topic]


def _own_card(modality: str, name: str, section: type[BaseModel]) -> str:
    lines = "\n".join(_parameter_lines(section, "objective"))
    return f"{name}: {_sentence(section.__doc__)}\n\nin recipes of modality {modality}\n{lines}"


def key_cards(schemas: Mapping[str, type[BaseModel]], key: str, *, several: bool) -> str:
    """The key in every modality's recipes, those that say the same of it together. ``several``: there are modalities besides,
    so each text says whose it is."""
    found: dict[str, list[str]] = {}
    for name, schema in schemas.items():
        found.setdefault(key_card(schema, key), []).append(name)
    if not several:
        return next(iter(found))
    return "\n\n".join(f"in recipes of modality {', '.join(names)}\n\n{card}" for card, names in found.items())


def _objectives() -> dict[str, Any]:
    from polyalign.core.objectives.table import TABLE

    return TABLE


def _unknown(topic: str, wanted: str, keys: list[str], names: list[str]) -> str:
    leaf = wanted.rsplit(".", 1)[-1]
    near = [key for key in keys if key.rsplit(".", 1)[-1] == leaf] or difflib.get_close_matches(wanted, [*names, *keys], n=3)
    hint = f" Did you mean {' or '.join(near[:4])}?" if near else ""
    return f"nothing is called {topic!r}.{hint} See 'polyalign explain' for the keys and 'polyalign explain objective'."


def overview(schema: type[BaseModel]) -> str:
    """The keys of a recipe at its first level, and where to go on."""
    rows = [(name, _sentence(info.description)) for name, info in schema.model_fields.items()]
    more = [
        ("objective", "the table of objectives"),
        ("dpo", "one objective: formula, parameters, source"),
        ("train.batch_size", "one key, with dots"),
        ("configs", "the packaged recipes"),
        ("schema", "JSON schema of recipes, for editors"),
    ]
    return f"Keys of a recipe:\n{_columns(rows)}\n\npolyalign explain TOPIC, for example:\n{_columns(more)}"


def configs_table() -> str:
    """The packaged recipes with the first line of their opening comment."""
    rows = []
    for name, path in packaged().items():
        first = path.read_text(encoding="utf-8").split("\n", 1)[0]
        rows.append((name, first.lstrip("# ") if first.startswith("#") else ""))
    return f"Packaged recipes:\n{_columns(rows)}" if rows else "No recipes are packaged with this installation."


def objectives_table(table: dict[str, Any]) -> str:
    """All objectives, a line each, with what they are for where that is not everything."""
    rows = [(name, f"{row.summary}{_only(row)}") for name, row in table.items()]
    return f"Objectives (objective.name):\n{_columns(rows)}\n\nOne of them in full: polyalign explain {next(iter(table))}"


def _only(row: Any) -> str:
    from polyalign.core.objectives.objective import ANY_LIKELIHOOD, LIKELIHOOD_WORDS
    from polyalign.core.objectives.serves import DATA_WORDS

    kinds = [LIKELIHOOD_WORDS[kind].split(" (")[0] for kind in LIKELIHOOD_WORDS if kind in row.likelihoods]
    limits = [" and ".join(kinds)] if row.likelihoods != ANY_LIKELIHOOD else []
    limits += [DATA_WORDS[row.data[0]].split(",")[0]] if "pairs" not in row.data else []
    return f" [{'; '.join(limits)}]" if limits else ""


def objective_card(row: Any, schemas: Mapping[str, type[BaseModel]] | None = None) -> str:
    """One objective in full. Where a single modality's schema is given, defaults are what its recipes take; of several, those
    that take a beta of their own are named."""
    from polyalign.core.objectives.objective import capability_words, in_words
    from polyalign.core.objectives.serves import DATA_WORDS

    parts = [f"{row.name}: {row.summary}", f"loss of a group\n{_indent(row.formula)}", f"source\n{_indent(row.source)}"]
    parts.append(f"differences from it\n{_indent(row.differences)}")
    parts.append(f"serves\n{_indent(in_words(row.likelihoods))}")
    if row.likelihoods & {"timestep", "position"}:
        parts.append(f"over noise levels\n{_indent(_jensen(row))}")
    parts.append(f"is trained on\n{_indent(', or '.join(DATA_WORDS[data] for data in row.data))}")
    parts.append(f"needs of the scores\n{_indent(capability_words(row.needs))}")
    others = {name: given for name, schema in (schemas or {}).items() if (given := _given_by(schema, row)) is not None}
    own = next(iter(others.values()), None) if len(schemas or {}) == 1 else None
    lines = list(_parameter_lines(row.parameters, "objective", own))
    if own is None:
        lines += [
            f"  in recipes of modality {name}, where none is given: {_beta_words(given)}" for name, given in others.items()
        ]
    parts.append("parameters\n" + "\n".join(lines))
    parts.append(f"in a recipe\n{textwrap.indent(_example(row, own), '  ')}")
    return "\n\n".join(parts)


def _given_by(schema: type[BaseModel], row: Any) -> BaseModel | None:
    """The objective as recipes of this schema take it where they say its name alone, None where that is the row's own. A schema
    with other defaults has ``objective_defaults(mapping) -> mapping``."""
    change = getattr(schema, "objective_defaults", None)
    if change is None:
        return None
    plain = _least(row)
    return None if (changed := change(plain)) == plain else row.parameters.model_validate(changed)


def _least(row: Any) -> dict[str, Any]:
    """The shortest mapping that a recipe can give."""
    fields = row.parameters.model_fields
    return {
        "name": row.name,
        **{name: literals(row.parameters, name)[0] for name, info in fields.items() if info.is_required()},
    }


def _beta_words(given: Any) -> str:
    return f"beta {short(given.beta.value)}, convention {given.beta.convention}"


def _jensen(row: Any) -> str:
    """What drawing one noise level after another does to the row's loss."""
    objective = row.build(row.parameters.model_validate(_least(row)))
    if objective.is_bound:
        return "the mean of its losses is an upper bound of the loss at the mean log-ratio"
    return "a heuristic with its default parameters: the mean of its losses is no bound of the loss at the mean log-ratio"


def _parameter_lines(section: type[BaseModel], prefix: str, own: BaseModel | None = None) -> Iterator[str]:
    """``own``: a default of the section, whose values stand for those of its class."""
    for name, info in section.model_fields.items():
        if name == "name":
            continue
        shape = shape_of_field(info)
        given = None if own is None else getattr(own, name)
        told = own is None or info.is_required() or isinstance(given, BaseModel)
        shown = _default_text(info) if told else f"; default {short(given)}"
        yield f"  {prefix}.{name}: {_kind(info)}{shown}"
        if info.description:
            yield _indent(info.description, 6)
        if len(shape.sections) == 1:
            default = given if own is not None or info.is_required() else info.get_default(call_default_factory=True)
            yield from _parameter_lines(
                shape.sections[0], f"{prefix}.{name}", default if isinstance(default, BaseModel) else None
            )


def _example(row: Any, own: BaseModel | None = None) -> str:
    """The row's defaults, or those of ``own``, as they would stand in a recipe."""
    values = {name: info.get_default(call_default_factory=True) for name, info in row.parameters.model_fields.items()}
    if own is not None:
        values = {name: getattr(own, name) for name in values}
    plain = {
        name: value.model_dump(mode="json", exclude_none=True) if isinstance(value, BaseModel) else value
        for name, value in values.items()
        if value is not None and not row.parameters.model_fields[name].is_required()
    }
    required = {name: f"<{_kind(info)}>" for name, info in row.parameters.model_fields.items() if info.is_required()}
    return to_yaml({"objective": {"name": row.name, **required, **{k: v for k, v in plain.items() if k != "name"}}}).rstrip()


def key_card(schema: type[BaseModel], key: str) -> str:
    """One key of a recipe: type, range, default, meaning; for a section also its keys."""
    outer = Shape(sections=(schema,))
    *parents, last = key.split(".")
    for part in parents:
        outer = through_lists(inside(outer, part))
    definitions = outer.fields()[last]
    shape = through_lists(inside(outer, last))
    lines = []
    for text, owners in _grouped(definitions).items():
        whose = f"  ({', '.join(owners)})" if len(outer.sections) > 1 and len(owners) < len(outer.sections) else ""
        lines.append(f"{key}: {text}{whose}")
    for description in dict.fromkeys(info.description for _, info in definitions if info.description):
        lines.append(_indent(description))
    if shape.tag:
        lines.append(f"\none of, by {key}.{shape.tag}: {', '.join(shape.tagged())}")
    elif len(shape.sections) == 1:
        rows = [(name, _sentence(info.description)) for name, info in shape.sections[0].model_fields.items()]
        lines.append(f"\nits keys\n{_columns(rows)}")
    return "\n".join(lines)


def _grouped(definitions: list[tuple[type[BaseModel], FieldInfo]]) -> dict[str, list[str]]:
    """Type and default -> the members of the union for which they hold."""
    found: dict[str, list[str]] = {}
    for section, info in definitions:
        tags = literals(section, "name")
        found.setdefault(f"{_kind(info)}{_default_text(info)}", []).append(str(tags[0]) if tags else section.__name__)
    return found


def _kind(info: FieldInfo) -> str:
    """A field's type and range in words."""
    shape = shape_of_field(info)
    words = ["section"] if shape.sections else []
    words += [_type_name(other) for other in shape.others]
    if NoneType in get_args(info.annotation):
        words.append("null")
    text = " or ".join(dict.fromkeys(words))
    bounds = [
        f"{word} {getattr(item, sign):g}" for item in info.metadata for sign, word in BOUNDS.items() if hasattr(item, sign)
    ]
    return ", ".join([text, *bounds])


def _type_name(annotation: Any) -> str:
    if get_origin(annotation) is Literal:
        return " | ".join(str(value) for value in get_args(annotation))
    if get_origin(annotation) in (list, tuple, set):
        inner = [item for item in get_args(annotation) if item is not Ellipsis]
        return f"list of {' and '.join(dict.fromkeys(_type_name(item) for item in inner))}"
    plain = get_origin(annotation) or annotation
    if plain in PLAIN_NAMES:
        return PLAIN_NAMES[plain]
    if isinstance(plain, type) and issubclass(plain, BaseModel):
        return "section"
    inner = get_args(annotation)
    return _type_name(inner[0]) if inner else getattr(plain, "__name__", str(plain)).lower()


def _default_text(info: FieldInfo) -> str:
    if info.is_required():
        return "; has no default"
    value = info.get_default(call_default_factory=True)
    return "" if isinstance(value, BaseModel) else f"; default {short(value)}"


def _sentence(text: str | None) -> str:
    return re.split(r"(?<=[.])\s(?=[A-Z`])", " ".join((text or "").split()), maxsplit=1)[0]


def _indent(text: str, by: int = 2) -> str:
    return textwrap.fill(" ".join(text.split()), WIDTH, initial_indent=" " * by, subsequent_indent=" " * by)


def _columns(rows: list[tuple[str, str]]) -> str:
    width = max((len(name) for name, _ in rows), default=0) + 2
    return "\n".join(
        textwrap.fill(text or "-", WIDTH, initial_indent=f"  {name:{width}}", subsequent_indent=" " * (width + 2))
        for name, text in rows
    )
