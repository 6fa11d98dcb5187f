"""Events -> server-sent events in OpenAI's form.

A frame is built by joining bytes around a template made once a request: a dict and a model object
for every chunk would cost more than all the rest of the gateway's work on it.
"""

from __future__ import annotations

from json.encoder import encode_basestring_ascii

from forebay.core.errors import ForebayError
from forebay.engine.interface import SampledToken
from forebay.gateway.generation import ChoiceEnd, Chunk, Event
from forebay.gateway.openai_responses import Logprobs, error_json, to_json, usage_json

DONE = b"data: [DONE]\n\n"
KEEP_ALIVE = b": keep-alive\n\n"


def error_frame(error: ForebayError) -> bytes:
    """Ends a stream in place of DONE."""
    return b"data: " + to_json(error_json(error)) + b"\n\n"


class StreamFormat:
    """Frames of one response. Tokens without text yet (part of a character, or of what may become
    a stop string) wait, so that no frame is empty and their logprobs go with the text they make."""

    def __init__(
        self,
        *,
        chat: bool,
        response_id: str,
        created: int,
        model: str,
        num_choices: int,
        include_usage: bool,
        logs: Logprobs,
    ) -> None:
        kind = "chat.completion.chunk" if chat else "text_completion"
        head = to_json({"id": response_id, "object": kind, "created": created, "model": model})
        self._head = b"data: " + head[:-1] + b',"choices":['
        self._tail = b'],"usage":null}\n\n' if include_usage else b"]}\n\n"
        self._chat = chat
        self._include_usage = include_usage
        self._logs = logs
        before, after = (
            (b',"delta":{"content":', b'},"logprobs":') if chat else (b',"text":', b',"logprobs":')
        )
        self._starts = [
            self._head + b'{"index":%d' % index + before for index in range(num_choices)
        ]
        self._middle = after
        self._plain_end = after + b'null,"finish_reason":null}' + self._tail
        self._waiting: list[list[SampledToken]] = [[] for _ in range(num_choices)]
        self._offsets = [0] * num_choices

    def opening(self) -> bytes:
        """Sent with the first event: who speaks, for every choice of a chat."""
        if not self._chat:
            return b""
        end = b',"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null}'
        return b"".join(
            self._head + b'{"index":%d' % index + end + self._tail
            for index in range(len(self._starts))
        )

    def frame(self, event: Event, comment: bytes = b"") -> bytes:
        """Empty where the event has nothing to show yet. `comment` goes in front of DONE."""
        if isinstance(event, Chunk):
            return self._text(event)
        if isinstance(event, ChoiceEnd):
            return self._end(event)
        closing = comment + DONE
        if self._include_usage:
            usage = to_json(usage_json(event.usage))
            closing = self._head + b'],"usage":' + usage + b"}\n\n" + closing
        return closing

    def _text(self, chunk: Chunk) -> bytes:
        if not self._logs.wanted:
            if not chunk.text:
                return b""
            text = encode_basestring_ascii(chunk.text).encode("ascii")
            return self._starts[chunk.choice] + text + self._plain_end
        self._waiting[chunk.choice].extend(chunk.tokens)
        if not chunk.text:
            return b""
        text = encode_basestring_ascii(chunk.text).encode("ascii")
        logprobs = self._take_logprobs(chunk.choice)
        end = b',"finish_reason":null}' + self._tail
        return self._starts[chunk.choice] + text + self._middle + logprobs + end

    def _end(self, end: ChoiceEnd) -> bytes:
        payload = b'{"index":%d,"delta":{}' if self._chat else b'{"index":%d,"text":""'
        logprobs = self._take_logprobs(end.choice) if self._waiting[end.choice] else b"null"
        reason = b',"finish_reason":"' + end.reason.encode("ascii") + b'"}'
        return self._head + payload % end.choice + b',"logprobs":' + logprobs + reason + self._tail

    def _take_logprobs(self, choice: int) -> bytes:
        tokens = self._waiting[choice]
        self._waiting[choice] = []
        if self._chat:
            return to_json(self._logs.chat(tokens))
        offset = self._offsets[choice]
        self._offsets[choice] += self._logs.num_chars(tokens)
        return to_json(self._logs.completion(tokens, offset))
