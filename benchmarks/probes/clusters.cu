// How many clusters of CTAs run at once, one CTA on a multiprocessor, for each size of a cluster.
//
//     nvcc -arch=sm_90a -o clusters clusters.cu && ./clusters
//
// Prints a line for each size: the size, the clusters, and the multiprocessors that they use.

#include <cstdio>
#include <cuda_runtime.h>

#define CHECK(call)                                                              \
  do {                                                                           \
    cudaError_t error = (call);                                                  \
    if (error != cudaSuccess) {                                                  \
      fprintf(stderr, "%s: %s\n", #call, cudaGetErrorString(error));             \
      return 1;                                                                  \
    }                                                                            \
  } while (0)

__global__ void empty() {}

int main() {
  cudaDeviceProp device;
  CHECK(cudaGetDeviceProperties(&device, 0));
  printf("%s, %d multiprocessors\n", device.name, device.multiProcessorCount);
  const int shared = 200 * 1024;  // More than half of a multiprocessor's.
  CHECK(cudaFuncSetAttribute(empty, cudaFuncAttributeMaxDynamicSharedMemorySize, shared));
  CHECK(cudaFuncSetAttribute(empty, cudaFuncAttributeNonPortableClusterSizeAllowed, 1));
  for (int size = 1; size <= 16; ++size) {
    cudaLaunchAttribute attribute{};
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = size;
    attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(size * 256);
    config.blockDim = dim3(256);
    config.dynamicSmemBytes = shared;
    config.attrs = &attribute;
    config.numAttrs = 1;
    int clusters = 0;
    CHECK(cudaOccupancyMaxActiveClusters(&clusters, empty, &config));
    printf("%2d: %3d clusters, %3d multiprocessors\n", size, clusters, clusters * size);
  }
}
