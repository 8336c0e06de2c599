"""Times PyTorch's int4 matvec (``torch._weight_int4pack_mm``) as a baseline.

    python benchmarks/torch_int4.py 4096x6144 4096x4096     prints one JSON object: {"4096x6144": us, ...}

Group size 128, batch 1. Each time is that of one call, in microseconds, in a CUDA graph of many calls with
different weights, so the L2 does not serve them. ``matvec.py`` runs this script in a separate process.
"""

import json
import statistics
import sys

GROUP = 128
INNER_K_TILES = 8
ROTATED_BYTES = 400e6
REPLAYS = 10


def measure(k: int, n: int) -> float:
    """Returns the median time of one call, microseconds."""
    import torch

    weights = max(2, round(ROTATED_BYTES / (k * n / 2)))
    device = torch.device("cuda")
    packed, scales = [], []
    for _ in range(weights):
        codes = torch.randint(0, 256, (n, k // 2), dtype=torch.uint8, device=device)
        packed.append(torch._convert_weight_to_int4pack(codes, INNER_K_TILES))
        scales.append(torch.rand(k // GROUP, n, 2, dtype=torch.bfloat16, device=device))
    x = torch.randn(1, k, dtype=torch.bfloat16, device=device)

    def all_weights():
        for w, s in zip(packed, scales, strict=True):
            torch._weight_int4pack_mm(x, w, GROUP, s)

    all_weights()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        all_weights()
    times = []
    for _ in range(REPLAYS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / weights)
    return statistics.median(times)


if __name__ == "__main__":
    shapes = {name: tuple(int(size) for size in name.split("x")) for name in sys.argv[1:]}
    print(json.dumps({name: measure(*shape) for name, shape in shapes.items()}))
