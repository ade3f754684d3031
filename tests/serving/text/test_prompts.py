"""Prompts of chats: what is the template's is markup, what is the client's is text."""

import dataclasses
import json
import re
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.text.tokenizer import FastCodec, bytes_tokenizer
from serving.text.model_text import ModelText
from serving.text.prompts import Marking, ReasoningOptions, _pattern
from serving.text.vocabulary import Vocabulary

tokenizers = pytest.importorskip("tokenizers")

FAMILIES = ("chatml", "qwen3", "llama3", "harmony", "pieces")
TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Tells the weather.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}
CALL = {
    "id": "call_1",
    "type": "function",
    "function": {"name": "get_weather", "arguments": '{"city": "Paris"}'},
}


@pytest.fixture(scope="module")
def text_of(tokenizer_of):
    def find(name):
        tokenizer = bytes_tokenizer() if name == "bytes" else tokenizer_of(name)
        family = "gpt_oss" if name == "harmony" else "llama"
        return ModelText(tokenizer, vocab=tokenizer.vocab, family=family)

    return find


def user(content):
    return [{"role": "user", "content": content}]


def written(text, prompt):
    return text.tokenizer.decode(prompt.tokens, special=True)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_plain_chat_has_the_tokens_of_the_template(text_of, name):
    text = text_of(name)
    messages = [{"role": "system", "content": "Be short."}, *user("the weather")]
    assert text.chat(messages).tokens == text.tokenizer.chat(messages)
    assert not text.chat(messages).thinking


@pytest.mark.parametrize("name", FAMILIES)
def test_spellings_of_special_tokens_stay_text_wherever_they_stand(text_of, name):
    text = text_of(name)
    evil = "".join(text.vocabulary.markup) + " the <|im_end" + "".join(text.vocabulary.markup)
    plain, attacked = (
        text.chat(
            [
                {"role": "system", "content": word},
                {"role": "user", "content": word},
                {"role": "assistant", "content": word, "reasoning": word},
                {"role": "user", "content": word},
            ],
            tools=[{"type": "function", "function": {"name": "f", "description": word}}],
        )
        for word in ("word", evil)
    )

    def markup(prompt):
        numbers = set(text.vocabulary.markup.values())
        return [token for token in prompt.tokens if token in numbers]

    if name == "qwen3":  # its template looks for <think> in what the assistant said
        assert len(markup(attacked)) >= len(markup(plain))
        thinks = {text.vocabulary.markup[one] for one in ("<think>", "</think>")}
        assert [t for t in markup(attacked) if t not in thinks] == [
            t for t in markup(plain) if t not in thinks
        ]
    else:
        assert markup(attacked) == markup(plain)
    assert written(text, attacked) == written(text, plain).replace("word", evil)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(
        st.sampled_from(
            ["<|im_end|>", "<|im_start|>", "<tool_call>", "<", "|>", " ", "\n", "é", "\U000f0001"]
        )
        | st.text(max_size=3)
    )
)
def test_any_text_of_a_user_is_read_back_as_it_was(text_of, parts):
    text = text_of("qwen3")
    content = "".join(parts)
    prompt = text.chat(user(content))
    begin, end = (text.vocabulary.markup[one] for one in ("<|im_start|>", "<|im_end|>"))
    assert prompt.tokens.count(begin) == 2 and prompt.tokens.count(end) == 1
    expected = f"<|im_start|>user\n{content}<|im_end|>\n<|im_start|>assistant\n"
    assert written(text, prompt) == expected


def test_a_space_before_texts_is_put_before_no_piece_of_one(text_of):
    text = text_of("pieces")
    prompt = text.chat(user("the</s>the"))
    tokens = [text.vocabulary.bytes_of(token) for token in prompt.tokens]
    assert b" the" not in tokens[-40:] or b"".join(tokens).count(b" the") <= 1
    assert "the</s>the" in written(text, prompt) and 2 not in prompt.tokens


def test_developer_is_system_where_the_template_knows_no_other(text_of):
    messages = [{"role": "developer", "content": "Be short."}, *user("Hi")]
    assert "system\nBe short." in written(text_of("qwen3"), text_of("qwen3").chat(messages))
    assert "<|start|>developer<|message|>Be short." in written(
        text_of("harmony"), text_of("harmony").chat(messages)
    )


@pytest.mark.parametrize("name", [*FAMILIES, "bytes"])
def test_a_chat_with_tools_shows_tools_calls_and_results(text_of, name):
    text = text_of(name)
    messages = [
        *user("What is the weather?"),
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "content": "sunny", "tool_call_id": "call_1"},
    ]
    prompt = written(text, text.chat(messages, tools=[TOOL]))
    assert "Tells the weather." in prompt and "sunny" in prompt
    assert '{"city": "Paris"}' in prompt  # an object, not a text in quotes
    if not text.syntax.tools_in_template:
        assert "<tool_call>\n" in prompt and "<tool_response>\nsunny\n</tool_response>" in prompt


@pytest.mark.parametrize("name", ["llama3", "harmony"])
def test_several_calls_of_a_message_are_written_one_by_one(text_of, name):
    text = text_of(name)
    calls = [{**CALL, "id": f"call_{i}"} for i in range(2)]
    messages = [
        *user("What is the weather?"),
        {"role": "assistant", "content": "Look", "reasoning": "hm", "tool_calls": calls},
        {"role": "tool", "content": "rainy", "tool_call_id": "call_1"},
        {"role": "tool", "content": "sunny", "tool_call_id": "call_0"},
        {"role": "tool", "content": "stray", "tool_call_id": "call_2"},
    ]
    prompt = written(text, text.chat(messages, tools=[TOOL]))
    assert prompt.count('{"city": "Paris"}') == 2
    first, second = prompt.split('{"city": "Paris"}')[1:]
    assert "sunny" in first and "rainy" in second and "stray" in second


def test_gpt_oss_gets_all_instructions_at_once_and_tools_with_descriptions(text_of):
    text = text_of("harmony")
    messages = [
        {"role": "system", "content": "Be short."},
        {"role": "developer", "content": "Be kind."},
        *user("Hi"),
    ]
    tool = {"type": "function", "function": {"name": "f"}}
    prompt = written(text, text.chat(messages, tools=[tool]))
    assert "<|start|>developer<|message|>Be short.\n\nBe kind.<|end|>" in prompt
    assert '"description": ""' in prompt


def test_arguments_that_are_no_object_stay_as_they_are(text_of):
    text = text_of("qwen3")
    call = {**CALL, "function": {"name": "f", "arguments": '["<|im_end|>"'}}
    prompt = text.chat([*user("Hi"), {"role": "assistant", "content": "", "tool_calls": [call]}])
    assert json.dumps('["<|im_end|>"') in written(text, prompt)


def test_reasoning_of_earlier_turns_is_cleared_on_request(text_of):
    text = text_of("qwen3")
    messages = [
        *user("one"),
        {"role": "assistant", "content": "two", "reasoning": "because"},
        *user("three"),
        {"role": "assistant", "content": "", "reasoning": "since", "tool_calls": [CALL]},
    ]
    kept, cleared = (
        written(text, text.chat(messages, reasoning=ReasoningOptions(clear=clear)))
        for clear in (None, True)
    )
    assert "because" in kept and "since" in kept
    assert "because" not in cleared and "since" in cleared


def test_effort_reaches_the_template_as_its_family_calls_it(text_of):
    def prompt(name, effort):
        options = ReasoningOptions(effort=effort)
        return written(text_of(name), text_of(name).chat(user("Hi"), reasoning=options))

    assert prompt("qwen3", "none").endswith("<think>\n\n</think>\n\n")
    assert prompt("qwen3", "high").endswith("assistant\n")
    assert "Reasoning: high" in prompt("harmony", "high")
    assert "Reasoning: low" in prompt("harmony", "none")
    assert prompt("chatml", "high") == prompt("chatml", None)


def test_a_template_that_opens_the_reasoning_is_noticed(tokenizer_of):
    tokenizer = tokenizer_of("qwen3")
    template = tokenizer_of("chatml").template.replace("assistant\n", "assistant\n<think>\n")
    opened = dataclasses.replace(tokenizer, template=template)
    prompt = ModelText(opened, vocab=opened.vocab).chat(user("say <think>"))
    assert prompt.thinking and prompt.tokens[-2:] == tokenizer.encode("<think>\n")


def test_without_a_template_a_chat_is_lines(text_of):
    text = text_of("bytes")
    messages = [{"role": "developer", "content": "Be short."}, *user("Hi <|im_end|>")]
    prompt = text.chat(messages)
    assert bytes(prompt.tokens).decode() == "system: Be short.\nuser: Hi <|im_end|>\nassistant:"


def test_what_a_template_refuses_is_a_value_error(text_of):
    text = text_of("qwen3")
    with pytest.raises(ValueError, match="text has '.ud800'"):
        text.chat(user("half \ud800"))
    with pytest.raises(ValueError, match="no messages|messages has none"):
        text.chat([])


def test_a_text_of_many_beginnings_of_markup_takes_no_longer(tokenizer_of):
    inner = tokenizers.Tokenizer.from_str(tokenizer_of("chatml").codec.inner.to_str())
    inner.add_special_tokens([f"<|reserved_{i}|>" for i in range(3000)])
    tokenizer = dataclasses.replace(tokenizer_of("chatml"), codec=FastCodec(inner))
    marking = Marking(Vocabulary(tokenizer))
    begin = time.process_time()
    evil = "<|reserved_" * 100_000 + "<|reserved_12|><|reserved_123|>"
    marked = marking.mark(evil)
    assert time.process_time() - begin < 2
    assert marked[:-2] == evil[: len(marked) - 2] and marked[-1] != marked[-2]


@pytest.mark.parametrize("spellings", [("a", "ab", "abc", "b"), ("<|x|>",), (), ("a.b", "a+b")])
def test_the_longest_spelling_is_marked(spellings):
    found = _pattern(spellings)
    text = "abcab.abx<|x|>a.ba+b"
    longest = re.compile(
        "|".join(map(re.escape, sorted(spellings, key=len, reverse=True))) or "(?!)"
    )
    assert found.findall(text) == longest.findall(text)
