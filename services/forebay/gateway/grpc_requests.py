"""GenerateRequest (protobuf) -> GenerationRequest, and events -> GenerateResponse."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from forebay.core.errors import InvalidRequest
from forebay.core.finish import FinishReason
from forebay.core.sampling import MAX_LOGIT_BIAS
from forebay.engine.interface import SampledToken
from forebay.gateway.generation import (
    CHAT_ROLES,
    ChatPrompt,
    Chunk,
    GenerationRequest,
    ModelCard,
    Prompt,
    TextPrompt,
    TokenPrompt,
    Usage,
)
from forebay.rpc.conversions import finish_to_proto, sampling_from_proto
from forebay.rpc.v1 import inference_pb2 as pb

_PROMPT_PARAMS = {"text": "text", "token_ids": "token_ids.ids", "chat": "messages"}
_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{0,128}")


def generation_request(request: pb.GenerateRequest, timeout_s: float | None) -> GenerationRequest:
    """Raises InvalidRequest; `timeout_s` is what the caller's deadline leaves."""
    if not request.model:
        raise InvalidRequest("model: is required", param="model", code="missing_field")
    if _REQUEST_ID.fullmatch(request.request_id) is None:
        raise InvalidRequest(
            "request_id: should be at most 128 letters, digits or .:_-", param="request_id"
        )
    sampling = request.sampling
    if len(sampling.logit_bias) > MAX_LOGIT_BIAS:
        raise InvalidRequest(f"logit_bias: at most {MAX_LOGIT_BIAS} ids", param="logit_bias")
    max_tokens = sampling.max_tokens if sampling.HasField("max_tokens") else None
    if max_tokens == 0:
        raise InvalidRequest("max_tokens: 0 is not at least 1", param="max_tokens")
    return GenerationRequest(
        model=request.model,
        prompt=_prompt(request),
        prompt_param=_PROMPT_PARAMS[request.WhichOneof("input") or ""],
        params=sampling_from_proto(sampling),
        max_tokens=max_tokens,
        seed=sampling.seed if sampling.HasField("seed") else None,
        request_id=request.request_id,
        timeout_s=timeout_s,
    )


def _prompt(request: pb.GenerateRequest) -> Prompt:
    kind = request.WhichOneof("input")
    if kind == "text":
        if not request.text:
            raise InvalidRequest("text: is empty", param="text")
        return TextPrompt(request.text)
    if kind == "token_ids":
        if not request.token_ids.ids:
            raise InvalidRequest("token_ids.ids: is empty", param="token_ids.ids")
        return TokenPrompt(tuple(request.token_ids.ids))
    if kind == "chat":
        return _chat(request.chat)
    raise InvalidRequest("input: set one of text, token_ids or chat", param="input")


def _chat(chat: pb.Chat) -> ChatPrompt:
    if not chat.messages:
        raise InvalidRequest("messages: needs at least one message", param="messages")
    for i, message in enumerate(chat.messages):
        if message.role not in CHAT_ROLES:
            param = f"messages[{i}].role"
            roles = ", ".join(CHAT_ROLES)
            raise InvalidRequest(f"{param}: should be one of {roles}", param=param)
    return ChatPrompt([{"role": CHAT_ROLES[m.role], "content": m.content} for m in chat.messages])


def chunk_response(request_id: str, chunk: Chunk, *, logprobs: bool) -> pb.GenerateResponse:
    return pb.GenerateResponse(
        request_id=request_id,
        chunk=pb.GenerateChunk(
            choice=chunk.choice,
            text=chunk.text,
            token_ids=[token.token_id for token in chunk.tokens],
            logprobs=_logprobs(chunk.tokens) if logprobs else (),
        ),
    )


def _logprobs(tokens: Iterable[SampledToken]) -> list[pb.TokenLogprob]:
    return [
        pb.TokenLogprob(
            token_id=token.token_id,
            logprob=float("-inf") if token.logprob is None else token.logprob,
            top=[pb.TokenLogprob(token_id=i, logprob=value) for i, value in token.top],
        )
        for token in tokens
    ]


def complete_response(
    request_id: str, reasons: Mapping[int, FinishReason], usage: Usage
) -> pb.GenerateResponse:
    return pb.GenerateResponse(
        request_id=request_id,
        complete=pb.GenerateComplete(
            choices=[
                pb.ChoiceResult(choice=choice, finish_reason=finish_to_proto(reason))
                for choice, reason in sorted(reasons.items())
            ],
            usage=pb.Usage(
                prompt_tokens=usage.prompt_tokens,
                completion_tokens=usage.completion_tokens,
                cached_tokens=usage.cached_tokens,
            ),
        ),
    )


def model_card(card: ModelCard) -> pb.ModelCard:
    return pb.ModelCard(id=card.id, max_model_len=card.max_model_len, engine=card.engine)
