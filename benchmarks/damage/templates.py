"""Chat templates: bombs that would take all time and memory, ways out of the sandbox, usual ones.

Bombs and escapes must end as an error that names the template, within the limits that
`models.text.template.render` states, and ordinary templates as their exact text.
"""

import functools
import pathlib
import random
import resource
import time
from typing import Any

from benchmarks.damage.case import Case
from models.text.template import render

_MOST_SECONDS = 25.0  # by the clock, on a busy machine; 2 of them are processor time
_MOST_MEMORY = 150 << 20  # bytes that this process may grow by
_DEEP = 3000
_LOOP = "{% for i in range(99999) %}"

# Each would take more than 2 s or 256 MB, make more than 10 MB of text, or nest without end.
_BOMBS: dict[str, str] = {
    "a text times a number": "{{ 'a' * 10**9 }}",
    "a list times a number": "{{ ([0] * 10**9) | length }}",
    "a tuple times a number": "{{ ((0,) * 10**9) | length }}",
    "a power": "{{ 10 ** (10 ** 8) % 7 }}",
    "powers of powers": "{{ (7 ** 3000000) * (7 ** 3000001) % 3 + 9 ** (9 ** (9 ** 9)) }}",
    "nested loops": f"{_LOOP}{_LOOP}x{{% endfor %}}{{% endfor %}}",
    "nested silent loops": f"{_LOOP}{_LOOP}{{% endfor %}}{{% endfor %}}",
    "a large range": "{% for a in range(10**9) %}{% endfor %}",
    "%-formatting": "{{ '%1000000000d' % 1 }}",
    "%-formatting with a star": "{{ '%*d' % (10**9, 1) }}",
    "format with a width": "{{ '{:1000000000}'.format(1) }}",
    "format with a precision": "{{ '{:.1000000000f}'.format(1.0) }}",
    "filter format": "{{ '%1000000000s' | format('a') }}",
    "center": "{{ 'a' | center(10**9) }}",
    "ljust": "{{ 'a'.ljust(10**9) }}",
    "zfill": "{{ '1'.zfill(10**9) }}",
    "expandtabs": "{{ '\\t'.expandtabs(10**9) }}",
    "join": "{{ (['a' * 10000] * 100000) | join('b' * 1000) }}",
    "indent": "{{ ('a\\n' * 100000) | indent(100000) }}",
    "replace": "{{ ('a' * 100000) | replace('a', 'b' * 100000) }}",
    "replace again": "{{ ('a' * 99999).replace('a', 'b' * 99999) }}",
    "batch": "{% for row in 'a' | batch(10**9, 'x') %}{{ row }}{% endfor %}",
    "slice": "{% for part in 'a' | slice(10**9) %}{% endfor %}",
    "wordwrap": "{{ ('a ' * 3000000) | wordwrap(1, true, 'b' * 1000) }}",
    "tojson": "{{ [[[1] * 1000] * 1000] | tojson(indent=1000000) }}",
    "tojson of a deep list": "{% set ns = namespace(l=[]) %}{% for i in range(99999) %}"
    "{% set ns.l = [ns.l] %}{% endfor %}{{ ns.l | tojson }}",
    "doubling a text": "{% set ns = namespace(t='a') %}{% for i in range(64) %}"
    "{% set ns.t = ns.t ~ ns.t %}{% endfor %}{{ ns.t }}",
    "doubling a list": "{% set ns = namespace(l=[1]) %}{% for i in range(64) %}"
    "{% set ns.l = ns.l + ns.l %}{% endfor %}{{ ns.l | length }}",
    "squaring a number": "{% set ns = namespace(n=10) %}{% for i in range(64) %}"
    "{% set ns.n = ns.n * ns.n %}{% endfor %}{{ ns.n % 2 }}",
    "a macro that calls itself": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "a macro that calls itself twice": "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}"
    "{% endif %}{% endmacro %}{{ m(60) }}",
    "a recursive loop": "{% for x in [1] recursive %}{{ loop([1]) }}{% endfor %}",
    "lipsum": "{{ lipsum(n=10**7) }}",
    "sorting": "{% for a in range(99999) %}{{ (range(99999) | sort | list)[0:0] }}{% endfor %}",
    "a product of sums": "{% for a in range(99999) %}{{ range(99999) | sum }}{% endfor %}",
    "groupby": "{% for a in range(99999) %}{{ (range(99999) | groupby(0))[0:0] }}{% endfor %}",
    "unique": "{% for a in range(99999) %}{{ (range(99999) | unique | list)[0:0] }}{% endfor %}",
    "a cycler": "{% set c = cycler('a' * 1000000, 'b') %}{% for i in range(99999) %}{{ c.next() }}"
    "{% endfor %}",
    "a block in a loop": _LOOP + "{% set x %}{{ 'a' * 100000 }}{% endset %}{{ x }}{% endfor %}",
    "deep brackets": "{{ " + "(" * _DEEP + "1" + ")" * _DEEP + " }}",
    "deep lists": "{{ " + "[" * _DEEP + "]" * _DEEP + " }}",
    "deep ifs": "{% if 1 %}" * _DEEP + "{% endif %}" * _DEEP,
    "deep negations": "{{ " + "not " * _DEEP + "1 }}",
    "a long source": "{{ 1 }}" * 200_000,
    "a long expression": "{{ 1" + "+1" * 200_000 + " }}",
}

_GROWTHS = ("x ~ x", "x * 2", "x + x", "[x, x] | join", "x | replace('a', 'aa')", "'%s%s' % (x, x)")

# Each reaches for Python below the sandbox, for files, or for what is not the template's to change.
_ESCAPES: dict[str, str] = {
    "class": "{{ ''.__class__ }}",
    "subclasses": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "class by subscript": "{{ ''['__class__'] }}",
    "class by attr": "{{ '' | attr('__class__') }}",
    "class by a spelled name": "{{ '' | attr('__cla' ~ 'ss__') }}",
    "class by map": "{{ [''] | map(attribute='__class__') | list }}",
    "class by format": "{{ '{0.__class__}'.format('') }}",
    "class by format_map": "{{ '{a.__class__.__mro__}'.format_map({'a': 1}) }}",
    "class by a filter's format": "{{ '{0.__class__.__mro__}' | attr('format') | list }}"
    "{{ ('{0.__class__}' | attr('format'))('') }}",
    "class by sort": "{{ [1, ''] | sort(attribute='__class__.__name__') }}",
    "class by groupby": "{{ ['', 1] | groupby('__class__') }}",
    "class by sum": "{{ [''] | sum(attribute='__class__', start=[]) }}",
    "globals of a function": "{{ raise_exception.__globals__ }}",
    "globals of a method": "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    "globals of joiner": "{{ joiner.__init__.__globals__ }}",
    "globals of lipsum": "{{ lipsum.__globals__['os'].system('id') }}",
    "globals of strftime_now": "{{ strftime_now.__globals__ }}",
    "builtins of a namespace": "{{ namespace.__init__.__globals__['__builtins__'] }}",
    "code of a macro": "{% macro m() %}{% endmacro %}{{ m.__call__.__func__.__code__ }}",
    "a macro's environment": "{% macro m() %}{% endmacro %}{{ m._environment.globals }}",
    "the template itself": "{{ self.__init__.__globals__ }}",
    "the template's context": "{{ self._TemplateReference__context.environment }}",
    "the loop's internals": "{% for x in [1] %}{{ loop._iterable }}{% endfor %}",
    "a namespace's class": "{% set n = namespace() %}{% set n.__class__ = 1 %}{{ n }}",
    "a namespace made with internals": "{{ namespace(**{'__class__': 1}) }}",
    "a generator's frame": "{{ (messages | map('upper')).gi_frame.f_globals }}",
    "code of a function": "{{ raise_exception.__code__.co_consts }}",
    "including a file": "{% include '/etc/passwd' %}",
    "importing a file": "{% import '/etc/passwd' as x %}",
    "extending a file": "{% extends '/etc/passwd' %}",
    "changing the messages": "{{ messages.append(1) }}",
    "changing a message": "{{ {'a': 1}.update({'b': 2}) }}",
    "emptying the messages": "{{ messages.clear() }}",
    "bytes of a text": "{{ ''.encode.__self__.__class__ }}",
    "open": "{{ open('/etc/passwd').read() }}",
    "eval": "{{ eval('1') }}",
    "import": "{{ __import__('os').system('id') }}",
}

_CHAT: list[dict[str, Any]] = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is <2> & 'two'?"},
    {"role": "assistant", "content": " Zwei, né. "},
    {"role": "user", "content": "More\n"},
]
_TOOLS = [{"type": "function", "function": {"name": "find", "parameters": {"q": "é<b>"}}}]

# How the chats of public families are written: a template, and the text of `_CHAT`.
_ORDINARY: dict[str, tuple[str, str]] = {
    "ChatML": (
        "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + "
        "message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        "<|im_start|>user\nWhat is <2> & 'two'?<|im_end|>\n"
        "<|im_start|>assistant\n Zwei, né. <|im_end|>\n<|im_start|>user\nMore\n<|im_end|>\n"
        "<|im_start|>assistant\n",
    ),
    "Llama 2": (
        "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}"
        "{% set system_message = messages[0]['content'] %}{% else %}"
        "{% set loop_messages = messages %}{% set system_message = false %}{% endif %}"
        "{% for message in loop_messages %}"
        "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('Conversation roles must alternate user/assistant/...') }}{% endif %}"
        "{% if loop.index0 == 0 and system_message != false %}"
        "{% set content = '<<SYS>>\\n' + system_message + '\\n<</SYS>>\\n\\n' + "
        "message['content'] %}"
        "{% else %}{% set content = message['content'] %}{% endif %}"
        "{% if message['role'] == 'user' %}"
        "{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
        "{% elif message['role'] == 'assistant' %}"
        "{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}",
        "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nWhat is <2> & 'two'? [/INST] Zwei, né. </s>"
        "<s>[INST] More [/INST]",
    ),
    "Llama 3": (
        "{% set loop_messages = messages %}{% for message in loop_messages %}"
        "{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'+ "
        "message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}"
        "{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}"
        "{% if add_generation_prompt %}"
        "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}",
        "<s><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nWhat is <2> & 'two'?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nZwei, né.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nMore<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
    ),
    "Zephyr": (
        "{% for message in messages %}\n{% if message['role'] == 'user' %}\n"
        "{{ '<|user|>\n' + message['content'] + eos_token }}\n"
        "{% elif message['role'] == 'system' %}\n"
        "{{ '<|system|>\n' + message['content'] + eos_token }}\n"
        "{% elif message['role'] == 'assistant' %}\n"
        "{{ '<|assistant|>\n'  + message['content'] + eos_token }}\n{% endif %}\n"
        "{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n"
        "{% endfor %}",
        "<|system|>\nBe brief.</s>\n<|user|>\nWhat is <2> & 'two'?</s>\n"
        "<|assistant|>\n Zwei, né. </s>\n<|user|>\nMore\n</s>\n<|assistant|>\n",
    ),
    "Gemma": (
        "{{ bos_token }}{% for message in messages %}"
        "{% if message['role'] == 'system' %}{% continue %}{% endif %}"
        "{% if (message['role'] == 'assistant') %}{% set role = 'model' %}{% else %}"
        "{% set role = message['role'] %}{% endif %}"
        "{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}",
        "<s><start_of_turn>user\nWhat is <2> & 'two'?<end_of_turn>\n<start_of_turn>model\n"
        "Zwei, né.<end_of_turn>\n<start_of_turn>user\nMore<end_of_turn>\n<start_of_turn>model\n",
    ),
    "Phi-3": (
        "{% for message in messages %}{% if message['role'] == 'system' and message['content'] %}"
        "{{'<|system|>\n' + message['content'] + '<|end|>\n'}}{% elif message['role'] == 'user' %}"
        "{{'<|user|>\n' + message['content'] + '<|end|>\n'}}"
        "{% elif message['role'] == 'assistant' %}"
        "{{'<|assistant|>\n' + message['content'] + '<|end|>\n'}}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}",
        "<|system|>\nBe brief.<|end|>\n<|user|>\nWhat is <2> & 'two'?<|end|>\n"
        "<|assistant|>\n Zwei, né. <|end|>\n<|user|>\nMore\n<|end|>\n<|assistant|>\n",
    ),
    "tools, as Qwen writes them": (
        "{%- if tools %}\n    {{- '<tools>' }}\n    {%- for tool in tools %}\n"
        '        {{- "\\n" }}\n        {{- tool | tojson }}\n    {%- endfor %}\n'
        "    {{- '\\n</tools>\\n' }}\n{%- endif %}\n"
        "{%- for message in messages[::-1] %}\n    {%- if loop.first %}\n"
        "        {{- message.content | trim }}\n    {%- endif %}\n{%- endfor %}",
        '<tools>\n{"type": "function", "function": {"name": "find", "parameters": {"q": "é<b>"}}}\n'
        "</tools>\nMore",
    ),
    "thinking, as Qwen3 switches it off": (
        "{%- set ns = namespace(last=messages|length - 1) %}\n{%- for message in messages %}\n"
        "    {%- set ns.last = loop.index0 %}\n{%- endfor %}\n{{- ns.last }}\n"
        "{%- if add_generation_prompt %}\n    {{- '<|im_start|>assistant\\n' }}\n"
        "    {%- if enable_thinking is defined and enable_thinking is false %}\n"
        "        {{- '<think>\\n\\n</think>\\n\\n' }}\n    {%- endif %}\n{%- endif %}",
        "3<|im_start|>assistant\n<think>\n\n</think>\n\n",
    ),
    "a macro, as gpt-oss has": (
        "{%- macro header(role, channel='final') -%}\n<|start|>{{ role }}<|channel|>{{ channel }}"
        "{%- endmacro -%}\n{%- for message in messages -%}\n    {{- header(message.role) -}}\n"
        "    {{- '<|message|>' ~ message.content|trim ~ '<|end|>' -}}\n{%- endfor -%}",
        "<|start|>system<|channel|>final<|message|>Be brief.<|end|>"
        "<|start|>user<|channel|>final<|message|>What is <2> & 'two'?<|end|>"
        "<|start|>assistant<|channel|>final<|message|>Zwei, né.<|end|>"
        "<|start|>user<|channel|>final<|message|>More<|end|>",
    ),
    "what was trained on, marked": (
        "{% for m in messages %}\n{% if m.role == 'assistant' %}\n"
        "{%- generation -%}\n{{ m.content }}\n{%- endgeneration -%}\n{% else %}\n"
        "[{{ m.role }}]{% endif %}\n{% endfor %}",
        "[system][user] Zwei, né. [user]",
    ),
    "JSON with arguments": (
        "{{ tools | tojson(indent=1, sort_keys=true) | length }} "
        "{{ {'b': 'é', 'a': [1, none]} | tojson(separators=(',', ':'), sort_keys=true) }} "
        "{{ 'é' | tojson(ensure_ascii=true) }}",
        '110 {"a":[1,null],"b":"é"} "\\u00e9"',
    ),
    "nothing given": (
        "{{ documents is none }} {{ tool_choice is defined }} {{ missing }}|"
        "{{ dict(a=1).items() | list }} {{ strftime_now('%%') }}",
        "True False |[('a', 1)] %",
    ),
    "breaks": (
        "{% for m in messages %}{% if loop.index > 2 %}{% break %}{% endif %}{{ m.role[0] }}"
        "{% endfor %}",
        "su",
    ),
}


def cases(seed: int) -> list[Case]:
    """Bombs, some of them made from `seed`, escapes, and ordinary templates."""
    rng = random.Random(seed)
    bombs = _BOMBS | {f"grown {i}": _grown(rng) for i in range(8)}
    kinds = {"template bombs": bombs, "template escapes": _ESCAPES}
    refused = [
        Case(kind, name, functools.partial(_is_refused, template))
        for kind, templates in kinds.items()
        for name, template in templates.items()
    ]
    ordinary = [
        Case("templates", name, functools.partial(_renders, template, _CHAT, text))
        for name, (template, text) in _ORDINARY.items()
    ]
    template, _ = _ORDINARY["ChatML"]
    for i in range(8):
        chat = _random_chat(rng)
        text = "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in chat)
        text += "<|im_start|>assistant\n"
        check = functools.partial(_renders, template, chat, text)
        ordinary.append(Case("templates", f"ChatML of chat {i}", check))
    return refused + ordinary


def _grown(rng: random.Random) -> str:
    """A template that doubles a text many times, each time in one of several ways."""
    steps = "".join(f"{{% set x = {rng.choice(_GROWTHS)} %}}" for _ in range(rng.randint(32, 64)))
    return "{% set x = 'aaaa' %}" + steps + "{{ x }}"


def _random_chat(rng: random.Random) -> list[dict[str, Any]]:
    letters = "ab \n\t<>&'\"{}%\\é日\N{GRINNING FACE}\ud800\x00"
    return [
        {"role": rng.choice(("user", "assistant")), "content": "".join(rng.choices(letters, k=40))}
        for _ in range(rng.randint(1, 9))
    ]


def _is_refused(template: str, folder: pathlib.Path) -> None:
    del folder
    before, start = _memory(), time.monotonic()
    try:
        text = render(template, {"messages": ["a"]}, "the case")
    except ValueError as error:
        assert "the chat template of the case" in str(error), error
    else:
        raise AssertionError(f"rendered as {text[:80]!r}")
    taken, grown = time.monotonic() - start, _memory() - before
    assert taken < _MOST_SECONDS, f"took {taken:.0f} s"
    assert grown < _MOST_MEMORY, f"took {grown >> 20} MB of this process"


def _renders(template: str, chat: list[dict[str, Any]], text: str, folder: pathlib.Path) -> None:
    del folder
    names: dict[str, Any] = {
        "messages": chat,
        "tools": _TOOLS,
        "documents": None,
        "add_generation_prompt": True,
    }
    names |= {"bos_token": "<s>", "eos_token": "</s>", "enable_thinking": False}
    rendered = render(template, names)
    assert rendered == text, f"rendered as {rendered!r}"


def _memory() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
