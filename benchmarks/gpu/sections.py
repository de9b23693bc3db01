"""All sections, in the order in which they run: what must be right first, peers last."""

from __future__ import annotations

from benchmarks.gpu.runner import Section

SECTIONS = [
    Section(
        "forms",
        "Bits of the update",
        "benchmarks.gpu.forms",
        seconds=60,
        case_seconds=40,
        about="Every form of the update, alone and several tensors in one launch, three steps.",
    ),
    Section(
        "sums",
        "Bits of sums, norms, checksums and 8-bit messages",
        "benchmarks.gpu.sums",
        seconds=60,
        case_seconds=40,
        about="The same calls with the same numbers on the GPU and on the CPU.",
    ),
    Section(
        "ranks",
        "Bits of ranks that share the GPU",
        "benchmarks.gpu.ranks",
        seconds=100,
        case_seconds=70,
        about="Parameters, states and norm of every step, against one process on the CPU that "
        "adds the ranks' gradients in order. NCCL with several ranks needs several GPUs.",
    ),
    Section(
        "graph",
        "CUDA graphs",
        "benchmarks.gpu.graph",
        seconds=50,
        case_seconds=40,
        about="Replays, against the same optimizer uncaptured.",
    ),
    Section(
        "training",
        "Short trainings",
        "benchmarks.gpu.training",
        seconds=80,
        case_seconds=50,
    ),
    Section(
        "bandwidth",
        "Bandwidth",
        "benchmarks.gpu.bandwidth",
        seconds=60,
        case_seconds=40,
        about="Bytes that have to move, per second, and their share of what a copy moves. The "
        "host has a start, so that only the GPU's time counts.",
    ),
    Section(
        "pairs",
        "Training steps in turns with AdamW's",
        "benchmarks.gpu.pairs",
        seconds=90,
        case_seconds=40,
        about="Medians of rounds in which each takes one step, and of the ratios of the rounds.",
    ),
    Section(
        "step",
        "A training step",
        "benchmarks.gpu.step",
        seconds=130,
        case_seconds=60,
        about="Host ms is until all of an iteration is issued, step ms between events around "
        "step() alone, busy ms the sum of all kernels. Peak is beyond the model: gradients, states "
        "and activations; held is what stays of it after a step. The last column says where two "
        "batches, clipping and step() first make the host wait.",
    ),
    Section(
        "one_of_eight",
        "A training step of one rank of eight",
        "benchmarks.gpu.one_of_eight",
        seconds=70,
        case_seconds=50,
        about="Each collective is a copy on the device: the work of a rank without the network.",
    ),
    Section(
        "frameworks",
        "Frameworks",
        "benchmarks.gpu.frameworks",
        seconds=120,
        case_seconds=110,
    ),
]
