"""A model on the GPU: allocate once, then one launch of the whole-model kernel a call.

A kernel of several columns takes many sequences at a time (`columns.py`). Through one of one column they go one after the other, in
launches of a few tokens (`turns.py`).
"""

from __future__ import annotations

import ctypes
import time
import warnings
from collections.abc import Collection, Generator, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import ml_dtypes
import numpy as np

from ...errors import DeviceError
from ...geometry import round_up
from ...ops.attention import CODES
from ...ops.rope import rope_table
from ...plan import BLOCK_POSITIONS, Plan
from ...tape import Tape, lay_tapes
from .. import GREEDY, Made, Progress, RunStats, Turn, generate_alone, no_progress
from ..sampling import NOTHING, REPORT_WORDS, Flag, Sampling, SamplingStruct, Scores, await_report, checked_token
from . import prefill
from .codegen import TILE_BITS, Params, Source, generate, threads
from .columns import MAX_STOP, MOST_SEQUENCES, Columns
from .compile import Kernel, compile_source
from .driver import Context, DeviceInfo, check, probe
from .launcher import Launcher, chunk_table
from .pack import KINDS, THREADS, Packer, Weights, gather_vectors, pack_words
from .prompts import PromptKernel, prompt_plan
from .turns import PIECE, run_turns

LOGIT_ROWS = 64  # positions of a launch that returns logits
POISON = 0xFF  # outputs hold NaN until the kernel has written them


def device_for(plan: Plan) -> DeviceInfo:
    """The GPU that `plan` was made for. Raises DeviceError where there is none or it does not fit the plan."""
    info = probe()
    if info is None:
        raise DeviceError('no CUDA GPU was found; run with --device cpu, or check the driver and pip install "flashformer[cuda]"')
    if info.workers < plan.target.workers:
        raise DeviceError(f"the plan needs {plan.target.workers} multiprocessors; {info.name} has {info.workers}")
    if info.shared_bytes < plan.target.shared_bytes:
        raise DeviceError(
            f"the plan needs {plan.target.shared_bytes} bytes of shared memory a block; {info.name} gives {info.shared_bytes}"
        )
    return info


def last_layer(plan: Plan) -> int:
    """The stage with which it begins."""
    return next(i for i, s in enumerate(plan.stages) if s.layer == plan.config.num_layers - 1)


def owners(context: Context, plan: Plan, tape: Tape, entries: np.ndarray) -> dict[str, int]:
    """Upload what tells the blocks which tiles they own and where their chunks (`chunk_table`) are: parameters of the kernel."""
    head = next(i for i, s in enumerate(plan.stages) if s.name == "head")
    return {
        "table": context.upload(entries, "chunk table"),
        "table_stride": entries.shape[1],
        "table_length": context.upload(tape.length.astype(np.uint32), "chunk counts"),
        "head_start": context.upload(tape.first_chunk(head).astype(np.uint32), "chunk counts"),
        "last_start": context.upload(tape.first_chunk(last_layer(plan)).astype(np.uint32), "chunk counts"),
        "tiles": context.upload(pack_words(plan.stages, plan, TILE_BITS), "tile ranges"),
    }


class CudaRunner(Launcher):
    """Implements `Runner` (backends/__init__.py) on one GPU; `weights` are packed as it is made."""

    def __init__(self, plan: Plan, weights: Weights, progress: Progress = no_progress) -> None:
        if plan.columns > 1 and plan.slots > MOST_SEQUENCES:
            raise DeviceError(f"{plan.slots} slots; a kernel of several columns serves at most {MOST_SEQUENCES}")
        self.columns, self.slots = plan.columns, plan.slots
        self.plan = plan
        self.stats = RunStats()
        self.info = device_for(plan)
        self.source: Source = generate(plan)
        progress("compiling", 0, 1)
        prompts = prompt_plan(plan) if plan.prompt_columns else None
        prompt_source = generate(prompts) if prompts else None
        prefill_source = generate(plan, prefill=True) if prefill.possible(plan) else None
        with ThreadPoolExecutor() as pool:  # the compiler runs in as many threads as there are sources
            prompt_kernel = pool.submit(compile_source, prompt_source.text, plan.target) if prompt_source else None
            prefill_kernel = pool.submit(compile_source, prefill_source.text, plan.target) if prefill_source else None
            tools = pool.submit(compile_source, '#include "code_tools.cuh"\n', plan.target, "cuda-tools")
            self.kernel: Kernel = compile_source(self.source.text, plan.target)
        progress("compiling", 1, 1)
        self.context = Context(self.info.ordinal)
        try:
            with ThreadPoolExecutor(1) as pool:
                tape = self._load(weights, tools.result(), progress, pool)
            self.many = Columns(self) if self.columns > 1 else None
            self.prompts: PromptKernel | None = None
            if prompts and prompt_source and prompt_kernel:
                self.prompts = PromptKernel(self, prompts, tape, prompt_source, prompt_kernel.result())
            self.prefill: prefill.Prefill | None = None
            if prefill_source and prefill_kernel:
                self.prefill = prefill.Prefill(self, tape, prefill_source, prefill_kernel.result())
        except BaseException:
            self.context.close()
            raise

    def _load(self, weights: Weights, tools: Kernel, progress: Progress, pool: Executor) -> Tape:
        """Claim memory, pack the weights, and make ready to launch; where the weights are."""
        plan, context = self.plan, self.context
        tape: Tape = lay_tapes(plan)
        embedding_bytes = plan.embedding_bytes() + 2  # the kernels convert two values at a time
        kv_bytes = plan.kv_bytes()
        needed = tape.nbytes + embedding_bytes + kv_bytes + prefill.memory(plan) + (256 << 20)
        free = context.free_bytes()
        if needed > free:
            raise DeviceError(
                f"the model needs {needed / 1e9:.1f} GB on the GPU ({(tape.nbytes + embedding_bytes) / 1e9:.1f} weights, "
                f"{kv_bytes / 1e9:.1f} KV cache for {plan.slots} x {plan.max_context} positions), {free / 1e9:.1f} are free; "
                "choose a smaller --max-context or a smaller model"
            )
        rope = pool.submit(rope_table, plan.config, plan.max_context)  # a thread has it ready before the weights are packed
        self.function = self.ready(self.kernel, plan)
        self.tools = context.load(tools.cubin)
        if context.blocks_per_sm(self.function, threads(plan), plan.target.shared_bytes) < 1:
            raise DeviceError(f"one block of this kernel does not fit on an SM of {self.info.name}")

        self.arena = context.allocate(tape.nbytes, "weights", fill=0)
        self.arena_bytes = tape.nbytes
        embedding = context.allocate(embedding_bytes, "the embedding table")
        strange = Packer(context, self.tools, plan, weights, progress).run(tape, self.arena, embedding)
        vectors, strange_vectors = gather_vectors(plan, self.source.vectors, weights)
        for name in (*strange, *strange_vectors):
            warnings.warn(f"{name} holds values that are not finite; the model's output will not be, either", stacklevel=2)

        self.kv = context.allocate(kv_bytes, "the KV cache", fill=0)  # [slots]; a launch is told where its slot begins
        self.token_address, tokens = context.allocate_pinned(8 * (plan.max_context + 1), "tokens", fill=0)
        self.tokens = tokens.view(np.uint64)
        cancel_address, cancel = context.allocate_pinned(64, "the cancel flag", fill=0)
        self.cancel = cancel.view(np.uint32)
        self._resumed_pass = sum(s.weight_bytes for s in plan.stages[last_layer(plan) :]) / plan.tape_bytes()
        self.logit_address = 0
        self.forced = context.allocate(4 * plan.max_context, "prompt")
        self.stop = context.allocate(4 * MAX_STOP, "stop tokens")
        self._sampling: dict[str, int] = {}  # addresses of what sampling uses, claimed when it first does
        self.report = np.empty((0, REPORT_WORDS), np.uint64)  # log probabilities, a row a token of the latest launch
        self._alternatives = 0  # that it reports for each
        self.params = Params(
            tape=self.arena,
            **owners(context, plan, tape, chunk_table(plan, tape)),
            vectors=context.upload(vectors, "norms and biases"),
            embedding=embedding,
            rope=context.upload(rope.result(), "rotary table"),
            kv=self.kv,
            **self.claim_exchange(),
            forced=self.forced,
            stop=self.stop,
            tokens=self.token_address,
            cancel=cancel_address,
            kv_blocks=plan.kv.blocks,
        )
        context.wait()
        return tape

    @contextmanager
    def instead(self, function: Any, plan: Plan) -> Iterator[None]:
        """Run another kernel (see `ready`) on the same weights for a while.

        Its plan differs in numbers of the target that leave every weight and buffer in place, and has no more copies of the vectors.
        """
        usual = self.function, self.plan
        self.function, self.plan = function, plan
        try:
            yield
        finally:
            self.function, self.plan = usual

    def launch(
        self, tokens: Sequence[int], start: int, count: int, stop: Collection[int] = (), sampling: Sampling = GREEDY, logits: bool = False
    ) -> None:
        """Start the kernel: `tokens` at positions start.., then `count` - 1 of its own choices."""
        if self.context.context is None:
            raise DeviceError("this model has been closed")
        steps = len(tokens) - 1 + count
        if not tokens or count < 1 or start < 0 or start + steps > self.plan.max_context:
            room = self.plan.max_context
            raise DeviceError(f"{len(tokens)} tokens at position {start} and {count} more do not fit into {room} positions")
        if len(stop) > MAX_STOP:
            raise DeviceError(f"{len(stop)} stop tokens; at most {MAX_STOP} are supported")
        self.context.use()
        p = self.params
        self._inputs = [  # alive until the copies are done
            (self.forced, np.array(tokens, np.uint32)),
            (self.stop, np.array(sorted(stop) or [0], np.uint32)),
        ]
        p.sampling = self._prepare(sampling, count)
        for pointer, values in self._inputs:
            self.context.copy_async(pointer, values.ctypes.data, values.nbytes)
        self.cancel[0] = 0
        p.start, p.forced_count, p.stop_count = start, len(tokens), len(stop)
        p.logits = self.logit_address if logits else 0
        self.start(steps)

    def launch_alone(self, start: int, count: int, sampling: Sampling = GREEDY) -> None:
        """Start the kernel for `count` tokens of one sequence, from position `start` on."""
        if self.many:
            self.many.launch([Turn(0, [1], start, count, sampling=sampling)])
        else:
            self.launch([1], start, count, (), sampling)

    def _prepare(self, sampling: Sampling, count: int) -> SamplingStruct:
        """Claim what a launch of `count` tokens uses to sample, and make it ready; what it copies is added to `_inputs`."""
        vocab, flags, context = self.plan.config.vocab_size, sampling.flags, self.context
        rows = round_up(vocab, self.plan.target.tile_rows)  # of the head: several are read at once

        def claim(name: str, nbytes: int) -> int:
            if name not in self._sampling:
                self._sampling[name] = context.allocate(nbytes, "sampling")
            return self._sampling[name]

        pointers: dict[str, int] = {}
        for name, values in (("bias", sampling.bias), ("seen", sampling.seen)):
            if values is not None:
                pointers[name] = claim(name, 4 * vocab)
                self._inputs.append((pointers[name], values))
        if flags & (Flag.TOP_K | Flag.TOP_P | Flag.MIN_P):
            pointers["scores"] = claim("scores", 2 * 4 * rows)
        self._alternatives = sampling.logprobs or 0
        if flags & Flag.REPORTED:
            pointers["raw"] = claim("raw", 4 * rows)
            if "report" not in self._sampling:
                words = (self.plan.max_context + 1, REPORT_WORDS)
                self._sampling["report"], report = context.allocate_pinned(8 * words[0] * words[1], "log probabilities")
                self.report = report.view(np.uint64).reshape(words)
            pointers["report"] = self._sampling["report"]
            self.report[:count] = NOTHING
        return sampling.struct(**pointers)

    def generate(
        self, tokens: Sequence[int], start: int, count: int, stop: Collection[int], sampling: Sampling = GREEDY
    ) -> Generator[int, None, None]:
        """See `Runner.generate`."""
        if self.many:
            yield from generate_alone(self, self.plan, Turn(0, tokens, start, count, stop, sampling))
            return
        began = time.perf_counter()
        self.launch(tokens, start, count, stop, sampling)
        ending = self.endings.next()
        run, made, first, last, pace = self.params.run, 0, began, began, self.pace
        pace.begin(self._resumed_pass if self.params.resumed else len(tokens))
        try:
            while made < count:
                over = ending.over  # NOTE: before the look, so that no token is missed
                there = self._made(made, count, run)
                if not there:
                    if over:
                        break
                    ending.wait(pace.next_look())
                    continue
                pace.made(len(there), count - made - len(there))
                last = time.perf_counter()
                first = last if made == 0 else first
                for token in there:
                    made += 1
                    yield checked_token(token, start + len(tokens) + made - 1)
                if there[-1] in stop:
                    break
        finally:
            if made < count:
                self.cancel[0] = 1
            self.context.use()
            self.finish()
            context = start + len(tokens)
            self.stats = RunStats(
                len(tokens), start, first - began, made, last - first,
                self.plan.bytes_of(context, max(made - 1, 0)),
            )  # fmt: skip

    def interrupt(self) -> None:
        """See `OneColumn.interrupt`."""
        self.cancel[0] = 1

    def _made(self, first: int, count: int, run: int) -> list[int]:
        """Tokens of this run that are there, from number `first` on."""
        found: list[int] = []
        while first < count and (word := int(self.tokens[first])) >> 32 == run:
            found.append(word & 0xFFFFFFFF)
            first += 1
        return found

    def run(self, turns: Sequence[Turn]) -> Generator[Made, None, None]:
        """See `Runner.run`."""
        return self.many.run(turns) if self.many else run_turns(self, turns)

    @property
    def piece(self) -> int:
        """See `OneColumn.piece`."""
        return self.prefill.room if self.prefill else PIECE

    def feeder(self, prompt: int) -> int:
        """See `Runner.feeder`: 1 is the kernel of several columns, 2 that for long prompts."""
        if self.prefill and prompt > prefill.LEAST:
            return 2
        return 1 if self.prompts else 0

    def resumes(self, prompt: int) -> bool:
        """See `OneColumn.resumes`."""
        return self.feeder(prompt) == 2

    def feed(self, tokens: Sequence[int], start: int, slot: int, prompt: int) -> None:
        """See `OneColumn.feed`."""
        feeder = self.feeder(prompt)
        if feeder == 2 and self.prefill:
            return self.prefill.feed(tokens, start, slot)
        if feeder == 1 and self.prompts:
            return self.prompts.feed(tokens, start, slot)
        with self.in_slot(slot):
            for _ in self.generate(tokens, start, 1, ()):
                pass  # what follows is known

    def copy(self, source: int, target: int, positions: int) -> None:
        """See `Runner.copy`."""
        kv, context = self.plan.kv, self.context
        slot_bytes, head_bytes = self.plan.kv_bytes() // self.slots, kv.blocks * kv.block_bytes
        nbytes = -(-positions // BLOCK_POSITIONS) * kv.block_bytes
        context.use()
        for at in range(0, slot_bytes if nbytes else 0, head_bytes):
            to, origin = (self.kv + slot * slot_bytes + at for slot in (target, source))
            check(context.driver.cuMemcpyDtoDAsync(to, origin, nbytes, context.stream), "copy a part of the KV cache")
        context.wait()

    @contextmanager
    def in_slot(self, slot: int, resumes: bool = False) -> Iterator[None]:
        """See `OneColumn.in_slot`."""
        self.params.kv = self.kv + slot * (self.plan.kv_bytes() // self.slots)
        if resumes and self.prefill:
            self.params.resumed = self.prefill.last_residual(slot)
        try:
            yield
        finally:
            self.params.kv, self.params.resumed = self.kv, 0

    def scores(self, index: int) -> Scores:
        """See `Runner.scores`. Raises DeviceError where they do not come, though the token did."""
        if self.many:
            return self.many.scores(index)
        return await_report(self.report[index], self._alternatives, index)

    def logits(self, tokens: Sequence[int], start: int, slot: int = 0) -> np.ndarray:
        """See `Runner.logits`."""
        vocab = self.plan.config.vocab_size
        out = np.empty((len(tokens), vocab), np.float32)
        self.context.use()
        if not self.logit_address:
            self.logit_address = self.context.allocate(LOGIT_ROWS * vocab * 4, "logits")
        for at in range(0, len(tokens), LOGIT_ROWS):
            part = list(tokens[at : at + LOGIT_ROWS])
            self.context.driver.cuMemsetD8Async(self.logit_address, POISON, LOGIT_ROWS * vocab * 4, self.context.stream)
            if self.many:
                self.many.launch([Turn(slot, part, start + at, 1)], self.logit_address)
            else:
                with self.in_slot(slot):
                    self.launch(part, start + at, 1, logits=True)
            self.finish()
            self.context.download(self.logit_address, out[at : at + len(part)], "logits")
        return out

    def time_generate(self, start: int, count: int, sampling: Sampling = GREEDY) -> float:
        """Seconds on the device for one launch of `count` tokens from position `start` (benchmarks)."""
        return self.seconds(lambda: self.launch_alone(start, count, sampling))

    def fill_kv(self) -> None:
        """Random values for every position of all slots of the KV cache: a benchmark reads positions that nobody has computed."""
        context, kv, address = self.context, self.plan.kv, self.params.kv
        nbytes = self.plan.kv_bytes()

        def fill(name: str, count: int, *how: Any) -> None:
            arguments = (ctypes.c_uint64(address), ctypes.c_uint64(count), ctypes.c_uint64(0), ctypes.c_uint32(1), *how)
            context.launch(context.function(self.tools, name), -(-count // THREADS), THREADS, arguments)

        context.use()
        if kv.type == "native":
            fill("flashformer_random", nbytes // 4, ctypes.c_float(1.0))
            return
        kind = KINDS["fp8" if kv.type == "fp8" else "int", 8]
        fill("flashformer_random_codes", nbytes, *map(ctypes.c_uint32, (kind, 0, 0)))  # no code stands for another
        # One scale for all, so that values lie between -1 and 1.
        scale, scales = int(np.array(1 / CODES[kv.type][1][0], ml_dtypes.bfloat16).view(np.uint16)), 2 * BLOCK_POSITIONS
        at = address + kv.block_bytes - scales * kv.scale_bytes
        filled = context.driver.cuMemsetD2D16Async(at, kv.block_bytes, scale, scales, nbytes // kv.block_bytes, context.stream)
        check(filled, "fill the scales of the KV cache")

    def trace(self, start: int, count: int) -> np.ndarray:
        """When the last of `count` greedy tokens from position `start` passed each stage: nanoseconds (`Block::mark`, roles.cuh).

        uint64 [2 roles, workers, layers + 1, stages, 2 events], 0 where nothing was marked; stages are `source.stage_names`.
        A kernel with timestamps is built for it; the weights stay where they are.
        """
        context, target, source = self.context, self.plan.target, generate(self.plan, trace=True)
        kernel = compile_source(source.text, target)
        stamps = np.zeros((2, target.workers, self.plan.config.num_layers + 1, len(source.stage_names), 2), np.uint64)
        context.use()
        self.params.trace = context.upload(stamps, "timestamps")
        try:
            with self.instead(self.ready(kernel, self.plan), self.plan):
                self.launch_alone(start, count)
                self.finish()
            return context.download(self.params.trace, stamps, "timestamps")
        finally:
            context.free(self.params.trace)
            self.params.trace = 0

    def read_bandwidth(self) -> float:
        """Best of plain vector loads and bulk copies over the weights, in GB/s; see `Runner.read_bandwidth`."""
        context, nbytes = self.context, min(self.arena_bytes, 16 << 30)
        context.use()
        address = self.arena
        own = nbytes < 1 << 30
        if own:  # a small model would be read from the L2 cache
            nbytes = 2 << 30
            address = context.allocate(nbytes, "a bandwidth test", fill=1)
        best = 0.0
        for name, block, per_sm, shared in (("flashformer_read", 512, 4, 0), ("flashformer_read_bulk", 160, 1, 8 * 16384)):
            if shared and not self.plan.target.bulk_copy:
                continue
            function = context.function(self.tools, name)
            if shared:
                context.allow_shared(function, shared)
            for _ in range(6):
                arguments = (ctypes.c_uint64(address), ctypes.c_uint64(nbytes), ctypes.c_uint64(self.status))
                first = context.event()
                context.launch(function, self.info.workers * per_sm, block, arguments, shared)
                best = max(best, nbytes / context.elapsed(first, context.event()) / 1e9)
        if own:
            context.free(address)
        return best

    def close(self) -> None:
        """See `Runner.close`."""
        self.endings.close()
        self.context.close()


def load(plan: Plan, weights: Weights, progress: Progress = no_progress) -> CudaRunner:
    """Compile `plan`, pack `weights`, and return the model ready to run."""
    return CudaRunner(plan, weights, progress)
