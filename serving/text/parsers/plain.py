"""Answers without markup."""

from serving.text.parsers.parts import Channel, Content, Part


class PlainReader:
    """Everything is content."""

    channel: Channel = "content"

    def text(self, text: str) -> list[Part]:
        """The text, as content."""
        return [Content(text)]

    def marker(self, marker: str) -> list[Part]:
        """The marker, as content."""
        return [Content(marker)]

    def finish(self) -> list[Part]:
        """Nothing is ever held back."""
        return []
