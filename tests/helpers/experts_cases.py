"""Random cases of the products of experts, for the emulator and the GPU."""

import dataclasses

import matvec_cases
import numpy as np

from pallas_kernels.expert_weights import NestedExperts
from pallas_kernels.matvec.mosaic_gpu import Config


@dataclasses.dataclass(frozen=True)
class ExpertsCase:
    """Sizes and distribution of one launch; the fields but ``num_experts`` are those of a matvec ``Case``."""

    in_features: int
    out_features: int
    rows: int
    num_experts: int
    max_bits: int = 8
    dtype: str = "float32"
    activations: str = "gaussian"
    config: Config | None = None
    seed: int = 0

    def __str__(self):
        return f"{self.num_experts}x{self._matvec(self.seed)}"

    def arrays(self) -> tuple[np.ndarray, NestedExperts, np.ndarray, np.ndarray]:
        """Returns x, weight, experts and thresholds, all of NumPy arrays. Rows may share an expert."""
        x, one, thresholds = self._matvec(self.seed).arrays()
        weights = [self._matvec((self.seed + i) % 2**32).arrays()[1] for i in range(self.num_experts)]
        weight = NestedExperts(
            np.stack([w.planes for w in weights]),
            np.stack([w.scales for w in weights]),
            self.in_features,
            self.out_features,
            one.level_gains,
        )
        experts = np.random.default_rng(self.seed).integers(0, self.num_experts, self.rows, np.int32)
        return x, weight, experts, thresholds

    def _matvec(self, seed: int) -> matvec_cases.Case:
        fields = {k: v for k, v in vars(self).items() if k != "num_experts"}
        return matvec_cases.Case(**fields | {"seed": seed})


def assert_agrees_with_oracle(x, weight: NestedExperts, experts, thresholds, y, bits) -> None:
    """Checks each row against the dense product with its expert (see ``matvec_cases``)."""
    for row, expert in enumerate(experts):
        one = slice(row, row + 1)
        matvec_cases.assert_agrees_with_oracle(
            x[one], weight.expert(int(expert)), thresholds[one], y[one], bits[one]
        )
