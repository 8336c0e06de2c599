// Bandwidth of the product at one level without its products: only its copies of boxes.
//
//     nvcc -arch=sm_90a -lcuda -o box_copies box_copies.cu && ./box_copies
//
// 132 CTAs read 3 planes of a 4096x24576 weight (75 MB), a ring of 4 slots ahead, as units of 24 KB. A line gives
// the width of a box's row, whether neighbouring CTAs read the halves of the same 128 bytes at the same time,
// the L2 promotion of the tensor map, and TB/s.

#include <cstdint>
#include <cstdio>
#include <cuda.h>
#include <cuda_runtime.h>

#define CHECK(call)                                                        \
  do {                                                                     \
    int error = int(call);                                                 \
    if (error != 0) {                                                      \
      fprintf(stderr, "%s: %d\n", #call, error);                           \
      return 1;                                                            \
    }                                                                      \
  } while (0)

constexpr int PLANES = 3, CHANNELS = 4096, ROW = 6144, CTAS = 132, SLOTS = 4, COPIES = 4, GROUP_BYTES = 8192;

__device__ uint32_t address(const void* p) { return uint32_t(__cvta_generic_to_shared(p)); }

// A unit is width bytes of GROUP_BYTES / width channels of all planes.
template <bool TEAMS>
__global__ void copy(const __grid_constant__ CUtensorMap map, int width) {
  extern __shared__ __align__(1024) uint8_t shared[];
  __shared__ uint64_t barriers[SLOTS];
  const int channels = GROUP_BYTES / width, groups = CHANNELS / channels;
  const int team = TEAMS ? 2 : 1, tile_bytes = team * width;
  const int units = (ROW / tile_bytes) * groups, teams = CTAS / team, each = (units + teams - 1) / teams;
  const int first = blockIdx.x / team * each, half = blockIdx.x % team;
  const int count = min(each, units - first);
  if (threadIdx.x == 0) {
    for (int s = 0; s < SLOTS; ++s)
      asm volatile("mbarrier.init.shared.b64 [%0], 1;" ::"r"(address(&barriers[s])));
    asm volatile("fence.mbarrier_init.release.cluster;");
    for (int u = 0; u < count + SLOTS - 1; ++u) {
      if (u >= SLOTS - 1) {
        const int old = u - (SLOTS - 1);
        uint32_t done = 0;
        while (!done)
          asm volatile(
              "{ .reg .pred p; mbarrier.try_wait.parity.shared.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
              : "=r"(done)
              : "r"(address(&barriers[old % SLOTS])), "r"(old / SLOTS & 1));
      }
      if (u >= count) continue;
      const int number = first + u, tile = number / groups, channel = number % groups * channels;
      const uint32_t slot = address(shared) + u % SLOTS * PLANES * GROUP_BYTES;
      const uint32_t barrier = address(&barriers[u % SLOTS]);
      asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(barrier), "r"(PLANES * GROUP_BYTES));
      asm volatile(
          "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4}], "
          "[%5];" ::"r"(slot),
          "l"(&map), "r"((tile * team + half) * width / 4), "r"(channel), "r"(0), "r"(barrier)
          : "memory");
    }
  }
}

int main() {
  const size_t bytes = size_t(PLANES) * CHANNELS * ROW;
  uint8_t* planes;
  CHECK(cudaMalloc(&planes, bytes * COPIES));
  CHECK(cudaMemset(planes, 1, bytes * COPIES));
  cudaEvent_t start, end;
  CHECK(cudaEventCreate(&start));
  CHECK(cudaEventCreate(&end));
  const CUtensorMapL2promotion promotions[] = {CU_TENSOR_MAP_L2_PROMOTION_NONE, CU_TENSOR_MAP_L2_PROMOTION_L2_128B};
  for (int width : {64, 128})
    for (int teams : {0, 1})
      for (int promotion : {0, 1}) {
        if (width == 128 && teams) continue;
        CUtensorMap maps[COPIES];
        for (int i = 0; i < COPIES; ++i) {
          cuuint64_t sizes[] = {ROW / 4, CHANNELS, PLANES}, strides[] = {ROW, size_t(ROW) * CHANNELS};
          cuuint32_t box[] = {cuuint32_t(width / 4), cuuint32_t(GROUP_BYTES / width), PLANES}, steps[] = {1, 1, 1};
          CHECK(cuTensorMapEncodeTiled(
              &maps[i], CU_TENSOR_MAP_DATA_TYPE_UINT32, 3, planes + bytes * i, sizes, strides, box, steps,
              CU_TENSOR_MAP_INTERLEAVE_NONE, width == 64 ? CU_TENSOR_MAP_SWIZZLE_64B : CU_TENSOR_MAP_SWIZZLE_128B,
              promotions[promotion], CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE));
        }
        auto kernel = teams ? copy<true> : copy<false>;
        const int shared = SLOTS * PLANES * GROUP_BYTES;
        CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared + 65536));
        for (int i = 0; i < COPIES; ++i) kernel<<<CTAS, 32, shared + 65536>>>(maps[i], width);
        CHECK(cudaEventRecord(start));
        const int repeats = 20;
        for (int i = 0; i < repeats * COPIES; ++i) kernel<<<CTAS, 32, shared + 65536>>>(maps[i % COPIES], width);
        CHECK(cudaEventRecord(end));
        CHECK(cudaDeviceSynchronize());
        float ms;
        CHECK(cudaEventElapsedTime(&ms, start, end));
        const double us = 1000 * ms / repeats / COPIES;
        printf("%3d bytes, %s, promotion %s: %.1f us, %.2f TB/s\n", width, teams ? "teams" : "alone",
               promotion ? "128 B" : "none ", us, bytes / us / 1e6);
      }
}
