"""The HTTP interface, as clients of OpenAI's and Cerebras' services speak it."""
