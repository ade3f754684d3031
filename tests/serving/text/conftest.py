"""Small tokenizers with the markers of the families."""

import pytest

pytest.importorskip("tokenizers")

import tokenizers  # noqa: E402
from tokenizers import AddedToken, decoders, pre_tokenizers, trainers  # noqa: E402

from models.text.tokenizer import FastCodec, Tokenizer  # noqa: E402
from serving.text.vocabulary import Vocabulary  # noqa: E402

TEXTS = [
    "the wafer and the fabric, the weather in Paris",
    '{"name": "get_weather", "arguments": {"city": "Paris", "days": 3}}',
    "naïve café 日本語 \N{GRINNING FACE} it's 2026",
    "a  b\n\n c\t",
]
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# What the template of Qwen3 does, in short.
QWEN3 = """{%- if tools %}<|im_start|>system
# Tools
{%- for tool in tools %}
{{ tool | tojson }}
{%- endfor %}<|im_end|>
{% endif %}
{%- for m in messages %}<|im_start|>{{ m.role }}
{% if m.reasoning_content %}<think>
{{ m.reasoning_content }}
</think>
{% endif %}
{{- m.content }}
{%- for call in m.tool_calls or [] %}
<tool_call>
{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}
</tool_call>
{%- endfor %}<|im_end|>
{% endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% if enable_thinking is defined and enable_thinking is false %}<think>

</think>

{% endif %}{% endif %}"""
LLAMA3 = """<|begin_of_text|>{% if tools %}<|start_header_id|>system<|end_header_id|>

Respond in the format {"name": function name, "parameters": dictionary}.
{% for tool in tools %}{{ tool | tojson }}
{% endfor %}<|eot_id|>{% endif %}
{%- for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>

{% if 'tool_calls' in m %}{%- set f = m.tool_calls[0].function -%}
{"name": "{{ f.name }}", "parameters": {{ f.arguments | tojson }}}
{%- else %}{{ m.content | trim }}{% endif %}<|eot_id|>
{%- endfor %}
{%- if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>

{% endif %}"""
HARMONY = """<|start|>system<|message|>Reasoning: {{ reasoning_effort or "medium" }}
# Valid channels: analysis, commentary, final.<|end|>
{%- if messages[0].role in ("developer", "system") %}<|start|>developer<|message|>
{{- messages[0].content }}<|end|>{% set messages = messages[1:] %}{% endif %}
{%- if tools %}<|start|>developer<|message|>{{ tools | tojson }}<|end|>{% endif %}
{%- for m in messages %}
{%- if m.thinking %}<|start|>assistant<|channel|>analysis<|message|>{{ m.thinking }}<|end|>
{%- endif %}
{%- for call in m.tool_calls or [] %}<|start|>assistant to=functions.{{ call.function.name -}}
<|channel|>commentary json<|message|>{{ call.function.arguments | tojson }}<|call|>{% endfor %}
{%- if m.content %}<|start|>{{ m.role }}<|message|>{{ m.content }}<|end|>{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}<|start|>assistant{% endif %}"""
SPECIAL = {
    "chatml": ("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
    "qwen3": ("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
    "llama3": ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
    + ("<|python_tag|>",),
    "harmony": ("<|start|>", "<|channel|>", "<|message|>", "<|constrain|>", "<|end|>")
    + ("<|call|>", "<|return|>"),
}
ADDED = {"qwen3": ("<think>", "</think>", "<tool_call>", "</tool_call>")}
TEMPLATES = {"chatml": CHATML, "qwen3": QWEN3, "llama3": LLAMA3, "harmony": HARMONY}
ENDS = {
    "chatml": ["<|im_end|>"],
    "qwen3": ["<|im_end|>", "<|endoftext|>"],
    "llama3": ["<|eot_id|>"],
    "harmony": ["<|return|>", "<|call|>"],
}


def byte_level(name):
    """A byte-level tokenizer with few merges, and the markers and the template of a family."""
    inner = tokenizers.Tokenizer(tokenizers.models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=list(SPECIAL[name]),
        show_progress=False,
    )
    inner.train_from_iterator(TEXTS * 3, trainer)
    # As in Qwen3's tokenizer.json, these are not special.
    inner.add_tokens([AddedToken(one, special=False) for one in ADDED.get(name, ())])
    return Tokenizer(
        codec=FastCodec(inner),
        template=TEMPLATES[name],
        ends=tuple(inner.get_vocab()[one] for one in ENDS[name]),
    )


def byte_fallback():
    """A tokenizer of pieces with a space before each text, and bytes for unknown characters."""
    from models.text.sentencepiece_model import Kind, SentencePieceModel, build

    letters = "▁ ▁the ▁wafer e t h a w f r < | > / im _ end ▁a . : \n".split(" ")
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *letters]
    kinds = [Kind.UNKNOWN, Kind.CONTROL, Kind.CONTROL, *[Kind.BYTE] * 256]
    kinds += [Kind.NORMAL] * len(letters)
    inner = build(
        SentencePieceModel(
            pieces=tuple(pieces),
            scores=tuple(-float(i) for i in range(len(pieces))),
            kinds=tuple(kinds),
            unigram=False,
            byte_fallback=True,
            unknown=0,
            begin=1,
            end=2,
            charsmap=b"",
            dummy_prefix=True,
            remove_spaces=False,
            escape_spaces=True,
        )
    )
    inner.add_special_tokens(["<s>", "</s>"])
    return Tokenizer(codec=FastCodec(inner), ends=(2,), template="<s>" + CHATML)


@pytest.fixture(scope="session")
def tokenizer_of():
    """A function that gives the tokenizer of a family; each is built once."""
    built = {}

    def find(name):
        if name not in built:
            built[name] = byte_fallback() if name == "pieces" else byte_level(name)
        return built[name]

    return find


@pytest.fixture(scope="session")
def vocabulary_of(tokenizer_of):
    """A function that gives the vocabulary of a family."""
    return lambda name: Vocabulary(tokenizer_of(name), [tokenizer_of(name).template])
