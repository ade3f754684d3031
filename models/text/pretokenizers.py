"""How byte-pair encoders split text into words first, by the names that GGUF has for it.

Inside a word bytes are merged, across words never. The patterns are those of the tokenizer.json of
the models; llama.cpp's `src/llama-vocab.cpp` lists which name stands for which, which merge a word
that is a token as a whole, and which begin every text with a token.
"""

import dataclasses
from typing import Any

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = (
    rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|"
    + _SPACES
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_QWEN35 = _QWEN2.replace(r"\p{L}+", r"[\p{L}\p{M}]+").replace(r"[^\s\p{L}", r"[^\s\p{L}\p{M}")
_UPPER, _LOWER = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}", r"\p{Ll}\p{Lm}\p{Lo}\p{M}"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]*[{_LOWER}]+|[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]+[{_LOWER}]*|"
    r"\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|" + _SPACES
)
_O200K = (
    rf"[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]*[{_LOWER}]+{_CONTRACTIONS}?|"
    rf"[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]+[{_LOWER}]*{_CONTRACTIONS}?|"
    r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|" + _SPACES
)
_SEED = (
    rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|" + _SPACES
)
_BLOOM = " ?[^(\\s|.,!?…。，、।۔،)]+"
_DEEPSEEK_LETTERS = (
    "A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿǄ-ʓʕ-ʯͰ-ͳͶͷͻ-ͽͿΆΈ-ΊΌΎ-ΡΣ-ϵϷ-ҁҊ-ԯԱ-ՖႠ-ჅᎠ-Ᏽᏸ-ᏽᲐ-ᲺᲽ-Ჿᴀ-ᴫᵫ-ᵷᵹ-ᶚḀ-ἕἘ-Ἕ"
    "ἠ-ὅὈ-Ὅὐ-ὗὙὛὝὟ-ώᾀ-ᾴᾶ-ᾼιῂ-ῄῆ-ῌῐ-ΐῖ-Ίῠ-Ῥῲ-ῴῶ-ῼℂℇℊ-ℓℕℙ-ℝℤΩℨK-ℭℯ-ℴℹℼ-ℿⅅ-ⅉⅎↃↄⰀ-ⱻⱾ-ⳤⳫ-ⳮⳲⳳ"
    "Ꙁ-ꙭꚀ-ꚛꜢ-ꝯꝱ-ꞇꞋ-ꞎꭰ-ꮿﬀ-ﬆﬓ-ﬗＡ-Ｚａ-ｚ𐐀-𐑏𐒰-𐓓𐓘-𐓻𐲀-𐲲𐳀-𐳲𑢠-𑣟𞤀-𞥃"
)
_CHINESE = "[一-龥ࠀ-一가-퟿]+"
_DEEPSEEK_LLM = (
    r"[\r\n]",
    rf"\s?[{_DEEPSEEK_LETTERS}]+",
    r"\s?[!-/:-~！-／：-～‘-‟　-。]+",
    r"\s+$",
    _CHINESE,
    r"\p{N}+",
)
_DEEPSEEK_CODER = (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _CHINESE, r"\p{N}")
_DEEPSEEK_V3 = (
    r"\p{N}{1,3}",
    "[一-龥぀-ゟ゠-ヿ]+",
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+|"
    r" ?[\p{P}\p{S}]+[\r\n]*|" + _SPACES,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PreTokenizer:
    """How text is split into words, and what follows from the name of it."""

    patterns: tuple[str, ...]  # each splits what the one before left
    whole_words: bool = False  # a word that is a token is that token, whatever the merges
    begins: bool = False  # a text begins with a token, if the file does not say whether

    def build(self, prefix: bool = False) -> Any:
        """A pre-tokenizer of the library `tokenizers`.

        Args:
          prefix: whether a space is put before every text.
        """
        from tokenizers import Regex, pre_tokenizers

        *first, last = self.patterns
        inner = last == _GPT2  # built into the library
        splits = [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated")
            for pattern in (first if inner else self.patterns)
        ]
        letters = pre_tokenizers.ByteLevel(add_prefix_space=prefix, use_regex=inner)
        return pre_tokenizers.Sequence([*splits, letters]) if splits else letters


_ALIASES: tuple[tuple[str, PreTokenizer], ...] = (
    (
        "gpt-2 phi-2 jina-es jina-de gigachat a.x-4.0 mellum modern-bert mpt olmo jais trillion "
        "granite-docling exaone4",
        PreTokenizer(patterns=(_GPT2,)),
    ),
    (
        "smollm refact starcoder codeshell command-r exaone minerva-7b mellum2",
        PreTokenizer(patterns=(r"\p{N}", _GPT2)),
    ),
    (
        "llama-bpe llama3 llama-v3 falcon3 falcon-h1 pixtral midm-2.0 lfm2 jina-v5-nano",
        PreTokenizer(patterns=(_LLAMA3,), whole_words=True, begins=True),
    ),
    ("dbrx smaug-bpe chatglm-bpe glm4", PreTokenizer(patterns=(_LLAMA3,))),
    (
        "qwen2 deepseek-r1-qwen kormo f2llmv2 megrez stablelm2 hunyuan solar-open grok-2",
        PreTokenizer(patterns=(_QWEN2,)),
    ),
    ("qwen35", PreTokenizer(patterns=(_QWEN35,))),
    ("gpt-4o llama4 kanana2 talkie minimax-m2", PreTokenizer(patterns=(_O200K,))),
    ("tekken", PreTokenizer(patterns=(_TEKKEN,), whole_words=True, begins=True)),
    ("seed-coder", PreTokenizer(patterns=(_SEED,))),
    ("minicpm5", PreTokenizer(patterns=(r"\p{N}{1,3}", _LLAMA3), whole_words=True)),
    ("deepseek-llm", PreTokenizer(patterns=_DEEPSEEK_LLM)),
    ("deepseek-coder", PreTokenizer(patterns=_DEEPSEEK_CODER)),
    ("deepseek-v3 hunyuan-dense joyai-llm", PreTokenizer(patterns=_DEEPSEEK_V3)),
    ("poro-chat bloom gpt3-finnish", PreTokenizer(patterns=(_BLOOM,))),
    ("viking", PreTokenizer(patterns=(_BLOOM, r"\p{N}"))),
    ("falcon", PreTokenizer(patterns=(r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, "[0-9][0-9][0-9]"))),
    # What llama.cpp takes for a file that names none.
    (
        "default",
        PreTokenizer(patterns=(r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]")),
    ),
)
PRE_TOKENIZERS = {name: kind for names, kind in _ALIASES for name in names.split()}


def find_pre_tokenizer(name: str) -> PreTokenizer:
    """The pre-tokenizer of a name, as GGUF has them.

    Raises:
      ValueError: the name is unknown.
    """
    if name not in PRE_TOKENIZERS:
        known = ", ".join(sorted(PRE_TOKENIZERS))
        raise ValueError(f"the pre-tokenizer {name!r} is not one of {known}")
    return PRE_TOKENIZERS[name]
