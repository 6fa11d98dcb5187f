"""The workers this gateway knows: discovered in the registry, kept by their step streams."""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

from forebay.core import clock
from forebay.core.clock import Deadline
from forebay.core.errors import ForebayError, Unavailable
from forebay.core.settings import GatewaySettings
from forebay.gateway.router import Router
from forebay.gateway.worker_link import WorkerLink, model_key
from forebay.router.view import WorkerFacts, WorkerLoad
from forebay.rpc.connector import Connector
from forebay.rpc.conversions import role_from_proto
from forebay.rpc.v1 import worker_pb2
from forebay.store.registry import Registry
from forebay.text.spec import TokenizerSpec
from forebay.text.tokenizer import Tokenizer

log = logging.getLogger(__name__)

OPEN_S = 5.0
MISSING_S = 3.0
"""A worker that the registry has not listed for this long gets no new requests."""


@dataclass(frozen=True, slots=True)
class ServedModel:
    """A model as its workers describe it. `max_model_len` is the smallest among them."""

    info: worker_pb2.ModelInfo
    kv_layout: worker_pb2.KvLayout
    max_model_len: int
    tokenizer: Tokenizer

    @property
    def key(self) -> str:
        return model_key(self.info)


class Fleet:
    """`on_change` is called whenever load or membership may have changed."""

    def __init__(
        self,
        settings: GatewaySettings,
        registry: Registry,
        connector: Connector,
        gateway_id: str,
        router: Router,
        on_change: Callable[[], None],
    ) -> None:
        self._router = router
        self._settings = settings
        self._registry = registry
        self._connector = connector
        self._gateway_id = gateway_id
        self._on_change = on_change
        self._links: dict[tuple[str, str], WorkerLink] = {}
        self._tokenizers: dict[str, Tokenizer] = {}
        self._opening: dict[tuple[str, str], asyncio.Task[None]] = {}
        self._unreachable: dict[tuple[str, str], str] = {}
        self._registry_reachable = True

    async def run(self) -> None:
        """Follows the registry until cancelled. Without Redis the known workers stay."""
        while True:
            try:
                await self._poll()
                self._router.follow(list(self._links))
            except Exception:
                log.exception("a look at the registry failed")
            await asyncio.sleep(self._settings.registry_poll_s)

    async def close(self) -> None:
        opening = list(self._opening.values())
        for task in opening:
            task.cancel()
        await asyncio.gather(*opening, return_exceptions=True)
        for link in self._links.values():
            await link.close()
        self._links.clear()

    def link(self, worker_id: str) -> WorkerLink:
        """Raises Unavailable when the worker has gone since it was chosen."""
        for link in self._links.values():
            if link.worker_id == worker_id and not link.lost:
                return link
        raise Unavailable(f"worker {worker_id} is gone")

    def expect(self, link: WorkerLink, num_sequences: int, num_prefill_tokens: int) -> None:
        """Work that is about to be sent there counts from now on for whoever is routed next."""
        link.expect(num_sequences, num_prefill_tokens)
        self._update_view(link)

    async def lives(self, link: WorkerLink) -> bool:
        """Whether the worker behind a lost link is there all the same, in the same life."""
        again = self._new_link(link.description)
        try:
            await again.check_identity()
        except ForebayError:
            return False
        finally:
            await again.close()
        return True

    def models(self) -> dict[str, ServedModel]:
        """By model id, of the workers that are there."""
        served: dict[str, ServedModel] = {}
        for link in self._links.values():
            info = link.description.model
            if link.lost or info.tokenizer_hash not in self._tokenizers:
                continue
            known = served.get(info.id)
            if known is not None and known.key != link.model_key:
                continue  # in a rolling update the revision that was there first
            served[info.id] = ServedModel(
                info=info,
                kv_layout=link.description.kv_layout,
                max_model_len=min(
                    info.max_model_len, known.max_model_len if known else info.max_model_len
                ),
                tokenizer=self._tokenizers[info.tokenizer_hash],
            )
        return served

    async def _poll(self) -> None:
        try:
            workers = await self._registry.list_workers()
        except Unavailable as error:
            if self._registry_reachable:
                log.warning("%s; going on with the known workers", error.message)
            self._registry_reachable = False
            return
        self._registry_reachable = True
        listed = {(worker.worker_id, worker.epoch): worker for worker in workers}
        for key, link in list(self._links.items()):
            if link.lost:
                del self._links[key]
                await link.close()
            elif key in listed:
                link.missing_since = None
                link.forget_expected()
                if link.description != listed[key]:
                    link.description = listed[key]
                    link.update_load(listed[key].load)
            elif link.missing_since is None:
                link.missing_since = clock.now()
            self._update_view(link)
        for key in [key for key in self._unreachable if key not in listed]:
            del self._unreachable[key]
        for key, worker in listed.items():
            if key not in self._links and key not in self._opening:
                self._opening[key] = asyncio.create_task(self._open(key, worker))
        self._on_change()

    async def _open(self, key: tuple[str, str], worker: worker_pb2.WorkerDescription) -> None:
        try:
            await self._join(key, worker)
            self._unreachable.pop(key, None)
        except ForebayError as error:
            if self._unreachable.get(key) != error.message:
                log.warning("worker %s cannot be reached: %s", worker.worker_id, error.message)
            self._unreachable[key] = error.message
        except Exception:
            log.exception("worker %s cannot join", worker.worker_id)
        finally:
            del self._opening[key]
        self._on_change()

    async def _join(self, key: tuple[str, str], worker: worker_pb2.WorkerDescription) -> None:
        _check_usable(worker)
        link = self._new_link(worker)
        try:
            await link.check_identity()
            await link.open(Deadline.after(OPEN_S))
            await self._learn_tokenizer(link)
            self._links[key] = link
            self._router.join(_facts_of(link))
            self._update_view(link)
            log.info("worker %s joined", worker.worker_id)
        finally:
            if self._links.get(key) is not link:
                await link.close()

    def _new_link(self, worker: worker_pb2.WorkerDescription) -> WorkerLink:
        channel = self._connector.connect(worker.endpoints[0].address)
        silence_s = self._settings.worker_silence_s
        link = WorkerLink(worker, channel, self._gateway_id, silence_s, lambda: self._heard(link))
        return link

    def _heard(self, link: WorkerLink) -> None:
        if self._links.get((link.worker_id, link.description.epoch)) is link:
            self._router.told(link.worker_id, link.description.epoch, link.load.kv_event_seq)
            self._update_view(link)
        self._on_change()

    def _update_view(self, link: WorkerLink) -> None:
        self._router.changed(link.worker_id, lambda: _load_of(link))

    async def _learn_tokenizer(self, link: WorkerLink) -> None:
        """One download per distinct tokenizer. Raises Unavailable when its hash is not the one
        the worker announced."""
        wanted = link.description.model.tokenizer_hash
        if wanted in self._tokenizers:
            return
        data = await link.get_tokenizer()
        if hashlib.sha256(data).hexdigest() != wanted:
            raise Unavailable(f"the tokenizer of {link.worker_id} does not match its hash")
        self._tokenizers[wanted] = _tokenizer(data)


@lru_cache(maxsize=8)
def _tokenizer(spec: bytes) -> Tokenizer:
    """One for all that want the same: it takes a while to build and never changes."""
    return Tokenizer(TokenizerSpec.from_bytes(spec))


def _check_usable(worker: worker_pb2.WorkerDescription) -> None:
    """Raises Unavailable for a record that this version can do nothing with."""
    if not worker.endpoints:
        raise Unavailable("its record names no endpoint")
    try:
        role_from_proto(worker.role)
    except KeyError:
        raise Unavailable(f"its role {worker.role} is unknown here") from None


def _facts_of(link: WorkerLink) -> WorkerFacts:
    worker = link.description
    return WorkerFacts(
        worker_id=worker.worker_id,
        role=role_from_proto(worker.role),
        model_key=link.model_key,
        kv_key=link.kv_key,
        block_size=worker.kv_layout.block_size,
    )


def _load_of(link: WorkerLink) -> WorkerLoad:
    load, blocks = link.load, link.load.kv_blocks
    is_silent = link.missing_since is not None and clock.now() - link.missing_since > MISSING_S
    draining = link.draining or link.description.draining
    return WorkerLoad(
        accepting=not (link.lost or draining or is_silent),
        num_sequences=load.num_running + load.num_waiting + link.num_sent_sequences,
        num_queued_tokens=load.num_pending_prefill_tokens + link.num_sent_tokens,
        prefill_room_tokens=load.prefill_room_tokens - link.num_sent_tokens,
        kv_usage=(blocks.used + blocks.leased + blocks.quarantined) / max(1, blocks.total),
    )
