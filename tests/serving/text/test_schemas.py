"""JSON schemas before a grammar is made of them."""

import json
import subprocess
import sys

import pytest

from serving.text.schemas import json_rule


def either(*branches, **more):
    return {"type": "object", "properties": {"x": {"oneOf": list(branches)}}, **more}


def kind(value, **more):
    schema = {"type": "object", "properties": {"kind": {"const": value}}, "required": ["kind"]}
    return schema | more


@pytest.mark.parametrize(
    "schema",
    [
        either({"type": "string"}, {"type": ["integer", "null"]}, {"type": "object"}),
        either({"enum": ["a", 1]}, {"const": "b"}),
        either(kind("cat"), kind("dog")),
        either(kind("cat")),
        either(
            {"$ref": "#/$defs/cat"},
            {"$ref": "#/$defs/a~1dog"},
            **{"$defs": {"cat": kind("cat"), "a/dog": kind("dog")}},
        ),
        {"properties": {"oneOf": {"type": "string"}}},  # a property that is called so
        {"items": {"anyOf": [{}, {}]}},
    ],
)
def test_a_one_of_whose_schemas_are_apart_is_an_any_of(schema):
    rule = json_rule(schema, "schema")
    written = json.loads(rule.removeprefix("%json "))
    assert written.pop("x-guidance")["coerce_one_of"] and written == schema


@pytest.mark.parametrize(
    "schema",
    [
        either({"type": "integer"}, {"type": "number"}),
        either({}, {"type": "string"}),
        either({"const": 1}, {"enum": [2, 1]}),
        either({"const": "a"}, {"type": "string"}),
        either(kind("cat"), kind("cat")),
        either(kind("cat", required=[]), kind("dog")),
        either({"$ref": "#/nowhere"}, {"type": "string"}),
        either({"$ref": "#/properties/x/oneOf/0"}, {"type": "string"}),  # itself
        {"$defs": {"a": {"allOf": [{"oneOf": [True, {"type": "string"}]}]}}},
    ],
)
def test_another_one_of_is_refused(schema):
    with pytest.raises(ValueError, match="schema: a value may match two schemas of a oneOf; use"):
        json_rule(schema, "schema")


@pytest.mark.parametrize("schema", [None, True, [], "{}", 3])
def test_a_schema_is_an_object(schema):
    with pytest.raises(ValueError, match="response_format must be an object, a JSON schema"):
        json_rule(schema, "response_format")


def test_text_needs_no_jax():
    program = "import sys, serving.text.model_text; sys.exit('jax' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
