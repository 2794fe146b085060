"""The checker of JSON and XML answers: what is right passes, and nothing else does."""

import json

import pytest

from schema_answers import check_answer, enforced_answers, score

VALUES = {"name": "Ana", "age": 47}
XML = "<record><name>Ana</name><age>47</age></record>"


@pytest.mark.parametrize(
    "style, text",
    [
        ("JSON", '{"name": "Ana", "age": 47}'),
        ("JSON", ' {"age":47,"name":"Ana"}\n'),
        ("XML", XML),
        ("XML", "<record>\n <age> 47 </age><name>Ana</name></record>"),
    ],
)
def test_right_answers(style, text):
    result = check_answer(text, style, VALUES)
    assert result.valid and result.right


@pytest.mark.parametrize(
    "style, text",
    [
        ("JSON", '{"name": "Ben", "age": 47}'),
        ("JSON", '{"name": "Ana", "age": 74}'),
        ("XML", XML.replace("Ana", "Ben")),
        ("XML", XML.replace("47", "48")),
    ],
)
def test_wrong_values_in_the_right_schema(style, text):
    result = check_answer(text, style, VALUES)
    assert result.valid and not result.right and "wrong value" in result.reason


@pytest.mark.parametrize(
    "style, text",
    [
        ("JSON", ""),
        ("JSON", "Ana is 47"),
        ("JSON", '{"name": "Ana", "age": "47"}'),
        ("JSON", '{"name": "Ana", "age": 47.5}'),
        ("JSON", '{"name": "Ana", "age": true}'),
        ("JSON", '{"name": "Ana"}'),
        ("JSON", '{"name": "Ana", "age": 47, "town": "Oslo"}'),
        ("JSON", '[{"name": "Ana", "age": 47}]'),
        ("JSON", 'Here: {"name": "Ana", "age": 47}'),
        ("JSON", '{"name": "Ana", "age": 47} bye'),
        ("JSON", XML),
        ("JSON", "[" * 5000),
        ("XML", json.dumps(VALUES)),
        ("XML", XML[:-1]),
        ("XML", XML.replace("record", "answer")),
        ("XML", "<record><name>Ana</name></record>"),
        ("XML", "<record><name>Ana</name><name>Ana</name><age>47</age></record>"),
        ("XML", XML.replace("47", "forty-seven")),
        ("XML", XML.replace("47", "")),
        ("XML", XML.replace("Ana", "<b>Ana</b>")),
        ("XML", '<!DOCTYPE record [<!ENTITY a "Ana">]>' + XML.replace("Ana", "&a;")),
        ("XML", XML + "x" * 20_000),
    ],
)
def test_answers_outside_the_schema(style, text):
    result = check_answer(text, style, VALUES)
    assert not result.valid and not result.right and result.reason


def test_an_unknown_style_is_refused_and_score_pairs_texts_with_rows():
    with pytest.raises(ValueError, match="YAML"):
        check_answer("", "YAML", VALUES)
    rows = [{"format": "XML", "values": VALUES}, {"format": "JSON", "values": VALUES}]
    assert [result.right for result in score([XML, XML], rows)] == [True, False]


ROWS = [
    {"format": "JSON", "values": {"name": "Ana", "age": 47}},
    {"format": "XML", "values": {"town": "Rome", "age": 3, "name": "Ben"}},
    {"format": "JSON", "values": {"age": 8}},
]


@pytest.mark.parametrize("writes", ["", "a } < & rambling \n answer", "-5", '","x":1}', "</record>", "9" * 50])
def test_enforced_answers_are_valid_whatever_the_model_writes(writes):
    results = score(enforced_answers(lambda rows, prefixes: [writes] * len(rows), ROWS), ROWS)
    assert all(result.valid for result in results) and not any(result.right for result in results)


def test_enforced_answers_hand_over_the_answer_so_far_and_cut_the_value_where_it_ends():
    full = [
        '{"name": "Ana", "age": 47}',
        "<record><town>Rome</town><age>3</age><name>Ben</name></record>",
        '{"age": 8}',
    ]
    seen = []

    def oracle(rows, prefixes):
        seen.extend(prefixes)
        assert all(full[row].startswith(prefix) for row, prefix in zip(rows, prefixes, strict=True))
        return [full[row].removeprefix(prefix) for row, prefix in zip(rows, prefixes, strict=True)]

    assert enforced_answers(oracle, ROWS) == full
    assert seen[0] == '{"name": "' and '{"name": "Ana", "age": ' in seen and "<record><town>Rome</town><age>" in seen
    assert enforced_answers(oracle, []) == []
