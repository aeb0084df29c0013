"""Validates JSON texts against a JSON Schema (draft 2020-12): validate.py SCHEMA, the texts as one JSON array on standard input.
Prints a JSON array with null for a valid text and a sentence for any other."""

import json
import sys

from jsonschema import Draft202012Validator


def refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON")  # Python's parser would read NaN and Infinity.


with open(sys.argv[1], encoding="utf-8") as file:
    schema = json.load(file)
Draft202012Validator.check_schema(schema)
validator = Draft202012Validator(schema)


def verdict(text: str) -> str | None:
    try:
        value = json.loads(text, parse_constant=refuse)
    except ValueError as error:
        return str(error)
    error = next(validator.iter_errors(value), None)
    return error and f"{error.json_path}: {error.message}"[:300]


json.dump([verdict(text) for text in json.load(sys.stdin)], sys.stdout)
