"""The gateway behind its edges: validates and tokenizes requests, and runs them on the fleet."""

from __future__ import annotations

import asyncio
from dataclasses import replace

from forebay.admission.queue import AdmissionQueue
from forebay.core.clock import Deadline
from forebay.core.errors import InvalidRequest, NotFound, Unavailable
from forebay.core.randomness import Rng
from forebay.core.sampling import SamplingParams
from forebay.core.settings import GatewaySettings
from forebay.gateway.dispatch import Dispatcher
from forebay.gateway.fleet import Fleet, ServedModel
from forebay.gateway.generation import (
    ChatPrompt,
    Generation,
    GenerationRequest,
    ModelCard,
    TextPrompt,
    TokenPrompt,
)
from forebay.gateway.poison import PoisonList
from forebay.gateway.request import GatewayRequest
from forebay.gateway.router import Router
from forebay.kv.block_hash import cache_root
from forebay.rpc.connector import Connector
from forebay.rpc.conversions import sampling_to_proto
from forebay.rpc.v1 import worker_pb2
from forebay.store.kv_events import KvEventSource
from forebay.store.registry import Registry


class GatewayService:
    """Implements `Generator`. `created`: Unix time shown for the models."""

    def __init__(
        self,
        settings: GatewaySettings,
        connector: Connector,
        registry: Registry,
        events: KvEventSource,
        rng: Rng,
        *,
        created: int = 0,
    ) -> None:
        self.gateway_id = rng.token("gateway")
        self._settings = settings
        self._registry = registry
        self._rng = rng
        self._created = created
        self._salt = (settings.cache_salt or rng.token("salt")).encode()
        self._queue = AdmissionQueue(settings.max_queued_requests)
        self.router = Router(settings, registry, events, self.gateway_id)
        self._fleet = Fleet(
            settings, registry, connector, self.gateway_id, self.router, self._queue.notify
        )
        self._poison = PoisonList(registry, self._salt, settings.poison_s)
        self._dispatcher = Dispatcher(
            self._fleet, self.router, self._queue, self._poison, settings.max_migrations
        )
        self._following: list[asyncio.Task[None]] = []

    @property
    def ready(self) -> bool:
        return any(self.router.can_serve(served.key) for served in self._fleet.models().values())

    async def start(self) -> None:
        self._following = [
            asyncio.create_task(self._fleet.run()),
            asyncio.create_task(self.router.run()),
            asyncio.create_task(self._poison.run()),
        ]

    async def stop(self) -> None:
        """Call it when no request runs any more."""
        for task in self._following:
            task.cancel()
        await asyncio.gather(*self._following, return_exceptions=True)
        await self._dispatcher.close()
        await self._fleet.close()
        await self.router.close()
        await self._registry.close()

    def models(self) -> list[ModelCard]:
        return [
            ModelCard(served.info.id, served.max_model_len, served.info.engine, self._created)
            for _, served in sorted(self._fleet.models().items())
        ]

    def prepare(self, request: GenerationRequest) -> Generation:
        served = self._served(request.model)
        prompt = _tokenize(request, served)
        params = self._resolve(request, served, len(prompt))
        fingerprint = self._poison.fingerprint(served.info.id, prompt)
        self._poison.check(fingerprint)
        timeout_s = self._settings.request_timeout_s
        if request.timeout_s is not None:
            timeout_s = min(timeout_s, request.timeout_s)
        request_id = self._rng.token("req")
        info = served.info
        kv_dtype = worker_pb2.KvDtype.Name(served.kv_layout.dtype)
        spec = worker_pb2.SequenceSpec(
            request_id=request_id,
            gateway_id=self.gateway_id,
            prompt_token_ids=prompt,
            sampling=sampling_to_proto(params),
            cache_root=cache_root(self._salt, info.id, info.revision, info.adapter, kv_dtype),
        )
        return GatewayRequest(
            spec=spec,
            params=params,
            served=served,
            client_request_id=request.request_id or request_id,
            fingerprint=fingerprint,
            deadline=Deadline.after(timeout_s),
            queue_timeout_s=self._settings.queue_timeout_s,
            dispatcher=self._dispatcher,
        )

    def _served(self, model_id: str) -> ServedModel:
        models = self._fleet.models()
        if model_id in models:
            return models[model_id]
        if not models:
            raise Unavailable("no worker has joined yet")
        known = ", ".join(sorted(models))
        raise NotFound(
            f"model {model_id[:100]!r} is not served here; there is {known}",
            param="model",
            code="model_not_found",
        )

    def _resolve(
        self, request: GenerationRequest, served: ServedModel, num_prompt_tokens: int
    ) -> SamplingParams:
        """Fills in max_tokens, seed and the model's own end tokens, then validates."""
        room = served.max_model_len - num_prompt_tokens
        max_tokens = room if request.max_tokens is None else request.max_tokens
        if room < 1 or max_tokens > room:
            wanted = "" if room < 1 else f" and {request.max_tokens_param} {max_tokens}"
            raise InvalidRequest(
                f"{request.prompt_param}: its {num_prompt_tokens} tokens{wanted} are more than the "
                f"{served.max_model_len} tokens this model can hold",
                param=request.prompt_param if room < 1 else request.max_tokens_param,
                code="context_length_exceeded",
            )
        if max_tokens < 1:
            name = request.max_tokens_param
            raise InvalidRequest(f"{name}: {max_tokens} is not at least 1", param=name)
        seed = self._rng.seed64() if request.seed is None else request.seed
        vocab_size = served.info.vocab_size
        replace(request.params, max_tokens=max_tokens, seed=seed).validate(vocab_size)
        stop_token_ids = request.params.stop_token_ids
        if not request.params.ignore_eos:
            stop_token_ids = tuple(dict.fromkeys((*stop_token_ids, *served.info.eos_token_ids)))
        return replace(
            request.params,
            max_tokens=max_tokens,
            seed=seed % 2**64,
            stop_token_ids=stop_token_ids,
        )


def _tokenize(request: GenerationRequest, served: ServedModel) -> list[int]:
    prompt, param = request.prompt, request.prompt_param
    max_chars = served.tokenizer.max_chars(served.max_model_len)
    match prompt:
        case TextPrompt(text):
            tokens = served.tokenizer.encode_text(text, param=param, max_chars=max_chars)
        case TokenPrompt(ids):
            if any(not 0 <= token_id < served.info.vocab_size for token_id in ids):
                raise InvalidRequest(f"{param}: a token id is outside the vocabulary", param=param)
            tokens = list(ids)
        case ChatPrompt(messages):
            tokens = served.tokenizer.encode_chat(messages, max_chars=max_chars)
    if not tokens:
        raise InvalidRequest(f"{param}: is empty", param=param)
    return tokens
