"""Chat templates: what they get, what they cost at most, and how a tokenizer picks one."""

import dataclasses
import enum
import json
import os
import resource
import signal
import threading
import time

import numpy as np
import pytest

pytest.importorskip("jinja2")
pytest.importorskip("tokenizers")

import tokenizers  # noqa: E402
from tokenizers import decoders, pre_tokenizers  # noqa: E402

from models.text import template as template_module  # noqa: E402
from models.text.reading import load_tokenizer  # noqa: E402
from models.text.template import OUTPUT, SOURCE, render  # noqa: E402
from models.text.tokenizer import FastCodec, Tokenizer, bytes_tokenizer  # noqa: E402

USER = [{"role": "user", "content": "hi"}]


def test_a_message_of_a_template_is_one_line_for_any_terminal():
    with pytest.raises(ValueError, match=r"fails: a\\nb\\x1b\[31m\\u202ec$"):
        render("{{ raise_exception(text) }}", {"text": "a\nb\x1b[31m\u202ec"})


@pytest.mark.parametrize("number", ["{{ 10 ** 5000 }}", "{{ [n] | tojson }}", "{{ n }}"])
def test_numbers_that_are_too_long_are_said_to_be(number):
    with pytest.raises(ValueError, match="fails: a number has too many digits to be written"):
        render(number, {"n": 10**5000})


def test_templates_fail_by_name():
    with pytest.raises(ValueError, match="the chat template of x fails: only users"):
        render("{{ raise_exception('only users') }}", {}, "x")
    with pytest.raises(ValueError, match="the chat template fails"):
        render("{% if %}", {})
    with pytest.raises(ValueError, match="'__class__' of 'str' is not for templates"):
        render("{{ ''.__class__ }}", {})
    with pytest.raises(ValueError, match="'append' of 'list' is not for templates"):
        render("{{ messages.append(1) }}", {"messages": []})
    with pytest.raises(ValueError, match="the chat template is 5; it must be a text"):
        render(5, {})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("template", "text"),
    [
        (
            "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
            "hi",
        ),
        ("a \n{%- generation -%}\n b {%- endgeneration %} c", "ab c"),
        ("  {% generation %}\n{{ 1 }}\n  {% endgeneration %}\n2", "1\n2"),
        # As in transformers, a block of its own.
        ("{% generation %}{% set x = 1 %}{{ x }}{% endgeneration %}{{ x }}", "1"),
        ("{{ {'b': '<é>', 'a': 1} | tojson }}", '{"b": "<é>", "a": 1}'),
        ("{{ [1, 'é'] | tojson(true, 1, ('; ', '')) }}", '[\n 1; \n "\\u00e9"\n]'),
        ("{{ {'b': 1, 'a': 2} | tojson(sort_keys=true) }}", '{"a": 2, "b": 1}'),
        ("{{ documents is none }}{{ tools }}{{ nothing }}", "FalseNone"),
        ("{% for i in range(9) %}{% if i == 3 %}{% break %}{% endif %}{{ i }}{% endfor %}", "012"),
        ("{% set ns = namespace(a=1, self=2) %}{% set ns.b = 3 %}{{ ns.a + ns.self + ns.b }}", "6"),
        ("{{ dict([('a', 1)], b=2) }}{{ dict.fromkeys('a', 1) }}", "{'a': 1, 'b': 2}{'a': 1}"),
    ],
)
def test_templates_render_as_in_transformers(template, text):
    assert render(template, {"messages": USER, "tools": None, "documents": [1]}) == text


def test_the_time_is_that_of_the_machine():
    before, text, after = time.time(), render("{{ strftime_now('%s') }}", {}), time.time()
    assert int(before) <= int(text) <= after


class Role(enum.StrEnum):
    USER = "user"


@dataclasses.dataclass
class Message:
    role: Role
    content: str


def test_variables_become_plain_data():
    value = {"m": Message(Role.USER, "hi"), "t": (1, [None]), "n": np.int64(3), "b": np.bool_(True)}
    text = "{'m': {'role': 'user', 'content': 'hi'}, 't': (1, [None]), 'n': 3, 'b': True}"
    assert render("{{ v }}", {"v": value}) == text
    with pytest.raises(ValueError, match=r"of x cannot get a numpy.ndarray; give"):
        render("", {"v": [np.array([1])]}, "x")
    deep: list = []
    for _ in range(100_000):
        deep = [deep]
    with pytest.raises(ValueError, match="nested too deeply"):
        render("", {"v": deep})


def test_what_is_stated_is_the_limit():
    """Right at the limits templates render, beyond them they do not."""
    assert len(render("{{ 'a' * n }}", {"n": OUTPUT})) == OUTPUT
    with pytest.raises(ValueError, match="its text has more than 10,000,000 characters"):
        render("{{ 'a' * n }}", {"n": OUTPUT + 1})
    with pytest.raises(ValueError, match="fails: it takes more than 256 MB"):
        render("{{ ('a' * n) | length }}", {"n": 256 << 20})
    assert render("{{ ('a' * n) | length }}", {"n": 128 << 20}) == str(128 << 20)
    assert render(" " * SOURCE, {}) == " " * SOURCE
    with pytest.raises(ValueError, match="has 1,000,001 characters; at most 1,000,000 are read"):
        render(" " * (SOURCE + 1), {})
    with pytest.raises(ValueError, match="gets 50,000,.* bytes; at most 50,000,000"):
        render("", {"v": "a" * 50_000_000})


def test_a_bomb_takes_time_and_memory_of_another_process():
    before = resource.getrusage(resource.RUSAGE_SELF)
    with pytest.raises(ValueError, match="it takes more than 2 s of processor time"):
        render(
            "{{ 9 ** (9 ** (9 ** 9)) }}{% for a in range(99999) %}{{ 7 ** 99999 }}{% endfor %}", {}
        )
    after = resource.getrusage(resource.RUSAGE_SELF)
    assert after.ru_utime - before.ru_utime < 1
    assert after.ru_maxrss - before.ru_maxrss < 50 << 10
    assert render("{{ 1 }}", {}) == "1"  # the next template has a process again


def test_a_process_that_does_not_answer_is_ended(monkeypatch):
    render("", {})
    monkeypatch.setattr(template_module, "_PATIENCE", 0.1)
    process = template_module._worker._process
    assert process is not None
    os.kill(process.pid, signal.SIGSTOP)
    with pytest.raises(ValueError, match="it does not end within 0.1 s"):
        render("", {})
    monkeypatch.undo()
    os.kill(template_module._worker._process.pid, 9) if template_module._worker._process else None
    assert render("{{ 2 }}", {}) == "2"


def test_threads_and_forks_get_texts_of_their_own():
    texts = {}

    def ask(i):
        texts[i] = [render("{{ i }}" * 99, {"i": i}) for _ in range(20)]

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert texts == {i: [str(i) * 99] * 20 for i in range(4)}


def test_variables_may_have_any_name():
    assert render("{{ self is defined }} {{ context }}", {"self": 1, "context": 2}) == "True 2"


def word_tokenizer(**fields):
    """A tokenizer of letters with chat templates."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {letter: i for i, letter in enumerate(letters)}
    inner = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return Tokenizer(codec=FastCodec(inner), **fields)


def text_of(tokenizer, messages=USER, **options):
    return tokenizer.decode(tokenizer.chat(messages, **options))


def test_options_reach_the_template():
    shown = "{{ enable_thinking }}|{{ tools }}|{{ documents }}|{{ add_generation_prompt }}"
    shown += "|{{ eos_token }}"
    tokenizer = word_tokenizer(template=shown, names={"eos_token": "<e>"})
    assert text_of(tokenizer) == "|None|None|True|<e>"
    options = {"enable_thinking": False, "tools": [1], "documents": [{"a": 2}], "eos_token": "<f>"}
    assert text_of(tokenizer, add_generation_prompt=False, **options) == (
        "False|[1]|[{'a': 2}]|False|<f>"
    )
    with pytest.raises(ValueError, match="chat has no option 'padding'"):
        tokenizer.chat(USER, padding=True)
    with pytest.raises(ValueError, match="chat has no option 'self'"):
        tokenizer.chat(USER, self=3)
    with pytest.raises(ValueError, match=r"chat_template is \[3\]; it must be a text"):
        tokenizer.chat(USER, chat_template=[3])
    with pytest.raises(ValueError, match="messages has none"):
        tokenizer.chat([])
    with pytest.raises(ValueError, match="messages holds 'hi'; a message is a dict"):
        tokenizer.chat(["hi"])


def test_messages_are_as_transformers_hands_them_over():
    tokenizer = word_tokenizer(template="{{ messages }}")
    assert text_of(tokenizer, [{"role": "tool", "content": None}]) == "[{'role': 'tool'}]"
    thought = [{"role": "assistant", "reasoning": "so"}]
    assert text_of(tokenizer, thought) == (
        "[{'thinking': 'so', 'role': 'assistant', 'reasoning': 'so', 'reasoning_content': 'so'}]"
    )


def test_one_of_several_templates_by_name():
    tokenizer = word_tokenizer(template="usual", templates={"tool_use": "tools", "rag": "{{ x }}"})
    assert text_of(tokenizer) == "usual"
    assert text_of(tokenizer, tools=[]) == "tools"
    assert text_of(tokenizer, tools=[], chat_template="rag", x="x") == "x"
    assert text_of(tokenizer, chat_template="{{ messages[0].role }}") == "user"
    named = word_tokenizer(templates={"rag": "r"})
    assert text_of(named, chat_template="rag") == "r"
    with pytest.raises(ValueError, match="no chat template for every use; give .*'rag'"):
        named.chat(USER)
    with pytest.raises(ValueError, match="bytes has no chat template"):
        bytes_tokenizer().chat(USER)


@pytest.mark.parametrize("as_list", [True, False])
def test_templates_of_a_configuration_survive_saving(tmp_path, as_list):
    templates = {"default": "usual", "tool_use": "tools"}
    saved = word_tokenizer(template="x")
    saved.save(tmp_path)
    fields = [{"name": n, "template": t} for n, t in templates.items()] if as_list else templates
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": fields}))
    tokenizer = load_tokenizer(tmp_path)
    tokenizer.save(tmp_path)
    again = load_tokenizer(tmp_path)
    assert (again.template, again.templates) == ("usual", {"tool_use": "tools"})


def test_templates_of_files_take_precedence(tmp_path):
    word_tokenizer(template="configuration").save(tmp_path)
    assert load_tokenizer(tmp_path).template == "configuration"
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "rag.jinja").write_text("rag")
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.template, tokenizer.templates) == (None, {"rag": "rag"})
    (tmp_path / "chat_template.jinja").write_text("file")
    assert load_tokenizer(tmp_path).template == "file"
