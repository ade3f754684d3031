"""What each family's markup means."""

import pytest

from serving.text.parsers.parts import Arguments, Content, Reasoning, ToolCall, merge
from serving.text.syntax import Syntax, choose_parser, find_syntax

SYNTAXES = {
    "qwen3": Syntax(name="hermes", thinks=True),
    "llama3": Syntax(name="llama3"),
    "harmony": Syntax(name="harmony"),
}


def call(number, name, arguments):
    return [ToolCall(number, "", name), *([Arguments(number, arguments)] if arguments else [])]


@pytest.fixture
def read(vocabulary_of):
    """A function from a family and a text to the text's parts, ids of calls left out."""

    def parts_of(name, text, **options):
        vocabulary = vocabulary_of(name)
        options = {"tools": ("f", "g")} | options
        parser = choose_parser(vocabulary, SYNTAXES[name], **options)
        parts = []
        for token in vocabulary.tokenizer.encode(text, special=False):
            parts += parser.feed([token])
        parts = merge([*parts, *parser.finish()])
        return [p._replace(id="") if isinstance(p, ToolCall) else p for p in parts]

    return parts_of


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("<think>\nhm\n\nso\n</think>\n\nParis", [Reasoning("hm\n\nso"), Content("Paris")]),
        ("<think>\n\n</think>\n\nParis", [Content("Paris")]),
        ("<think>hm", [Reasoning("hm")]),  # the longest answer allowed ended inside
        ("\n<think>hm</think>\n x \n", [Reasoning("hm"), Content("x \n")]),
        # A marker that makes no sense where it stands is text.
        ("Paris </think> or <think>", [Content("Paris </think> or <think>")]),
        ("<think>a<think>b</think>c", [Reasoning("a<think>b"), Content("c")]),
        (
            '<think>hm</think>\nLook:\n<tool_call>\n{"name": "f", "arguments": {"a": "}"}}\n'
            '</tool_call>\n<tool_call>\n{"name": "g", "arguments": {}}\n</tool_call>',
            [Reasoning("hm"), Content("Look:"), *call(0, "f", '{"a": "}"}'), *call(1, "g", "{}")],
        ),
        # The reasoning ends with a call, too.
        (
            '<think>hm\n<tool_call>{"name": "f", "arguments": {}}</tool_call>',
            [Reasoning("hm"), *call(0, "f", "{}")],
        ),
    ],
)
def test_reasoning_and_calls_of_hermes(read, text, parts):
    assert read("qwen3", text) == parts


@pytest.mark.parametrize(
    ("written", "parts"),
    [
        ('{"arguments": {"a": [1, {"b": "\\""}]}, "name": "f"}', '{"a": [1, {"b": "\\""}]}'),
        ('{"name": "f", "arguments": "{\\"a\\": 1}"}', '{"a": 1}'),  # JSON in a text
        ('{"name": "f", "parameters": {"a": 1}}', '{"a": 1}'),
        ('{"name": "f"}', "{}"),
        ('{"name": "f", "arguments": null}', "{}"),
        ('{"type": "function", "id": 3, "name": "f", "arguments": {}}', "{}"),
        ('{"name": "f", "arguments": {"a": 1}', '{"a": 1}'),  # a bracket is missing
        ('{"name": "\\u0066", "arguments": {"é": "日"}}', '{"é": "日"}'),
    ],
)
def test_calls_in_all_their_spellings(read, written, parts):
    expected = call(0, "f", parts)
    assert read("qwen3", f"<tool_call>\n{written}\n</tool_call>") == expected


@pytest.mark.parametrize(
    "written",
    [
        "x",
        "{}",
        '{"nam": "f", "arguments": {}}',
        '{"name": 3, "arguments": {}}',
        '{"name": "", "arguments": {}}',
        '{"name": "f", "arguments": [1]}',
        '{"name": "f", "arguments": 3}',
        '{"name": {"a": 1}}',
        '{"name" "f"}',
        '{"name": "f" "g"}',
        '{"arguments": {}}',
        '{"name": "f", "name": "g"}',
        '["f"]',
        '{"name": "f", "arg',
    ],
)
def test_what_is_no_call_is_content_as_it_was_written(read, written):
    text = f"Look: <tool_call>\n{written}\n</tool_call> done"
    assert read("qwen3", text) == [Content(text)]
    assert read("qwen3", text.removesuffix("\n</tool_call> done")) == [
        Content(text.removesuffix("\n</tool_call> done"))
    ]


def test_what_follows_a_mistake_in_a_call_is_content(read):
    begin = '<tool_call>{"name": "f", "arguments": {'
    assert read("qwen3", begin + "]}</tool_call>x") == [*call(0, "f", "{"), Content("]}x")]
    assert read("qwen3", begin + "}}}</tool_call>x") == [*call(0, "f", "{}"), Content("}x")]
    assert read("qwen3", begin + '"a": 1') == call(0, "f", '{"a": 1')  # cut off: a part of it


def test_without_tools_calls_are_content_and_raw_reasoning_is_too(read):
    text = '<think>hm</think>\n<tool_call>{"name": "f"}</tool_call>'
    assert read("qwen3", text, tools=()) == [
        Reasoning("hm"),
        Content('<tool_call>{"name": "f"}</tool_call>'),
    ]
    assert read("qwen3", text, tools=(), raw=True) == [Content(text)]
    assert read("qwen3", "hm</think>x", tools=(), raw=True, thinking=True) == [
        Content("hm</think>x")
    ]
    assert read("qwen3", "hm</think>x", thinking=True) == [Reasoning("hm"), Content("x")]


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ('{"name": "f", "parameters": {"a": 1}}', call(0, "f", '{"a": 1}')),
        ('<|python_tag|>{"name": "f", "parameters": {}}', call(0, "f", "{}")),
        (
            '{"name": "f", "parameters": {}}; {"name": "g", "parameters": {"a": 1}}',
            [*call(0, "f", "{}"), *call(1, "g", '{"a": 1}')],
        ),
        (
            '[{"name": "f", "parameters": {}},\n{"name": "g", "parameters": {}}]',
            [*call(0, "f", "{}"), *call(1, "g", "{}")],
        ),
        ('{"name": "f", "parameters": {}} and', [*call(0, "f", "{}"), Content(" and")]),
        (
            'Look: <|python_tag|>{"name": "f", "parameters": {}}',
            [Content("Look: "), *call(0, "f", "{}")],
        ),
        # JSON that calls no tool of the client is an answer.
        ('{"name": "Ada", "parameters": {}}', [Content('{"name": "Ada", "parameters": {}}')]),
        ('{"city": "Paris"}', [Content('{"city": "Paris"}')]),
        ("[1, 2]", [Content("[1, 2]")]),
        (' {"name": "f"', [Content(' {"name": "f"')]),
        ('Hi {"name": "f", "parameters": {}}', [Content('Hi {"name": "f", "parameters": {}}')]),
        ("<|python_tag|>print(1)", [Content("print(1)")]),
        ("  ", [Content("  ")]),
    ],
)
def test_calls_of_llama3(read, text, parts):
    assert read("llama3", text) == parts


ANALYSIS = "<|channel|>analysis<|message|>"
FINAL = "<|start|>assistant<|channel|>final<|message|>"


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        (f"{ANALYSIS}hm<|end|>{FINAL}Paris<|return|>", [Reasoning("hm"), Content("Paris")]),
        (f"{ANALYSIS}hm", [Reasoning("hm")]),
        ("<|channel|>final<|message|>Paris", [Content("Paris")]),
        (
            f"{ANALYSIS}hm<|end|><|start|>assistant<|channel|>commentary to=functions.f "
            '<|constrain|>json<|message|>{"a": 1}<|call|>',
            [Reasoning("hm"), *call(0, "f", '{"a": 1}')],
        ),
        (
            " to=functions.f<|channel|>commentary json<|message|>{}<|end|>"
            "<|start|>assistant to=functions.g<|channel|>commentary<|message|>{}<|call|>",
            [*call(0, "f", "{}"), *call(1, "g", "{}")],
        ),
        # What the model says before a call is for the user.
        (
            "<|channel|>commentary<|message|>Look:<|end|><|start|>assistant to=functions.f"
            "<|channel|>commentary<|message|>{}",
            [Content("Look:"), *call(0, "f", "{}")],
        ),
        # Tools that the client does not have are the model's own.
        ("<|channel|>analysis to=python<|message|>1 + 1<|end|>", [Reasoning("1 + 1")]),
        # An end and a start are forgotten.
        (f"{ANALYSIS}hm<|channel|>final<|message|>x", [Reasoning("hm"), Content("x")]),
        # A header that was cut off is no text of the answer; what is no header is.
        (f"{ANALYSIS}hm<|end|><|start|>assistant<|channel|>fin", [Reasoning("hm")]),
        ("Paris", [Content("Paris")]),
        (
            "<|channel|>final and then nothing of it",
            [Content("<|channel|>final and then nothing of it")],
        ),
        (f"{ANALYSIS}hm<|end|>x y", [Reasoning("hm"), Content("x y")]),
        ("<|message|>Paris", [Content("Paris")]),
    ],
)
def test_channels_of_harmony(read, text, parts):
    assert read("harmony", text) == parts


def test_a_header_of_harmony_is_of_bounded_length(read):
    text = f"<|channel|>final{' word' * 200}"
    assert read("harmony", text) == [Content(text)]


def test_calls_of_harmony_without_tools_are_content(read):
    text = "<|channel|>commentary to=functions.f<|message|>{}<|call|>"
    assert read("harmony", text, tools=()) == [Content("{}")]


def test_the_syntax_of_a_model_is_found(vocabulary_of):
    for name, syntax in SYNTAXES.items():
        vocabulary = vocabulary_of(name)
        found = find_syntax(vocabulary, vocabulary.tokenizer.template, "")
        assert (found.name, found.thinks) == (syntax.name, syntax.thinks)
        assert found.tools_in_template
    plain = vocabulary_of("chatml")
    for template in (plain.tokenizer.template, None):
        found = find_syntax(plain, template, "llama")
        assert found == Syntax(name="hermes", thinks=False, tools_in_template=False)
    assert find_syntax(plain, "{% if '</think>' in m %}", "llama").thinks
