"""A model on the GPU: allocate once, then one launch of the whole-model kernel a call."""

from __future__ import annotations

import ctypes
import time
import warnings
from collections.abc import Collection, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from ...errors import DeviceError
from ...ops.rope import rope_table
from ...plan import Plan
from ...tape import Tape, lay_tapes
from .. import Progress, RunStats, no_progress
from .codegen import TILE_BITS, Params, Source, generate, threads
from .compile import Kernel, compile_source
from .driver import Context, DeviceInfo, probe
from .pack import THREADS, Packer, Weights, gather_vectors, pack_words

MAX_STOP = 64  # stop tokens of a launch
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


class CudaRunner:
    """Implements `Runner` (backends/__init__.py) on one GPU; `weights` are packed as it is made."""

    def __init__(self, plan: Plan, weights: Weights, progress: Progress = no_progress) -> None:
        self.plan = plan
        self.stats = RunStats()
        self.info = device_for(plan)
        self.source: Source = generate(plan)
        progress("compiling", 0, 1)
        self.kernel: Kernel = compile_source(self.source.text, plan.target)
        tools = compile_source('#include "tools.cuh"\n', plan.target, "cuda-tools")
        progress("compiling", 1, 1)
        with ThreadPoolExecutor(1) as pool:
            rope = pool.submit(rope_table, plan.config, plan.max_context)  # a thread has it ready before the weights are packed
            self.context = Context(self.info.ordinal)
            try:
                self._load(weights, rope, tools, progress)
            except BaseException:
                self.context.close()
                raise

    def _load(self, weights: Weights, rope: Future[np.ndarray], tools: Kernel, progress: Progress) -> None:
        """Claim memory, pack the weights, and make ready to launch."""
        plan, context = self.plan, self.context
        tape: Tape = lay_tapes(plan)
        embedding_bytes = plan.embedding_bytes() + 2  # the kernels convert two values at a time
        kv_bytes = plan.config.num_layers * plan.kv.layer_bytes
        needed = tape.nbytes + embedding_bytes + kv_bytes + (256 << 20)
        free = context.free_bytes()
        if needed > free:
            raise DeviceError(
                f"the model needs {needed / 1e9:.1f} GB on the GPU ({(tape.nbytes + embedding_bytes) / 1e9:.1f} weights, "
                f"{kv_bytes / 1e9:.1f} KV cache for {plan.max_context} positions), {free / 1e9:.1f} are free; "
                "choose a smaller --max-context or a smaller model"
            )
        module = context.load(self.kernel.cubin)
        self.function = context.function(module, "flashformer_decode")
        self.tools = context.load(tools.cubin)
        context.allow_shared(self.function, plan.target.shared_bytes)
        if context.blocks_per_sm(self.function, threads(plan), plan.target.shared_bytes) < 1:
            raise DeviceError(f"one block of this kernel does not fit on an SM of {self.info.name}")

        self.arena = context.allocate(tape.nbytes, "weights", fill=0)
        self.arena_bytes = tape.nbytes
        embedding = context.allocate(embedding_bytes, "the embedding table")
        strange = Packer(context, self.tools, plan, weights, progress).run(tape, self.arena, embedding)
        vectors, strange_vectors = gather_vectors(plan, self.source.vectors, weights)
        for name in (*strange, *strange_vectors):
            warnings.warn(f"{name} holds values that are not finite; the model's output will not be, either", stacklevel=2)

        entries = np.zeros((plan.target.workers, tape.offset.shape[0], 2), np.uint32)
        entries[:, :, 0] = tape.offset.T
        entries[:, :, 1] = tape.size.T
        for index, stage in enumerate(plan.stages):
            if stage.kind == "attention":
                entries[np.arange(plan.target.workers), tape.first_chunk(index), 0] = stage.layer
        head = next(i for i, s in enumerate(plan.stages) if s.name == "head")
        self.token_address, tokens = context.allocate_pinned(8 * (plan.max_context + 1), "tokens", fill=0)
        self.tokens = tokens.view(np.uint64)
        cancel_address, cancel = context.allocate_pinned(64, "the cancel flag", fill=0)
        self.cancel = cancel.view(np.uint32)
        self.status = context.allocate(8, "status", fill=0)
        self.exchange_bytes = self.source.exchange_words * 8
        self.logit_address = 0
        self.forced = context.allocate(4 * plan.max_context, "prompt")
        self.stop = context.allocate(4 * MAX_STOP, "stop tokens")
        self.params = Params(
            tape=self.arena,
            table=context.upload(entries, "chunk table"),
            table_length=context.upload(tape.length.astype(np.uint32), "chunk counts"),
            head_start=context.upload(tape.first_chunk(head).astype(np.uint32), "chunk counts"),
            tiles=context.upload(pack_words(plan.stages, plan, TILE_BITS), "tile ranges"),
            vectors=context.upload(vectors, "norms and biases"),
            embedding=embedding,
            rope=context.upload(rope.result(), "rotary table"),
            kv=context.allocate(kv_bytes, "the KV cache", fill=0),
            exchange=context.allocate(self.exchange_bytes, "exchanges", fill=0),
            forced=self.forced,
            stop=self.stop,
            tokens=self.token_address,
            cancel=cancel_address,
            status=self.status,
            table_stride=entries.shape[1],
            kv_blocks=plan.kv.blocks,
            epoch=1,
        )
        context.wait()

    def launch(self, tokens: Sequence[int], start: int, count: int, stop: Collection[int] = (), logits: bool = False) -> None:
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
        # Tags must never repeat: before they would wrap, the exchange memory is cleared and counting starts again.
        if (p.epoch + steps + 1) * (self.plan.config.num_layers + 1) >= 1 << 32:
            self._clear_exchange()
        self._inputs = (np.array(tokens, np.uint32), np.array(sorted(stop) or [0], np.uint32))  # alive until the copy is done
        for pointer, values in zip((self.forced, self.stop), self._inputs, strict=True):
            self.context.copy_async(pointer, values.ctypes.data, values.nbytes)
        self.cancel[0] = 0
        p.start, p.forced_count, p.stop_count, p.steps = start, len(tokens), len(stop), steps
        p.run = p.run % 0x7FFFFFFF + 1
        p.logits = self.logit_address if logits else 0
        self.context.launch(
            self.function, self.plan.target.workers, threads(self.plan), (p,), self.plan.target.shared_bytes, cooperative=True
        )
        p.epoch += steps

    def _clear_exchange(self) -> None:
        """Forget every tag."""
        driver = self.context.driver
        driver.cuMemsetD8Async(self.params.exchange, 0, self.exchange_bytes, self.context.stream)
        self.context.wait()
        self.params.epoch = 1

    def finish(self) -> None:
        """Wait for the kernel and raise DeviceError where it gave up."""
        self.context.wait()
        status = self.context.download(self.status, np.zeros(2, np.uint32), "status")
        if not status[0]:
            return
        where = int(status[0]) - 1
        self.context.driver.cuMemsetD8(self.status, 0, 8)
        self._clear_exchange()
        stage = self.source.stage_names[where >> 16] if where >> 16 < len(self.source.stage_names) else "unknown"
        raise DeviceError(
            f"the kernel waited too long and gave up: stage {stage!r}, layer {where & 0xFFFF}, block {int(status[1])}; "
            "please report this with the model's configuration"
        )

    def generate(self, tokens: Sequence[int], start: int, count: int, stop: Collection[int]) -> Generator[int, None, None]:
        """See `Runner.generate`."""
        began = time.perf_counter()
        self.launch(tokens, start, count, stop)
        marker = self.context.event()
        run, made, first, last = self.params.run, 0, began, began
        try:
            while made < count:
                word = int(self.tokens[made])
                if word >> 32 != run:
                    if self.context.done(marker) and int(self.tokens[made]) >> 32 != run:
                        break
                    time.sleep(20e-6)
                    continue
                last = time.perf_counter()
                first = last if made == 0 else first
                made += 1
                token = word & 0xFFFFFFFF
                yield token
                if token in stop:
                    break
        finally:
            if made < count:
                self.cancel[0] = 1
            self.context.use()
            self.context.driver.cuEventDestroy(marker)
            self.finish()
            context = start + len(tokens)
            self.stats = RunStats(
                len(tokens), start, first - began, made, last - first,
                sum(self.plan.token_bytes(context + i) for i in range(max(made - 1, 0))),
            )  # fmt: skip

    def logits(self, tokens: Sequence[int], start: int) -> np.ndarray:
        """See `Runner.logits`."""
        vocab = self.plan.config.vocab_size
        out = np.empty((len(tokens), vocab), np.float32)
        self.context.use()
        if not self.logit_address:
            self.logit_address = self.context.allocate(LOGIT_ROWS * vocab * 4, "logits")
        for at in range(0, len(tokens), LOGIT_ROWS):
            part = list(tokens[at : at + LOGIT_ROWS])
            self.context.driver.cuMemsetD8Async(self.logit_address, POISON, LOGIT_ROWS * vocab * 4, self.context.stream)
            self.launch(part, start + at, 1, logits=True)
            self.finish()
            self.context.download(self.logit_address, out[at : at + len(part)], "logits")
        return out

    def time_generate(self, start: int, count: int) -> float:
        """Seconds on the device for one launch of `count` greedy tokens from position `start` (benchmarks)."""
        self.context.use()
        first = self.context.event()
        self.launch([1], start, count)
        seconds = self.context.elapsed(first, self.context.event())
        self.finish()
        return seconds

    def fill_kv(self) -> None:
        """Random values for every position of the KV cache: a benchmark reads positions that nobody has computed."""
        pairs = self.plan.config.num_layers * self.plan.kv.layer_bytes // 4
        arguments = (
            ctypes.c_uint64(self.params.kv), ctypes.c_uint64(pairs), ctypes.c_uint64(0), ctypes.c_uint32(1), ctypes.c_float(1.0),
        )  # fmt: skip
        self.context.use()
        self.context.launch(self.context.function(self.tools, "flashformer_random"), -(-pairs // THREADS), THREADS, arguments)

    def trace(self, start: int, count: int) -> np.ndarray:
        """When the last of `count` greedy tokens from position `start` passed each stage: nanoseconds (`Block::mark`, roles.cuh).

        uint64 [2 roles, workers, layers + 1, stages, 2 events], 0 where nothing was marked; stages are `source.stage_names`.
        A kernel with timestamps is built for it; the weights stay where they are.
        """
        context, target, source = self.context, self.plan.target, generate(self.plan, trace=True)
        kernel = compile_source(source.text, target)
        stamps = np.zeros((2, target.workers, self.plan.config.num_layers + 1, len(source.stage_names), 2), np.uint64)
        context.use()
        plain, self.function = self.function, context.function(context.load(kernel.cubin), "flashformer_decode")
        self.params.trace = context.upload(stamps, "timestamps")
        try:
            context.allow_shared(self.function, target.shared_bytes)
            self.launch([1], start, count)
            self.finish()
            return context.download(self.params.trace, stamps, "timestamps")
        finally:
            context.free(self.params.trace)
            self.params.trace, self.function = 0, plain

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
        self.context.close()


def load(plan: Plan, weights: Weights, progress: Progress = no_progress) -> CudaRunner:
    """Compile `plan`, pack `weights`, and return the model ready to run."""
    return CudaRunner(plan, weights, progress)
