"""`GET /v1/models` and `/public/v1/models`: which models there are, and what they can do."""

from typing import Any

from starlette.requests import Request
from starlette.types import Send

from serving.api.errors import refuse, unknown_model
from serving.api.interface import Interface, send_object
from serving.api.registry import ModelCard

_FORMATS = ("default", "openrouter", "huggingface")
_OWNER = "wsekern"
_PROVIDER = "wsekern/"


async def list_models(interface: Interface, request: Request, send: Send) -> None:
    """Lists the models, in the form that the query's `format` names."""
    form = _form(request)
    records = [_record(card, form) for card in interface.models.cards]
    listed = {"data": records} if form == "openrouter" else {"object": "list", "data": records}
    await send_object(send, listed)


async def retrieve(interface: Interface, request: Request, send: Send) -> None:
    """Sends the record of one model."""
    await send_object(send, _record(_find(interface, request), _form(request)))


async def list_public(interface: Interface, request: Request, send: Send) -> None:
    """Lists the models with what they can do."""
    _form(request)
    records = [_public_record(interface, card) for card in interface.models.cards]
    await send_object(send, {"object": "list", "data": records})


async def retrieve_public(interface: Interface, request: Request, send: Send) -> None:
    """Sends what one model can do."""
    _form(request)
    await send_object(send, _public_record(interface, _find(interface, request)))


def _form(request: Request) -> str:
    form = request.query_params.get("format", "default")
    if form not in _FORMATS:
        refuse("format", f"format is {form[:40]!r}; it must be one of {', '.join(_FORMATS)}")
    return form


def _find(interface: Interface, request: Request) -> ModelCard:
    name = request.path_params["id"]
    for card in interface.models.cards:
        if card.name == name:
            return card
    raise unknown_model(name)


def _record(card: ModelCard, form: str) -> dict[str, Any]:
    if form == "openrouter":
        return {
            "id": f"{_PROVIDER}{card.name}",
            "name": card.name,
            "created": card.created,
            "description": card.description,
            "context_length": card.context,
            "max_output_length": card.context,
            "pricing": {"prompt": "0", "completion": "0"},
            "hugging_face_id": card.hugging_face_id,
            "input_modalities": ["text"],
            "output_modalities": ["text"],
            "quantization": card.quantization,
            "supported_features": _features(card),
            "supported_sampling_parameters": [
                name for name, is_taken in _parameters().items() if is_taken
            ],
        }
    record = {"id": card.name, "object": "model", "created": card.created, "owned_by": _OWNER}
    if form == "huggingface":
        record |= {
            "context_length": card.context,
            "hugging_face_id": card.hugging_face_id,
            "pricing": {"input": 0.0, "output": 0.0},
            "capabilities": {
                "streaming": True,
                "function_calling": True,
                "structured_outputs": True,
                "vision": False,
            },
        }
    return record


def _features(card: ModelCard) -> list[str]:
    features = ["tools", "json_mode", "structured_outputs", "logprobs"]
    return features + ["reasoning"] if card.reasoning else features


def _parameters() -> dict[str, bool]:
    """Which fields are taken; `repetition_penalty` within `model_parameters`."""
    names = [
        *("temperature", "top_p", "stop", "seed", "max_completion_tokens", "logprobs"),
        *("top_logprobs", "logit_bias", "frequency_penalty", "presence_penalty"),
    ]
    return dict.fromkeys(names, True) | {"repetition_penalty": True}


def _public_record(interface: Interface, card: ModelCard) -> dict[str, Any]:
    limits = interface.settings.limits
    return {
        "id": card.name,
        "object": "model",
        "created": card.created,
        "owned_by": _OWNER,
        "name": card.name,
        "description": card.description,
        "pricing": {"prompt": "0", "completion": "0"},
        "capabilities": {
            "streaming": True,
            "function_calling": True,
            "tools": True,
            "tool_choice": True,
            "parallel_tool_calls": True,
            "json_mode": True,
            "response_format": True,
            "structured_outputs": True,
            "reasoning": card.reasoning,
            "vision": False,
        },
        "supported_parameters": _parameters(),
        "architecture": {
            "modality": "text->text",
            "tokenizer": card.tokenizer,
            "instruct_type": card.instruct_type,
        },
        "limits": {
            "max_context_length": card.context,
            "max_completion_tokens": card.context,
            "requests_per_minute": limits.requests_minute,
            "tokens_per_minute": limits.tokens_minute,
        },
        "deprecated": False,
        "preview": False,
        "quantization": card.quantization,
        "hugging_face_id": card.hugging_face_id,
        "datacenter_locations": [],
    }
