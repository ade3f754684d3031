"""The text of requests and answers: prompts, stop strings, tool calls, grammars; no jax.

`serving.text.model_text.ModelText` is the face; make one for each model:

    text = ModelText(tokenizer, vocab=config.vocab, family=config.family)
    prompt = text.chat(messages, tools=tools, reasoning=ReasoningOptions(effort="low"))
    grammar = text.grammar(prompt, schema=schema, tools=tools, tool_choice="auto")  # None: any text
    params = SamplingParams(stop_tokens=text.stop_tokens, matcher=grammar and grammar.matcher())
    generation = engine.submit(prompt.tokens, params)
    answer = text.answer(prompt, tools=tools, stops=stops)  # one for each choice
    for delta in generation:
        parts, places = answer.feed(delta.tokens)
        if answer.is_over:  # a stop string, or the one tool call that was allowed
            generation.cancel()
            break
    parts, places = answer.finish()

`grammar` takes a schema (for json_object, `{"type": "object"}`), a regular expression, and
tool_choice "required" or a name; `text.bare_grammar` is for completions. Compiling may take tenths
of a second, so call it outside of an event loop; it keeps the newest grammars.

`parts` are `Content`, `Reasoning`, `ToolCall` and `Arguments` (`serving.text.parsers.parts`).
`places` say which tokens are written with them: `position` among all tokens of the answer,
`channel` ("content", "reasoning", "tool"), and `offset` in the content (for `text_offset`). With
`answer.calls > 0` the reason to finish is "tool_calls"; `answer.reasoning_tokens` counts.

For `/v1/completions`: `text.encode(prompt)` and `text.completion(stops)`. For logprobs:
`text.token_text(token)` and `text.token_bytes(token)`. Whatever is wrong with a client's text,
schema or grammar raises ValueError.
"""
