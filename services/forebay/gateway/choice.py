"""From the tokens of one choice to text: ordered, detokenized, cut at stop strings."""

from __future__ import annotations

from forebay.core.finish import FinishReason
from forebay.core.sampling import SamplingParams
from forebay.engine.interface import SampledToken
from forebay.engine.wire import tokens_from_proto
from forebay.gateway.generation import ChoiceEnd, Chunk, Event
from forebay.rpc.conversions import finish_from_proto
from forebay.rpc.v1 import worker_pb2
from forebay.text.detokenizer import IncrementalDetokenizer, StopWatcher
from forebay.text.tokenizer import Tokenizer


class ChoiceText:
    """Outputs may come out of order, since a choice's first token and the others come from
    different workers, and twice; `accept` takes each token once, by its offset."""

    def __init__(self, choice: int, tokenizer: Tokenizer, params: SamplingParams) -> None:
        self.token_ids: list[int] = []
        self.finish: FinishReason | None = None
        self.stopped_here = False
        self._choice = choice
        self._stop_token_ids = params.stop_token_ids
        self._detokenizer = IncrementalDetokenizer(tokenizer)
        self._watcher = StopWatcher(params.stop)
        self._early: dict[int, worker_pb2.SequenceOutput] = {}

    def accept(self, output: worker_pb2.SequenceOutput) -> list[Event]:
        """The events that `output`, and earlier ones that waited for it, give."""
        events: list[Event] = []
        if output.offset >= len(self.token_ids):
            self._early[output.offset] = output
        while self.finish is None and len(self.token_ids) in self._early:
            self._take(self._early.pop(len(self.token_ids)), events)
        return events

    def resume(self) -> None:
        """Another leg goes on after `token_ids`: what came too early from the one before is
        computed again."""
        self._early.clear()

    def _take(self, output: worker_pb2.SequenceOutput, events: list[Event]) -> None:
        reason = finish_from_proto(output.finish_reason)
        text: list[str] = []
        taken: list[SampledToken] = []
        matched: str | None = None
        for token in tokens_from_proto(output):
            taken.append(token)
            if reason is FinishReason.STOP and token.token_id in self._stop_token_ids:
                break
            emitted, matched = self._watcher.push(self._detokenizer.push(token.token_id))
            text.append(emitted)
            if matched is not None:
                break
        self.token_ids += [token.token_id for token in taken]
        if matched is None and reason is not None:
            emitted, matched = self._watcher.push(self._detokenizer.finish())
            text.append(emitted)
            if matched is None:
                text.append(self._watcher.finish())
        if matched is not None:
            self.stopped_here = reason is None
            reason = FinishReason.STOP
        events.append(Chunk(self._choice, "".join(text), tuple(taken)))
        if reason is not None:
            self.finish = reason
            events.append(ChoiceEnd(self._choice, reason))
