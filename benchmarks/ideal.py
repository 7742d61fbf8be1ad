"""The speedup that a depth would have if time were nothing but the work that cannot be avoided.

Two limits, after the roofline model (Williams et al. 2009, doi 10.1145/1498765.1498785):

decoding is bound by the bytes of every weight once a step and of the K and V of every context, a prompt by its floating
point operations. The rate of either cancels in a ratio. Norms, activations, rotary embedding and writing K and V are
left out. At a large batch on a CPU decoding lies between the two.
"""

from __future__ import annotations

from dataclasses import dataclass

from sleb.benchmarks.ceilings import Ceilings
from sleb.benchmarks.workloads import Workload
from sleb.engine.engine import Engine
from sleb.engine.model.architecture import DecoderSpec


@dataclass(frozen=True)
class DepthCost:
    """What one depth of a model holds: numbers of the blocks whose attention, or MLP, runs; bytes of all its weights,
    patches, embedding and head included (once, if tied), of a token's K and V over the kept attention sublayers, of a
    row of the embedding table, and of an element of what is not quantised; elements of the patches' matrices; bytes of
    all experts.
    """

    spec: DecoderSpec
    attention_blocks: tuple[int, ...]
    mlp_blocks: tuple[int, ...]
    weight_bytes: int
    kv_bytes_per_token: int
    embed_row_bytes: int
    itemsize: int
    patch_elements: int = 0
    expert_bytes: int = 0

    @classmethod
    def of(cls, engine: Engine, depth: int) -> DepthCost:
        """The cost of a depth that `engine` serves."""
        kept, runner = sorted(engine.runner.kept_sublayers(depth)), engine.runner
        attention, mlp = (tuple(block for block, part in kept if part == own) for own in ("attention", "mlp"))
        sizes = engine.weight_bytes(depth), engine.kv_bytes_per_token(depth), runner.embed_row_bytes
        patches = [each for patch in runner.patches(depth).values() for each in patch.tensors.values()]
        elements = sum(each.size for each in patches if each.ndim == 2)
        return cls(
            engine.spec, attention, mlp, *sizes, runner.dtype.itemsize, elements, runner.expert_bytes(depth)
        )


def step_weight_bytes(cost: DepthCost, batch: int) -> int:
    """Bytes of weights that one decode step of `batch` rows reads.

    All weights once, but of tables that are only looked into (positions; the embedding unless it is tied, when
    the head reads it whole) one row a sequence; and of experts those that some row gets, if all are as likely.
    """
    spec = cost.spec
    total = cost.weight_bytes + batch * cost.embed_row_bytes
    if not spec.tied_embeddings:
        total -= spec.vocab_size * cost.embed_row_bytes
    if spec.experts is not None:
        total -= round(cost.expert_bytes * (1 - spec.experts.top_k / spec.experts.number) ** batch)
    if spec.position == "learned":
        num_positions = spec.max_positions + spec.position_offset
        total -= (num_positions - batch) * spec.hidden_size * cost.itemsize
    return total


def context_kv_bytes(cost: DepthCost, context: int) -> int:
    """Bytes of K and V that one new token reads when its context, itself included, has `context` tokens."""
    if not cost.attention_blocks:
        return 0
    block_bytes = cost.kv_bytes_per_token // len(cost.attention_blocks)
    return block_bytes * sum(_visible(cost.spec, block, context) for block in cost.attention_blocks)


def decode_bytes(cost: DepthCost, batch: int, prompt_tokens: int, output_tokens: int) -> int:
    """Bytes read by the decode steps of `batch` equal requests: output_tokens − 1, for a prompt's step gives one."""
    contexts = range(prompt_tokens + 1, prompt_tokens + output_tokens)
    kv_bytes = sum(context_kv_bytes(cost, context) for context in contexts)
    return len(contexts) * step_weight_bytes(cost, batch) + batch * kv_bytes


def prompt_flops(cost: DepthCost, batch: int, prompt_tokens: int) -> int:
    """Floating point operations to compute `batch` prompts and the logits after each one's last token.

    A multiply and an add count two. With T prompt tokens, E hidden, I intermediate, Q query and K key-value features:

        attention   2·T·E·(Q + 2K) + 2·T·Q·E + 4·Q·(1 + 2 + … + T)     scores and values see the causal half only
        MLP         2·T·E·I · (3 if gated else 2), of experts those that a token gets
        patches     2·T·E·E, low-rank 4·T·E·r
        head        2·E·V, for one row
    """
    return batch * _flops(cost, range(1, prompt_tokens + 1), 1)


def decode_flops(cost: DepthCost, batch: int, prompt_tokens: int, output_tokens: int) -> int:
    """Operations of the decode steps of `batch` equal requests: contexts as in `decode_bytes`, a head a token."""
    contexts = range(prompt_tokens + 1, prompt_tokens + output_tokens)
    return batch * _flops(cost, contexts, len(contexts))


def _flops(cost: DepthCost, contexts: range, num_sampled: int) -> int:
    """Of one token in each of `contexts`, its own length included, and the logits of so many of them."""
    spec, num_tokens = cost.spec, len(contexts)
    projections = 2 * num_tokens * spec.hidden_size * 2 * (spec.query_size + spec.kv_size)
    attended = sum(_visible(spec, block, context) for block in cost.attention_blocks for context in contexts)
    neurons = sum(map(spec.neurons_of_token, cost.mlp_blocks))
    mlp = 2 * num_tokens * spec.hidden_size * neurons * (3 if spec.gated else 2)
    head = 2 * num_sampled * spec.embed_size * spec.vocab_size
    if spec.embed_size != spec.hidden_size:  # projected in for every token, out for those that sample
        head += 2 * spec.embed_size * spec.hidden_size * (num_tokens + num_sampled)
    attention = len(cost.attention_blocks) * projections + 4 * spec.query_size * attended
    return attention + mlp + 2 * num_tokens * cost.patch_elements + head


def ideal_speedup(workload: Workload, baseline: DepthCost, cost: DepthCost) -> float:
    """How much faster than `baseline` a depth would be at best: by a prompt's operations, or the bytes of decoding."""
    if workload.test == "prompt":
        shape = (workload.batch, workload.prompt_tokens)
        return prompt_flops(baseline, *shape) / prompt_flops(cost, *shape)
    lengths = (workload.batch, workload.prompt_tokens, workload.output_tokens)
    return decode_bytes(baseline, *lengths) / decode_bytes(cost, *lengths)


def floor_seconds(workload: Workload, cost: DepthCost, ceilings: Ceilings) -> float:
    """The least time of a workload at the ceilings; "generate" is the sum of the prompts' and the decode steps'."""
    batch, prompt_tokens = workload.batch, workload.prompt_tokens
    prompt = ceilings.floor_seconds(step_weight_bytes(cost, batch), prompt_flops(cost, batch, prompt_tokens))
    if workload.test == "prompt":
        return prompt
    shape = (batch, prompt_tokens, workload.output_tokens)
    decode = ceilings.floor_seconds(decode_bytes(cost, *shape), decode_flops(cost, *shape))
    return decode if workload.test == "decode" else prompt + decode


def _visible(spec: DecoderSpec, block: int, context: int) -> int:
    window = spec.windows[block]
    return context if window is None else min(context, window)
