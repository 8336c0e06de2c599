// Cycles that the integer matrix instructions and the integer ALU of a multiprocessor take, alone and mixed.
//
//   nvcc -O3 -std=c++17 -gencode arch=compute_90a,code=sm_90a benchmarks/probes/matrix_unit.cu -o /tmp/matrix_unit && /tmp/matrix_unit
//
// One CTA runs on one multiprocessor. Each line gives the cycles of one scheduler for one iteration of a loop, for 1,
// 2 and 4 warps on each scheduler, divided by the number of warps: the cost of the iteration's work in steady state.
#include <cstdint>
#include <cstdio>
#include <cuda_runtime.h>

constexpr int ITERATIONS = 512;

__device__ inline void imma(int (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile("mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+r"(sum[0]), "+r"(sum[1]), "+r"(sum[2]), "+r"(sum[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ inline void hmma(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ inline uint32_t lop(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t d;
  asm volatile("lop3.b32 %0, %1, %2, %3, 0x96;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
}

__device__ inline uint32_t permute(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t d;
  asm volatile("prmt.b32 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
}

__device__ inline uint32_t multiply_add(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t d;
  asm volatile("mad.lo.u32 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
}

// The work of an iteration: numbers of IMMA, HMMA, LOP3, PRMT, and IMAD.
template <int IMMAS, int HMMAS, int LOPS, int PRMTS, int MADS>
__global__ void instructions(long long *cycles, uint32_t *out, uint32_t seed) {
  int sums[IMMAS > 0 ? IMMAS : 1][4] = {};
  float fsums[HMMAS > 0 ? HMMAS : 1][4] = {};
  uint32_t a[4] = {seed + threadIdx.x, seed, seed + 1, seed + 2}, b[8], x[16];
  for (int i = 0; i < 16; ++i) x[i] = seed + i * threadIdx.x;
  for (int i = 0; i < 8; ++i) b[i] = seed * (i + 3);
  __syncthreads();
  long long start = clock64();
#pragma unroll 1
  for (int n = 0; n < ITERATIONS; ++n) {
    constexpr int MOST = IMMAS > LOPS ? (IMMAS > HMMAS ? IMMAS : HMMAS) : (LOPS > HMMAS ? LOPS : HMMAS);
    constexpr int ALL = MOST > PRMTS ? (MOST > MADS ? MOST : MADS) : (PRMTS > MADS ? PRMTS : MADS);
#pragma unroll
    for (int i = 0; i < ALL; ++i) {  // interleaved
      if (i < LOPS) x[i % 16] = lop(x[i % 16], b[i % 8], a[i % 4]);
      if (i < PRMTS) x[(i + 5) % 16] = permute(x[(i + 5) % 16], b[i % 8], 0x3210 + i);
      if (i < MADS) x[(i + 9) % 16] = multiply_add(x[(i + 9) % 16], b[i % 8], a[i % 4]);
      if (i < IMMAS) imma(sums[i], a, b[(2 * i) % 8], b[(2 * i + 1) % 8]);
      if (i < HMMAS) hmma(fsums[i], a, b[(2 * i) % 8], b[(2 * i + 1) % 8]);
    }
  }
  long long end = clock64();
  uint32_t all = 0;
  for (int i = 0; i < 16; ++i) all ^= x[i];
  for (auto &s : sums) all ^= s[0] ^ s[1] ^ s[2] ^ s[3];
  for (auto &s : fsums) all ^= __float_as_uint(s[0] + s[1] + s[2] + s[3]);
  out[threadIdx.x] = all;
  if (threadIdx.x == 0) *cycles = end - start;
}

// wgmma of 64 x N x 32 bytes, A in registers, B in shared memory: 4 of them in a group, and LOPS LOP3 that prepare the
// operands of the next group.
__device__ inline void wgmma(int (&s)[8], const uint32_t (&a)[4], uint64_t b) {
  asm volatile("{ .reg .pred p; setp.ne.b32 p, 1, 0; wgmma.mma_async.sync.aligned.m64n16k32.s32.u8.s8 "
               "{%0,%1,%2,%3,%4,%5,%6,%7}, {%8,%9,%10,%11}, %12, p; }"
               : "+r"(s[0]), "+r"(s[1]), "+r"(s[2]), "+r"(s[3]), "+r"(s[4]), "+r"(s[5]), "+r"(s[6]), "+r"(s[7])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}

__device__ inline void wgmma(int (&s)[16], const uint32_t (&a)[4], uint64_t b) {
  asm volatile("{ .reg .pred p; setp.ne.b32 p, 1, 0; wgmma.mma_async.sync.aligned.m64n32k32.s32.u8.s8 "
               "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15}, {%16,%17,%18,%19}, %20, p; }"
               : "+r"(s[0]), "+r"(s[1]), "+r"(s[2]), "+r"(s[3]), "+r"(s[4]), "+r"(s[5]), "+r"(s[6]), "+r"(s[7]), "+r"(s[8]), "+r"(s[9]), "+r"(s[10]), "+r"(s[11]), "+r"(s[12]), "+r"(s[13]), "+r"(s[14]), "+r"(s[15])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}

__device__ inline void wgmma(int (&s)[32], const uint32_t (&a)[4], uint64_t b) {
  asm volatile("{ .reg .pred p; setp.ne.b32 p, 1, 0; wgmma.mma_async.sync.aligned.m64n64k32.s32.u8.s8 "
               "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31}, {%32,%33,%34,%35}, %36, p; }"
               : "+r"(s[0]), "+r"(s[1]), "+r"(s[2]), "+r"(s[3]), "+r"(s[4]), "+r"(s[5]), "+r"(s[6]), "+r"(s[7]), "+r"(s[8]), "+r"(s[9]), "+r"(s[10]), "+r"(s[11]), "+r"(s[12]), "+r"(s[13]), "+r"(s[14]), "+r"(s[15]), "+r"(s[16]), "+r"(s[17]), "+r"(s[18]), "+r"(s[19]), "+r"(s[20]), "+r"(s[21]), "+r"(s[22]), "+r"(s[23]), "+r"(s[24]), "+r"(s[25]), "+r"(s[26]), "+r"(s[27]), "+r"(s[28]), "+r"(s[29]), "+r"(s[30]), "+r"(s[31])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}

// The same with A in shared memory, too.
__device__ inline void wgmma(int (&s)[32], uint64_t a, uint64_t b) {
  asm volatile("{ .reg .pred p; setp.ne.b32 p, 1, 0; wgmma.mma_async.sync.aligned.m64n64k32.s32.u8.s8 "
               "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31}, %32, %33, p; }"
               : "+r"(s[0]), "+r"(s[1]), "+r"(s[2]), "+r"(s[3]), "+r"(s[4]), "+r"(s[5]), "+r"(s[6]), "+r"(s[7]), "+r"(s[8]), "+r"(s[9]), "+r"(s[10]), "+r"(s[11]), "+r"(s[12]), "+r"(s[13]), "+r"(s[14]), "+r"(s[15]), "+r"(s[16]), "+r"(s[17]), "+r"(s[18]), "+r"(s[19]), "+r"(s[20]), "+r"(s[21]), "+r"(s[22]), "+r"(s[23]), "+r"(s[24]), "+r"(s[25]), "+r"(s[26]), "+r"(s[27]), "+r"(s[28]), "+r"(s[29]), "+r"(s[30]), "+r"(s[31])
               : "l"(a), "l"(b));
}

// Waits until at most PENDING groups are unfinished. The registers pass through, so that instructions that follow in
// the source and write them stay behind the wait.
template <int PENDING>
__device__ inline void wait(uint32_t (&a)[16]) {
  asm volatile("wgmma.wait_group.sync.aligned %16;"
               : "+r"(a[0]), "+r"(a[1]), "+r"(a[2]), "+r"(a[3]), "+r"(a[4]), "+r"(a[5]), "+r"(a[6]), "+r"(a[7]), "+r"(a[8]), "+r"(a[9]), "+r"(a[10]), "+r"(a[11]), "+r"(a[12]), "+r"(a[13]), "+r"(a[14]), "+r"(a[15])
               : "n"(PENDING)
               : "memory");
}

// LOP3 prepare the next group behind the wait for this one, or behind a wait for the group before only. (ptxas 13.0 moves
// them behind the wait for this group even if they come before it in the source, and pass through it.)
enum Order { BEHIND, QUEUED };

template <int N, int LOPS, Order ORDER = BEHIND, bool SHARED_A = false>
__global__ void groups(long long *cycles, uint32_t *out, uint32_t seed) {
  __shared__ alignas(1024) uint8_t codes[4096];
  for (int i = threadIdx.x; i < 1024; i += blockDim.x) reinterpret_cast<uint32_t *>(codes)[i] = seed * i;
  int sums[N / 2] = {};
  uint32_t a[2][16], c[4] = {seed + threadIdx.x, seed * 3, seed * 5, seed * 7};
  for (int i = 0; i < 16; ++i) a[0][i] = a[1][i] = seed + i * threadIdx.x;
  uint64_t address = (__cvta_generic_to_shared(codes) & 0x3ffff) >> 4;
  uint64_t descriptor = address | (uint64_t(8) << 16) | (uint64_t(16) << 32);  // no swizzle; which bytes does not matter
  __syncthreads();
  asm volatile("fence.proxy.async;");
  long long start = clock64();
#pragma unroll 1
  for (int n = 0; n < ITERATIONS; n += 2) {
#pragma unroll
    for (int now = 0; now < 2; ++now) {
      asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if constexpr (SHARED_A)
          wgmma(sums, descriptor, descriptor);
        else
          wgmma(sums, *reinterpret_cast<uint32_t(*)[4]>(&a[now][4 * i]), descriptor);
      }
      asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
      if (ORDER == BEHIND) wait<0>(a[1 - now]);
      if (ORDER == QUEUED) wait<1>(a[1 - now]);
#pragma unroll
      for (int i = 0; i < LOPS; ++i) a[1 - now][i % 16] = lop(a[1 - now][i % 16], seed, c[i % 4]);
    }
  }
  asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
  long long end = clock64();
  uint32_t all = 0;
  for (int i = 0; i < N / 2; ++i) all ^= sums[i];
  for (int i = 0; i < 16; ++i) all ^= a[0][i] ^ a[1][i];
  out[threadIdx.x] = all;
  if (threadIdx.x == 0) *cycles = end - start;
}

template <typename Kernel>
void report(const char *name, Kernel kernel) {
  long long *cycles;
  uint32_t *out;
  cudaMallocManaged(&cycles, sizeof *cycles);
  cudaMalloc(&out, 4096 * sizeof *out);
  std::printf("%-44s", name);
  for (int warps : {1, 2, 4}) {
    for (int again = 0; again < 2; ++again) {
      kernel<<<1, 128 * warps>>>(cycles, out, 12345);
      if (cudaDeviceSynchronize() != cudaSuccess) {
        std::printf(" %s\n", cudaGetErrorString(cudaGetLastError()));
        return;
      }
    }
    std::printf(" %8.1f", double(*cycles) / ITERATIONS / warps);
  }
  std::printf("\n");
  cudaFree(cycles);
  cudaFree(out);
}

int main() {
  std::printf("%-44s %8s %8s %8s\n", "cycles of an iteration, warps of a scheduler:", "1", "2", "4");
  report("8 IMMA", instructions<8, 0, 0, 0, 0>);
  report("16 IMMA", instructions<16, 0, 0, 0, 0>);
  report("8 HMMA", instructions<0, 8, 0, 0, 0>);
  report("16 LOP3", instructions<0, 0, 16, 0, 0>);
  report("16 PRMT", instructions<0, 0, 0, 16, 0>);
  report("16 IMAD", instructions<0, 0, 0, 0, 16>);
  report("16 LOP3, 16 IMAD", instructions<0, 0, 16, 0, 16>);
  report("8 IMMA, 16 LOP3", instructions<8, 0, 16, 0, 0>);
  report("8 IMMA, 12 LOP3, 4 PRMT", instructions<8, 0, 12, 4, 0>);
  report("16 IMMA, 12 LOP3, 4 PRMT", instructions<16, 0, 12, 4, 0>);
  report("16 IMMA, 16 LOP3", instructions<16, 0, 16, 0, 0>);
  report("8 HMMA, 16 LOP3", instructions<0, 8, 16, 0, 0>);
  report("4 wgmma 64x16x32", groups<16, 0>);
  report("4 wgmma 64x16x32, 16 LOP3", groups<16, 16>);
  report("4 wgmma 64x16x32, 64 LOP3", groups<16, 64>);
  report("4 wgmma 64x32x32", groups<32, 0>);
  report("4 wgmma 64x32x32, 64 LOP3", groups<32, 64>);
  report("4 wgmma 64x64x32", groups<64, 0>);
  report("4 wgmma 64x64x32, then 64 LOP3", groups<64, 64>);
  report("4 wgmma 64x64x32, 64 LOP3, queued", groups<64, 64, QUEUED>);
  report("4 wgmma 64x64x32, 48 LOP3, queued", groups<64, 48, QUEUED>);
  report("4 wgmma 64x64x32, queued", groups<64, 0, QUEUED>);
  report("4 wgmma 64x64x32, A shared", groups<64, 0, BEHIND, true>);
  report("4 wgmma 64x64x32, A shared, 64 LOP3, queued", groups<64, 64, QUEUED, true>);
  return 0;
}
