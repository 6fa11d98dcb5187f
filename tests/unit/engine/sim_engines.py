"""Engines over the sim runner, driven by hand, and what each request should answer."""

from __future__ import annotations

from dataclasses import dataclass, field

from forebay.core.kv_codec import KvCodec
from forebay.core.sampling import SamplingParams
from forebay.engine.engine import Engine, Prefilled, StepOutcome
from forebay.engine.interface import KvSlice
from forebay.engine.profile import StepProfile
from forebay.engine.sequence import RequestKey, SequenceStart
from forebay.engine.sim import SimRunner
from forebay.kv.block_hash import HashChain, cache_root
from forebay.kv.block_pool import OutOfBlocks
from forebay.kv.leases import LeaseTable

ROOT = cache_root(b"salt", "sim")
INSTANT = StepProfile(((1, 1e-9),), 0.0, 0.0, 0.0)


def sim_runner(num_blocks: int, block_size: int = 4) -> SimRunner:
    return SimRunner(
        model_id="sim",
        block_size=block_size,
        num_blocks=num_blocks,
        max_model_len=4096,
        profile=INSTANT,
        time_scale=0.0,
        mean_output_tokens=64,
    )


def sim_engine(
    num_blocks: int, *, block_size: int = 4, max_batch_tokens: int = 16, max_num_seqs: int = 8
) -> Engine:
    return Engine(
        sim_runner(num_blocks, block_size),
        max_batch_tokens=max_batch_tokens,
        max_num_seqs=max_num_seqs,
    )


@dataclass
class Job:
    """`choices` and `generated`: of a job that goes on where another run of it was left."""

    name: str
    prompt: list[int]
    params: SamplingParams
    choices: tuple[int, ...] = ()
    generated: list[int] = field(default_factory=list)

    @property
    def key(self) -> RequestKey:
        return RequestKey("gateway", self.name)

    @property
    def start(self) -> SequenceStart:
        return SequenceStart(
            key=self.key,
            attempt=1,
            tokens=(*self.prompt, *self.generated),
            num_prompt_tokens=len(self.prompt),
            params=self.params,
            choices=self.choices or tuple(range(self.params.n)),
            cache_root=ROOT,
        )

    def resumed(self, choice: int, generated: list[int]) -> Job:
        return Job(f"{self.name}.{choice}", self.prompt, self.params, (choice,), generated)


@dataclass
class Answers:
    """Tokens by (request, choice), checked to come in order and to end once. `given`: by request,
    what was generated before."""

    tokens: dict[tuple[str, int], list[int]] = field(default_factory=dict)
    ended: set[tuple[str, int]] = field(default_factory=set)
    prefilled: list[Prefilled] = field(default_factory=list)
    cached: dict[str, int] = field(default_factory=dict)
    given: dict[str, list[int]] = field(default_factory=dict)

    def add(self, outcome: StepOutcome) -> None:
        for output in outcome.outputs:
            choice = (output.key.request_id, output.choice)
            given = self.given.get(output.key.request_id, [])
            tokens = self.tokens.setdefault(choice, list(given))
            assert choice not in self.ended
            assert output.offset == len(tokens)
            assert (output.num_cached_tokens is None) == (len(tokens) > len(given))
            tokens.append(output.token.token_id)
            if output.num_cached_tokens is not None:
                self.cached[output.key.request_id] = output.num_cached_tokens
            if output.finish is not None:
                self.ended.add(choice)
        self.prefilled += outcome.prefilled


def submit(engine: Engine, job: Job, *, prefill_only: bool = False) -> None:
    engine.submit(job.start, prefill_only=prefill_only)


def step(engine: Engine, answers: Answers) -> bool:
    batch = engine.begin_step()
    if batch is None:
        return False
    answers.add(engine.end_step(batch, engine.runner.run(batch)))
    engine.check_integrity()
    return True


def run_out(engine: Engine, answers: Answers) -> Answers:
    while step(engine, answers):
        pass
    return answers


def alone(job: Job) -> dict[tuple[str, int], list[int]]:
    """The answer of an undisturbed run in a big pool, whole prompt in one step."""
    engine = sim_engine(1024, max_batch_tokens=4096)
    submit(engine, job)
    return run_out(engine, answers_to(job)).tokens


def answers_to(*jobs: Job) -> Answers:
    return Answers(given={job.name: job.generated for job in jobs})


def all_blocks_back(engine: Engine) -> bool:
    counts = engine.pool.counts()
    return counts.free + counts.cached == counts.total and engine.num_sequences == 0


def adopt_from(
    source: Engine, prefilled: Prefilled, target: Engine, leases: LeaseTable, job: Job
) -> bool:
    """Moves a computed prompt between engines as a KV transfer would; False without room."""
    tokens = job.start.tokens
    hashes = HashChain(ROOT, target.pool.block_size).upto(tokens)
    try:
        lease = leases.grant(job.name, job.key, hashes, len(tokens))
    except OutOfBlocks:
        return False
    start = lease.num_cached_tokens
    layers = source.runner.kv_layout.num_layers
    part = KvSlice(0, layers, start, len(tokens) - start, 0, 1)
    payload = memoryview(bytearray(source.runner.kv_payload_bytes(part, KvCodec.RAW)))
    table = prefilled.sequence.block_table
    checksum = source.runner.export_kv(table, part, KvCodec.RAW, payload)
    target.runner.import_kv(lease.block_table, part, KvCodec.RAW, payload, checksum)
    target.adopt(job.start, leases.take(lease), list(prefilled.first_tokens))
    return True
