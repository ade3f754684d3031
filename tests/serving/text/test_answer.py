"""One answer: its parts, the tokens that belong to them, and where it ends."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.text.tokenizer import bytes_tokenizer
from serving.text.answer import TokenPlace
from serving.text.model_text import ModelText
from serving.text.parsers.parts import Arguments, Content, Part, Reasoning, ToolCall, merge
from serving.text.prompts import Prompt

TOOLS = [{"type": "function", "function": {"name": name}} for name in ("f", "g")]
BARE = Prompt(tokens=[])


@pytest.fixture(scope="module")
def qwen3(tokenizer_of):
    tokenizer = tokenizer_of("qwen3")
    return ModelText(tokenizer, vocab=tokenizer.vocab, family="qwen3")


@pytest.fixture(scope="module")
def bare():
    return ModelText(bytes_tokenizer(), vocab=256)


def fed(answer, tokens, size=1):
    """All parts and places; nothing is fed after the end."""
    parts, places = list[Part](), list[TokenPlace]()
    for i in range(0, len(tokens), size):
        if not answer.is_over:
            found = answer.feed(tokens[i : i + size])
            parts, places = parts + found.parts, places + found.tokens
    found = answer.finish()
    return merge(parts + found.parts), places + found.tokens


@pytest.mark.parametrize("size", [1, 3, 100])
def test_a_stop_string_ends_the_content_and_its_tokens(bare, size):
    answer = bare.completion(["END", "zz"])
    parts, places = fed(answer, list("日 wafer END more".encode()), size)
    assert parts == [Content("日 wafer ")] and answer.stop == "END" and answer.is_over
    assert [place.position for place in places] == list(range(10))
    assert [place.offset for place in places] == [0, 0, 0, *range(1, 8)]


def test_a_stop_string_counts_once_min_tokens_are_made(bare):
    for least, content in ((0, ""), (2, "z"), (3, "zz"), (5, "zzzzz")):
        answer = bare.completion(["zz"], min_tokens=least)
        parts, _ = fed(answer, list(b"zzzzz"))
        assert "".join(part.text for part in parts) == content, least
        assert answer.stop == ("zz" if least < 5 else None)
    answer = bare.completion(["abcd", "bc"], min_tokens=3)  # "abc" may begin the longer one
    assert fed(answer, list(b"abcx"))[0] == [Content("abcx")]


def test_tokens_wait_for_the_text_they_belong_to(bare):
    answer = bare.completion(["END"])
    assert answer.feed(list(b"xEN")) == ([Content("x")], [(0, "content", 0)])
    assert answer.feed(list(b"Ey")).parts == [Content("ENEy")]
    assert answer.finish() == ([], []) and answer.stop is None


def test_stop_strings_are_looked_for_in_the_content_alone(qwen3):
    text = '<think>STOP</think>\nx<tool_call>{"name": "f", "arguments": {"a": "STOP"}}</tool_call>'
    answer = qwen3.answer(BARE, tools=TOOLS, stops=["STOP"])
    parts, _ = fed(answer, qwen3.encode(text, special=False))
    assert [type(part) for part in parts] == [Reasoning, Content, ToolCall, Arguments]
    assert answer.stop is None and answer.calls == 1


def test_tokens_are_told_apart_by_channel(qwen3):
    text = '<think>the</think>\n wafer<tool_call>{"name": "f", "arguments": {}}</tool_call>'
    tokens = qwen3.encode(text, special=False)
    answer = qwen3.answer(BARE, tools=TOOLS)
    _, places = fed(answer, tokens)
    texts = {"content": "", "reasoning": "", "tool": ""}
    for place in places:
        texts[place.channel] += qwen3.token_text(tokens[place.position])
    assert texts["reasoning"] == "the" and texts["content"].strip() == "wafer"
    assert texts["tool"].strip() == '{"name": "f", "arguments": {}}'
    assert answer.reasoning_tokens == len(qwen3.encode("the", special=False))
    assert {place.position for place in places}.isdisjoint(
        i for i, token in enumerate(tokens) if qwen3.token_text(token).startswith("<t")
    )


@pytest.mark.parametrize("size", [1, 100])
def test_without_parallel_calls_an_answer_ends_after_the_first(qwen3, size):
    one = '<tool_call>\n{"name": "%s", "arguments": {"a": 1}}\n</tool_call>'
    tokens = qwen3.encode(one % "f" + "\n" + one % "g", special=False)
    answer = qwen3.answer(BARE, tools=TOOLS, parallel_calls=False)
    parts, _ = fed(answer, tokens, size)
    assert [part.name for part in parts if isinstance(part, ToolCall)] == ["f"]
    assert parts[1:] == [Arguments(0, '{"a": 1}')] and answer.is_over
    both = qwen3.answer(BARE, tools=TOOLS)
    assert len(fed(both, tokens, size)[0]) == 4 and both.calls == 2


@settings(max_examples=100, deadline=None)
@given(
    st.text("ab日\n", max_size=20), st.lists(st.text("ab日", min_size=1, max_size=3), max_size=3)
)
def test_places_follow_the_text(bare, text, stops):
    """Whatever is cut away: each token that is left begins within the text that was written."""
    tokens = list(text.encode())
    answer = bare.completion(stops)
    parts, places = fed(answer, tokens)
    content = "".join(part.text for part in parts)
    cut = min((at for stop in stops if (at := text.find(stop)) >= 0), default=len(text))
    assert content == text[: len(content)] and len(content) >= cut
    assert [place.position for place in places] == list(range(len(places)))
    assert bytes(tokens[: len(places)]).decode(errors="ignore").startswith(content)
    if not answer.stop:
        assert len(places) == len(tokens)


def test_logprobs_show_tokens_that_are_no_characters(bare):
    first, *_ = "日".encode()
    assert bare.token_text(first) == "\\xe6" and bare.token_bytes(first) == [0xE6]
    assert bare.token_text(ord("a")) == "a" and bare.token_bytes(300) == []


def test_a_model_knows_what_ends_its_answers(qwen3, bare):
    assert qwen3.stop_tokens == qwen3.tokenizer.ends and len(qwen3.stop_tokens) == 2
    assert bare.stop_tokens == () and qwen3.reasons and not bare.reasons
    assert qwen3.decode(qwen3.encode("<|im_end|>the")) == "the"
