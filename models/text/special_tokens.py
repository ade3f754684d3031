"""Read what a checkpoint's JSON files say of special and added tokens, as `transformers` does.

tokenizer_config.json names them, and numbers them in `added_tokens_decoder`; older checkpoints do
so in special_tokens_map.json and added_tokens.json.
"""

import dataclasses
import pathlib
import re
from typing import Any

from models.checkpoints import json_file
from models.text.limits import LONGEST

_NAMED = "bos_token eos_token unk_token sep_token pad_token cls_token mask_token".split()
_EXTRA = ("additional_special_tokens", "extra_special_tokens")
_SPECIFIC = "model_specific_special_tokens"
_SWITCHES = (
    "add_bos_token",
    "add_eos_token",
    "add_prefix_space",
    "clean_up_tokenization_spaces",
    "legacy",
    "split_special_tokens",
)
_MOST_ADDED = 100_000  # tokens; models of speech add 66,000
_SURROGATE = re.compile("[\ud800-\udfff]")
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SpecialTokens:
    """What a checkpoint's files say of its special and added tokens."""

    names: dict[str, str]  # "bos_token", "eos_token" and the like, and how each is written
    flags: dict[str, Any]  # of a token: an AddedToken, if a file says how it is found in text
    extra: tuple[str, ...]  # special tokens without a name
    numbers: dict[int, str]  # tokens that are numbered outside the vocabulary's own file
    settings: dict[str, Any]  # tokenizer_config.json, with what special_tokens_map.json adds

    def matched_before_normalization(self) -> "SpecialTokens":
        """The same, with every numbered token found in the text as it is written."""
        from tokenizers import AddedToken

        flags = {
            name: AddedToken(
                name,
                **{f: getattr(token, f) for f in _FLAGS if f != "normalized"},
                normalized=token.normalized and name not in self.numbers.values(),
            )
            for name, token in self.flags.items()
        }
        return dataclasses.replace(self, flags=flags)

    def add_to(self, tokenizer: Any, room: int | None, source: pathlib.Path) -> frozenset[str]:
        """Adds the tokens to a `tokenizers.Tokenizer`; returns those it numbered on its own.

        A special token that no file numbers gets the next number, as in `transformers`, if the
        model has a row for it.

        Args:
          tokenizer: a `tokenizers.Tokenizer`, changed in place.
          room: the model's `vocab_size`; None if it is unknown.
          source: the vocabulary's file, for error messages.

        Raises:
          ValueError: a token cannot get the number that a file gives it.
        """
        from tokenizers import AddedToken

        named = set(self.names.values())
        added = tokenizer.get_added_tokens_decoder()
        changed = [
            self.flags[name]
            for number, name in sorted(self.numbers.items())
            if repr(self.flags[name]) != repr(added.get(number))
        ]
        for token in changed:
            token.special = token.special or token.content in named
        tokenizer.add_tokens(changed)
        for number, name in sorted(self.numbers.items()):
            found = tokenizer.token_to_id(name)
            if found != number:
                raise ValueError(
                    f"{source.parent}: added token {name!r} is to be number {number}, but "
                    f"{source.name} makes it {found}; the files are not of one checkpoint"
                )
        added = {token.content: token for token in tokenizer.get_added_tokens_decoder().values()}
        unnumbered: set[str] = set()
        new: list[Any] = []
        next_number = max(tokenizer.get_vocab().values(), default=-1) + 1
        # The order decides the numbers of those that have none.
        rank = {name: i for i, name in enumerate(_NAMED)}
        in_order = sorted(self.names, key=lambda name: rank.get(name, len(rank)))
        for name in dict.fromkeys([*(self.names[one] for one in in_order), *self.extra]):
            if tokenizer.token_to_id(name) is None:
                if room is not None and next_number + len(unnumbered) >= room:
                    continue
                unnumbered.add(name)
            if name not in added or (name in named and not added[name].special):
                token = added.get(name) or self.flags.get(name) or AddedToken(name)
                token.special = True
                new.append(token)
        tokenizer.add_tokens(new)  # at once: each call takes time for all that were added before
        return frozenset(unnumbered)


def read_special_tokens(folder: pathlib.Path) -> SpecialTokens:
    """The special and added tokens that the JSON files of a checkpoint's folder name.

    Raises:
      ValueError: a file is not JSON, or a field is not what it should be; both are named.
    """
    config = folder / "tokenizer_config.json"
    settings = read_json(config)
    flags: dict[str, Any] = {}
    numbers: dict[int, str] = {}
    numbered = settings.get("added_tokens_decoder")
    if numbered is not None:  # then special_tokens_map.json and added_tokens.json say nothing
        if not isinstance(numbered, dict):
            raise _refusal(config, "added_tokens_decoder", numbered, "an object")
        _check_count(config, "added_tokens_decoder", numbered)
        for key, value in numbered.items():
            if not key.isdecimal() or len(key) > 9 or not isinstance(value, dict):
                raise _refusal(config, f"added_tokens_decoder[{key!r}]", value, "a token's object")
            token = _token(value, config, f"added_tokens_decoder[{key!r}]", flags)
            numbers[int(key)] = token
    else:
        overrides = read_json(folder / "special_tokens_map.json")
        before, after = settings.get(_EXTRA[0]), overrides.get(_EXTRA[0])
        settings = settings | overrides
        if isinstance(before, list) and isinstance(after, list):
            settings[_EXTRA[0]] = before + after
    for key in _SWITCHES:
        if not isinstance(settings.get(key), bool | None):
            raise _refusal(config, key, settings[key], "true or false")
    names = {
        key: _token(value, config, key, flags)
        for key, value in (dict.fromkeys(_NAMED) | settings).items()
        if key.endswith("_token") and (isinstance(value, str | dict) or key in _NAMED)
        if value not in (None, "")
    }
    extra: list[str] = []
    for key in _EXTRA:
        value = settings.get(key) or []
        if isinstance(value, dict):
            names |= {name: _token(one, config, key, flags) for name, one in value.items()}
        elif isinstance(value, list):
            _check_count(config, key, value)
            extra += [_token(one, config, key, flags) for one in value]
        else:
            raise _refusal(config, key, value, "a list of tokens")
    specific = settings.get(_SPECIFIC) or {}
    if not isinstance(specific, dict):
        raise _refusal(config, _SPECIFIC, specific, "an object")
    _check_count(config, _SPECIFIC, specific)
    if names.keys() <= set(_NAMED):  # else these say the same, or nothing, as in transformers
        names |= {
            name: _token(one, config, f"{_SPECIFIC}.{name}", flags)
            for name, one in specific.items()
        }
    if numbered is None:
        special = {*names.values(), *extra}
        numbers |= _numbered_in(folder / "added_tokens.json", special, flags)
    return SpecialTokens(
        names=names, flags=flags, extra=tuple(extra), numbers=numbers, settings=settings
    )


def read_json(file: pathlib.Path) -> dict[str, Any]:
    """The object in a JSON file; an empty one if there is no such file.

    Raises:
      ValueError: it is no regular file, not JSON, or no object.
    """
    return json_file.read_json(file) if json_file.is_there(file) else {}


def _numbered_in(file: pathlib.Path, special: set[str], flags: dict[str, Any]) -> dict[int, str]:
    """The tokens of added_tokens.json by number; `flags` learns how they are found in text."""
    from tokenizers import AddedToken

    numbers: dict[int, str] = {}
    added = read_json(file)
    _check_count(file, "it", added)
    for name, number in added.items():
        if type(number) is not int or number < 0 or number in numbers or not _is_token(name):
            raise _refusal(file, name, number, "a number of its own")
        numbers[number] = name
        flags[name] = AddedToken(name, normalized=name not in special, special=name in special)
    return numbers


def _token(value: Any, file: pathlib.Path, field: str, flags: dict[str, Any]) -> str:
    """How a token is written; `flags` learns how it is found in text, if `value` says so."""
    from tokenizers import AddedToken

    content = value.get("content") if isinstance(value, dict) else value
    if not isinstance(content, str) or not _is_token(content):
        raise _refusal(file, field, value, "a token: a text, or an object with its `content`")
    if isinstance(value, str):
        return content
    options = {name: value[name] for name in _FLAGS if name in value}
    for name, option in options.items():
        if not isinstance(option, bool):
            raise _refusal(file, f"{field}.{name}", option, "true or false")
    flags.setdefault(content, AddedToken(content, **options))
    return content


def _is_token(text: str) -> bool:
    """Whether the text can be a token: it is Unicode, and of a sensible length."""
    return len(text) <= LONGEST and (text.isascii() or _SURROGATE.search(text) is None)


def _check_count(file: pathlib.Path, field: str, tokens: dict[str, Any] | list[Any]) -> None:
    if len(tokens) > _MOST_ADDED:
        raise ValueError(f"{file}: {field} has {len(tokens):,} tokens, more than {_MOST_ADDED:,}")


def _refusal(file: pathlib.Path, field: str, value: Any, wanted: str) -> ValueError:
    return ValueError(f"{file}: {field} is {json_file.shown(value)}; it must be {wanted}")
