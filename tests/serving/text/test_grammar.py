"""Grammars: what they allow is what they say, token by token, and nothing else."""

import json
import time
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("llguidance")

from models.text.tokenizer import bytes_tokenizer  # noqa: E402
from serving.text.model_text import ModelText  # noqa: E402
from serving.text.parsers.parts import Arguments, Content, Reasoning, ToolCall  # noqa: E402

NAMES = ("chatml", "qwen3", "llama3", "harmony", "pieces", "bytes")
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 5},
        "age": {"type": "integer", "minimum": 0, "maximum": 99},
        "tags": {"type": "array", "items": {"enum": ["a", "é日"]}, "maxItems": 2},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
TOOLS: list[dict[str, Any]] = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "parameters": {
                "$defs": {"city": {"enum": ["Paris", "Rome"]}},
                "type": "object",
                "properties": {"city": {"$ref": "#/$defs/city"}},
                "required": ["city"],
                "additionalProperties": False,
            },
        },
    },
    {"type": "function", "function": {"name": "stop", "parameters": None}},
]


@pytest.fixture(scope="module")
def text_of(tokenizer_of):
    built = {}

    def find(name):
        if name not in built:
            tokenizer = bytes_tokenizer() if name == "bytes" else tokenizer_of(name)
            family = "gpt_oss" if name == "harmony" else "llama"
            # As of most models, the vocabulary has rows that no token uses.
            built[name] = ModelText(tokenizer, vocab=tokenizer.vocab + 37, family=family)
        return built[name]

    return find


def allowed(matcher, vocab):
    mask = np.full(-(-vocab // 32), -1, np.int32)
    matcher.fill_mask(mask)
    return np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little"))


def walk(text, matcher, choose, most=400):
    """The tokens of a text that follows the grammar; None if it did not end."""
    tokens = list[int]()
    while not matcher.is_complete and len(tokens) < most:
        options = allowed(matcher, text.vocab)
        assert len(options) and max(options) < text.tokenizer.vocab
        token = int(choose(options))
        assert matcher.accept(token)
        if token in text.stop_tokens:
            return tokens
        tokens.append(token)
    return tokens if matcher.is_complete else None


def prompt_of(text, tools=()):
    return text.chat([{"role": "user", "content": "the weather"}], tools=tools)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("seed", range(3))
def test_any_walk_through_a_schema_gives_json_of_it(text_of, name, seed):
    text, random = text_of(name), np.random.default_rng(seed)
    prompt = prompt_of(text)
    grammar = text.grammar(prompt, schema=SCHEMA)
    tokens = walk(text, grammar.matcher(), random.choice)
    if tokens is None:  # it reasons on and on
        assert text.reasons
        return
    answer = text.answer(prompt)
    parts = [*answer.feed(tokens).parts, *answer.finish().parts]
    content = "".join(part.text for part in parts if isinstance(part, Content))
    value = json.loads(content)
    assert set(value) == {"name", "age", "tags"} and len(value["name"]) <= 5
    assert 0 <= value["age"] <= 99 and set(value["tags"]) <= {"a", "é日"}
    assert not text.vocabulary.special & set(tokens) or text.syntax.name == "harmony"


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("choice", ["required", "get_weather", "stop"])
def test_tool_choice_is_read_back_by_the_parser(text_of, name, choice):
    text, random = text_of(name), np.random.default_rng(0)
    prompt = prompt_of(text, TOOLS)
    grammar = text.grammar(prompt, tools=TOOLS, tool_choice=choice)
    reasoning = {"<think>", "analysis"}
    for _ in range(3):
        # Without reasoning, which would take ever more tokens.
        def choose(options):
            plain = [o for o in options if text.token_text(int(o)) not in reasoning]
            texts = [text.token_text(int(o)) for o in plain]
            plain = [o for o, t in zip(plain, texts, strict=True) if not t.startswith("a")] or plain
            return random.choice(plain)

        tokens = walk(text, grammar.matcher(), choose)
        if tokens is None:
            continue
        answer = text.answer(prompt, tools=TOOLS)
        parts = [*answer.feed(tokens).parts, *answer.finish().parts]
        calls = [part for part in parts if isinstance(part, ToolCall)]
        assert calls and not [p for p in parts if isinstance(p, Content | Reasoning)]
        assert {call.name for call in calls} <= (
            {"get_weather", "stop"} if choice == "required" else {choice}
        )
        for i, call in enumerate(calls):
            pieces = [p.text for p in parts if isinstance(p, Arguments) and p.call == i]
            arguments = json.loads("".join(pieces))
            if call.name == "get_weather":
                assert arguments in ({"city": "Paris"}, {"city": "Rome"})
            assert isinstance(arguments, dict)
        assert choice == "required" or len(calls) == 1


@pytest.mark.parametrize(
    ("name", "reasoning", "answer"),
    [
        ("qwen3", "<think>\nhm {\n</think>\n\n", '{"a": 1}'),
        ("qwen3", "", '{"a":1}'),
        ("harmony", "<|channel|>analysis<|message|>hm {<|end|><|start|>assistant", '{"a": 1}'),
        ("harmony", "", '{"a":\n  1}'),
    ],
)
def test_reasoning_may_come_before_the_answer(text_of, name, reasoning, answer):
    text = text_of(name)
    schema = {
        "type": "object",
        "properties": {"a": {"type": "integer"}},
        "required": ["a"],
        "additionalProperties": False,
    }
    prompt = prompt_of(text)
    matcher = text.grammar(prompt, schema=schema).matcher()
    written = reasoning + ("<|channel|>final<|message|>" if name == "harmony" else "") + answer
    tokens = text.encode(written, special=False)
    assert all(map(matcher.accept, tokens)) and matcher.is_complete
    assert set(allowed(matcher, text.vocab)) == set(text.stop_tokens)
    found = text.answer(prompt)
    parts = [*found.feed(tokens).parts, *found.finish().parts]
    texts = {Reasoning: "", Content: ""}
    for part in parts:
        texts[type(part)] += part.text
    assert texts == {Reasoning: "hm {" if reasoning else "", Content: answer}


def test_with_tools_at_hand_an_answer_is_json_or_a_call(text_of):
    text = text_of("qwen3")
    prompt = prompt_of(text, TOOLS)
    grammar = text.grammar(prompt, schema={"type": "object"}, tools=TOOLS)
    for written in ('{"x": []}', '<tool_call>\n{"name": "stop", "arguments": {}}\n</tool_call>'):
        matcher = grammar.matcher()
        assert all(map(matcher.accept, text.encode(written, special=False))), written
        assert set(text.stop_tokens) <= set(allowed(matcher, text.vocab))
    assert not grammar.matcher().accept(text.encode("x")[0])
    assert text.grammar(prompt, tools=TOOLS) is None  # any text, any call


@pytest.mark.parametrize("name", ["qwen3", "harmony"])
def test_strict_tools_are_held_to_their_schemas_after_any_text(text_of, name):
    text = text_of(name)
    strict = [{**tool, "function": {**tool["function"], "strict": True}} for tool in TOOLS]
    grammar = text.grammar(prompt_of(text, strict), tools=strict)
    final, look, begin = {
        "qwen3": ("", "Look: {", '<tool_call>\n{"name": "get_weather", "arguments": '),
        "harmony": (
            "<|channel|>final<|message|>",
            "<|channel|>commentary<|message|>Look: {<|end|><|start|>assistant",
            "<|channel|>commentary to=functions.get_weather <|constrain|>json<|message|>",
        ),
    }[name]

    def accepts(written):
        matcher = grammar.matcher()
        return all(map(matcher.accept, text.encode(written, special=False)))

    assert accepts(final + "any { text") and accepts(look + begin + '{"city": "Rome"}')
    assert accepts(begin + '{"city": "Rome"}') and not accepts(begin + '{"city": "Riga"}')
    assert not accepts(look + begin + "{}")
    assert text.grammar(prompt_of(text), tools=strict, tool_choice="none") is None


@settings(max_examples=50, deadline=None)
@given(data=st.data())
def test_rollback_comes_back_to_the_same_place(text_of, data):
    text = text_of("qwen3")
    matcher = text.bare_grammar(regex=r"(the (wafer|weather|[0-9]+\.)\n?){2,5}").matcher()
    masks = []
    for _ in range(data.draw(st.integers(1, 12))):
        options = allowed(matcher, text.vocab)
        masks.append(options.tolist())
        # A mask may leave out other ways to write what the grammar forces, which are accepted.
        begins = {text.token_text(option)[:1] for option in masks[-1]}
        outside = [t for t in range(text.vocab) if text.token_text(t)[:1] not in begins]
        assert not matcher.accept(data.draw(st.sampled_from(outside)))
        assert matcher.accept(data.draw(st.sampled_from(masks[-1])))
    back = data.draw(st.integers(1, len(masks)))
    matcher.rollback(back)
    assert allowed(matcher, text.vocab).tolist() == masks[-back]


def test_the_end_may_be_accepted_and_taken_back(text_of):
    text = text_of("chatml")
    matcher = text.bare_grammar(regex="a+").matcher()
    (end,) = text.stop_tokens
    letter = text.encode("a")[0]
    assert not matcher.accept(end) and matcher.accept(letter) and not matcher.is_complete
    assert {end, letter} <= set(allowed(matcher, text.vocab))
    assert matcher.accept(end) and matcher.is_complete and not matcher.accept(letter)
    assert allowed(matcher, text.vocab).tolist() == [end]
    matcher.rollback(1)
    assert matcher.accept(letter) and not matcher.is_complete
    assert not matcher.accept(text.vocab + 5) and not matcher.accept(-1)


def test_without_an_end_token_a_text_ends_where_the_grammar_does(text_of):
    text = text_of("bytes")
    matcher = text.bare_grammar(regex="é").matcher()
    assert [matcher.accept(byte) for byte in "é".encode()] == [True, True]
    assert matcher.is_complete and not len(allowed(matcher, text.vocab))


@pytest.mark.parametrize("name", ["chatml", "pieces", "bytes"])
def test_forced_tokens_are_what_the_masks_allow_alone(text_of, name):
    text = text_of(name)
    matcher = text.grammar(prompt_of(text, TOOLS), tools=TOOLS, tool_choice="stop").matcher()
    tokens = matcher.forced()
    assert len(tokens) > 5
    for token in tokens:
        assert allowed(matcher, text.vocab).tolist() == [token]
        assert matcher.accept(token)
    assert len(allowed(matcher, text.vocab)) > 1 or matcher.forced() == []
    written = b"".join(map(text.vocabulary.bytes_of, tokens)).decode()
    assert written.startswith('<tool_call>\n{"name": "stop", "arguments":')


def test_matchers_of_a_grammar_go_their_own_ways(text_of):
    text = text_of("bytes")
    grammar = text.bare_grammar(regex="ab|b")
    one, other = grammar.matcher(), grammar.matcher()
    assert one.accept(ord("a")) and other.accept(ord("b")) and other.is_complete
    assert not one.is_complete
    assert text.bare_grammar(regex="ab|b") is grammar  # compiled once


def nested(levels):
    schema = dict[str, object]()
    for _ in range(levels):
        schema = {"type": "object", "properties": {"a": schema}, "required": ["a"]}
    return schema


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        (nested(40), "response_format has 65 objects and lists within one another; 64 is the"),
        (nested(400), "within one another"),
        ({"enum": ["x" * 70_000]}, "has 70,014 bytes; 65,536 is the most"),
        ({"not": {}}, r'response_format: .*Unimplemented keys: \["not"\]'),
        ({"type": "foo"}, "response_format: .*Invalid type: foo"),
        ({"$ref": "#"}, "response_format: no text matches it"),
        ({"$ref": "http://example.com/schema"}, "response_format: .*not present in a registry"),
        ({"multipleOf": 999_999_937, "type": "integer"}, "fuel exhausted"),
        ({"x-guidance": {}}, "x-guidance"),
        ({"enum": []}, "response_format: "),
    ],
)
def test_refuses_schemas_it_cannot_follow(text_of, schema, message):
    text = text_of("qwen3")
    with pytest.raises(ValueError, match=message) as error:
        text.grammar(prompt_of(text), schema=schema)
    assert len(str(error.value)) < 500 and "\n" not in str(error.value)


def test_refuses_other_grammars_it_cannot_follow(text_of):
    text = text_of("qwen3")
    prompt = prompt_of(text)
    bad = [{"type": "function", "function": {"name": "f", "parameters": {"type": 3}}}]
    with pytest.raises(ValueError, match=r"tools\[0\].function.parameters: "):
        text.grammar(prompt, tools=bad, tool_choice="required")
    with pytest.raises(ValueError, match="tool_choice is 'g'; no tool"):
        text.grammar(prompt, tools=TOOLS, tool_choice="g")
    with pytest.raises(ValueError, match="8,193 characters; 8,192 is the most"):
        text.grammar(prompt, regex="a" * 8193)
    for regex in ("(", "[z-a]", r"(?=a)"):
        with pytest.raises(ValueError):
            text.bare_grammar(regex=regex)
    with pytest.raises(ValueError):
        text.bare_grammar(lark="start: nowhere")


@pytest.mark.parametrize(
    "schema",
    [
        nested(30),
        {"enum": [f"value{i}" for i in range(4000)]},
        {"type": "array", "items": {"type": "integer"}, "minItems": 10**9},
        {"type": "string", "maxLength": 10**9},
        {"type": "string", "pattern": "^((a{1,100}){1,100}){1,100}$"},
        {"type": "string", "pattern": "^(a+)+(b|a*)*$"},
        {"type": "object", "properties": {f"p{i}": {"type": "integer"} for i in range(1500)}},
        {"allOf": [{"type": "string", "pattern": f".*{chr(97 + i)}.*"} for i in range(12)]},
        {"anyOf": [{"properties": {f"p{i}": {"type": "integer"}}} for i in range(300)]},
    ],
    ids=range(9),
)
def test_a_schema_made_to_take_long_does_not(text_of, schema):
    """It is refused, or fails by itself, or each step takes a moment."""
    text = text_of("qwen3")
    begin = time.process_time()
    try:
        matcher = text.grammar(prompt_of(text), schema=schema).matcher()
        walk(text, matcher, lambda options: options[-1], most=20)
    except ValueError as error:
        assert len(str(error)) < 500
    assert time.process_time() - begin < 5
