"""The router of a mixture of experts as one kernel of a decode step on an NVIDIA GPU."""

from pallas_kernels.router.kernel import Routed, lacks, route, supports

__all__ = ["Routed", "lacks", "route", "supports"]
