"""All parsers: the same parts in any pieces, and nothing that a model wrote is lost."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.text.tokenizer import bytes_tokenizer
from serving.text.parsers.parser import Marker, Markup
from serving.text.parsers.parts import Arguments, Content, Part, Reasoning, ToolCall, merge
from serving.text.syntax import Syntax, choose_parser
from serving.text.vocabulary import Vocabulary

SYNTAXES = {
    "qwen3": Syntax(name="hermes", thinks=True),
    "bytes": Syntax(name="hermes", thinks=True),
    "llama3": Syntax(name="llama3"),
    "harmony": Syntax(name="harmony"),
}
FRAGMENTS = {
    "qwen3": ["<think>", "</think>", "<tool_call>", "</tool_call>", "<tool", "\n", "\n\n", " "],
    "llama3": ["<|python_tag|>", ";", ", ", "[", "]", "\n", " "],
    "harmony": [
        *("<|start|>assistant", "<|channel|>analysis", "<|channel|>final", "<|message|>"),
        *("<|channel|>commentary to=functions.f <|constrain|>json", " to=functions.f", "<|end|>"),
        *("<|call|>", "<|return|>"),
    ],
}
FRAGMENTS["bytes"] = FRAGMENTS["qwen3"]
JSON = [
    *('{"name": "f", "arguments": {"a": "w7"}}', '{"name": "f", "parameters": {"a": [{}]}}'),
    *('{"arguments": {"w8": 1}, "name": "f"}', '{"name": "f", "arguments": "w9"}'),
    *('{"name"', ': "f"', '"', "{", "}", "]", "[", ",", '"arguments": {', '{"w6": 1}', "\\"),
]
WORDS = [f"w{i}" for i in range(6)]


@pytest.fixture(scope="session")
def parser_of(vocabulary_of):
    """A function that gives a new parser of a family, and its tokenizer."""
    bytes_vocabulary = Vocabulary(bytes_tokenizer())

    def build(name, **options):
        vocabulary = bytes_vocabulary if name == "bytes" else vocabulary_of(name)
        options = {"tools": ("f",)} | options
        return choose_parser(vocabulary, SYNTAXES[name], **options), vocabulary.tokenizer

    return build


def parts_of(parser, tokens, sizes=()):
    """All parts, joined, and with the ids of calls left out."""
    parts, rest = [], list(tokens)
    for size in sizes:
        parts += parser.feed(rest[:size])
        rest = rest[size:]
    found = merge([*parts, *parser.feed(rest), *parser.finish()])
    return [part._replace(id="") if isinstance(part, ToolCall) else part for part in found]


@pytest.mark.parametrize("name", SYNTAXES)
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_any_pieces_give_the_same_parts_and_no_word_is_lost(parser_of, name, data):
    # A header of harmony holds no words: between markers, they are no text of the answer.
    fragment = st.sampled_from([*FRAGMENTS[name], *JSON, *WORDS])
    text = "".join(data.draw(st.lists(fragment, max_size=14)))
    options = {} if name == "harmony" else {"thinking": data.draw(st.booleans())}
    parser, tokenizer = parser_of(name, **options)
    tokens = tokenizer.encode(text, special=False)
    whole = parts_of(parser, tokens)
    sizes = data.draw(st.lists(st.integers(0, 5), max_size=12))
    assert parts_of(parser_of(name, **options)[0], tokens, sizes) == whole
    ones = parser_of(name, **options)[0]
    assert parts_of(ones, tokens, [1] * len(tokens)) == whole
    assert ones.reasoning_tokens == parser.reasoning_tokens
    calls = [part.call for part in whole if isinstance(part, ToolCall)]
    assert calls == list(range(len(calls)))
    for part in whole:
        if isinstance(part, Arguments):
            assert part.call < len(calls)
    if name != "harmony":
        written = "".join(part.text for part in whole if not isinstance(part, ToolCall))
        for word in WORDS:
            assert written.count(word) == text.count(word), word


@pytest.mark.parametrize("name", SYNTAXES)
def test_text_without_markup_comes_out_at_once_and_unchanged(parser_of, name):
    parser, tokenizer = parser_of(name, tools=())
    text = "  naïve { \n\n日本語 [ 1 < 2\n"
    pieces = [parser.feed([token]) for token in tokenizer.encode(text, special=False)]
    assert parts_of(parser_of(name)[0], tokenizer.encode(text, special=False)) == [Content(text)]
    assert sum(bool(piece) for piece in pieces) > 10
    assert merge([*sum(pieces, []), *parser.finish()]) == [Content(text)]


@pytest.mark.parametrize("name", ["qwen3", "llama3", "harmony"])
def test_a_marker_that_is_spelled_by_other_tokens_is_text(parser_of, vocabulary_of, name):
    vocabulary = vocabulary_of(name)
    parser, tokenizer = parser_of(name)
    for marker in vocabulary.markup:
        spelled = [token for part in marker for token in tokenizer.encode(part, special=False)]
        assert len(spelled) > 1
        parts = parts_of(parser_of(name)[0], [*tokenizer.encode("x", special=False), *spelled])
        assert parts == [Content(f"x{marker}")]


def test_markup_is_found_across_tokens_where_it_has_none_of_its_own():
    vocabulary = Vocabulary(bytes_tokenizer())
    markup = Markup(vocabulary, ("<think>", "</think>"))
    found = [one for byte in b"a<th<think>b</think" for one in markup.feed(byte)]
    found += markup.finish()
    assert Marker("<think>") in found
    assert "".join(one for one in found if isinstance(one, str)) == "a<thb</think"


def test_other_special_tokens_are_left_out(parser_of, vocabulary_of):
    parser, tokenizer = parser_of("qwen3")
    end = vocabulary_of("qwen3").markup["<|im_end|>"]
    tokens = [*tokenizer.encode("one ", special=False), end, *tokenizer.encode("two")]
    assert parts_of(parser, tokens) == [Content("one two")]
    assert parser.is_marker(end) and not parser.is_marker(tokens[0])


def test_merge_joins_neighbors_of_one_kind():
    parts: list[Part] = [Content("a"), Content(""), Content("b"), Reasoning("c")]
    parts += [ToolCall(0, "i", "f"), Arguments(0, "{"), Arguments(0, "}"), Arguments(1, "x")]
    assert merge(parts) == [
        *(Content("ab"), Reasoning("c"), ToolCall(0, "i", "f")),
        *(Arguments(0, "{}"), Arguments(1, "x")),
    ]
